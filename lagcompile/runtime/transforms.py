"""Values and slopes of G, the transform of a defect: one class for each record of `ir/transforms.py`.

In: a record. Out: `behaviour(record)`, which computes on defects of shape (states, rows, ...features). Invariant: the
table in `behaviour` is total; nothing here changes its arguments or draws a random number.

In the augmented Lagrangian of |r| <= epsilon, G's place is taken by the excess g = c(r) - s at the slack s that
minimises over it. A signed G has c(r) = r and -epsilon <= s <= epsilon, so that s = clip(r + lambda / rho); one signed
multiplier lambda = mu+ - mu- serves both sides. A size has c(r) = |r| - epsilon, s <= 0 and lambda >= 0. The term
<lambda, g> + (rho/2) |g|^2 is once continuously differentiable in r across the edge, and g is its gradient in lambda
(Rockafellar 1973, The multiplier method of Hestenes and Powell applied to convex programming; Bertsekas 1982,
Constrained Optimization and Lagrange Multiplier Methods, section 3.1).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from functools import lru_cache
from typing import assert_never

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812  (PyTorch's own custom)

from lagcompile.ir.transforms import Abs, AbsTube, Hardshrink, Identity, NormTube, Softshrink, Squared, Transform


class Behaviour(ABC):
    """What a solver may ask of G."""

    def __init__(self, epsilon: float = 0.0) -> None:
        self.epsilon = epsilon

    @abstractmethod
    def value(self, r: Tensor) -> Tensor:
        """Return G(r)."""

    @abstractmethod
    def pull(self, g: Tensor, multiplier: Tensor, r: Tensor) -> Tensor:
        """Return lambda G'(r), of r's shape, with g = G(r) computed before."""

    @abstractmethod
    def excess(self, r: Tensor, multiplier: Tensor, rho: float) -> Tensor:
        """Return what replaces G in the augmented Lagrangian, for rho > 0."""

    def along(self, push: Tensor, r: Tensor) -> Tensor:
        """Return a force on G's argument as a force on r."""
        return push


class _Signed(Behaviour):
    def excess(self, r: Tensor, multiplier: Tensor, rho: float) -> Tensor:
        return r - (r + multiplier / rho).clamp(-self.epsilon, self.epsilon)

    def pull(self, g: Tensor, multiplier: Tensor, r: Tensor) -> Tensor:
        return multiplier * (g != 0)


class _Identity(_Signed):
    def value(self, r: Tensor) -> Tensor:
        return r

    def pull(self, g: Tensor, multiplier: Tensor, r: Tensor) -> Tensor:
        return multiplier.expand_as(r)


class _Softshrink(_Signed):
    def value(self, r: Tensor) -> Tensor:
        return F.softshrink(r, self.epsilon)


class _Hardshrink(_Signed):
    def value(self, r: Tensor) -> Tensor:
        return F.hardshrink(r, self.epsilon)


class _Size(Behaviour):
    """max(size(r) - epsilon, 0); |r| unless a subclass says otherwise."""

    def size(self, r: Tensor) -> Tensor:
        return r.abs()

    def direction(self, r: Tensor) -> Tensor:
        """Gradient of the size in r."""
        return r.sign()

    def value(self, r: Tensor) -> Tensor:
        return F.relu(self.size(r) - self.epsilon)

    def pull(self, g: Tensor, multiplier: Tensor, r: Tensor) -> Tensor:
        return multiplier * (g > 0) * self.direction(r)

    def excess(self, r: Tensor, multiplier: Tensor, rho: float) -> Tensor:
        return torch.maximum(self.size(r) - self.epsilon, -multiplier / rho)

    def along(self, push: Tensor, r: Tensor) -> Tensor:
        return push * self.direction(r)


class _Abs(_Size):
    def value(self, r: Tensor) -> Tensor:
        return r.abs()


class _Squared(_Size):
    def value(self, r: Tensor) -> Tensor:
        return r * r

    def pull(self, g: Tensor, multiplier: Tensor, r: Tensor) -> Tensor:
        return multiplier * (2.0 * r)


class _NormTube(_Size):
    def __init__(self, epsilon: float, order: int) -> None:
        super().__init__(epsilon)
        self.order = order

    def size(self, r: Tensor) -> Tensor:
        axes = tuple(range(2, r.dim()))
        return torch.linalg.vector_norm(r, self.order, dim=axes, keepdim=True) if axes else r.abs()

    def direction(self, r: Tensor) -> Tensor:
        if self.order == 1:
            return r.sign()
        return r / self.size(r).clamp_min(torch.finfo(r.dtype).tiny)


@lru_cache
def behaviour(transform: Transform) -> Behaviour:
    """Return what a transform computes."""
    match transform:
        case Identity():
            return _Identity()
        case Abs():
            return _Abs()
        case Squared():
            return _Squared()
        case Softshrink():
            return _Softshrink(transform.epsilon)
        case Hardshrink():
            return _Hardshrink(transform.epsilon)
        case AbsTube():
            return _Size(transform.epsilon)
        case NormTube():
            return _NormTube(transform.epsilon, transform.order)
    assert_never(transform)
