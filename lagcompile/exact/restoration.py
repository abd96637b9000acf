"""Feasibility restoration: minimise the sum of violations by elastic subproblems.

In: a point that the main iteration cannot leave. Out: a point with less violation, or evidence that the sum of
violations is locally as small as it gets. Invariant: the weighted sum of violations decreases at every step; bounds
always hold.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import scipy.sparse as sp

from lagcompile.exact.linear import Vector, add_diagonal, entries, finite, is_sparse, largest, positive_semidefinite
from lagcompile.exact.problem import Evaluation, Problem, Values
from lagcompile.exact.quadratic import Outcome, QuadraticData
from lagcompile.exact.residuals import Duals
from lagcompile.exact.search import Solve


@dataclass(frozen=True)
class Restored:
    """Where the restoration ended.

    Attributes:
        stationary: the violation cannot be decreased to first order; `forces` are then the multipliers of
            that problem, nonzero only on constraints that take part in the conflict.
    """

    point: Evaluation
    forces: Duals
    stationary: bool
    steps: int


def weighted_violation(values: Values, weights: Vector) -> float:
    """Sum of violations, each times its weight."""
    excess = np.concatenate([np.abs(values.eq), np.maximum(values.ineq, 0.0)])
    return float(weights @ excess)


def modelled_violation(data: QuadraticData, d: Vector, weights: Vector) -> float:
    """The same for the linearised constraints after a step."""
    excess = np.concatenate([np.abs(data.E @ d + data.e), np.maximum(data.I @ d + data.i, 0.0)])
    return float(weights @ excess)


class Restoration:
    """Line-search method for the sum of violations, with the constraints' curvature in its subproblems.

    Args:
        problem: the program.
        solve: solves an elastic subproblem.
        expired: says that time is up.
        record: called with every new point, its step length and step norm.
    """

    def __init__(
        self,
        problem: Problem,
        *,
        solve: Solve,
        expired: Callable[[], bool],
        record: Callable[[Evaluation, Duals, float, float], None],
    ) -> None:
        self._problem = problem
        self._solve = solve
        self._expired = expired
        self._record = record

    def run(
        self,
        point: Evaluation,
        *,
        weights: Vector,
        enough: Callable[[Evaluation], bool],
        limit: int,
        tolerance: float = 1e-10,
    ) -> Restored:
        """Decrease the weighted violation until `enough`, or until it is stationary.

        Args:
            point: start, within the bounds.
            weights: (equalities + inequalities,); 0 leaves a constraint out.
            enough: whether a point may be handed back.
            limit: most steps.
            tolerance: modelled decrease, relative to 1 and to the violation, below which a point is stationary.
        """
        forces = self._none()
        proximity = 1e-3
        for step in range(limit):
            if self._expired():
                return Restored(point, forces, False, step)
            now = weighted_violation(point.values, weights)
            data = self._data(point, forces, weights, proximity)
            answer = self._solve(data)
            expected = now - modelled_violation(data, answer.d, weights)
            if answer.outcome is not Outcome.OPTIMAL or expected <= tolerance * max(1.0, now):
                plain = self._plain(point, weights, 1.0)
                data, answer = plain, self._solve(plain)
                expected = now - modelled_violation(data, answer.d, weights)
                if answer.outcome is not Outcome.OPTIMAL:
                    return Restored(point, forces, False, step)
                if expected <= tolerance * max(1.0, now):
                    return Restored(point, Duals(answer.eq, answer.ineq, answer.bounds), True, step)
            forces = Duals(answer.eq, answer.ineq, answer.bounds)
            found = self._search(point, data, answer.d, expected)
            if found is None:
                if proximity > 1e8:
                    return Restored(point, forces, False, step)
                proximity = max(100.0 * proximity, 1.0)
                continue
            x, values, length = found
            gained = (now - weighted_violation(values, weights)) / expected
            proximity = min(proximity * (0.1 if gained > 0.5 else 10.0 if gained < 0.1 else 1.0), 1e8)
            proximity = max(proximity, 1e-8)
            point = self._problem.evaluate(x, values)
            if not point.finite:
                return Restored(point, forces, False, step)
            self._record(point, forces, length, length * largest(answer.d))
            if enough(point):
                return Restored(point, forces, False, step + 1)
        return Restored(point, forces, False, limit)

    def _data(self, point: Evaluation, forces: Duals, weights: Vector, proximity: float) -> QuadraticData:
        """With the curvature of the violated constraints where that is convex, else with proximity alone."""
        plain = self._plain(point, weights, proximity)
        curvature = self._problem.hessian(point.x, 0.0, forces.eq, forces.ineq)
        if not finite(curvature):
            return plain
        H = add_diagonal(curvature, np.full(len(point.x), proximity))
        slack = 1e-12 * max(1.0, largest(entries(H)))
        return replace(plain, H=H) if positive_semidefinite(H, slack) else plain

    def _plain(self, point: Evaluation, weights: Vector, proximity: float) -> QuadraticData:
        bounds = self._problem.bounds
        size = len(point.x)
        identity = proximity * (sp.eye_array(size, format="csc") if is_sparse(point.jacobian_eq) else np.eye(size))
        return QuadraticData(
            H=identity,
            g=np.zeros(size),
            E=point.jacobian_eq,
            e=point.values.eq,
            I=point.jacobian_ineq,
            i=point.values.ineq,
            lower=bounds.lower - point.x,
            upper=bounds.upper - point.x,
            weights=weights,
        )

    def _search(
        self, point: Evaluation, data: QuadraticData, d: Vector, expected: float
    ) -> tuple[Vector, Values, float] | None:
        """Backtrack; after a full step that falls short, once aim at where the constraints really went."""
        weights = data.weights if data.weights is not None else np.zeros(0)
        now = weighted_violation(point.values, weights)
        length = 1.0
        while length > 1e-10 and not self._expired():
            x = self._problem.bounds.project(point.x + length * d)
            values = self._problem.values(x)
            if values.finite and weighted_violation(values, weights) <= now - 1e-4 * length * expected:
                return x, values, length
            if length == 1.0 and values.finite:
                bent = self._solve(replace(data, e=values.eq - data.E @ d, i=values.ineq - data.I @ d))
                if bent.outcome is Outcome.OPTIMAL:
                    x = self._problem.bounds.project(point.x + bent.d)
                    values = self._problem.values(x)
                    if values.finite and weighted_violation(values, weights) <= now - 0.1 * expected:
                        return x, values, 1.0
            length *= 0.5
        return None

    def _none(self) -> Duals:
        problem = self._problem
        return Duals(np.zeros(problem.equalities), np.zeros(problem.inequalities), np.zeros(problem.size))
