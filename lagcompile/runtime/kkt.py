"""The mathematics of the Lagrangian, as pure functions of tensors. The sign rule lives here.

    r_k = f_{k-1}(.) - h_k            (prediction minus state)
    L   = loss + c [ <lambda, G(r)> + (rho/2) |r|^2 ],     c = 1/batch for a mean loss, 1 for a sum
    or, with an augmented weight, c [ <lambda, g> + (rho/2) |g|^2 ],  g the excess of r over its tube

Stationarity of L in h_k then reads  lambda_k = d loss_i / d h_k,i : multipliers are backprop's adjoints.
Invariant: no function here changes its arguments, knows a network, or draws a random number.
"""

from __future__ import annotations

from typing import assert_never

import torch
from torch import Tensor

from lagcompile.ir.axes import LAYOUTS, LayoutName
from lagcompile.ir.transforms import Transform
from lagcompile.runtime.transforms import behaviour


def defect(prediction: Tensor, state: Tensor) -> Tensor:
    """Return the defect r = prediction - state."""
    return prediction - state


def coupling(g: Tensor, multiplier: Tensor | None, r: Tensor, rho: float, *, mean_features: bool = False) -> Tensor:
    """Sum <lambda, G(r)> + (rho/2) |r|^2 over everything, a scalar.

    Args:
        g: G(r), or the excess (`runtime.transforms`).
        multiplier: of g's shape, or with size 1 where one number serves several features; None for a pure penalty.
        r: defects; in an augmented Lagrangian the excess again.
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
    pull = behaviour(transform).pull(g, multiplier, r)
    return torch.add(pull, r, alpha=rho) if rho else pull


def augmented_force(g: Tensor, multiplier: Tensor, r: Tensor, rho: float, transform: Transform) -> Tensor:
    """Gradient of the augmented Lagrangian's term in r: lambda + rho g, along the direction in which a size grows.

    Args:
        g: the excess.
        multiplier: of r's shape, one number per row for a transform that gives one.
        r: defects.
        rho: weight of the quadratic term.
        transform: which tube.
    """
    return behaviour(transform).along(torch.add(multiplier, g, alpha=rho), r)


def dual_gradient(g: Tensor, layout: LayoutName, labels: Tensor | None, classes: int, *, mean_features: bool) -> Tensor:
    """Gradient of L in the multiplier, per example: G(r) reduced to the multiplier's layout.

    Args:
        g: G(r), of shape (states, rows, ...).
        layout: of the multiplier; one number for several features takes their sum, for several rows their mean.
        labels: class of each row, for `class`.
        classes: number of classes, for `class`.
        mean_features: the coupling takes the mean over features.
    """
    if mean_features and g[0, 0].numel():
        g = g / g[0, 0].numel()
    laid, axes = LAYOUTS[layout], tuple(range(2, g.dim()))
    if axes and not laid.per_feature:
        g = g.sum(dim=axes, keepdim=True)
    match laid.rows:
        case "example":
            return g
        case "all":
            return g.mean(dim=1, keepdim=True)
        case "class":
            assert labels is not None
            total = g.new_zeros((g.shape[0], classes, *g.shape[2:])).index_add_(1, labels, g)
            counts = torch.bincount(labels, minlength=classes).clamp_(min=1).to(g.dtype)
            return total / counts.reshape(1, -1, *(1 for _ in g.shape[2:]))
    assert_never(laid.rows)


def size(value: Tensor, kind: str) -> Tensor:
    """Compute a regulariser: |value|_1, or 1/2 |value|_2^2."""
    if kind == "l1":
        return value.abs().sum()
    real = torch.view_as_real(value.resolve_conj()) if value.is_complex() else value
    return 0.5 * (real * real).sum()
