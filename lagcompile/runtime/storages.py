"""Rows, starts, values and defects of states: one class for each way in which `ir/storages.py` keeps one.

In: a storage and a domain. Out: `keeping(storage, domain)`, which computes on tables of shape (states, rows, ...).
Invariant: the table in `keeping` is total; a table is changed by `begin` and `begun` alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import assert_never

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812  (PyTorch's own custom)

from lagcompile.ir.domains import Domain
from lagcompile.ir.storages import ClassGaussian, Eliminated, Shared, Storage, Table, Transient
from lagcompile.runtime import kkt
from lagcompile.runtime.domains import inside


class Keeping:
    """What a solver may ask of a storage; here of one that keeps values themselves."""

    def __init__(self, storage: Storage, domain: Domain) -> None:
        self.storage, self.inside = storage, inside(domain)

    # ---------------------------------------------------------------- tables
    def empty(self, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
        """Return a fresh table for values of this shape."""
        # filled, not zero-allocated: memory that is only promised would be fetched page by page inside the steps
        return torch.empty(tuple(shape), dtype=dtype, device=device).fill_(0.0)

    def at(self, rows: Tensor) -> Tensor | None:
        """Return which rows of the table belong to these rows of the data; None for all of them."""
        return rows if self.storage.per_example else None

    def centre(self, table: Tensor) -> Tensor:
        """Return what a start sets, a view of the table."""
        return table

    def begin(self, table: Tensor, rows: Tensor, values: Tensor, labels: Tensor | None) -> None:
        """Start the rows of a batch at values."""
        at, stored = self.at(rows), self.stored(values)
        if at is None:
            table.copy_(stored)
        else:
            table.index_copy_(1, at, stored.to(table.dtype))

    def begun(self, table: Tensor, labels: Tensor | None) -> None:
        """End a start, after all batches."""

    # ---------------------------------------------------------------- values
    def stored(self, values: Tensor) -> Tensor:
        """Return what to store for values."""
        return self.inside.stored(values)

    def project(self, stored: Tensor) -> Tensor:
        """Return the nearest that may be stored, where the domain is kept by projection."""
        return self.inside.project(stored)

    def values(self, stored: Tensor, labels: Tensor | None, noise: Tensor | None) -> Tensor:
        """Return values as stages read them, of samples where the state is sampled."""
        return self.inside.value(stored)

    def defect(self, prediction: Tensor, values: Tensor, stored: Tensor, labels: Tensor | None) -> Tensor:
        """Return the defect of predictions, whose rows have these classes."""
        return kkt.defect(prediction, values)

    def named(self, name: str, stored: Tensor) -> dict[str, Tensor]:
        """Return what a solution holds of one state, by name."""
        return {name: self.inside.value(stored)}


class _Gaussian(Keeping):
    """A table of (states, classes, 2, ...): the mean, and what softplus makes the standard deviation."""

    def __init__(self, storage: ClassGaussian, domain: Domain) -> None:
        super().__init__(storage, domain)
        self.sigma = storage.sigma

    def empty(self, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
        table = super().empty((*shape[:2], 2, *shape[2:]), dtype, device)
        table[:, :, 1] = self.sigma + math.log(-math.expm1(-self.sigma))  # softplus's inverse
        return table

    def centre(self, table: Tensor) -> Tensor:
        return table[:, :, 0]

    def stored(self, values: Tensor) -> Tensor:
        return values

    def begin(self, table: Tensor, rows: Tensor, values: Tensor, labels: Tensor | None) -> None:
        assert labels is not None
        table[:, :, 0].index_add_(1, labels, values)

    def begun(self, table: Tensor, labels: Tensor | None) -> None:
        assert labels is not None
        counts = torch.bincount(labels, minlength=table.shape[1]).clamp(min=1).to(table.device)
        table[:, :, 0] /= counts.reshape(1, -1, *(1 for _ in table.shape[3:]))

    def values(self, stored: Tensor, labels: Tensor | None, noise: Tensor | None) -> Tensor:
        assert noise is not None
        mu, sigma = _of_rows(stored, labels)
        return self.inside.value(mu + noise * sigma)

    def defect(self, prediction: Tensor, values: Tensor, stored: Tensor, labels: Tensor | None) -> Tensor:
        mu, sigma = _of_rows(stored, labels)
        return kkt.defect(prediction, mu) / sigma

    def named(self, name: str, stored: Tensor) -> dict[str, Tensor]:
        return {f"{name}.mu": stored[:, 0], f"{name}.sigma": F.softplus(stored[:, 1])}


def _of_rows(stored: Tensor, labels: Tensor | None) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each row's class."""
    assert labels is not None
    return stored[:, :, 0].index_select(1, labels), F.softplus(stored[:, :, 1]).index_select(1, labels)


@lru_cache
def keeping(storage: Storage, domain: Domain) -> Keeping:
    """Return how a state is kept."""
    match storage:
        case Eliminated() | Transient() | Table() | Shared():
            return Keeping(storage, domain)
        case ClassGaussian():
            return _Gaussian(storage, domain)
    assert_never(storage)
