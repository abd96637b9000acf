"""The run folder: what a run leaves behind, and what it goes on from.

In: texts, rows, states. Out: files. Invariant: a folder that is there holds a state of a step's boundary with the rows
of all steps before it, in one file; of each state the last two are kept, each with its SHA-256 and a digest of what its
run is (spec, data, program, how it began), which the folder holds too; one process at a time has the folder; what is
refused changes nothing.
"""

from __future__ import annotations

import io
import json
import os
import pickle
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self, final

import torch

from lagcompile.ir import disk, sums
from lagcompile.ir.base import DataError
from lagcompile.store.pack import fingerprint, pack, unpack

SPEC, PROGRAM, PROGRAM_JSON, LOG = "spec.yaml", "program.txt", "program.json", "log.jsonl"
RUN_ID = "run.id"
MODEL, SOLUTION, CERTIFICATE, KKT = "model.pt", "solution.pt", "certificate.json", "kkt.json"
STATE = "checkpoint"
SLOTS = "ab"

OTHER = {
    "version": "was run by another version of lagcompile ({old}; this is {new})",
    "run": (
        "was run with another spec, or by a lagcompile with other options: only steps, time limit, looks, checkpoints, "
        "device and baseline may change when a run is resumed"
    ),
    "program": "was run with another program",
    "data": "was run with other data, or with its rows in another order (as a loader that shuffles gives them)",
}
"""What may not change when a run is resumed, and what is said where it did."""

Row = Mapping[str, float]
Notice = Callable[[str], None]
Identity = Mapping[str, str]
"""Words of `OTHER` -> a digest, or the version itself."""


