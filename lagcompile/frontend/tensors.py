"""Tensors of any layout: are they equal, do they share memory, what are they as dense ones?

In: tensors, sparse ones too. Out: answers. Invariant: nothing is changed; NaN equals NaN only.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor


def identical(a: Tensor, b: Tensor) -> bool:
    """Equal bit for bit, NaN in the same places."""
    if a.shape != b.shape or a.dtype != b.dtype or a.device != b.device or a.layout != b.layout:
        return False
    if a.layout is not torch.strided:
        a, b = a.to_dense(), b.to_dense()
    if torch.equal(a, b):
        return True
    if not (a.is_floating_point() or a.is_complex()):
        return False
    return bool(((a == b) | (a.isnan() & b.isnan())).all())


def memory_of(tensor: Tensor) -> int:
    """A number that is the same for tensors in one memory; of sparse ones, that of their values."""
    held = tensor
    if tensor.layout is not torch.strided:
        held = tensor._values() if tensor.layout is torch.sparse_coo else tensor.values()
    return held.untyped_storage()._cdata


def dense(gradients: Iterable[Tensor | None]) -> list[Tensor | None]:
    """Gradients as dense tensors; those of embeddings may be sparse."""
    return [None if g is None else g.to_dense() for g in gradients]
