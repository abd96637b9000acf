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

_DENSE = 48
"""Rows below which the rest is inverted as one dense matrix: one call instead of several levels of small ones."""


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
        last: inverse of the few block rows that remain, as one dense matrix.
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
        n = diagonal.shape[-1]
        ok = torch.ones(diagonal.shape[:-3], dtype=torch.bool, device=diagonal.device)
        while diagonal.shape[-3] > max(1, _DENSE // n):
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
        last, info = torch.linalg.inv_ex(_dense(diagonal, lower))
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
        x = (self.last @ rhs.flatten(-3, -2)).unflatten(-2, rhs.shape[-3:-1])
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


def _dense(diagonal: Tensor, lower: Tensor) -> Tensor:
    """The block-tridiagonal matrix as one dense matrix."""
    count, n = diagonal.shape[-3], diagonal.shape[-1]
    full = diagonal.new_zeros(*diagonal.shape[:-3], count, n, count, n)
    index = torch.arange(count, device=diagonal.device)
    full[..., index, :, index, :] = diagonal.movedim(-3, 0)
    if count > 1:
        below = lower.movedim(-3, 0)
        full[..., index[1:], :, index[:-1], :] = below
        full[..., index[:-1], :, index[1:], :] = below.mT
    return full.flatten(-4, -3).flatten(-2, -1)
