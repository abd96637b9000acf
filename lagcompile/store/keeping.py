"""A run that is kept in a folder, whatever makes it: what is saved, when, and what it goes on from.

In: the folder's place, and between two iterations a state. Out: `Keeping`, the `Keeper` of a solver. Invariant: what is
saved lies between two iterations, with the rows of all iterations before it.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self, final

import torch

from lagcompile.ir.base import DataError
from lagcompile.ir.keeper import Wait
from lagcompile.ir.solution import Status
from lagcompile.store.folder import Identity, Notice, Row, RunFolder, check_free
from lagcompile.store.stop import Ended, Stop, waited

State = Callable[[], Mapping[str, Any]]


@final
class Clock:
    """When a checkpoint is due: each so many steps, and when so many seconds have passed since the last."""

    def __init__(self, every: int | None, seconds: float | None) -> None:
        self._every, self._seconds = every, seconds
        self._last = time.monotonic()

    def due(self, step: int) -> bool:
        """Whether one is due behind a number of steps."""
        late = self._seconds is not None and time.monotonic() - self._last > self._seconds
        if not late and (self._every is None or step % self._every):
            return False
        self._last = time.monotonic()
        return True


@final
class Keeping:
    """Keeps a run; a context manager that gives its folder back.

    Attributes:
        state: what the run goes on from; None where it begins.
        rows: of all iterations so far, those before it was resumed included.
        was_ended: why it had ended, where it is resumed behind its end.
        folder: where it is kept; None where it is not, or not yet.
        stop: a request to stop.
        notice: called with a sentence on what does no harm.
    """

    def __init__(
        self,
        stop: Stop,
        *,
        every: int | None = None,
        seconds: float | None = None,
        device: str = "cpu",
        look: Callable[[Row], None] | None = None,
    ) -> None:
        """A run that is kept nowhere yet.

        Args:
            stop: a request to stop.
            every: iterations between two checkpoints.
            seconds: between two checkpoints.
            device: where it runs.
            look: called with each row.
        """
        self.stop = stop
        self.state: Mapping[str, Any] | None = None
        self.rows: list[Row] = []
        self.was_ended: Status | None = None
        self.folder: RunFolder | None = None
        self._clock, self._look = Clock(every, seconds), look
        self._made = {"device": device, "torch": str(torch.__version__)}
        self._open: Callable[[Mapping[str, Any] | None], RunFolder] | None = None
        self._latest: tuple[int, State, int] | None = None
        self.notice: Notice = warnings.warn

    def keep_in(
        self,
        path: Path,
        files: Mapping[str, bytes],
        identity: Identity,
        *,
        resume: bool,
        notice: Notice = warnings.warn,
        force: bool = False,
    ) -> None:
        """Keep the run in a folder: the one of a run that is gone on with, or one that is made with the first state.

        Args:
            path: where.
            files: first files of the folder.
            identity: what may not change when the run is resumed, by the words of `store.folder.OTHER`.
            resume: go on from what is there; it is not changed before the solver has taken it.
            notice: called with a sentence on what is damaged and does no harm.
            force: replace a run folder that is there.

        Raises:
            DataError: as `RunFolder.create` and `RunFolder.reopen`.
        """
        self.notice = notice
        if not resume:
            check_free(path, force=force)
            self._open = lambda state: RunFolder.create(path, files, identity, state, self.rows, force=force)
            return
        self.folder = place = RunFolder.reopen(path, identity, notice)
        with fitting(path):
            kept = place.state()
            self.state, self.rows = kept["solver"], list(kept["rows"])
            self.was_ended = kept["ended"] and Status[kept["ended"]]
            for word, old in kept["made"].items():
                if old != self._made[word]:
                    notice(f"{path} was run with {word} {old}, goes on with {self._made[word]}: rounding may differ")

        def again(state: object) -> RunFolder:
            place.begin(files, self.rows)
            return place

        self._open = again

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        if self.folder is not None:
            self.folder.close()

    # ---------------------------------------------------------------- as a solver sees it
    @property
    def stopped(self) -> bool:
        """Whether a stop was asked for."""
        return self.stop.asked

    def watch(self, row: Row) -> None:
        """Take a row of the history."""
        self.rows.append(dict(row))
        if self.folder is not None:
            self.folder.log(row)
        if self._look is not None:
            self._look(row)

    def between(self, moment: int, state: State) -> None:
        """Save where that is due; see `Keeper.between`.

        Raises:
            DataError: the state cannot be written.
        """
        self.reached(moment, state)
        if self.folder is not None and moment and not self.stopped and self._clock.due(moment):
            self.folder.commit(self._whole(), moment)

    @contextmanager
    def at_once(self, call: str) -> Iterator[Wait]:
        """Around a call that cannot be stopped half-way; see `Keeper.at_once`."""
        if self.state is not None:
            self.notice(f"{call} keeps nothing half-way: it starts again from how it began")

        def said() -> str:
            kept = "" if self.folder is None else f": {self.folder.path} holds how it began, resuming starts it again"
            return f"{call} was ended by a signal{kept}"

        self.stop.at_once = said
        try:
            if self.stopped:
                raise Ended(self.stop.signal, said())
            yield waited
        finally:
            self.stop.at_once = None

    # ---------------------------------------------------------------- as its caller sees it
    def reached(self, moment: int, state: State) -> None:
        """Note where the run is; the folder is made, or taken up again, with the first state.

        Raises:
            DataError: the folder cannot be written.
        """
        self._latest = moment, state, len(self.rows)
        if self._open is not None:
            self.folder = self._open(self._whole() if self.state is None else None)
            self._open = None

    def ended(self, status: Status) -> None:
        """Save the state behind the last iteration.

        Raises:
            DataError: it cannot be written.
        """
        if self.folder is not None and self._latest is not None:
            last = status is not Status.INTERRUPTED
            self.folder.commit(self._whole(status if last else None), self._latest[0], final=last)

    def finish(self, files: Mapping[str, bytes], rows: Sequence[Row]) -> None:
        """Write what the run gave.

        Raises:
            DataError: a file cannot be written.
        """
        if self._open is not None:  # it ended before it had a state: nothing to go on from is kept
            self.folder, self._open = self._open(None), None
        if self.folder is not None:
            self.folder.finish(files, rows)

    def _whole(self, status: Status | None = None) -> Mapping[str, Any]:
        assert self._latest is not None
        _, state, count = self._latest
        ended = None if status is None else status.name
        return {"made": self._made, "solver": state(), "rows": self.rows[:count], "ended": ended}


@contextmanager
def fitting(path: Path) -> Iterator[None]:
    """Taking a state that is whole.

    Raises:
        DataError: it is not one of this solver's.
    """
    try:
        yield
    except (KeyError, TypeError, ValueError, RuntimeError, IndexError, AttributeError) as error:
        raise DataError(f"{path} holds a checkpoint that does not fit this program and method") from error
