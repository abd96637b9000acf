"""The executor of a step-wise method, and the loop that drives it.

In: an `Executor`, which a `Method` (backends/method.py) makes for an `Instance`. Out: a `Solution`. Invariant: the
rows of step t depend on (seed, t) alone, so that a resumed run sees what an unbroken one would have seen.
"""

from __future__ import annotations

import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from pydantic import Field
from torch import Tensor, nn

from lagcompile.backends.best import Best, Evaluate, Probe, evaluated, finite, judged
from lagcompile.ir.alone import ALONE
from lagcompile.ir.arguments import expect
from lagcompile.ir.base import Frozen, ProgramError
from lagcompile.ir.solution import History, Solution, Status
from lagcompile.runtime.instance import Instance
from lagcompile.runtime.trial import try_batches
from lagcompile.store.stop import Ended, StoppedError

Watch = Callable[[Mapping[str, float]], None]


SHOWN = 4
"""Examples that a problem names."""


class RunOptions(Frozen):
    """How long a step-wise method runs, on which rows, and how often it is looked at."""

    steps: int = Field(default=1000, ge=0)
    batch_size: int = Field(default=64, ge=1)
    seed: int = 0
    look_every: int = Field(default=50, ge=1)
    """Steps between two rows of the history (each costs one synchronisation with the device)."""
    evaluate_every: int | None = Field(default=None, ge=1)
    """Steps between two evaluations on held-out data; None: at the end only."""
    time_limit: float | None = Field(default=None, gt=0)
    """Seconds."""
    checkpoint_every: int | None = Field(default=None, ge=1)
    """Steps between two checkpoints in the run folder, besides those by time and at the end."""
    checkpoint_seconds: float | None = Field(default=300.0, gt=0)
    """Seconds between two checkpoints; None: not by time."""


