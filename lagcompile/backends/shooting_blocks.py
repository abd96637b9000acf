"""Symmetric positive definite block-tridiagonal systems by block cyclic reduction.

In: diagonal and lower blocks with any batch shape. Out: a factor whose `solve` serves many right-hand sides. Invariant:
both cost a number of batched calls that grows with the logarithm of the number of block rows, and a number of
operations that grows linearly (Heller 1976; stable without pivoting because all reduced diagonals are Schur
complements of an SPD matrix).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class _Level:
    """One reduction: inverse of the odd diagonal blocks and their couplings to the even neighbours."""

    inverse: Tensor
    left: Tensor
    right: Tensor | None


@dataclass(frozen=True, eq=False)
class BlockTridiagonal:
    """Factor of a block-tridiagonal matrix with `count` block rows of size n.

    Attributes:
        levels: the reductions, finest first.
        last: inverse of the one block that remains.
        ok: batch-shaped bool, False where the matrix is not finite or a block is singular.
    """

    levels: tuple[_Level, ...]
    last: Tensor
    ok: Tensor

    @classmethod
    def factor(cls, diagonal: Tensor, lower: Tensor) -> BlockTridiagonal:
        """Factor the matrix.

        Args:
            diagonal: (..., count, n, n) symmetric diagonal blocks.
            lower: (..., count - 1, n, n); block k couples block row k + 1 to block column k.
        """
        levels = []
        ok = torch.ones(diagonal.shape[:-3], dtype=torch.bool, device=diagonal.device)
        while diagonal.shape[-3] > 1:
            count = diagonal.shape[-3]
            odd = count // 2
            inverse, info = torch.linalg.inv_ex(diagonal[..., 1::2, :, :])
            ok = ok & (info == 0).all(-1)
            left = lower[..., 0::2, :, :][..., :odd, :, :]
            over = lower[..., 1::2, :, :]
            reached = over.shape[-3]
            scaled = inverse @ left
            even = diagonal[..., 0::2, :, :].clone()
            even[..., :odd, :, :] -= left.mT @ scaled
            if reached:
                across = over @ inverse[..., :reached, :, :]
                even[..., 1 : reached + 1, :, :] -= across @ over.mT
                lower = -(across @ left[..., :reached, :, :])
            else:
                lower = lower[..., :0, :, :]
            levels.append(_Level(inverse, left, over if reached else None))
            diagonal = 0.5 * (even + even.mT)
        last, info = torch.linalg.inv_ex(diagonal[..., 0, :, :])
        ok = ok & (info == 0) & torch.isfinite(last).flatten(-2).all(-1)
        return cls(tuple(levels), last, ok)

    def solve(self, rhs: Tensor) -> Tensor:
        """Solve for (..., count, n, m) right-hand sides."""
        kept: list[Tensor] = []
        for level in self.levels:
            odd = level.inverse @ rhs[..., 1::2, :, :]
            kept.append(odd)
            even = rhs[..., 0::2, :, :].clone()
            even[..., : odd.shape[-3], :, :] -= level.left.mT @ odd
            if level.right is not None:
                reached = level.right.shape[-3]
                even[..., 1 : reached + 1, :, :] -= level.right @ odd[..., :reached, :, :]
            rhs = even
        x = (self.last @ rhs[..., 0, :, :])[..., None, :, :]
        for level, odd in zip(reversed(self.levels), reversed(kept), strict=True):
            coupled = level.left @ x[..., : odd.shape[-3], :, :]
            if level.right is not None:
                reached = level.right.shape[-3]
                coupled[..., :reached, :, :] += level.right.mT @ x[..., 1 : reached + 1, :, :]
            full = torch.empty(
                (*x.shape[:-3], x.shape[-3] + odd.shape[-3], *x.shape[-2:]), dtype=x.dtype, device=x.device
            )
            full[..., 0::2, :, :] = x
            full[..., 1::2, :, :] = odd - level.inverse @ coupled
            x = full
        return x
