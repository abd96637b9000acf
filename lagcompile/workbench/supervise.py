"""An executor under supervision: scheduled step sizes, stops and checkpoints between steps, never inside one.

In: an executor. Out: an executor that `drive` runs. Invariant: the step itself is the inner executor's; a stop that is
asked for takes effect before the next step, so that what is saved lies on a step's boundary and resumes bit for bit.
"""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import FrameType
from typing import Any

from torch import Tensor

from lagcompile.backends.base import Executor
from lagcompile.workbench.schedule import Schedules


class Stop:
    """A request to stop; Ctrl-C sets it, a second Ctrl-C interrupts at once."""

    def __init__(self) -> None:
        self.asked = False

    @contextmanager
    def on_interrupt(self) -> Iterator[None]:
        """Ask on Ctrl-C for as long as the context lasts (in the main thread; elsewhere nothing is changed)."""

        def ask(number: int, frame: FrameType | None) -> None:
            if self.asked:
                raise KeyboardInterrupt
            self.asked = True

        try:
            before = signal.signal(signal.SIGINT, ask)
        except ValueError:  # not the main thread
            yield
            return
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)


class Supervised(Executor):
    """Runs another executor."""

    def __init__(
        self,
        inner: Executor,
        schedules: Schedules,
        *,
        total: int,
        stop: Stop,
        save: Callable[[], None] | None = None,
        save_every: int | None = None,
    ) -> None:
        """Take over an executor, before it loads a checkpoint.

        Args:
            inner: the executor.
            schedules: of its step sizes.
            total: steps of the whole run.
            stop: asked before each step.
            save: writes a checkpoint.
            save_every: steps between two checkpoints; None for none along the way.
        """
        self.inner, self.instance = inner, inner.instance
        self.steps, self.gradient_evaluations = inner.steps, inner.gradient_evaluations
        self._schedules, self._total, self._stop = schedules.given(), total, stop
        self._save, self._every = save, save_every
        self._start = {n: [g["lr"] for g in self._groups(n)] for n in inner.groups()}

    def step(self, rows: Tensor) -> None:
        """One step of the inner executor at scheduled step sizes.

        Raises:
            KeyboardInterrupt: a stop was asked for; the step was not begun.
        """
        if self._stop.asked:
            raise KeyboardInterrupt
        for name, schedule in self._schedules.items():
            factor = schedule.at(self.steps, self._total)
            for group, lr in zip(self._groups(name), self._start[name], strict=True):
                group["lr"] = lr * factor
        self.inner.step(rows)
        self._follow()
        if self._save is not None and self._every is not None and self.steps % self._every == 0:
            self._save()

    def _groups(self, name: str) -> list[dict[str, Any]]:
        """Parameter groups as they are now: loading a checkpoint makes new ones."""
        return [g for optimizer in self.inner.groups()[name] for g in optimizer.param_groups]

    def _follow(self) -> None:
        self.steps, self.gradient_evaluations = self.inner.steps, self.inner.gradient_evaluations

    def measures(self) -> dict[str, float]:
        """Numbers of the last step."""
        return self.inner.measures()

    def final_measures(self) -> dict[str, float]:
        """Numbers over all rows."""
        return self.inner.final_measures()

    def values(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """States and multipliers by name, on the CPU."""
        return self.inner.values()

    def tensors(self) -> Iterator[Tensor]:
        """What the inner executor moves."""
        return self.inner.tensors()

    def restarted(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """States and multipliers as the inner executor would start them."""
        return self.inner.restarted()

    def free_inputs(self) -> dict[str, Tensor]:
        """Values of the inputs that are variables."""
        return self.inner.free_inputs()

    def state_dict(self) -> dict[str, Any]:
        """Everything that the inner executor needs to go on."""
        return self.inner.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a checkpoint."""
        self.inner.load_state_dict(state)
        self._follow()

    def bytes(self) -> int:
        """Bytes of states, multipliers and their optimiser rows."""
        return self.inner.bytes()
