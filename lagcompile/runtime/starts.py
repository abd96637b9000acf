"""Values at which states start: one case for each start of `ir/axes.py`.

In: a start, a tensor of the shape (states, rows, ...). Out: `started`. Invariant: the table in `started` is total;
values lie where the record says, and what keeps a domain is applied to them behind it.
"""

from __future__ import annotations

from typing import assert_never

import torch
from torch import Tensor

from lagcompile.ir.axes import Forward, Observed, Start, UnitSphere, Zeros
from lagcompile.ir.base import ProgramError


def started(start: Start, like: Tensor, generator: torch.Generator) -> Tensor | None:
    """Return values that a start gives by itself; None where a forward pass gives them.

    Raises:
        ProgramError: they are observed, which a program does not hold.
    """
    match start:
        case Forward():
            return None
        case Zeros():
            return torch.zeros_like(like)
        case UnitSphere():
            wide = torch.float64 if like.dtype == torch.float64 else torch.float32
            drawn = torch.randn(like.shape, generator=generator, device=like.device, dtype=wide)
            flat = drawn.flatten(2) if drawn.dim() > 2 else drawn.unsqueeze(-1)
            norm = torch.linalg.vector_norm(flat, dim=2).reshape(*drawn.shape[:2], *(1 for _ in drawn.shape[2:]))
            return (drawn / norm).to(like.dtype)
        case Observed():
            raise ProgramError("states that start from observed values need trajectories (method gauss_newton)")
    assert_never(start)
