"""Solvers whose runs are kept in a folder: the state of a step-wise one, and the front door of both kinds.

In: a solver, an instance and the folder. Out: its solution; the folder. Invariant: a run that was resumed is the
unbroken one, bit for bit.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, final

import torch
from torch import Tensor, nn

from lagcompile.backends.base import Executor, RunOptions, Watch, begin, best_of, drive, seeded
from lagcompile.backends.best import Evaluate
from lagcompile.backends.method import Solver
from lagcompile.ir.base import DataError
from lagcompile.ir.solution import History, Solution, Status
from lagcompile.ir.text import to_json
from lagcompile.runtime.instance import Instance
from lagcompile.store.folder import CERTIFICATE, MODEL, PROGRAM, PROGRAM_JSON, Notice, tensor_bytes
from lagcompile.store.keeping import Keeping, fitting
from lagcompile.store.pack import fingerprint
from lagcompile.store.stop import Stop, StoppedError

RUN = "run.json"
FREE = {"look_every", "evaluate_every", "checkpoint_every", "checkpoint_seconds", "time_limit"}
"""Options of a run that may change when it is resumed; of step-wise methods `steps` too."""


@final
class Steps:
    """Keeps the run of an executor while it is driven."""

    def __init__(self, executor: Executor, options: RunOptions, keeping: Keeping) -> None:
        """Judge the start, or go on from the state that the keeping has.

        Args:
            executor: a fresh one.
            options: of the run.
            keeping: where the run is kept.

        Raises:
            DataError: the state does not fit.
        """
        self.executor, self.options, self.keeping = executor, options, keeping
        self._best = best_of(executor, options)
        self._ended: Status | None = None
        if keeping.state is not None and keeping.folder is not None:
            with fitting(keeping.folder.path):
                self._take(keeping.state)
            made, wanted = executor.steps, options.steps
            if made > wanted:
                keeping.notice(
                    f"{keeping.folder.path} holds {made} steps already, more than the {wanted} asked for: none is made"
                )
        keeping.reached(executor.steps, self._state)

    def _state(self) -> dict[str, Any]:
        instance = self.executor.instance
        return {
            "executor": self.executor.state_dict(),
            "hidden": hidden(instance.module),
            "random": random_state(instance.device) if instance.draws else None,
            "best": self._best.state_dict(),
        }

    def _take(self, state: Mapping[str, Any]) -> None:
        self.executor.load_state_dict(state["executor"])
        instance = self.executor.instance
        load_hidden(instance.module, state["hidden"])
        if state["random"] is not None:
            set_random_state(instance.device, state["random"])
        self._best.load_state_dict(state["best"])
        rows, ended, limit = self.keeping.rows, self.keeping.was_ended, self.options.time_limit
        late = limit is not None and bool(rows) and rows[-1]["seconds"] > limit
        self._ended = ended if ended is Status.DIVERGED or (ended is Status.TIME_LIMIT and late) else None

    def solve(self, *, original: Any, evaluate: Evaluate | None = None) -> Solution:
        """Drive the executor to the end of the options."""
        return drive(
            self.executor,
            self.options,
            original=original,
            evaluate=evaluate,
            watch=self.keeping.watch,
            start=History(tuple(self.keeping.rows)),
            best=self._best,
            keeper=self,
            ended=self._ended,
        )

    def between(self) -> None:
        """Called before each step.

        Raises:
            StoppedError: a stop was asked for.
            DataError: a checkpoint cannot be written.
        """
        self.keeping.between(self.executor.steps, self._state)
        if self.keeping.stopped:
            raise StoppedError

    def ended(self, status: Status) -> None:
        """Called behind the last step, before anything is read off."""
        self.keeping.reached(self.executor.steps, self._state)
        self.keeping.ended(status)


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
    """Version of lagcompile; what it writes is read by the same one."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("lagcompile")
    except PackageNotFoundError:
        return "unknown"


def identity_of(instance: Instance, run: str) -> dict[str, str]:
    """What may not change when a run is resumed.

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
        folder: the run folder to make, or to go on from.
        resume: go on from what is there.
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
    if resume and start is not None:
        raise DataError("start=... and resume=True exclude each other: a run goes on from its own checkpoint")
    steps = method.stepwise
    run = {"method": method.model_dump(mode="json"), "options": options.model_dump(mode="json")}
    files = program_files(instance.program) | {RUN: (json.dumps(run, indent=2) + "\n").encode()}
    fixed = {
        "method": method.model_dump(mode="json", exclude=set(method.FREE)),
        "options": options.model_dump(mode="json", exclude=FREE | ({"steps"} if steps else set())),
    }
    keeping = keeping_of(options, Stop(), instance.device, watch)
    with keeping, keeping.stop.listening(), running(method, instance, options):
        identity = identity_of(instance, fingerprint(fixed))
        keeping.keep_in(Path(folder), files, identity, resume=resume, notice=notice)
        if method.stepwise:
            begin(instance, start)
            executor = method.executor(instance, seed=options.seed)
            found = Steps(executor, options, keeping).solve(original=original, evaluate=evaluate)
        else:
            found = method.solve(
                instance,
                options,
                original=original,
                evaluate=evaluate,
                watch=keeping.watch,
                start=start,
                keeper=keeping,
            )
            keeping.ended(found.status)
        solution = certified(found)
        certificate = {} if solution.certificate is None else {CERTIFICATE: solution.certificate.file_bytes()}
        keeping.finish({MODEL: tensor_bytes(solution.model.state_dict()), **certificate}, solution.history.rows)
    return solution


def keeping_of(options: RunOptions, stop: Stop, device: torch.device, look: Watch | None) -> Keeping:
    """The keeping of a run with these options."""
    every, seconds = options.checkpoint_every, options.checkpoint_seconds
    return Keeping(stop, every=every, seconds=seconds, device=str(device), look=look)


@contextmanager
def running(method: Solver, instance: Instance, options: RunOptions) -> Iterator[None]:
    """What a run needs around it: step-wise ones have seeds, and the process to themselves where they draw numbers."""
    with ExitStack() as stack:
        if method.stepwise:
            stack.enter_context(seeded(instance, options))
            if not instance.draws:
                stack.close()
        yield
