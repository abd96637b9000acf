"""Is the gradient that autograd gives the derivative of the function? A probe along random directions.

In: tensors, their gradients, a function of them. Out: nothing, or one sentence. Invariant: tensors are moved in place
and moved back; steps are relative to each tensor's size, so that scaling a network or a loss changes no answer.

A gradient that was stopped on purpose or by mistake (detach, no_grad, a custom backward) leaves identities between
gradients intact: both sides lack the same part. Only differences of the function itself show it. One direction moves
every tensor by its size, another one moves each so far that it changes the function as much as the others do: what is
missing in a small tensor is not hidden behind a large one.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from itertools import pairwise
from statistics import median

import torch
from torch import Tensor, nn

from lagcompile.frontend.graph import Node
from lagcompile.frontend.stages import Network

STEPS = (1e-5, 1e-6, 1e-7, 1e-8)
"""Relative to a tensor's size. A kink that one of them crosses is not crossed by all."""
AGREE = 1e-6
"""Relative difference of derivative and quotient."""
ROUNDING = 2e-15
"""Relative rounding of the function's value, at least."""
SURE = 0.1
"""Quotients of two steps say the same where they differ by so little of their distance from the slope."""
NOISE = 1e-2
"""Relative difference that rounding may explain, where quotients of different steps say different things."""
LEVELLED = 1e3
"""Largest factor by which a tensor is moved further than by its size."""
NEARBY = 1e-4
"""Relative distance at which the point is no longer at a kink."""
NAMED = 3
PATTERN = 65_537
"""Random numbers of a direction; they repeat in larger tensors, since drawing them takes longer than using them."""
MOST = 20
"""Number of tensors up to which each is tried by itself where the whole disagrees."""


