"""Step-wise runs that are kept in a folder: what is saved, when, and how a run is resumed.

In: an executor and the folder. Out: `Keeping`, which `drive` calls between steps. Invariant: what is saved lies on a
step's boundary, with the rows of all steps before it; a run that was resumed is the unbroken one, bit for bit.
"""

from __future__ import annotations

import json
import time
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, final

import torch
from torch import Tensor, nn

from lagcompile.backends.base import (
    Executor,
    RunOptions,
    Watch,
    begin,
    best_of,
    drive,
    seeded,
)
from lagcompile.backends.best import Evaluate
from lagcompile.backends.method import Method, Solver
from lagcompile.ir.base import DataError
from lagcompile.ir.solution import History, Solution, Status
from lagcompile.ir.text import to_json
from lagcompile.runtime.instance import Instance
from lagcompile.store.folder import (
    CERTIFICATE,
    LOG,
    MODEL,
    PROGRAM,
    PROGRAM_JSON,
    Notice,
    RunFolder,
    check_free,
    log_bytes,
    tensor_bytes,
)
from lagcompile.store.pack import fingerprint
from lagcompile.store.stop import Stop

RUN = "run.json"
FREE = {"steps", "time_limit", "look_every", "evaluate_every", "checkpoint_every", "checkpoint_seconds"}
"""Options of a run that may change when it is resumed."""


@final
class Clock:
    """When a checkpoint is due: each so many steps, and when so many seconds have passed since the last."""

    def __init__(self, options: RunOptions) -> None:
        self._every, self._seconds = options.checkpoint_every, options.checkpoint_seconds
        self._last = time.monotonic()

    def due(self, step: int) -> bool:
        """Return whether one is due after a number of steps."""
        late = self._seconds is not None and time.monotonic() - self._last > self._seconds
        if not late and (self._every is None or step % self._every):
            return False
        self._last = time.monotonic()
        return True


@final
class Keeping:
    """Keeps the run of an executor.

    Attributes:
        executor: what runs.
        options: of the run.
        rows: of all steps so far, those before it was resumed included.
        folder: where it is kept; None while there is none.
    """

    def __init__(
        self,
        executor: Executor,
        options: RunOptions,
        *,
        stop: Stop,
        look: Watch | None = None,
    ) -> None:
        """Judge the start.

        Args:
            executor: a fresh one.
            options: of the run.
            stop: asked before each step.
            look: called with each row.
        """
        self.executor, self.options = executor, options
        self.rows: list[Mapping[str, float]] = []
        self.folder: RunFolder | None = None
        self._stop, self._clock, self._look = stop, Clock(options), look
        self._best = best_of(executor, options)
        self._ended: Status | None = None

    # ---------------------------------------------------------------- what is kept
    def state(self) -> dict[str, Any]:
        """Return all that the run needs to be resumed."""
        device = self.executor.instance.device
        return {
            "made": {"device": str(device), "torch": str(torch.__version__)},
            "executor": self.executor.state_dict(),
            "hidden": hidden(self.executor.instance.module),
            "random": random_state(device) if self.executor.instance.draws else None,
            "best": self._best.state_dict(),
            "rows": self.rows,
            "ended": None if self._ended is None else self._ended.name,
        }

    def resume(self, folder: RunFolder) -> None:
        """Resume from a folder's newest state; the folder is not changed.

        Raises:
            DataError: it is damaged, or of another run.
        """
        state = folder.state()
        try:
            self.executor.load_state_dict(state["executor"])
            device = self.executor.instance.device
            load_hidden(self.executor.instance.module, state["hidden"])
            if state["random"] is not None:
                set_random_state(device, state["random"])
            self._best.load_state_dict(state["best"])
            self.rows += state["rows"]
            ended = state["ended"] and Status[state["ended"]]
            now = {"device": str(device), "torch": str(torch.__version__)}
            for word, old in state["made"].items():
                if old != now[word]:
                    folder.notice(
                        f"{folder.path} was run with {word} {old} and is resumed with {now[word]}: rounding may differ"
                    )
        except (KeyError, TypeError, ValueError, RuntimeError, IndexError, AttributeError) as error:
            raise DataError(f"{folder.path} holds a checkpoint that does not fit this program and method") from error
        made, wanted = self.executor.steps, self.options.steps
        if made > wanted:
            folder.notice(f"{folder.path} holds {made} steps already, more than the {wanted} asked for: none is made")
        limit = self.options.time_limit
        late = limit is not None and bool(self.rows) and self.rows[-1]["seconds"] > limit
        self._ended = ended if ended is Status.DIVERGED or (ended is Status.TIME_LIMIT and late) else None

    # ---------------------------------------------------------------- while it runs
    def solve(self, *, original: Any, evaluate: Evaluate | None = None) -> Solution:
        """Drive the executor to the end of the options."""
        return drive(
            self.executor,
            self.options,
            original=original,
            evaluate=evaluate,
            watch=self._watch,
            start=History(tuple(self.rows)),
            best=self._best,
            keeper=self,
            ended=self._ended,
        )

    def _watch(self, row: Mapping[str, float]) -> None:
        self.rows.append(dict(row))
        if self.folder is not None:
            self.folder.log(row)
        if self._look is not None:
            self._look(row)

    def between(self) -> None:
        """Called before each step.

        Raises:
            StoppedError: a stop was asked for.
            DataError: a checkpoint cannot be written.
        """
        self._stop.check()
        steps = self.executor.steps
        if self.folder is not None and steps and self._clock.due(steps):
            self.folder.commit(self.state(), steps)

    def ended(self, status: Status) -> None:
        """Called after the last step, before results are read."""
        self._ended = status
        if self.folder is not None:
            final = status is not Status.INTERRUPTED
            self.folder.commit(self.state(), self.executor.steps, final=final)


