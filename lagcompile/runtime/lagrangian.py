"""The Lagrangian of a batch: values of states, defects, coupling, and gradients in every group of variables.

In: an `Instance`, a `Batch`, stored states and multipliers of its rows. Out: `Terms` and `Gradients`. Invariant: one
pass forward and one backward for each call; gradients in states and multipliers are per example (d L_i / d h_i), those
in weights are of L.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from lagcompile.frontend.tensors import dense
from lagcompile.ir.base import ProgramError
from lagcompile.ir.program import Program, ValueConstraint
from lagcompile.ir.sampling import mixed, sampled
from lagcompile.runtime import kkt
from lagcompile.runtime.instance import Batch, Instance, Known
from lagcompile.runtime.storages import keeping
from lagcompile.runtime.transforms import behaviour


@dataclass(frozen=True)
class Terms:
    """Result of a forward pass of the Lagrangian.

    Attributes:
        loss: the user's loss, with the regularisers of the objective.
        output: the model's output at the states.
        defects: r for each bank, of shape (states, rows, ...).
        transformed: G(r) for each bank, not connected; with an augmented weight what exceeds the tube.
        multipliers: multiplier of each row and bank; None for pure penalties.
    """

    loss: Tensor
    output: Any
    defects: list[Tensor]
    transformed: list[Tensor]
    multipliers: list[Tensor | None]


@dataclass(frozen=True)
class Gradients:
    """Gradients in weights (of L), and in stored states, multipliers and free inputs (per example)."""

    weights: list[Tensor | None]
    states: list[Tensor]
    multipliers: list[Tensor | None]
    terms: Terms
    inputs: list[Tensor] = field(default_factory=list)


def unexecuted(program: Program) -> Iterator[str]:
    """Say what first-order methods do not execute."""
    for c in program.constraints:
        if isinstance(c, ValueConstraint):
            yield f"the constraint '{c.name}' on {', '.join(c.reads)} needs the exact backend (method sqp)"
    yield from mixed(program)


class Lagrangian:
    """The Lagrangian of one instance."""

    def __init__(self, instance: Instance) -> None:
        """Check that a first-order backend can evaluate the program.

        Raises:
            ProgramError: it has features that first-order backends do not support.
        """
        if problems := list(unexecuted(instance.program)):
            raise ProgramError(problems)
        self.instance = instance
        banks, found = instance.layout.banks, sampled(instance.program)
        self._keeping = [keeping(b.first.storage, b.first.domain) for b in banks]
        self.on_samples = [b.constraint.stage in found.stages for b in banks]
        self._output_of_samples = any(r in found.values for r in instance.program.objective.reads)
        classes = torch.arange(instance.program.classes or 0, device=instance.device)
        self.drawn = classes.repeat(instance.samples // max(1, len(classes)))
        self._leaves = instance.weights.trainable
        self._signed = [b.constraint.relation == "<=" for b in instance.layout.banks]
        self._augmented = [b.augmented for b in instance.layout.banks]

    def values(self, stored: Sequence[Tensor], noise: Sequence[Tensor | None]) -> list[Tensor]:
        """Return the values of the states as the stages read them."""
        given = zip(self._keeping, stored, noise, strict=True)
        return [kept.values(raw, self.drawn, drawn) for kept, raw, drawn in given]

    def terms(
        self,
        batch: Batch,
        stored: Sequence[Tensor],
        multipliers: Sequence[Tensor | None],
        *,
        rho: Sequence[float],
        noise: Sequence[Tensor | None],
        known: Known | None = None,
    ) -> Terms:
        """Run one forward pass: loss and defects.

        Args:
            batch: the batch.
            stored: stored states of the batch's rows, one tensor for each bank.
            multipliers: multipliers of the batch's rows (class rows for `class`), None for pure penalties.
            rho: weight of the quadratic term for each bank.
            noise: standard normal numbers for class Gaussians.
            known: see `Instance.predict`.
        """
        instance, banks = self.instance, self.instance.layout.banks
        values = self.values(stored, noise)
        predictions, env = instance.predict(values, batch.values, known)
        target = self.drawn if self._output_of_samples else batch.target
        output = instance.output(env)
        loss = instance.loss(output, target)
        defects, transformed, rows = [], [], []
        for i, bank in enumerate(banks):
            labels = self.row_labels(i, batch)
            r = self._keeping[i].defect(predictions[i], values[i], stored[i], labels)
            multiplier = multipliers[i]
            if multiplier is not None and bank.multiplier is not None and bank.multiplier.laid.rows == "class":
                assert labels is not None
                multiplier = multiplier.index_select(1, labels)
            defects.append(r)
            rows.append(multiplier)
            transformed.append(self._transformed(i, r.detach(), multiplier, rho[i]))
        return Terms(self._regularised(loss, values), output, defects, transformed, rows)

    def value(self, terms: Terms, rho: Sequence[float]) -> Tensor:
        """Compute L, a scalar connected to everything. Steps need its gradient only."""
        total = terms.loss
        for i, (r, multiplier, weight) in enumerate(zip(terms.defects, terms.multipliers, rho, strict=True)):
            g = self._transformed(i, r, multiplier, weight)
            squared = g if self._augmented[i] else r
            mean = self.instance.layout.banks[i].constraint.features == "mean"
            total = total + self._scale(r) * kkt.coupling(g, multiplier, squared, weight, mean_features=mean)
        return total

    def _transformed(self, i: int, r: Tensor, multiplier: Tensor | None, rho: float) -> Tensor:
        """G(r) of one bank, or what exceeds its tube; connected to r where r is."""
        transform = behaviour(self.instance.layout.banks[i].constraint.transform)
        if self._augmented[i]:
            assert multiplier is not None
            return transform.excess(r, multiplier, rho)
        return transform.value(r)

    def _scale(self, r: Tensor) -> float:
        """c: weight of one row of a bank's defects."""
        return 1.0 / r.shape[1] if self.instance.program.objective.reduction == "mean" else 1.0

    def _force(self, i: int, terms: Terms, rho: float) -> Tensor:
        """Compute dL/dr, the gradient of the Lagrangian with respect to the defects of one bank."""
        bank, r = self.instance.layout.banks[i], terms.defects[i].detach()
        g, multiplier = terms.transformed[i], terms.multipliers[i]
        if self._augmented[i]:
            assert multiplier is not None
            pull = kkt.augmented_force(g, multiplier, r, rho, bank.constraint.transform)
        else:
            pull = kkt.force(g, multiplier, r, rho, bank.constraint.transform)
        scale = self._scale(r)
        if bank.constraint.features == "mean":
            scale /= max(1, r[0, 0].numel())
        return pull if scale == 1.0 else pull * scale

    def _regularised(self, total: Tensor, values: Sequence[Tensor]) -> Tensor:
        for term in self.instance.program.objective.regularisers:
            for t in self._leaves if term.on == "weights" else values:
                size = kkt.size(t, term.kind)
                if term.on == "states" and self.instance.program.objective.reduction == "mean":
                    size = size / t.shape[1]
                total = total + term.weight * size
        return total

    def row_labels(self, bank: int, batch: Batch) -> Tensor | None:
        """Return the class of each row of a bank's defects."""
        return self.drawn if self.on_samples[bank] else batch.labels

    def gradients(
        self,
        batch: Batch,
        stored: Sequence[Tensor],
        multipliers: Sequence[Tensor | None],
        *,
        rho: Sequence[float],
        noise: Sequence[Tensor | None],
        weights: bool = True,
        inputs: Mapping[str, Tensor] | None = None,
        known: Known | None = None,
    ) -> Gradients:
        """Compute the gradients of L at a point; see `terms` for the arguments.

        Args:
            weights: also differentiate in the weights.
            inputs: values of the free inputs' rows, in the order of the gradients.
        """
        leaves = [s.detach().requires_grad_() for s in stored]
        free = {n: v.detach().requires_grad_() for n, v in (inputs or {}).items()}
        batch = self.reading(batch, free)
        terms = self.terms(batch, leaves, multipliers, rho=rho, noise=noise, known=known)
        variables = [*leaves, *free.values(), *(self._leaves if weights else [])]
        pairs = [(terms.loss, torch.ones_like(terms.loss))]
        pairs += [(r, self._force(i, terms, rho[i])) for i, r in enumerate(terms.defects)]
        connected = [(value, pull) for value, pull in pairs if value.requires_grad]
        found: Sequence[Tensor | None] = [None for _ in variables]
        if variables and connected:
            found = dense(
                torch.autograd.grad([v for v, _ in connected], variables, [p for _, p in connected], allow_unused=True)
            )
        states = []
        for i, (leaf, g) in enumerate(zip(leaves, found[: len(leaves)], strict=True)):
            gradient = torch.zeros_like(leaf) if g is None else g
            per_class = self.instance.layout.banks[i].first.storage.per_class
            if not per_class and self.instance.program.objective.reduction == "mean":
                gradient = gradient * terms.defects[i].shape[1]
            states.append(gradient)
        rest = found[len(leaves) + len(free) :]
        moved = [
            torch.zeros_like(v) if g is None else g * (1.0 / self.instance.scale(batch))
            for v, g in zip(free.values(), found[len(leaves) :], strict=False)
        ]
        return Gradients(list(rest), states, self._dual_gradients(batch, terms), terms, moved)

    def reading(self, batch: Batch, inputs: Mapping[str, Tensor]) -> Batch:
        """Return the batch with other values of some inputs; what follows from inputs alone is computed again."""
        if not inputs:
            return batch
        network, values = self.instance.network, {**batch.values, **inputs}
        return replace(batch, values=network.run(network.prologue, values) if network.prologue.writes else values)

    def _dual_gradients(self, batch: Batch, terms: Terms) -> list[Tensor | None]:
        result: list[Tensor | None] = []
        for i, bank in enumerate(self.instance.layout.banks):
            if bank.multiplier is None:
                result.append(None)
                continue
            result.append(
                kkt.dual_gradient(
                    terms.transformed[i],
                    bank.multiplier.layout,
                    self.row_labels(i, batch),
                    self.instance.program.classes or 0,
                    mean_features=bank.constraint.features == "mean",
                )
            )
        return result

    def dual_signed(self, bank: int) -> bool:
        """Return whether a bank's multiplier must be >= 0 (an inequality)."""
        return self._signed[bank]
