"""Is the gradient that autograd gives the derivative of the function? A probe along random directions.

In: tensors, their gradients, a function of them. Out: nothing, or one sentence. Invariant: tensors are moved in place
and moved back; steps are relative to each tensor's size, so that scaling a network or a loss changes no answer.

A gradient that was stopped on purpose or by mistake (detach, no_grad, a custom backward) leaves identities between
gradients intact: both sides lack the same part. Only differences of the function itself show it.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from statistics import median

import torch
from torch import Tensor

from lagcompile.frontend.graph import Node
from lagcompile.frontend.stages import Network

DIRECTIONS = 2
STEPS = (1e-6, 1e-5, 1e-7)
"""Steps relative to a tensor's size: a kink that one of them crosses is not crossed by all."""
AGREE = 1e-4
"""Relative difference of derivative and quotient."""
ROUNDING = 1e-14
"""Relative rounding of the function's value."""
NAMED = 3
PATTERN = 65_537
"""Random numbers of a direction; they repeat in larger tensors, since drawing them takes longer than using them."""
MOST = 20
"""Number of tensors up to which each is tried by itself where the whole disagrees."""


class Probe:
    """Random directions in some tensors, and the slopes of a function along them."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self.tensors = tensors
        sizes = {n: float(t.detach().abs().square().mean().sqrt()) if t.numel() else 0.0 for n, t in tensors.items()}
        usual = median([s for s in sizes.values() if s > 0.0] or [1.0])
        self._sizes = {n: s or usual for n, s in sizes.items()}
        self._slopes: dict[tuple[str, int], float] = {}

    def _direction(self, name: str, number: int) -> Tensor:
        """Draw the same numbers each time: directions are as large as the tensors and are not kept."""
        like = self.tensors[name].detach()
        generator = torch.Generator().manual_seed(zlib.crc32(f"{number} {name}".encode()))
        drawn = torch.randn(min(PATTERN, like.numel()), generator=generator, dtype=like.dtype) * self._sizes[name]
        return drawn.repeat(-(-like.numel() // PATTERN))[: like.numel()].view(like.shape)

    def add(self, name: str, gradient: Tensor) -> None:
        """Note the gradient in one tensor."""
        for number in range(DIRECTIONS):
            slope = (gradient.detach().conj() * self._direction(name, number)).sum()
            self._slopes[name, number] = float(slope.real)

    @contextmanager
    def _moved(self, names: Sequence[str], number: int, step: float) -> Iterator[None]:
        def move(by: float) -> None:
            with torch.no_grad():
                for name in names:
                    self.tensors[name].add_(self._direction(name, number), alpha=by)

        move(step)
        try:
            yield
        finally:
            move(-step)

    def disagreement(self, value: Callable[[], float], *, size: float = 0.0) -> str:
        """Say what speaks against the gradients that were noted; empty where nothing does.

        Args:
            value: the function at the tensors as they are.
            size: of the terms that the value is a sum of, where they cancel.
        """
        names, here = [n for n in self.tensors if (n, 0) in self._slopes], value()
        for number in range(DIRECTIONS if names else 0):
            slope = math.fsum(self._slopes[n, number] for n in names)
            quotient = self._quotient(names, number, value, here, slope, size)
            if quotient is not None:
                wrong = [n for n in names[:MOST] if self._alone(n, number, value, here, size)]
                more = ", ..." if len(wrong) > NAMED else ""
                where = f" (in {', '.join(wrong[:NAMED])}{more})" if wrong else ""
                return f"along a random direction autograd gives {slope:.3g}, differences give {quotient:.3g}{where}"
        return ""

    def variation(self, value: Callable[[], float]) -> float:
        """By how much the function changes when tensors move by about their own size; at least 1 where it breaks."""
        names, here, found = list(self.tensors), value(), 0.0
        for number in range(DIRECTIONS):
            for step in (1.0, -1.0):
                with self._moved(names, number, step):
                    change = abs(value() - here)
                found = max(found, change if math.isfinite(change) else 1.0)
        return found

    def _alone(self, name: str, number: int, value: Callable[[], float], here: float, size: float) -> bool:
        return self._quotient([name], number, value, here, self._slopes[name, number], size) is not None

    def _quotient(
        self, names: Sequence[str], number: int, value: Callable[[], float], here: float, slope: float, size: float
    ) -> float | None:
        """The quotient of differences that contradicts a slope; None where one agrees with it."""
        quotient = math.nan
        for step in STEPS:
            with self._moved(names, number, step):
                up = value()
            with self._moved(names, number, -step):
                down = value()
            quotient = (up - down) / (2 * step)
            noise = ROUNDING * max(abs(up), abs(down), size) / step
            if abs(quotient - slope) <= AGREE * max(abs(quotient), abs(slope)) + noise:
                return None
            sides = (up - here) / step, (here - down) / step
            if min(sides) - noise <= slope <= max(sides) + noise:  # at a kink any slope between the one-sided ones
                return None
        return quotient


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