def hidden(module: nn.Module) -> dict[str, Tensor]:
    """Buffers that are in no state_dict."""
    kept = module.state_dict().keys()
    return {n: b for n, b in module.named_buffers() if n not in kept}


@torch.no_grad()
def load_hidden(module: nn.Module, buffers: Mapping[str, Tensor]) -> None:
    """Put such buffers back."""
    for name, buffer in hidden(module).items():
        buffer.copy_(buffers[name])


def random_state(device: torch.device) -> tuple[Tensor, Tensor | None]:
    """States of the generators that dropout and noise on a device draw from."""
    return torch.get_rng_state(), torch.cuda.get_rng_state(device) if device.type == "cuda" else None


def set_random_state(device: torch.device, state: tuple[Tensor, Tensor | None]) -> None:
    """Put generators back to `random_state`; a state of a device that is not used any more is left out."""
    torch.set_rng_state(state[0])
    if device.type == "cuda" and state[1] is not None:
        torch.cuda.set_rng_state(state[1], device)


def program_files(program: Any) -> dict[str, bytes]:
    """The program as text and as JSON."""
    return {PROGRAM: str(program).encode(), PROGRAM_JSON: (to_json(program) + "\n").encode()}


def own_version() -> str:
    """Version of lagcompile; only the same version reads what it wrote."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("lagcompile")
    except PackageNotFoundError:
        return "unknown"


def identity_of(instance: Instance, run: str) -> dict[str, str]:
    """Digests of what must not change when a run is resumed.

    Args:
        instance: the program and its data.
        run: digest of everything else.
    """
    data = fingerprint([instance.inputs, instance.target])
    return {"version": own_version(), "run": run, "program": fingerprint(to_json(instance.program)), "data": data}


def solve_in_folder(
    method: Solver,
    instance: Instance,
    options: RunOptions,
    folder: str | Path | None,
    *,
    resume: bool,
    original: nn.Module,
    evaluate: Evaluate | None = None,
    watch: Watch | None = None,
    start: Solution | None = None,
    certified: Callable[[Solution], Solution],
    notice: Notice = warnings.warn,
) -> Solution:
    """`Solver.solve`, kept in a run folder.

    Args:
        method: the method.
        instance: the bound program.
        options: of the run.
        folder: the run folder to make or to resume from.
        resume: resume the run that is there.
        original: the user's module.
        evaluate: numbers of a module on held-out data.
        watch: called with each row.
        start: a solution to start from.
        certified: gives the solution with its certificate.
        notice: called with what is damaged and does no harm.

    Raises:
        DataError: the folder exists, cannot be written, is in use, is damaged, or is of another run.
    """
    if folder is None:
        raise DataError("resume=True needs the folder of the run: folder=...")
    given: object = folder
    if not isinstance(given, str | Path) or "\0" in str(given):
        raise DataError(f"folder takes the path of a folder, got {folder!r}")
    place = Path(folder)
    stop, run = Stop(), {"method": method.model_dump(mode="json"), "options": options.model_dump(mode="json")}
    fixed = {**run, "options": options.model_dump(mode="json", exclude=FREE)}
    files = program_files(instance.program) | {RUN: (json.dumps(run, indent=2) + "\n").encode()}
    if not isinstance(method, Method):
        if resume:
            raise DataError(f"{type(method).__name__} has no checkpoint to resume: solve into another folder")
        check_free(place, force=False)
        found = method.solve(instance, options, original=original, evaluate=evaluate, watch=watch, start=start)
        solution = certified(found)
        RunFolder.create(place, files | _last(solution) | {LOG: log_bytes(solution.history.rows)}, {}).close()
        return solution
    if not resume:
        check_free(place, force=False)
        begin(instance, start)

    def run_kept() -> Solution:
        executor = method.executor(instance, seed=options.seed)
        keeping = Keeping(executor, options, stop=stop, look=watch)
        with opened(place, keeping, files, fingerprint(fixed), resume=resume, notice=notice) as kept:
            solution = certified(keeping.solve(original=original, evaluate=evaluate))
            kept.finish(_last(solution), keeping.rows)
        return solution

    with stop.listening():
        with seeded(instance, options):
            if instance.draws:
                return run_kept()
        return run_kept()


def _last(solution: Solution) -> dict[str, bytes]:
    certificate = {} if solution.certificate is None else {CERTIFICATE: solution.certificate.file_bytes()}
    return {MODEL: tensor_bytes(solution.model.state_dict()), **certificate}


def opened(
    folder: Path,
    keeping: Keeping,
    files: Mapping[str, bytes],
    run: str,
    *,
    resume: bool,
    notice: Notice = warnings.warn,
    force: bool = False,
) -> RunFolder:
    """Make the folder of a run, or reopen it.

    Args:
        folder: where.
        keeping: the run.
        files: first files of the folder.
        run: digest of what may not change when it is resumed, besides program and data.
        resume: reopen it.
        notice: called with what is damaged and does no harm.
        force: replace a run folder that is there.

    Raises:
        DataError: as `RunFolder.create`, `RunFolder.reopen` and `Keeping.resume`.
    """
    identity = identity_of(keeping.executor.instance, run)
    if resume:
        place = RunFolder.reopen(folder, identity, notice)
        try:
            keeping.resume(place)
            place.begin(files, keeping.rows)
        except BaseException:
            place.close()
            raise
    else:
        place = RunFolder.create(folder, files, identity, keeping.state(), force=force)
    keeping.folder = place
    return place
