"""KKT residuals computed without any of the solver's code: plain autograd on the Lagrangian, plain comparisons."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from lagcompile.exact import Result

Function = Callable[[Tensor], Tensor]


def independent_kkt(
    objective: Function,
    result: Result,
    eq: Function | None = None,
    ineq: Function | None = None,
    bounds: tuple[Tensor, Tensor] | None = None,
) -> dict[str, float]:
    """The four residuals at `result.x` with the result's multipliers, in the documented sign convention."""
    x = result.x.clone().requires_grad_(True)
    lower, upper = bounds if bounds is not None else (torch.full_like(x, -torch.inf), torch.full_like(x, torch.inf))
    empty = torch.zeros(0, dtype=torch.float64)
    c = empty if eq is None else eq(x)
    g = empty if ineq is None else ineq(x)
    lagrangian = objective(x) + (result.multipliers_eq * c).sum() + (result.multipliers_ineq * g).sum()
    lagrangian = lagrangian + (result.multipliers_bounds * x).sum()
    (gradient,) = torch.autograd.grad(lagrangian, x)
    x = x.detach()
    complementarity, dual, primal = [0.0], [0.0], [0.0, *c.detach().abs().tolist()]
    for value, multiplier in zip(g.detach().tolist(), result.multipliers_ineq.tolist(), strict=True):
        primal.append(value)
        dual.append(-multiplier)
        complementarity.append(abs(value * multiplier))
    for i, multiplier in enumerate(result.multipliers_bounds.tolist()):
        primal += [float(x[i] - upper[i]), float(lower[i] - x[i])]
        if multiplier > 0:
            finite = bool(torch.isfinite(upper[i]))
            (complementarity if finite else dual).append(multiplier * float(upper[i] - x[i]) if finite else multiplier)
        if multiplier < 0:
            finite = bool(torch.isfinite(lower[i]))
            (complementarity if finite else dual).append(
                -multiplier * float(x[i] - lower[i]) if finite else -multiplier
            )
    return {
        "stationarity": float(gradient.abs().max()),
        "primal": max(primal),
        "dual": max(dual),
        "complementarity": max(complementarity),
    }
