"""Forward-mode derivatives without the warning that torch's own first call raises.

In: a function, primals, tangents. Out: value and directional derivative, as `torch.func.jvp`. Invariant: nothing but
the first call differs from `torch.func.jvp`; that call loads torch's scripted formulas, which torch itself reports as
deprecated.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from lagcompile.ir.alone import without_warnings


@functools.cache
def _load() -> None:
    one = torch.ones(())
    with without_warnings(DeprecationWarning):
        torch.func.jvp(torch.sin, (one,), (one,))


def derivative(function: Callable[..., Tensor], at: tuple[Tensor, ...], along: tuple[Tensor, ...]) -> Tensor:
    """Directional derivative of a function at a point."""
    _load()
    found: Tensor = torch.func.jvp(function, at, along)[1]
    return found
