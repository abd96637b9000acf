"""Maps and projections onto the domains of states: one class for each record of `ir/domains.py`.

In: a record. Out: `inside(record)`, which computes on tensors of any shape. Invariant: the table in `inside` is total;
nothing here changes its arguments.
"""

from __future__ import annotations

from functools import lru_cache
from typing import assert_never

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812  (PyTorch's own custom)

from lagcompile.ir.domains import Domain, Free, NonNegative, OfActivation, Range


class Inside:
    """What a solver may ask of a domain; here of one that leaves nothing out."""

    def value(self, stored: Tensor) -> Tensor:
        """Return the value of a state from what is stored."""
        return stored

    def stored(self, value: Tensor) -> Tensor:
        """Return what to store for a value: the inverse of `value` inside the domain, the closest there is outside."""
        return self.project(value)

    def project(self, stored: Tensor) -> Tensor:
        """Return the nearest point of a domain that is kept by projection; what others store may be any number."""
        return stored

    def squashed(self, number: Tensor) -> Tensor:
        """Return a value inside the domain for any number, smoothly."""
        return number


class _Relu(Inside):
    def value(self, stored: Tensor) -> Tensor:
        return F.relu(stored)

    def squashed(self, number: Tensor) -> Tensor:
        return number.relu()


class _Softplus(_Relu):
    def value(self, stored: Tensor) -> Tensor:
        return F.softplus(stored)

    def stored(self, value: Tensor) -> Tensor:
        value = value.clamp_min(1e-4)
        return value + torch.log(-torch.expm1(-value))


class _AboveZero(_Relu):
    def value(self, stored: Tensor) -> Tensor:
        return stored

    def project(self, stored: Tensor) -> Tensor:
        return stored.clamp_min(0.0)


class _Range(Inside):
    def __init__(self, lower: float, upper: float) -> None:
        self.lower, self.upper = lower, upper

    def project(self, stored: Tensor) -> Tensor:
        return stored.clamp(self.lower, self.upper)

    def squashed(self, number: Tensor) -> Tensor:
        middle, half = 0.5 * (self.upper + self.lower), 0.5 * (self.upper - self.lower)
        return middle + half * torch.tanh(number)


@lru_cache
def inside(domain: Domain) -> Inside:
    """Return how a domain is kept."""
    match domain:
        case Free() | OfActivation():
            return Inside()
        case NonNegative():
            return {"relu": _Relu, "softplus": _Softplus, "project": _AboveZero}[domain.by]()
        case Range():
            return _Range(domain.lower, domain.upper)
    assert_never(domain)
