"""Operations without a derivative everywhere, and how far their arguments are from such a point.

In: the name and arguments of an ATen operation. Out: distances, one for each number or group of numbers. Invariant:
`None` means that the distance is not known here, never that there is no kink.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

AT = 1e-7
"""Distance from a kink below which a number counts as lying at it (linear programs leave about 1e-9)."""
Margin = Callable[[Sequence[Any]], Tensor | None]


def _first(args: Sequence[Any]) -> Tensor | None:
    return args[0].abs()


def _between(args: Sequence[Any]) -> Tensor | None:
    """Distance from the ends of clamp(x, low, high) and similar operations."""
    ends = [a for a in args[1:3] if isinstance(a, int | float)]
    ends = ends or ([-1.0, 1.0] if len(args) == 1 else [])
    if not ends:
        return None
    return torch.stack([(args[0] - e).abs() for e in ends]).amin(0)


def _apart(args: Sequence[Any]) -> Tensor | None:
    return (args[0] - args[1]).abs()


def _leaders(args: Sequence[Any]) -> Tensor | None:
    """Gap between the two largest numbers along the reduced axes (for amin: smallest)."""
    x = args[0]
    axes = args[1] if len(args) > 1 else None
    if axes is None or (isinstance(axes, list | tuple) and not axes):
        flat = x.reshape(1, -1)
    elif isinstance(axes, int):
        flat = x.movedim(axes, -1)
    else:
        count = len(axes)
        flat = x.movedim(tuple(axes), tuple(range(-count, 0))).flatten(-count)
    if flat.shape[-1] < 2:
        return None
    pair = flat.topk(2, dim=-1).values
    return pair[..., 0] - pair[..., 1]


def _shrunk(args: Sequence[Any]) -> Tensor | None:
    return (args[0].abs() - (args[1] if len(args) > 1 else 0.5)).abs()


def _three(args: Sequence[Any]) -> Tensor | None:
    return (args[0].abs() - 3.0).abs()


def _unknown(args: Sequence[Any]) -> Tensor | None:
    return None


KINKS: dict[str, Margin] = {
    **dict.fromkeys(("relu", "leaky_relu", "_prelu_kernel", "rrelu_with_noise", "abs", "sign", "heaviside"), _first),
    **dict.fromkeys(("hardtanh", "clamp", "clamp_min", "clamp_max", "threshold"), _between),
    **dict.fromkeys(("maximum", "minimum", "fmax", "fmin", "gt", "ge", "lt", "le"), _apart),
    **dict.fromkeys(("max", "amax"), _leaders),
    **dict.fromkeys(("softshrink", "hardshrink"), _shrunk),
    **dict.fromkeys(("hardsigmoid", "hardswish"), _three),
    **dict.fromkeys(
        ("min", "amin", "sort", "topk", "median", "kthvalue", "cummax", "max_pool2d_with_indices", "floor", "ceil"),
        _unknown,
    ),
    **dict.fromkeys(("max_pool3d_with_indices", "adaptive_max_pool2d", "round", "trunc", "remainder"), _unknown),
}
"""Operations with kinks or jumps, and the distance of their arguments from them."""
_SIZES = (1, float("inf"), float("-inf"))


def is_norm_of_sizes(name: str, args: Sequence[Any]) -> bool:
    """Whether an operation is a norm that sums or compares |x|, which has a kink wherever an entry is zero."""
    return name == "linalg_vector_norm" and len(args) > 1 and args[1] in _SIZES
