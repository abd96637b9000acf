"""Unscaled KKT residuals and least-squares multipliers.

In: an `Evaluation`, `Duals`, `Bounds`. Out: `KKT`, improved `Duals`. Invariant: no scaling anywhere; a residual is
what the caller would compute from the functions and the multipliers by hand.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from lagcompile.exact.linear import Mask, Vector, is_sparse, largest, select_rows, solve_saddle_point, stack_rows
from lagcompile.exact.problem import Bounds, Evaluation
from lagcompile.exact.result import KKT


@dataclass(frozen=True)
class Duals:
    """Multipliers as numpy vectors, with the signs of `Result`."""

    eq: Vector
    ineq: Vector
    bounds: Vector

    @property
    def largest(self) -> float:
        """Largest absolute value."""
        return max(largest(self.eq), largest(self.ineq), largest(self.bounds))


@dataclass(frozen=True)
class WorkingSet:
    """Constraints taken as active: mask of inequalities (k,), sides of variables (n,): +1 upper, -1 lower, 0 free."""

    ineq: Mask
    sides: Vector

    @property
    def count(self) -> int:
        """Members, equalities not counted."""
        return int(self.ineq.sum()) + int((self.sides != 0).sum())


def lagrangian_gradient(point: Evaluation, eq: Vector, ineq: Vector) -> Vector:
    """Gradient of the Lagrangian without its bound term."""
    total: Vector = point.gradient + point.jacobian_eq.T @ eq + point.jacobian_ineq.T @ ineq
    return total


def primal_violation(point: Evaluation, bounds: Bounds) -> float:
    """Largest violation of any constraint or bound."""
    values = point.values
    return max(
        largest(values.eq),
        float(np.maximum(values.ineq, 0.0).max(initial=0.0)),
        float(np.maximum(point.x - bounds.upper, 0.0).max(initial=0.0)),
        float(np.maximum(bounds.lower - point.x, 0.0).max(initial=0.0)),
    )


def kkt_residual(point: Evaluation, duals: Duals, bounds: Bounds) -> KKT:
    """The four residuals of a point with its multipliers."""
    up, down = np.maximum(duals.bounds, 0.0), np.maximum(-duals.bounds, 0.0)
    room_up, room_down = bounds.upper - point.x, point.x - bounds.lower
    has_up, has_down = np.isfinite(bounds.upper), np.isfinite(bounds.lower)
    products = np.concatenate(
        [duals.ineq * point.values.ineq, up[has_up] * room_up[has_up], down[has_down] * room_down[has_down]]
    )
    wrong = np.concatenate([np.maximum(-duals.ineq, 0.0), up[~has_up], down[~has_down]])
    return KKT(
        stationarity=largest(lagrangian_gradient(point, duals.eq, duals.ineq) + duals.bounds),
        primal=primal_violation(point, bounds),
        dual=largest(wrong),
        complementarity=largest(products),
    )


def bound_multipliers(point: Evaluation, eq: Vector, ineq: Vector, bounds: Bounds) -> Vector:
    """Bound multipliers that cancel the Lagrangian gradient where a nearby bound may push that way, else 0."""
    pull = -lagrangian_gradient(point, eq, ineq)
    near = 1.0  # with more room than this, complementarity would suffer more than stationarity gains
    up = (pull > 0) & (bounds.upper - point.x < near)
    down = (pull < 0) & (point.x - bounds.lower < near)
    fixed = bounds.lower == bounds.upper
    return np.where(up | down | fixed, pull, 0.0)


def least_squares_duals(point: Evaluation, working: WorkingSet, bounds: Bounds) -> Duals | None:
    """Multipliers of the working set that minimise the stationarity residual; minimum norm when they are not unique.

    Inequalities that come out with a negative multiplier leave the set, up to ten times.
    """
    free = (working.sides == 0) & (bounds.lower != bounds.upper)
    chosen = working.ineq.copy()
    for _ in range(10):
        A = stack_rows(point.jacobian_eq, select_rows(point.jacobian_ineq, chosen))[:, free]
        if is_sparse(A):
            import scipy.sparse as sp

            solved = solve_saddle_point(
                sp.eye_array(int(free.sum()), format="csc"), A, point.gradient[free], np.zeros(A.shape[0])
            )
            if solved is None:
                return None
            values = -solved.multipliers
        else:
            values = np.linalg.lstsq(A.T, -point.gradient[free], rcond=1e-12)[0]
        ineq = np.zeros(len(chosen))
        ineq[chosen] = values[len(point.values.eq) :]
        negative = ineq < 0
        if not negative.any():
            break
        chosen &= ~negative
    eq, ineq = values[: len(point.values.eq)], np.maximum(ineq, 0.0)
    return Duals(eq, ineq, bound_multipliers(point, eq, ineq, bounds))
