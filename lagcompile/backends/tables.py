"""The tables of a run: states and multipliers that are kept from step to step, allocated and started.

In: a `Lagrangian` and a generator. Out: `Tables`. Invariant: a table has one row for each example, class Gaussian or
shared value of its bank, and is made once; what a step does to it is the store's.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from lagcompile.frontend.graph import dtype_of
from lagcompile.ir.base import BindError
from lagcompile.ir.program import Program
from lagcompile.runtime.adjoint import dual_sweep
from lagcompile.runtime.instance import Instance, batch_axis
from lagcompile.runtime.lagrangian import Lagrangian
from lagcompile.runtime.layout import Bank
from lagcompile.runtime.starts import started
from lagcompile.runtime.storages import keeping

FILL_BATCH = 512


class Tables:
    """States and multipliers that are kept.

    Attributes:
        kept: banks whose states are kept; `states` holds their tables in this order.
        passing: banks whose states are transient.
        dual: kept banks with a multiplier; `multipliers` holds their tables in this order.
    """

    def __init__(self, lagrangian: Lagrangian, generator: torch.Generator) -> None:
        self.lagrangian, self.generator = lagrangian, generator
        self.instance = lagrangian.instance
        self.banks = self.instance.layout.banks
        self.keeping = [keeping(b.first.storage, b.first.domain) for b in self.banks]
        self.kept = [i for i, b in enumerate(self.banks) if b.first.storage.kept]
        self.passing = [i for i, b in enumerate(self.banks) if not b.first.storage.kept]
        self.dual = [i for i in self.kept if self.banks[i].multiplier is not None]
        self.first_noise = [self.noise(b) for b in self.banks]
        self.states = [self._state_table(i) for i in self.kept]
        self.multipliers = [self._dual_table(i) for i in self.dual]
        self._fill()

    # ---------------------------------------------------------------- allocation
    def _features(self, bank: Bank) -> tuple[int, ...]:
        kind = bank.first.type
        if kind.features is None:
            raise BindError(f"the shape of the state {bank.first.name} is not known: lift with example_inputs")
        _, factor = batch_axis(kind)
        return (factor, *kind.features) if factor > 1 else kind.features

    def dtype(self, bank: Bank) -> torch.dtype:
        """Type in which a state is computed."""
        return dtype_of(bank.first.type.dtype)

    def _state_table(self, index: int) -> Tensor:
        bank, examples = self.banks[index], self.instance.examples
        rows = bank.first.storage.rows(examples, examples, self.instance.program.classes or 0)
        shape = (len(bank.states), rows, *self._features(bank))
        return self.keeping[index].empty(shape, self._kept_as(bank), self.instance.device)

    def _dual_table(self, index: int) -> Tensor:
        shape = self.dual_shape(index, self._rows(index))
        # filled for the reason that state tables are
        return torch.empty(shape, dtype=self._kept_as(self.banks[index]), device=self.instance.device).fill_(0.0)

    def _kept_as(self, bank: Bank) -> torch.dtype:
        return dtype_of(bank.first.storage.keeps(bank.first.type.dtype))

    def dual_shape(self, index: int, rows: int) -> tuple[int, ...]:
        """Shape of a bank's multipliers for so many rows of defects."""
        bank = self.banks[index]
        assert bank.multiplier is not None
        classes = self.instance.program.classes or 0
        return (len(bank.states), *bank.multiplier.laid.shape(rows, classes, self._features(bank)))

    def _rows(self, index: int) -> int:
        """Rows of a bank's defects over the whole data set."""
        if self.lagrangian.on_samples[index]:
            return self.instance.samples
        return 1 if self.banks[index].first.storage.single else self.instance.examples

    def noise(self, bank: Bank) -> Tensor | None:
        """Fresh noise of a state's samples; None for states that are not sampled."""
        if not bank.first.storage.sampled:
            return None
        shape = (len(bank.states), self.instance.samples, *self._features(bank))
        return torch.randn(shape, generator=self.generator, device=self.instance.device, dtype=self.dtype(bank))

    # ---------------------------------------------------------------- starts
    def _fill(self) -> None:
        """Start every state and multiplier that is kept."""
        forward = []
        for table, i in zip(self.states, self.kept, strict=True):
            centre = self.keeping[i].centre(table)
            values = started(self.banks[i].first.start, centre, self.generator)
            if values is None:
                forward.append(i)
            else:
                centre.copy_(self.keeping[i].stored(values))
        adjoint = [i for i in self.dual if starts_at_adjoint(self.banks[i])]
        if forward or adjoint:
            self.instance.weights.publish()
            with self.instance.quiet():
                self._fill_forward(set(forward), set(adjoint))

    def _fill_forward(self, forward: set[int], adjoint: set[int]) -> None:
        for rows in portions(self.instance):
            batch = self.instance.batch(rows)
            with torch.no_grad():
                values, _ = self.instance.forward(batch)
            for table, i in zip(self.states, self.kept, strict=True):
                if i in forward:
                    self.keeping[i].begin(table, batch.rows, values[i], batch.labels)
            if adjoint:
                sweep = dual_sweep(self.instance, batch, values)
                for table, i in zip(self.multipliers, self.dual, strict=True):
                    if i in adjoint:
                        table.index_copy_(1, batch.rows, sweep[i].to(table.dtype))
        for table, i in zip(self.states, self.kept, strict=True):
            if i in forward:
                self.keeping[i].begun(table, self.instance.labels)

    # ---------------------------------------------------------------- results
    def named(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """States and multipliers by name, on the CPU; a class Gaussian as name.mu and name.sigma."""
        states: dict[str, Tensor] = {}
        for table, i in zip(self.states, self.kept, strict=True):
            bank = self.banks[i]
            for k, state in enumerate(bank.states):
                held = self.keeping[i].named(state.name, table[k].to(self.dtype(bank)))
                states |= {name: value.cpu() for name, value in held.items()}
        program = self.instance.program
        duals: dict[str, Tensor] = {}
        for table, i in zip(self.multipliers, self.dual, strict=True):
            for k, state in enumerate(self.banks[i].states):
                constraint = program.defect_of(state.name)
                assert constraint is not None
                multiplier = program.multiplier_of(constraint.name)
                assert multiplier is not None
                duals[multiplier.name] = table[k].to(self.dtype(self.banks[i])).cpu()
        return states, duals


def starts_at_adjoint(bank: Bank) -> bool:
    """Whether a bank's multipliers begin at backprop's adjoints."""
    return bank.multiplier is not None and bank.multiplier.start == "adjoint"


def portions(instance: Instance) -> list[Tensor]:
    """Split all rows in portions; a single last row joins the portion before it (normalisation needs more than one)."""
    found = list(torch.arange(instance.examples).split(instance.sizes.portion(instance.examples, FILL_BATCH)))
    if len(found) > 1 and len(found[-1]) == 1 and instance.sizes.allow(len(found[-2]) + 1):
        found[-2:] = [torch.cat(found[-2:])]
    return found


def unkept(program: Program, *, sweep: bool) -> Iterator[str]:
    """Say which combinations of storage, start and layout are not supported.

    Args:
        program: the program.
        sweep: the exact dual sweep sets the multipliers.
    """
    for c in program.defects:
        s, multiplier = program.state(c.state), program.multiplier_of(c.name)
        if c.weight is None and multiplier is None:
            yield (
                f"the constraint {c.name} has neither a multiplier nor a weight: nothing couples the stages at "
                f"{s.name} (after {s.node}). Give 'multiplier: {{layout: full}}' or a weight"
            )
        if s.start.kind == "observed":
            yield f"the state {s.name} starts from observed values, which trajectories give (method gauss_newton)"
        if s.start.kind == "zeros" and s.domain.flat:
            yield (
                f"the state {s.name} starts from zeros, where {s.domain.map} has no slope, and would never move: "
                "write 'domain: {kind: nonnegative, by: project}', or start from a forward pass"
            )
        if not s.storage.kept and s.start.kind == "unit_sphere":
            yield f"the state {s.name} is {s.storage.kind}: start it from a forward pass or zeros, no unit sphere"
        adjoint = sweep or (multiplier is not None and multiplier.start == "adjoint")
        if adjoint and (multiplier is None or multiplier.layout != "full" or s.storage.sampled):
            yield (
                f"the state {s.name}: adjoints have one number for each example and feature, so its multiplier must be "
                "laid out 'full' and its storage must not be class_gaussian"
            )
        if c.transform.per_row and s.storage.single:
            yield f"the state {s.name} is shared by all examples: {c.transform.kind} needs one row for each example"
