"""Solving a subproblem by guessing its active set.

In: `QuadraticData` and the guess. Out: a solution that was verified to be optimal, or None. Invariant: nothing is
returned on trust; a wrong guess costs one linear solve and no accuracy.
"""

from __future__ import annotations

import numpy as np

from lagcompile.exact.linear import (
    Mask,
    Vector,
    largest,
    row_norms,
    scale_rows,
    select_rows,
    solve_saddle_point,
    stack_rows,
)
from lagcompile.exact.quadratic import Outcome, QuadraticData, QuadraticSolution


def solve_with_active_set(
    data: QuadraticData, ineq: Mask, bounds: Vector, *, tolerance: float
) -> QuadraticSolution | None:
    """Solution under the guess that exactly these constraints are active; None unless it is verified to be optimal.

    Args:
        data: a subproblem that is not elastic.
        ineq: (k,) inequalities taken as equalities.
        bounds: (n,) +1 for variables at the upper bound, -1 at the lower, 0 free.
        tolerance: allowed violation and wrong sign, relative to the data.
    """
    at = np.where(bounds > 0, data.upper, data.lower)
    free = (bounds == 0) & (data.lower != data.upper)
    at = np.where(free, 0.0, np.where(data.lower == data.upper, data.lower, at))
    if not np.isfinite(at).all():
        return None
    A = stack_rows(data.E, select_rows(data.I, ineq))
    below = -np.concatenate([data.e, data.i[ineq]]) - A @ at
    right = -(data.g + data.H @ at)
    H = data.H[free][:, free] if free.any() else np.zeros((0, 0))
    if not free.any():
        return None
    rows = A[:, free]
    lengths = row_norms(rows)  # a row may be short once the variables at their bounds are taken out of it
    factors = np.where(lengths > 1e-13, 1.0 / np.maximum(lengths, 1e-13), 1.0)
    point = solve_saddle_point(H, scale_rows(rows, factors), right[free], factors * below)
    scale = 1.0 + max(largest(right), largest(below))
    if point is None or point.residual > tolerance * scale:
        return None
    d = at.copy()
    d[free] = point.step
    multipliers = factors * point.multipliers
    eq, some = multipliers[: len(data.e)], multipliers[len(data.e) :]
    full = np.zeros(len(data.i))
    full[ineq] = some
    pull = -(data.g + data.H @ d + data.E.T @ eq + data.I.T @ full)
    pull[free] = 0.0
    wrong = max(
        float(np.maximum(-some, 0.0).max(initial=0.0)),
        float(np.maximum(data.I @ d + data.i, 0.0).max(initial=0.0)),
        float(np.maximum(d - data.upper, 0.0).max(initial=0.0)),
        float(np.maximum(data.lower - d, 0.0).max(initial=0.0)),
        float(np.maximum(-pull * bounds, 0.0)[data.lower != data.upper].max(initial=0.0)),
    )
    if wrong > tolerance * scale:
        return None
    return QuadraticSolution(Outcome.OPTIMAL, d, eq, np.maximum(full, 0.0), pull, source="active set")
