"""Inputs that are variables, for step-wise methods: a table with a row for each example.

In: an `Instance`, a step rule. Out: `FreeInputs`: what the stages read in place of the data. Invariant: the instance's
own inputs are the start and stay as they are; between `begin` and `update` the batch's rows are held as small tensors.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lagcompile.ir.base import ProgramError
from lagcompile.runtime.instance import Batch, Instance
from lagcompile.runtime.rules import Rule, Scheme
from lagcompile.runtime.steps import ExtraRows


class FreeInputs:
    """The free inputs of a program, with their optimiser; nothing where all inputs are data."""

    def __init__(self, instance: Instance, rule: Rule, scheme: Scheme) -> None:
        """Start from the data, moved inside the bounds.

        Raises:
            ProgramError: a free input does not hold floating-point numbers.
        """
        self.variables = [d for d in instance.program.data if d.free]
        position = instance.network.capture.signature.names.index
        given = [instance.inputs[position(d.name)] for d in self.variables]
        problems = [
            f"the input '{d.name}' is a variable but holds {t.dtype} numbers: only floating inputs can move"
            for d, t in zip(self.variables, given, strict=True)
            if not t.is_floating_point()
        ]
        if problems:
            raise ProgramError(problems)
        self.tables = [
            self._inside(i, t.detach().to(instance.device).unsqueeze(0)).clone() for i, t in enumerate(given)
        ]
        self.optimizer = ExtraRows(self.tables, rule, scheme) if self.tables else None
        self._now: list[Tensor] = []

    def begin(self, batch: Batch) -> None:
        """Take the batch's rows."""
        if self.optimizer is not None:
            self._now = self.optimizer.take([batch.rows for _ in self.tables])

    @property
    def rows(self) -> dict[str, Tensor]:
        """Values of the batch's rows by name, where gradients are wanted."""
        return {d.name: t[0] for d, t in zip(self.variables, self._now, strict=bool(self._now))}

    def extrapolate(self, gradients: Sequence[Tensor] | None) -> None:
        """Take the first half step; without gradients along the last ones."""
        if self.optimizer is not None:
            moved = self.optimizer.extrapolated(None if gradients is None else [g.unsqueeze(0) for g in gradients])
            self._now = [self._inside(i, t) for i, t in enumerate(moved)]

    def update(self, gradients: Sequence[Tensor]) -> None:
        """Take the second half step, and write it back."""
        if self.optimizer is not None:
            self._now = self.optimizer.update([g.unsqueeze(0) for g in gradients], self._inside)

    def _inside(self, i: int, value: Tensor) -> Tensor:
        return value.clamp(
            -torch.inf if (low := self.variables[i].lower) is None else low,
            torch.inf if (high := self.variables[i].upper) is None else high,
        )

    def named(self) -> dict[str, Tensor]:
        """All rows by name, on the CPU."""
        return {d.name: t[0].cpu().clone() for d, t in zip(self.variables, self.tables, strict=True)}

    def bytes(self) -> int:
        """Bytes of values and optimiser rows."""
        slots = [] if self.optimizer is None else [t for s in self.optimizer.state.values() for t in s.values()]
        return sum(t.numel() * t.element_size() for t in [*self.tables, *slots])

    def state_dict(self) -> dict[str, Any]:
        """Tables and optimiser."""
        optimizer = None if self.optimizer is None else self.optimizer.state_dict()
        return {"tables": [t.clone() for t in self.tables], "optimizer": optimizer}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Resume from `state_dict`."""
        for table, value in zip(self.tables, state["tables"], strict=True):
            table.copy_(value)
        if self.optimizer is not None:
            self.optimizer.load_state_dict(state["optimizer"])
