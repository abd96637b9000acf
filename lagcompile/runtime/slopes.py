"""Code with chosen slopes at its kinks: relu at 0 may have any slope between 0 and 1, |x| any between -1 and 1.

In: any PyTorch code, while `Slopes` is active, and one number in [0, 1] for each argument at a kink. Out: the same
values, with derivatives that take these slopes. Invariant: values do not change; away from kinks neither do
derivatives. Such a derivative is an element of the generalised gradient's product form (Clarke 1983, theorem 2.3.9):
where the Lagrangian vanishes with some of them, the point is stationary in that sense.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from lagcompile.runtime.kinks import AT

MOST = 60
"""Number of kinks up to which slopes are searched for."""
STEPS = 15
"""Gauss-Newton steps from one start."""
FEW = 10
"""Slopes up to which three starts are tried: the residual is not affine in all of them together."""


class Slopes(TorchFunctionMode):
    """Take slopes at kinks from a vector, in the order in which the kinks are met.

    Attributes:
        seen: arguments at kinks that were met and given a slope.
        used: numbers taken from the vector; more than `seen` where several largest entries share a maximum.
    """

    def __init__(self, slopes: Tensor | None = None) -> None:
        """Take slopes from a vector; None takes one half everywhere, to count."""
        super().__init__()
        self.slopes = slopes
        self.seen = self.used = 0

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type[Any]],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        given = dict(kwargs or {})
        if func.__name__ in _MAXIMA and len(args) == 1 and not given and args[0].requires_grad:
            return self._largest(args[0], func(*args))
        rule = _RULES.get(func.__name__)
        x = args[0] if args else given.get("input")
        if rule is None or not isinstance(x, Tensor) or not x.requires_grad:
            return func(*args, **given)
        if func.__name__ == "l1_loss":
            return self._l1(func, args, given)
        ends = rule(args, given)
        return func(*args, **given) if ends is None else self._bent(x, func(*args, **given), ends)

    def _next(self, count: int) -> Tensor:
        start, self.used = self.used, self.used + count
        if self.slopes is None:
            return torch.full((count,), 0.5, dtype=torch.float64)
        return self.slopes[start : self.used]

    def _bent(self, x: Tensor, value: Tensor, ends: Sequence[tuple[float, float, float]]) -> Tensor:
        """Return the value, with the slopes chosen at (place, slope below, slope above)."""
        slope = torch.full_like(x, ends[0][1], requires_grad=False)
        plain = x.detach()
        for place, _, above in ends:
            slope = torch.where(plain > place, above, slope)
        for place, below, above in ends:
            at = (plain - place).abs() <= AT
            count = int(at.sum())
            if count:
                self.seen += count
                slope[at] = (below + (above - below) * self._next(count)).to(slope.dtype)
        return value.detach() + slope * (x - plain)

    def _l1(self, func: Callable[..., Any], args: tuple[Any, ...], given: dict[str, Any]) -> Tensor:
        x, target = args[0], args[1]
        size = self._bent(x - target, (x - target).abs(), _SIZE)
        reduction = given.get("reduction", "mean")
        return size.mean() if reduction == "mean" else size.sum() if reduction == "sum" else size

    def _largest(self, x: Tensor, value: Tensor) -> Tensor:
        """Return the largest entry, with a convex combination of the slopes of the entries that share it."""
        plain = x.detach()
        near = plain.max() - plain <= AT
        count = int(near.sum())
        if count < 2:
            return value
        self.seen += 1
        moves = (x - plain)[near]
        mixed = moves[0]
        for k, slope in enumerate(self._next(count - 1)):  # a tournament: affine in each slope
            mixed = mixed + slope * (moves[k + 1] - mixed)
        return value.detach() + mixed


_MAXIMA = frozenset({"amax", "max"})
"""Return the largest entry of a whole tensor."""
_SIZE = ((0.0, -1.0, 1.0),)
Ends = Sequence[tuple[float, float, float]]
Rule = Callable[[tuple[Any, ...], Mapping[str, Any]], Ends | None]


def _relu(args: tuple[Any, ...], given: Mapping[str, Any]) -> Ends | None:
    return ((0.0, 0.0, 1.0),)


def _size(args: tuple[Any, ...], given: Mapping[str, Any]) -> Ends | None:
    return _SIZE


def _leaky(args: tuple[Any, ...], given: Mapping[str, Any]) -> Ends | None:
    below = args[1] if len(args) > 1 else given.get("negative_slope", 0.01)
    return ((0.0, float(below), 1.0),)


def _clamp(args: tuple[Any, ...], given: Mapping[str, Any]) -> Ends | None:
    low = args[1] if len(args) > 1 else given.get("min", given.get("min_val"))
    high = args[2] if len(args) > 2 else given.get("max", given.get("max_val"))
    if isinstance(low, Tensor) or isinstance(high, Tensor) or (low is None and high is None):
        return None
    if low is None:
        return ((float(high), 1.0, 0.0),)
    return ((float(low), 0.0, 1.0), *(() if high is None else ((float(high), 1.0, 0.0),)))


def _clamp_max(args: tuple[Any, ...], given: Mapping[str, Any]) -> Ends | None:
    return _clamp((args[0], None, *args[1:]), given)


def _hardtanh(args: tuple[Any, ...], given: Mapping[str, Any]) -> Ends | None:
    found = _clamp(args, given)
    return ((-1.0, 0.0, 1.0), (1.0, 1.0, 0.0)) if found is None else found


def _relu6(args: tuple[Any, ...], given: Mapping[str, Any]) -> Ends | None:
    return ((0.0, 0.0, 1.0), (6.0, 1.0, 0.0))


_RULES: dict[str, Rule] = {
    **dict.fromkeys(("relu", "relu_"), _relu),
    **dict.fromkeys(("abs", "absolute", "__abs__", "l1_loss"), _size),
    **dict.fromkeys(("clamp", "clip", "clamp_min"), _clamp),
    "clamp_max": _clamp_max,
    "leaky_relu": _leaky,
    "hardtanh": _hardtanh,
    "relu6": _relu6,
}


def fit_slopes(residual: Callable[[Tensor], Tensor], count: int, tolerance: float) -> Tensor:
    """Find slopes in [0, 1] with a small residual, by Gauss-Newton steps within the bounds.

    The residual is affine in each slope alone, so that differences between its ends are exact derivatives.

    Args:
        residual: slopes (count,) -> a vector that should vanish.
        count: number of slopes.
        tolerance: largest entry of the residual at which to stop looking.
    """
    best, least = torch.full((count,), 0.5, dtype=torch.float64), np.inf
    for start in (0.5, 0.05, 0.95) if count <= FEW else (0.5,):
        found = _improved(residual, torch.full((count,), start, dtype=torch.float64), tolerance)
        worst = float(residual(found).detach().abs().max())
        if worst < least:
            best, least = found, worst
        if least <= tolerance:
            break
    return best


def _improved(residual: Callable[[Tensor], Tensor], slopes: Tensor, tolerance: float) -> Tensor:
    from scipy.optimize import lsq_linear

    value = residual(slopes).detach()
    for _ in range(STEPS):
        if float(value.abs().max()) <= tolerance:
            break
        columns = []
        for j in range(len(slopes)):
            ends = [slopes.index_fill(0, torch.tensor(j), end) for end in (0.0, 1.0)]
            columns.append(residual(ends[1]).detach() - residual(ends[0]).detach())
        matrix = torch.stack(columns, dim=1).numpy()
        goal = (matrix @ slopes.numpy()) - value.numpy()
        new = torch.from_numpy(np.clip(lsq_linear(matrix, goal, bounds=(0.0, 1.0), method="bvls").x, 0.0, 1.0))
        length = 1.0
        while length > 1e-3:
            trial = slopes + length * (new - slopes)
            at = residual(trial).detach()
            if float(at.norm()) < float(value.norm()):
                break
            length *= 0.5
        else:
            break
        slopes, value = trial, at
    return slopes