class Probe:
    """Random directions in some tensors, and the slopes of a function along them."""

    def __init__(self, tensors: Mapping[str, Tensor], still: Mapping[str, int]) -> None:
        """Take tensors by name, and of some the row that stays as it is."""
        self.tensors, self._still = tensors, still
        sizes = {n: float(t.detach().abs().square().mean().sqrt()) if t.numel() else 0.0 for n, t in tensors.items()}
        usual = median([s for s in sizes.values() if s > 0.0] or [1.0])
        self._sizes = {n: s or usual for n, s in sizes.items()}
        self._slopes: dict[str, tuple[float, float]] = {}
        """By name: the slope along the tensor's direction, and what slopes are like there."""

    def _direction(self, name: str, number: int = 0) -> Tensor:
        """Draw the same numbers each time: directions are as large as the tensors and are not kept."""
        like = self.tensors[name].detach()
        generator = torch.Generator().manual_seed(zlib.crc32(f"{number} {name}".encode()))
        drawn = torch.randn(min(PATTERN, like.numel()), generator=generator, dtype=like.dtype)
        drawn = (drawn + drawn.sgn()) * (0.5 * self._sizes[name])  # no number is so small that it says nothing
        drawn = drawn.repeat(-(-like.numel() // PATTERN))[: like.numel()].view(like.shape)
        if name in self._still:
            drawn[self._still[name]] = 0.0
        return drawn

    def add(self, name: str, gradient: Tensor) -> None:
        """Note the gradient in one tensor."""
        g = gradient.detach().to_dense()
        slope = float((g.conj() * self._direction(name)).sum().real)
        self._slopes[name] = slope, float(torch.linalg.vector_norm(g)) * self._sizes[name]

    @contextmanager
    def _moved(self, factors: Mapping[str, float], step: float, number: int = 0) -> Iterator[None]:
        def move(by: float) -> None:
            with torch.no_grad():
                for name, factor in factors.items():
                    self.tensors[name].add_(self._direction(name, number), alpha=by * factor)

        move(step)
        try:
            yield
        finally:
            move(-step)

    @contextmanager
    def nearby(self) -> Iterator[None]:
        """Stay at another point close by, where nothing is at a kink; gradients are to be noted anew."""
        with self._moved(dict.fromkeys(self.tensors, 1.0), NEARBY, number=1):
            yield

    def disagreement(self, value: Callable[[], float]) -> str:
        """Say what speaks against the gradients that were noted; empty where nothing does.

        Args:
            value: the function at the tensors as they are.
        """
        most = max((size for _, size in self._slopes.values()), default=0.0)
        levelled = {n: min(LEVELLED, most / size) if size > 0.0 else LEVELLED for n, (_, size) in self._slopes.items()}
        for factors in (dict.fromkeys(self._slopes, 1.0), levelled):
            said = self._along(factors, value)
            if said:
                wrong = [n for n in [*factors][:MOST] if self._along({n: factors[n]}, value)]
                more = ", ..." if len(wrong) > NAMED else ""
                return said + (f" (in {', '.join(wrong[:NAMED])}{more})" if wrong else "")
        return ""

    def variation(self, value: Callable[[], float]) -> float:
        """By how much the function changes when tensors move by about their own size; at least 1 where it breaks."""
        here, found = value(), 0.0
        for number, step in ((0, 1.0), (0, -1.0), (1, 1.0), (1, -1.0)):
            with self._moved(dict.fromkeys(self.tensors, 1.0), step, number):
                change = abs(value() - here)
            found = max(found, change if math.isfinite(change) else 1.0)
        return found

    def _along(self, factors: Mapping[str, float], value: Callable[[], float]) -> str:
        """Say what speaks against the slope along one direction; empty where quotients of differences agree with it."""
        if not factors:
            return ""
        slope = math.fsum(f * self._slopes[n][0] for n, f in factors.items())
        found: list[float] = []
        for step in STEPS:
            with self._moved(factors, step):
                up = value()
            with self._moved(factors, -step):
                down = value()
            found.append((up - down) / (2 * step))
            size, noise = max(abs(found[-1]), abs(slope)), ROUNDING * max(abs(up), abs(down)) / step
            if abs(found[-1] - slope) <= AGREE * size + noise:
                return ""
        told = f"along a random direction autograd gives {slope:.9g}, differences give "
        if not all(map(math.isfinite, (slope, *found))):
            return f"{told}{found[-1]:.9g}"
        for a, b in pairwise(found):
            if abs(a - b) <= SURE * min(abs(a - slope), abs(b - slope)):
                return f"{told}{b:.9g}"
        least = min(found, key=lambda q: abs(q - slope))
        if abs(least - slope) > NOISE * max(abs(least), abs(slope)):
            return f"{told}{min(found):.3g} to {max(found):.3g}, by the step: the function is rough there"
        return ""


def padding_rows(model: nn.Module) -> dict[str, int]:
    """Return the row of each embedding that stands for padding: PyTorch gives it no gradient, as it is to stay."""
    rows = {m.weight: m.padding_idx for m in model.modules() if isinstance(m, nn.Embedding | nn.EmbeddingBag)}
    return {n: row for n, p in model.named_parameters() if (row := rows.get(p)) is not None}


def not_the_derivative(network: Network, said: str) -> str:
    """The reason why nothing was shown, with the places where the network stops gradients."""
    stops = [_place(n) for n in network.partition.graph.nodes if _stops(n)]
    more = ", ..." if len(stops) > NAMED else ""
    where = (
        f"{', '.join(stops[:NAMED])}{more}" if stops else "a custom backward, or a detach inside a layer or the loss"
    )
    return f"the gradient is not the derivative of the loss: {said}; look at {where}"


def _stops(node: Node) -> bool:
    return any(word in f"{node.target} {node.operation}" for word in ("detach", "set_grad_enabled", "no_grad"))


def _place(node: Node) -> str:
    return f"a stopped gradient in {node.module or 'the model'}" + (f" ({node.source})" if node.source else "")