@final
class RunFolder:
    """A run folder in the hands of this process; a context manager.

    Attributes:
        path: where.
        notice: called with a sentence on what is damaged and does no harm.
    """

    def __init__(self, path: Path, identity: Identity, handle: int, notice: Notice = warnings.warn) -> None:
        self.path, self.notice = path, notice
        self._identity, self._handle = dict(identity), handle
        self._slot = {STATE: 0}

    @classmethod
    def create(
        cls,
        path: Path,
        files: Mapping[str, bytes],
        identity: Identity,
        state: Any = None,
        rows: Iterable[Row] = (),
        *,
        force: bool = False,
    ) -> Self:
        """Make a run folder with its first files, in one move.

        Args:
            path: where.
            files: file name -> content.
            identity: what may not change when the run is resumed, by the words of `OTHER`.
            state: of the run as it begins; None for runs that have none.
            rows: of the log, where there is a state.
            force: replace a run folder that is there.

        Raises:
            DataError: something is there that may not be replaced, or the folder cannot be written.
        """
        check_free(path, force=force)
        if state is not None:
            identity = {**identity, "start": fingerprint(state)}
        old, handle = disk.lock(path) if path.exists() else None, None
        try:
            with disk.appearing(path) as part:
                handle = disk.lock(part)
                if state is not None:
                    disk.replace(part / _slot(STATE, 0), *pack(_kept(identity, 0, state)))
                    disk.replace(part / LOG, log_bytes(rows))
                    files = {**files, RUN_ID: _id(identity)}
                sums.write(part, files)
        except BaseException:
            if handle is not None:
                disk.unlock(path, handle)
            raise
        finally:
            if old is not None:
                disk.unlock(path, old)
        return cls(path, identity, handle)

    @classmethod
    def reopen(cls, path: Path, identity: Identity, notice: Notice = warnings.warn) -> Self:
        """Take the folder of a run that is to be resumed; nothing is changed yet.

        Args:
            path: where.
            identity: of the run that goes on.
            notice: called with a sentence on what is damaged and does no harm.

        Raises:
            DataError: there is none, or another process has it.
        """
        with disk.naming(path, "read"):
            disk.restore(path)
        if not path.is_dir() or not any((path / _slot(STATE, i)).exists() for i in range(len(SLOTS))):
            raise DataError(f"{path} holds no {STATE}: there is nothing to resume")
        return cls(path, identity, disk.lock(path), notice)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Give the folder back."""
        disk.unlock(self.path, self._handle)

    # ---------------------------------------------------------------- states
    def state(self, name: str = STATE) -> Any:
        """The newest state of a name that is whole; None where none was ever kept.

        Raises:
            DataError: all that were kept are damaged, or of another run.
        """
        found, bad, own = list[tuple[int, int, dict[str, Any]]](), list[str](), self._own_id()
        for index in range(len(SLOTS)):
            path = self.path / _slot(name, index)
            if not path.exists():
                continue
            try:
                kept = self._opened(path, own)
                found.append((kept["moment"], index, kept))
            except DataError as error:
                bad += error.problems
        if bad and not found:
            raise DataError(list(dict.fromkeys(bad)))
        if not found:
            return None
        if len({_id(kept["identity"]) for _, _, kept in found}) > 1:
            raise DataError(
                f"{self.path} holds checkpoints of two runs that began differently: take all from one of them"
            )
        newest, self._slot[name], kept = max(found, key=lambda f: f[0])
        self._identity = dict(kept["identity"])
        absent = [p for p in (self.path / _slot(name, i) for i in range(len(SLOTS))) if not os.path.lexists(p)]
        if name == STATE and newest:  # all but the first state have another beside them
            bad += [f"{p} is gone" for p in absent]
        for problem in bad:
            self.notice(f"{problem}; going on from {_slot(name, self._slot[name])}")
        return kept["state"]

    def _own_id(self) -> bytes | None:
        """What the folder says that its run is; None where that is gone or damaged."""
        path = self.path / RUN_ID
        try:
            # where the list is gone, `begin` says so once for the whole folder
            return sums.read(path) if (self.path / sums.SUMS).exists() else disk.read_bytes(path)
        except DataError as error:
            problem = f"{path} is gone" if not os.path.lexists(path) else error.problems[0]
            self.notice(f"{problem}: whether its checkpoints are of this run cannot be said; it is written anew")
            return None

    def _opened(self, path: Path, own: bytes | None) -> dict[str, Any]:
        kept = unpack(disk.read_bytes(path), str(path))
        try:
            identity, _, _ = kept["identity"], int(kept["moment"]), kept["state"]
            if own not in (None, _id(identity)):
                raise DataError(f"{path} is of another run than {self.path}: take this run's own back")
            for word, text in OTHER.items():
                if identity[word] != self._identity[word]:
                    raise DataError(f"{self.path} {text.format(old=identity[word], new=self._identity[word])}")
        except (TypeError, KeyError, ValueError) as error:
            raise DataError(f"{path} is no checkpoint of this lagcompile") from error
        return dict(kept)

    def commit(self, state: Any, moment: int, name: str = STATE, *, final: bool = False) -> None:
        """Keep a state in the place of the older of the two.

        Args:
            state: all that the run needs to go on, its rows included.
            moment: number of steps behind it.
            name: of the state.
            final: in the place of both: the last state of a run is kept twice.

        Raises:
            DataError: it cannot be written; the two before are as they were.
        """
        chunks = pack(_kept(self._identity, moment, state))
        slot = self._slot.get(name, len(SLOTS) - 1)
        for _ in SLOTS if final else "-":
            slot = (slot + 1) % len(SLOTS)
            disk.replace(self.path / _slot(name, slot), *chunks)
            self._slot[name] = slot

    # ---------------------------------------------------------------- rows and files
    def begin(self, files: Mapping[str, bytes], rows: Iterable[Row]) -> None:
        """Go on: the log holds the rows of the steps made before, and nothing is left of what a crash interrupted.

        Raises:
            DataError: a file cannot be written.
        """
        disk.remove_parts(self.path)
        if not (self.path / sums.SUMS).exists():
            self.notice(
                f"{self.path / sums.SUMS} is gone: whether files were damaged cannot be said; it is written anew"
            )
        for problem in sums.problems(self.path):
            anew = any(f"/{name} " in problem for name in (LOG, RUN_ID))  # they follow from the state
            if not anew and not problem.startswith("there is no file "):
                self.notice(problem)
        sums.write(self.path, {**files, RUN_ID: _id(self._identity)}, without=[LOG], anew=True)
        disk.replace(self.path / LOG, log_bytes(rows))

    def log(self, row: Row) -> None:
        """Append a row to the log.

        Raises:
            DataError: it cannot be written.
        """
        disk.append(self.path / LOG, log_bytes([row]))

    def finish(self, files: Mapping[str, bytes], rows: Sequence[Row]) -> None:
        """Write what a run gave, and list the digests of it and of the log.

        Raises:
            DataError: a file cannot be written.
        """
        sums.write(self.path, {**files, LOG: log_bytes(rows)})


def _kept(identity: Identity, moment: int, state: Any) -> dict[str, Any]:
    return {"identity": dict(identity), "moment": moment, "state": state}


def _id(identity: Identity) -> bytes:
    """Digest of what a run is, and of how it began: equal runs have equal ones."""
    return f"{fingerprint(sorted(identity.items()))}\n".encode()


def _slot(name: str, index: int) -> str:
    return f"{name}-{SLOTS[index]}.state"


def log_bytes(rows: Iterable[Row]) -> bytes:
    """Rows as the log holds them, one JSON object a line."""
    return "".join(json.dumps(dict(row)) + "\n" for row in rows).encode()


def check_free(path: Path, *, force: bool) -> None:
    """Whether a folder may be made.

    Raises:
        DataError: something is there, and it may not be replaced.
    """
    with disk.naming(path, "written"):
        disk.restore(path)
        if not path.exists():
            return
        if not force:
            raise DataError(
                f"{path} exists: --force replaces it, --resume (resume=True) goes on, --out names another folder"
            )
        # A spec alone may be anybody's project; older run folders have no list of digests, but a log or a checkpoint.
        ours = path.is_dir() and any((path / name).is_file() for name in (sums.SUMS, LOG, "checkpoint.pt"))
        if not ours and not (path.is_dir() and not any(path.iterdir())):
            raise DataError(f"{path} is not a run folder (it has no {sums.SUMS}); --force does not replace it")
        if Path.cwd().is_relative_to(path.resolve()):
            raise DataError(f"{path} is the folder that this runs in: --force replaces it from outside only")


def tensor_bytes(value: Any) -> bytes:
    """A file of tensors that `torch.load(weights_only=True)` reads."""
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def load_tensors(path: Path) -> dict[str, Any]:
    """A file that holds tensors and plain values, read without running code.

    Raises:
        DataError: there is none, it is damaged, or it holds something else.
    """
    data = sums.read(path)
    try:
        found = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds for a damaged file
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        if isinstance(error, pickle.UnpicklingError):  # torch's own advice there is to run what the file holds
            reason = "it is no pickle of tensors and plain values, and nothing else is read"
        raise DataError(f"{path} is damaged, or no file of tensors: {reason}") from error
    if not isinstance(found, dict) or not all(isinstance(name, str) for name in found):
        raise DataError(f"{path} holds a {type(found).__name__}, expected a dictionary of tensors by name")
    return found
