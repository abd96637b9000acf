"""An executor with scheduled step sizes.

In: an executor. Out: an executor that `drive` runs. Invariant: the step itself is the inner executor's.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor

from lagcompile.backends.base import Executor
from lagcompile.workbench.schedule import Schedules


class Supervised(Executor):
    """Runs another executor."""

    def __init__(
        self,
        inner: Executor,
        schedules: Schedules,
        *,
        total: int,
    ) -> None:
        """Take over an executor, before it loads a checkpoint.

        Args:
            inner: the executor.
            schedules: of its step sizes.
            total: steps of the whole run.
        """
        self.inner, self.instance = inner, inner.instance
        self.steps, self.gradient_evaluations = inner.steps, inner.gradient_evaluations
        self._schedules, self._total = schedules.given(), total
        self._start = {n: [g["lr"] for g in self._groups(n)] for n in inner.groups()}

    def step(self, rows: Tensor) -> None:
        """One step of the inner executor at scheduled step sizes."""
        for name, schedule in self._schedules.items():
            factor = schedule.at(self.steps, self._total)
            for group, lr in zip(self._groups(name), self._start[name], strict=True):
                group["lr"] = lr * factor
        self.inner.step(rows)
        self._follow()

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
        """Complete state of the inner executor."""
        return self.inner.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Resume from a checkpoint."""
        self.inner.load_state_dict(state)
        self._follow()

    def bytes(self) -> int:
        """Bytes of states, multipliers and their optimiser rows."""
        return self.inner.bytes()