class Executor(ABC):
    """Owns what a run changes: weights, tables, optimisers. One call of `step` is one step of the method."""

    instance: Instance
    steps: int
    gradient_evaluations: int

    @abstractmethod
    def step(self, rows: Tensor) -> None:
        """One step on a batch of rows; no synchronisation with the device."""

    def groups(self) -> Mapping[str, Sequence[torch.optim.Optimizer]]:
        """Optimisers of each group of variables (weights, states, multipliers), whose step sizes may be scheduled."""
        return {}

    @abstractmethod
    def measures(self) -> dict[str, float]:
        """Numbers of the last step: loss, defect, and what the method has (synchronises)."""

    @abstractmethod
    def final_measures(self) -> dict[str, float]:
        """Numbers over all rows of the data at the end, such as the mean absolute defect."""

    @abstractmethod
    def values(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """States and multipliers by name, on the CPU."""

    def free_inputs(self) -> dict[str, Tensor]:
        """Values of the inputs that are variables, by name, on the CPU."""
        return {}

    def tensors(self) -> Iterator[Tensor]:
        """Weights, buffers and whatever else a step moves, on the device."""
        self.instance.weights.publish()
        yield from self.instance.module.state_dict().values()

    def restarted(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """States and multipliers as a run would start them at the present weights, by name, on the CPU."""
        return {}, {}

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """Complete state of the run; loading it resumes the run bit for bit."""

    @abstractmethod
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Resume from a checkpoint."""

    @abstractmethod
    def bytes(self) -> int:
        """Bytes of states, multipliers and their optimiser rows."""


def begin(instance: Instance, start: Solution | None) -> None:
    """Give an instance the weights of a solution."""
    if start is not None:
        instance.module.load_state_dict(start.model.state_dict())
        instance.weights.adopt()


def fits(start: Solution | None, module: nn.Module) -> None:
    """Check that a solution to start from has the weights of this network.

    Raises:
        SpecError: it is not a solution.
        ProgramError: names the first weight that is of another network.
    """
    expect("start", start, Solution, "a lagcompile.Solution")
    if start is None:
        return
    given, own = start.model.state_dict(), module.state_dict()
    for name in {**own, **given}:
        if name not in given or name not in own or given[name].shape != own[name].shape:
            has, needs = (f"{list(s[name].shape)}" if name in s else "none" for s in (given, own))
            raise ProgramError(f"start is a solution of another network: '{name}' is {has} there, {needs} here")


@contextmanager
def seeded(instance: Instance, options: RunOptions) -> Iterator[None]:
    """Let dropout and noise depend on the run's seed alone, and leave the caller's random numbers as they were.

    They belong to the process: a run that draws any has them to itself while the context lasts.

    Raises:
        LagcompileError: the program does not run on batches of the sizes that the run has.
    """
    with ALONE, torch.random.fork_rng(devices=[instance.device] if instance.device.type == "cuda" else []):
        torch.manual_seed(options.seed)
        try_batches(instance, Rows(instance.examples, options.batch_size, options.seed).sizes(options.steps))
        yield


class Rows:
    """Rows of each step: a new permutation for each epoch, the last batch of an epoch may be short."""

    def __init__(self, examples: int, batch_size: int, seed: int) -> None:
        self.examples, self.batch, self.seed = examples, min(batch_size, examples), seed
        self.per_epoch = math.ceil(examples / self.batch)
        self._epoch, self._order = -1, torch.empty(0, dtype=torch.int64)

    def at(self, step: int) -> Tensor:
        """Row numbers of a step, from 0."""
        epoch, position = divmod(step, self.per_epoch)
        if epoch != self._epoch:
            mixed = (self.seed * 1_000_003 + epoch + 2**63) % 2**64 - 2**63  # a generator takes 64 bits
            generator = torch.Generator().manual_seed(mixed)
            self._epoch, self._order = epoch, torch.randperm(self.examples, generator=generator)
        return self._order[position * self.batch : (position + 1) * self.batch]

    def sizes(self, steps: int) -> set[int]:
        """Batch sizes of that many steps from the first."""
        short = self.examples % self.batch
        return {self.batch} | ({short} if short and steps >= self.per_epoch else set())


class Between(Protocol):
    """Keeps a run while it is driven."""

    def between(self) -> None:
        """Called before each step; raises `StoppedError` to end the run there."""

    def ended(self, status: Status) -> None:
        """Called after the last step, before results are read."""


def drive(
    executor: Executor,
    options: RunOptions,
    *,
    original: nn.Module,
    evaluate: Evaluate | None = None,
    watch: Watch | None = None,
    start: History | None = None,
    best: Best | None = None,
    keeper: Between | None = None,
    ended: Status | None = None,
) -> Solution:
    """Run an executor to the end of its options.

    The last iterate is returned; the best one where it is not finite, or where an interrupted run was worse than its
    start. `Best` judges them.

    Args:
        executor: a fresh one, or one that has loaded a checkpoint (it continues after its `steps`).
        options: steps, batch size, seed and so on.
        original: the user's module, for the class of `solution.model`.
        evaluate: numbers of a module on held-out data, such as {"accuracy": 0.98}.
        watch: called with each row of the history.
        start: history of the steps made before.
        best: the best iterate of the steps made before; None judges the executor as it is as the start.
        keeper: keeps the run; None keeps nothing.
        ended: reason why the run has already ended, so that no step is made.

    Raises:
        ProgramError: a weight is not finite.
        KeyboardInterrupt: in the middle of a step, where a keeper may not keep what was reached; `Ended` by the
            command line, which keeps nothing half done.
    """
    instance = executor.instance
    best = best or best_of(executor, options)
    rows = Rows(instance.examples, options.batch_size, options.seed)
    history = list(start.rows) if start is not None else []
    before = history[-1]["seconds"] if history else 0.0
    status, begin, paused = ended or Status.STEPS_DONE, time.perf_counter(), 0.0
    try:
        while ended is None and executor.steps < options.steps:
            if keeper is not None:
                keeper.between()
            executor.step(rows.at(executor.steps))
            done = executor.steps == options.steps
            due = options.evaluate_every is not None and executor.steps % options.evaluate_every == 0
            if not (done or due or executor.steps % options.look_every == 0):
                continue
            measures = executor.measures()
            now = time.perf_counter()
            if not (best.offer(executor.steps) and all(math.isfinite(v) for v in measures.values())):
                status = Status.DIVERGED
            if evaluate is not None and status is not Status.DIVERGED and (due or done):
                instance.weights.publish()
                measures |= dict(evaluated(instance.module, evaluate))
            paused += time.perf_counter() - now
            elapsed = before + time.perf_counter() - begin - paused
            row = {"step": float(executor.steps), "seconds": elapsed} | measures
            history.append(row)
            if watch is not None:
                watch(row)
            if status is Status.DIVERGED:
                break
            if options.time_limit is not None and elapsed > options.time_limit:
                status = Status.TIME_LIMIT
                break
    except StoppedError:
        status = Status.INTERRUPTED
    except KeyboardInterrupt as interrupt:
        if keeper is not None or isinstance(interrupt, Ended):
            raise
        status = Status.INTERRUPTED
    if keeper is not None:
        keeper.ended(status)
    seconds = before + time.perf_counter() - begin - paused
    return conclude(executor, status, History(tuple(history)), seconds, original=original, best=best)


def best_of(executor: Executor, options: RunOptions) -> Best:
    """Make the present iterate of an executor the first candidate for its best one.

    Raises:
        ProgramError: a weight is not finite, or the loss is NaN.
    """
    instance = executor.instance
    probe = Probe(instance, options.batch_size)
    free = any(d.free for d in instance.program.data)

    def weights() -> Mapping[str, Tensor]:
        instance.weights.publish()
        return instance.module.state_dict()

    def inputs() -> dict[str, Tensor]:
        return executor.free_inputs() if free else {}

    bad = [n for n, v in weights().items() if not finite([v])]
    if bad and executor.steps == 0:
        raise ProgramError(
            [f"the weight '{n}' holds numbers that are not finite: no method can start there" for n in bad]
        )

    def score() -> float:
        value = probe(inputs())
        if probe.undefined and executor.steps == 0:
            rows = ", ".join(map(str, torch.cat(probe.undefined).sort().values[:SHOWN].tolist()))
            raise ProgramError(
                f"the loss is not a number (NaN) at the start on {len(probe.undefined)} of {len(probe.rows)} batches "
                f"looked at, such as that of the examples {rows}: each batch needs an example on which the loss is "
                "defined: take larger batches, or leave the others out"
            )
        return judged(value, executor.tensors())

    return Best(score, weights, inputs)


def conclude(
    executor: Executor, status: Status, history: History, seconds: float, *, original: nn.Module, best: Best
) -> Solution:
    """Make the solution that an executor has reached; it goes back to the best iterate where that is returned."""
    instance = executor.instance
    status, back = best.ended(status, executor.steps)
    if back:
        instance.module.load_state_dict(best.kept)
        instance.weights.adopt()
        model, (states, multipliers) = instance.recover(original), executor.restarted()
    else:
        model, (states, multipliers) = instance.recover(original), executor.values()
    return Solution(
        model=model,
        status=status,
        history=history,
        states=states,
        multipliers=multipliers,
        program=instance.program,
        steps=executor.steps,
        gradient_evaluations=executor.gradient_evaluations,
        seconds=seconds,
        details={
            "final": {} if back else executor.final_measures(),
            "returned_step": best.step if back else executor.steps,
            "probe": best.numbers(),
            "best_step": best.step,
            "best_weights": best.kept,
            "inputs": best.inputs if back else executor.free_inputs(),
            "bytes": executor.bytes(),
        },
    )
