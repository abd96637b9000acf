"""Bounds by a primal-dual barrier (interior point).

In: bounds and the present point. Out: diagonal curvature and gradient terms for the Gauss-Newton model, and the longest
step that stays inside. Invariant: every bounded variable stays strictly inside its bounds.

Why a barrier and not an active set: a barrier only adds a diagonal to blocks that are there anyway, so the cost stays
linear in the number of stages and all starts keep one shape, while working sets would differ from start to start and
cost a factorisation for each change.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

_FRACTION = 0.995
_SPREAD = 1e8


def push_inside(value: Tensor, lower: Tensor, upper: Tensor, margin: float = 1e-2) -> Tensor:
    """Values moved strictly inside their bounds, by a part of the width or of the bound's size."""
    width = upper - lower
    room_low = torch.where(torch.isfinite(width), margin * width, margin * lower.abs().clamp_min(1e-2))
    room_high = torch.where(torch.isfinite(width), margin * width, margin * upper.abs().clamp_min(1e-2))
    low = torch.where(torch.isfinite(lower), lower + room_low, lower)
    high = torch.where(torch.isfinite(upper), upper - room_high, upper)
    return torch.minimum(torch.maximum(value, low), high)


@dataclass(frozen=True, eq=False)
class Barrier:
    """Barrier terms of one group of variables; all tensors have the variables' shape, in scaled units.

    Attributes:
        below: distance to the lower bound, infinite where there is none.
        above: distance to the upper bound.
        dual_below: multiplier of the lower bound, 0 where there is none.
        dual_above: multiplier of the upper bound.
    """

    below: Tensor
    above: Tensor
    dual_below: Tensor
    dual_above: Tensor

    @classmethod
    def at(cls, value: Tensor, lower: Tensor, upper: Tensor, scale: Tensor, weight: Tensor) -> Barrier:
        """Barrier at a point; `weight` is the barrier parameter of each start, broadcastable to `value`."""
        below, above = (value - lower) / scale, (upper - value) / scale
        return cls(below, above, weight / below, weight / above)

    def moved(self, value: Tensor, lower: Tensor, upper: Tensor, scale: Tensor) -> Barrier:
        """The barrier at a new point with the same multipliers."""
        return Barrier((value - lower) / scale, (upper - value) / scale, self.dual_below, self.dual_above)

    @property
    def curvature(self) -> Tensor:
        """Diagonal to be added to the Hessian."""
        return self.dual_below / self.below + self.dual_above / self.above

    def gradient(self, weight: Tensor) -> Tensor:
        """Gradient of the logarithmic barrier."""
        return weight / self.above - weight / self.below

    def value(self, weight: Tensor) -> Tensor:
        """Logarithmic barrier, summed over all but the first axis."""
        one = torch.ones_like(self.below)
        low = torch.where(torch.isfinite(self.below), self.below, one).log()
        high = torch.where(torch.isfinite(self.above), self.above, one).log()
        return -(weight * (low + high)).flatten(1).sum(1)

    def longest(self, step: Tensor) -> Tensor:
        """(starts,) longest factor of a step that stays inside."""
        down = torch.where(step < 0, _FRACTION * self.below / (-step).clamp_min(1e-300), float("inf"))
        up = torch.where(step > 0, _FRACTION * self.above / step.clamp_min(1e-300), float("inf"))
        return torch.minimum(down, up).flatten(1).amin(1).clamp_max(1.0)

    def duals_after(self, step: Tensor, weight: Tensor, moved: Barrier) -> Barrier:
        """Multipliers after the full step, kept positive and near weight / distance."""
        low = weight / self.below - self.dual_below / self.below * step
        high = weight / self.above + self.dual_above / self.above * step
        return Barrier(
            moved.below,
            moved.above,
            _near(torch.maximum(low, 0.005 * self.dual_below), weight / moved.below),
            _near(torch.maximum(high, 0.005 * self.dual_above), weight / moved.above),
        )

    def rows(self, index: Tensor) -> Barrier:
        """Some of the starts."""
        return Barrier(self.below[index], self.above[index], self.dual_below[index], self.dual_above[index])

    def store(self, index: Tensor, other: Barrier) -> None:
        """Overwrite some of the starts."""
        self.below[index], self.above[index] = other.below, other.above
        self.dual_below[index], self.dual_above[index] = other.dual_below, other.dual_above


def _near(dual: Tensor, centre: Tensor) -> Tensor:
    return torch.minimum(torch.maximum(dual, centre / _SPREAD), centre * _SPREAD)
