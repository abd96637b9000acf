"""Kinks at a solution: where the program has no derivative, by stage and unit, and what that leaves open.

In: the operations of the stages and of the loss while they run at the solution. Out: `Kink`s, each with the leaves
whose gradient depends on the slope taken there. Invariant: a leaf that no kink touches is assessed as anywhere else.

At a kink autograd takes one of many slopes (0 for relu at 0). If the Lagrangian is stationary with it, that is a proof:
the slope lies between the one-sided ones. If not, another slope may do, and nothing is shown either way.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lagcompile.runtime.kinks import AT, KINKS, is_norm_of_sizes

LISTED = 3
MOST = 200
"""Maximum number of kinks recorded for each operation; of further ones only their presence is."""


@dataclass(frozen=True)
class Kink:
    """One number at a kink of one operation.

    Attributes:
        place: "stage f0" or "the loss".
        operation: ATen name.
        unit: which number of the operation's argument, such as "example 0, feature 3".
        distance: from the kink.
        touched: leaves whose gradient depends on the slope taken here.
    """

    place: str
    operation: str
    unit: str
    distance: float
    touched: frozenset[tuple[str, str]]

    def __str__(self) -> str:
        return f"{self.operation} in {self.place}, {self.unit}"


class KinkRecorder(TorchDispatchMode):
    """Record arguments that lie at a kink; `place` says where the operations that follow belong."""

    def __init__(self) -> None:
        super().__init__()
        self.place = ""
        self._found: list[tuple[str, str, Tensor, list[int], list[float]]] = []

    @contextmanager
    def at(self, place: str) -> Iterator[None]:
        """Operations inside belong to this place."""
        self.place = place
        with self:
            yield

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func.overloadpacket).removeprefix("aten.")
        if name in KINKS or is_norm_of_sizes(name, args):
            self._look(name, args)
        return func(*args, **(kwargs or {}))

    def _look(self, name: str, args: Sequence[Any]) -> None:
        reached = [a for a in args if isinstance(a, Tensor) and a.requires_grad]
        if not reached:
            return
        plain = [a.detach() if isinstance(a, Tensor) else a for a in args]
        margin = KINKS["abs" if name == "linalg_vector_norm" else name](plain)
        if margin is None or not margin.numel():
            return
        flat = margin.reshape(-1)
        near = torch.nonzero(flat <= AT).flatten()[: MOST + 1].tolist()
        if near:
            self._found.append((self.place, name, reached[0], near, flat[near].tolist()))

    def kinks(self, leaves: Mapping[tuple[str, str], Tensor]) -> tuple[Kink, ...]:
        """Return the kinks, with the leaves that each touches."""
        found: list[Kink] = []
        for place, name, argument, near, distances in self._found:
            gradients: Sequence[Tensor | None] = torch.autograd.grad(
                argument.sum(), list(leaves.values()), retain_graph=True, allow_unused=True
            )
            touched = frozenset(k for k, g in zip(leaves, gradients, strict=True) if g is not None)
            for position, distance in zip(near[:MOST], distances[:MOST], strict=True):
                found.append(Kink(place, name, _unit(position, argument.shape), distance, touched))
        return tuple(found)


def _unit(position: int, shape: Sequence[int]) -> str:
    if position >= torch.Size(shape).numel():
        return f"entry {position}"
    index = [int(i) for i in torch.unravel_index(torch.tensor(position), tuple(shape) or (1,))]
    if len(index) < 2:
        return f"entry {index[0]}"
    return f"example {index[0]}, feature {index[1] if len(index) == 2 else tuple(index[1:])}"


def sentence(kinks: Sequence[Kink]) -> str:
    """Describe kinks in words."""
    more = len(kinks) - LISTED
    rest = f"; and {more if more < MOST - LISTED else 'many'} more" if more > 0 else ""
    return "; ".join(str(k) for k in kinks[:LISTED]) + rest
