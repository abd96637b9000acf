"""How far tensors, and outputs of a model, are apart.

In: what was expected and what was got. Out: largest differences. Invariant: infinite where structure, shapes or types
differ, NaN where an entry is not a number.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from lagcompile.frontend.structure import leaves, opened


def top(value: Tensor) -> float:
    """Return the largest size of an entry; NaN where one is not a number."""
    return float(value.detach().abs().max()) if value.numel() else 0.0


def apart(got: Tensor, expected: Tensor) -> float:
    """Largest difference; infinite where shapes or types differ, NaN where an entry is not a number."""
    if got.shape != expected.shape or got.dtype != expected.dtype:
        return math.inf
    equal = got == expected  # equal infinities do not differ
    if not (got.is_floating_point() or got.is_complex()):
        return 0.0 if bool(equal.all()) else math.inf
    return top(torch.where(equal, 0.0, (got - expected).abs()))


def relative(off: float, scale: float) -> float:
    """A difference over the size of what differs."""
    return 0.0 if off == scale == 0.0 else off / scale if scale != 0.0 else math.inf


def outputs_apart(expected: Any, got: Any) -> tuple[float, float]:
    """Largest relative difference of the outputs, and their size."""
    a, b = leaves(opened(expected)), leaves(opened(got))
    if len(a) != len(b) or any(isinstance(x, Tensor) != isinstance(y, Tensor) for x, y in zip(a, b, strict=True)):
        return math.inf, 1.0
    others = all(_same(x, y) for x, y in zip(a, b, strict=True) if not isinstance(x, Tensor))
    found: list[tuple[float, float]] = [] if others else [(math.inf, 1.0)]
    for x, y in zip(a, b, strict=True):
        if isinstance(x, Tensor):
            size = top(torch.where(x.isinf(), 0.0, x.abs()) if x.dtype != torch.bool else x.double())
            off = apart(y.detach(), x.detach())
            found.append((relative(off, size), size))
    worst = max(found, key=lambda pair: math.inf if math.isnan(pair[0]) else pair[0], default=(0.0, 0.0))
    return worst[0], max((size for _, size in found), default=0.0)


def _same(x: Any, y: Any) -> bool:
    """Whether leaves that are no tensors are equal; one that names float32 names float64 in a copy in float64."""
    wide = [torch.float64 if isinstance(v, torch.dtype) and v.is_floating_point else v for v in (x, y)]
    return bool(wide[0] == wide[1])
