"""The mathematics of the Lagrangian, as pure functions of tensors. The sign rule lives here.

    r_k = f_{k-1}(.) - h_k            (prediction minus state)
    L   = loss + c [ <lambda, G(r)> + (rho/2) |r|^2 ],     c = 1/batch for a mean loss, 1 for a sum
    or, with an augmented weight, c [ <lambda, g> + (rho/2) |g|^2 ],  g the `excess` of r over its tube

Stationarity of L in h_k then reads  lambda_k = d loss_i / d h_k,i : multipliers are backprop's adjoints.
Invariant: no function here changes its arguments, knows a network, or draws a random number.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812  (PyTorch's own custom)

from lagcompile.ir.axes import Domain, Hardshrink, NonNegative, NormTube, Range, Softshrink, Transform

SIGNED = frozenset({"identity", "softshrink", "hardshrink"})
"""Transforms whose multiplier has either sign."""


def defect(prediction: Tensor, state: Tensor) -> Tensor:
    """R = prediction - state, of their common shape."""
    return prediction - state


def transformed(r: Tensor, transform: Transform, lead: int = 2) -> Tensor:
    """G(r), elementwise; `norm_tube` gives one number for each of the first `lead` axes (size 1 elsewhere).

    Args:
        r: defects of shape (states, rows, ...).
        transform: which G; formulas in FORMULATIONS of Local Propagation (Marra et al. 2020) and DistProp, eq. (3).
        lead: number of leading axes that are not features.
    """
    if transform.kind == "identity":
        return r
    if transform.kind == "abs":
        return r.abs()
    if transform.kind == "squared":
        return r * r
    if isinstance(transform, Softshrink):
        return F.softshrink(r, transform.epsilon)
    if isinstance(transform, Hardshrink):
        return F.hardshrink(r, transform.epsilon)
    if isinstance(transform, NormTube):
        axes = tuple(range(lead, r.dim()))
        norm = torch.linalg.vector_norm(r, transform.order, dim=axes, keepdim=True) if axes else r.abs()
        return F.relu(norm - transform.epsilon)
    return F.relu(r.abs() - transform.epsilon)


def epsilon_of(transform: Transform) -> float:
    """Half-width of the tube in which a defect counts as none; 0 where there is no tube."""
    return float(getattr(transform, "epsilon", 0.0)) if transform.kind not in {"identity", "abs", "squared"} else 0.0


def excess(r: Tensor, multiplier: Tensor, rho: float, transform: Transform) -> Tensor:
    """What takes G's place in the augmented Lagrangian of a tube: c(r) - s, at the slack s that minimises over it.

    The signed |r| <= epsilon (softshrink, hardshrink; identity with epsilon = 0) has c(r) = r and -epsilon <= s <=
    epsilon, so that s = clip(r + lambda / rho); one signed multiplier lambda = mu+ - mu- serves both sides. Sizes
    (abs_tube, norm_tube) have c(r) = |r| - epsilon, s <= 0 and lambda >= 0. The term is <lambda, g> + (rho/2) |g|^2
    with g the excess, once continuously differentiable in r across the edge, and g its gradient in lambda
    (Rockafellar 1973, The multiplier method of Hestenes and Powell applied to convex programming; Bertsekas 1982,
    Constrained Optimization and Lagrange Multiplier Methods, section 3.1).

    Args:
        r: defects of shape (states, rows, ...).
        multiplier: of r's shape, one number per row for `norm_tube`.
        rho: weight of the quadratic term, > 0.
        transform: which tube.
    """
    epsilon = epsilon_of(transform)
    if transform.kind in SIGNED:
        return r - (r + multiplier / rho).clamp(-epsilon, epsilon)
    size = r.abs()
    if isinstance(transform, NormTube) and r.dim() > 2:
        size = torch.linalg.vector_norm(r, transform.order, dim=tuple(range(2, r.dim())), keepdim=True)
    return torch.maximum(size - epsilon, -multiplier / rho)


def coupling(g: Tensor, multiplier: Tensor | None, r: Tensor, rho: float, *, mean_features: bool = False) -> Tensor:
    """Sum of <lambda, G(r)> + (rho/2) |r|^2 over everything, a scalar.

    Args:
        g: G(r), or the `excess`.
        multiplier: of g's shape, or with size 1 where one number serves several features; None for a pure penalty.
        r: defects; the excess once more in an augmented Lagrangian.
        rho: weight of the quadratic term.
        mean_features: divide by the number of features of a row.
    """
    total = g.new_zeros(())
    if multiplier is not None:
        total = total + (multiplier * g).sum()
    if rho:
        total = total + (0.5 * rho) * (r * r).sum()
    if mean_features:
        total = total / max(1, r[0, 0].numel())
    return total


def force(g: Tensor, multiplier: Tensor | None, r: Tensor, rho: float, transform: Transform) -> Tensor:
    """Gradient of `coupling` in r: lambda G'(r) + rho r, of r's shape (mean over features not applied).

    Args:
        g: G(r).
        multiplier: as for `coupling`.
        r: defects.
        rho: weight of the quadratic term.
        transform: which G.
    """
    if multiplier is None:
        return rho * r
    kind = transform.kind
    if kind == "identity":
        pull = multiplier.expand_as(r)
    elif kind == "squared":
        pull = multiplier * (2.0 * r)
    elif kind in {"softshrink", "hardshrink"}:
        pull = multiplier * (g != 0)
    elif isinstance(transform, NormTube):
        pull = multiplier * (g > 0) * _norm_gradient(r, transform)
    else:  # abs, abs_tube
        pull = multiplier * (g > 0) * r.sign()
    return torch.add(pull, r, alpha=rho) if rho else pull


def augmented_force(g: Tensor, multiplier: Tensor, r: Tensor, rho: float, transform: Transform) -> Tensor:
    """Gradient of the augmented Lagrangian's term in r: lambda + rho g, along the direction in which a size grows.

    Args:
        g: the `excess`.
        multiplier: as for `excess`.
        r: defects.
        rho: weight of the quadratic term.
        transform: which tube.
    """
    pull = torch.add(multiplier, g, alpha=rho)
    if transform.kind in SIGNED:
        return pull
    return pull * (_norm_gradient(r, transform) if isinstance(transform, NormTube) else r.sign())


def _norm_gradient(r: Tensor, transform: NormTube) -> Tensor:
    if transform.order == 1:
        return r.sign()
    axes = tuple(range(2, r.dim()))
    norm = torch.linalg.vector_norm(r, 2, dim=axes, keepdim=True) if axes else r.abs()
    return r / norm.clamp_min(torch.finfo(r.dtype).tiny)


def dual_gradient(g: Tensor, layout: str, labels: Tensor | None, classes: int, *, mean_features: bool) -> Tensor:
    """Gradient of L in the multiplier, per example: G(r) reduced to the multiplier's layout.

    Args:
        g: G(r), of shape (states, rows, ...).
        layout: full, example (summed over features), class (mean over the rows of a class), scalar (mean over rows).
        labels: class of each row, for `class`.
        classes: number of classes, for `class`.
        mean_features: the coupling takes the mean over features.
    """
    if mean_features and g[0, 0].numel():
        g = g / g[0, 0].numel()
    if layout == "full":
        return g
    if layout == "class":
        assert labels is not None
        total = g.new_zeros((g.shape[0], classes, *g.shape[2:])).index_add_(1, labels, g)
        counts = torch.bincount(labels, minlength=classes).clamp_(min=1).to(g.dtype)
        return total / counts.reshape(1, -1, *(1 for _ in g.shape[2:]))
    axes = tuple(range(2, g.dim()))
    summed = g.sum(dim=axes, keepdim=True) if axes else g
    return summed.mean(dim=1, keepdim=True) if layout == "scalar" else summed


def to_domain(stored: Tensor, domain: Domain) -> Tensor:
    """Value of a state from what is stored (relu and softplus are maps; projections act after steps)."""
    if isinstance(domain, NonNegative) and domain.by == "relu":
        return F.relu(stored)
    if isinstance(domain, NonNegative) and domain.by == "softplus":
        return F.softplus(stored)
    return stored


def from_domain(value: Tensor, domain: Domain) -> Tensor:
    """Something to store whose value is (closest to) the given one; inverse of `to_domain` on the domain's interior."""
    if isinstance(domain, NonNegative) and domain.by == "softplus":
        value = value.clamp_min(1e-4)
        return value + torch.log(-torch.expm1(-value))
    return project(value, domain)


def project(stored: Tensor, domain: Domain) -> Tensor:
    """Nearest point of a domain that is kept by projection; others pass."""
    if isinstance(domain, NonNegative) and domain.by == "project":
        return stored.clamp_min(0.0)
    if isinstance(domain, Range):
        return stored.clamp(domain.lower, domain.upper)
    return stored


def relative(residual: Tensor, scale: Tensor) -> float:
    """Max |residual| / max(1, max |scale|), 0 for empty tensors."""
    if residual.numel() == 0:
        return 0.0
    size = float(scale.abs().max()) if scale.numel() else 0.0
    return float(residual.abs().max()) / max(1.0, size)
