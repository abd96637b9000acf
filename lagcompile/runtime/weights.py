"""The weights of an instance: one leaf tensor for each variable, or for each stack of equal stages' variables.

In: a bound `Network` and its `Layout`. Out: `Weights`. Invariant: every parameter of the model is in exactly one
leaf; `publish` makes the modules agree with the leaves.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lagcompile.frontend.stages import Network
from lagcompile.ir.program import Program
from lagcompile.runtime.layout import Layout, Unit


@dataclass(frozen=True)
class Leaf:
    """One tensor that moves: a parameter, or the stack of `names` along axis 0."""

    names: tuple[str, ...]
    tensor: Tensor
    stacked: bool


class Weights:
    """Leaves of an instance, and how units find their parameters in them."""

    def __init__(self, network: Network, layout: Layout, program: Program) -> None:
        aliases = {alias: name for name, others in network.capture.ties.items() for alias in others}
        self._parameters: Mapping[str, nn.Parameter] = dict(network.capture.original.named_parameters())
        trainable = {w.name for w in program.weights if w.trainable}
        leaves: dict[tuple[str, ...], Leaf] = {}
        self.of_unit: list[tuple[tuple[int, bool], ...]] = []
        """For each unit and slot: number of the leaf, and whether it is stacked over the unit's stages."""
        keys: list[list[tuple[str, ...]]] = []
        for unit in layout.units:
            row = [self._key(unit, j, aliases) for j in range(len(unit.stages[0].slots))]
            keys.append(row)
            for key in row:
                if key not in leaves:
                    leaves[key] = self._leaf(key, trainable)
        index = {key: i for i, key in enumerate(leaves)}
        self.leaves = tuple(leaves.values())
        for row in keys:
            self.of_unit.append(tuple((index[key], leaves[key].stacked) for key in row))

    def _key(self, unit: Unit, slot: int, aliases: Mapping[str, str]) -> tuple[str, ...]:
        return tuple(dict.fromkeys(aliases.get(s.slots[slot], s.slots[slot]) for s in unit.stages))

    def _leaf(self, names: tuple[str, ...], trainable: set[str]) -> Leaf:
        moves = names[0] in trainable
        if len(names) == 1:
            parameter = self._parameters[names[0]]
            parameter.requires_grad_(moves)
            return Leaf(names, parameter, stacked=False)
        with torch.no_grad():
            stack = torch.stack([self._parameters[n] for n in names])
            if stack.dim() == 3:  # column-major: batched products read it faster and give gradients of this layout
                stack = stack.mT.contiguous().mT
        return Leaf(names, stack.requires_grad_(moves), stacked=True)

    @property
    def trainable(self) -> list[Tensor]:
        """Leaves that are solved for."""
        return [leaf.tensor for leaf in self.leaves if leaf.tensor.requires_grad]

    @torch.no_grad()
    def publish(self) -> None:
        """Write stacked leaves into the modules' parameters (the others are those parameters)."""
        for leaf in self.leaves:
            if leaf.stacked:
                targets = [self._parameters[n].data for n in leaf.names]
                torch._foreach_copy_(targets, list(leaf.tensor.unbind()))

    @torch.no_grad()
    def adopt(self) -> None:
        """Read stacked leaves from the modules' parameters."""
        for leaf in self.leaves:
            if leaf.stacked:
                torch._foreach_copy_(list(leaf.tensor.unbind()), [self._parameters[n].data for n in leaf.names])

    def named_gradients(self, gradients: Sequence[Tensor | None]) -> dict[str, Tensor]:
        """Return the gradients of the trainable leaves by parameter name; absent ones are zero."""
        result: dict[str, Tensor] = {}
        moving = [leaf for leaf in self.leaves if leaf.tensor.requires_grad]
        for leaf, gradient in zip(moving, gradients, strict=True):
            value = torch.zeros_like(leaf.tensor) if gradient is None else gradient
            parts = value.unbind() if leaf.stacked else (value,)
            result.update(zip(leaf.names, parts, strict=True))
        return result


def not_real(program: Program, what: str) -> Iterator[str]:
    """Say which weights and inputs that move are complex."""
    moving = [f"the weight {w.name}" for w in program.weights if w.trainable and w.type.dtype.startswith("complex")]
    moving += [f"the input {d.name}" for d in program.data if d.free and d.type.dtype.startswith("complex")]
    if moving:
        yield (
            f"{what} is for real variables, but these are complex: {', '.join(moving)}. Freeze them "
            "(formulation.frozen), hold real and imaginary parts as two parameters, or use a first-order method"
        )
