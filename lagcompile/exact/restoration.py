"""Feasibility restoration: minimise the sum of violations by elastic subproblems.

In: a point that the main iteration cannot leave. Out: a point with less violation, or evidence that the sum of
violations is locally as small as it gets. Invariant: the weighted sum of violations decreases at every step; bounds
always hold.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from lagcompile.exact.convexity import InertiaCorrection
from lagcompile.exact.linear import Vector, largest
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
        self._correction = InertiaCorrection()

    def run(
        self,
        point: Evaluation,
        *,
        weights: Vector,
        enough: Callable[[Evaluation], bool],
        limit: int,
        tolerance: float = 1e-9,
    ) -> Restored:
        """Decrease the weighted violation until `enough`, or until it is stationary.

        Args:
            point: start, within the bounds.
            weights: (equalities + inequalities,); 0 leaves a constraint out.
            enough: whether a point may be handed back.
            limit: most steps.
            tolerance: relative decrease of the model below which a point is stationary.
        """
        forces = self._none()
        proximity = 1e-4
        for step in range(limit):
            if self._expired():
                return Restored(point, forces, False, step)
            data = self._data(point, forces, weights, proximity)
            answer = self._solve(data)
            if answer.outcome is not Outcome.OPTIMAL:
                if proximity > 1e6:
                    return Restored(point, forces, False, step)
                proximity = max(10.0 * proximity, 1e-2)
                forces = self._none()
                continue
            now = weighted_violation(point.values, weights)
            expected = now - modelled_violation(data, answer.d, weights)
            forces = Duals(answer.eq, answer.ineq, answer.bounds)
            if expected <= tolerance * max(now, 1e-12):
                return Restored(point, forces, True, step)
            found = self._search(point, answer.d, now, expected, weights)
            if found is None:
                if proximity > 1e6:
                    return Restored(point, forces, True, step)
                proximity *= 100.0
                continue
            x, values, length = found
            proximity = max(proximity / 10.0, 1e-8) if length == 1.0 else min(proximity * 4.0, 1e8)
            point = self._problem.evaluate(x, values)
            if not point.finite:
                return Restored(point, forces, False, step)
            self._record(point, forces, length, length * largest(answer.d))
            if enough(point):
                return Restored(point, forces, False, step + 1)
        return Restored(point, forces, False, limit)

    def _data(self, point: Evaluation, forces: Duals, weights: Vector, proximity: float) -> QuadraticData:
        curvature = self._problem.hessian(point.x, 0.0, forces.eq, forces.ineq)
        H, _ = self._correction.shift_only(curvature, floor=proximity)
        bounds = self._problem.bounds
        return QuadraticData(
            H=H,
            g=np.zeros(len(point.x)),
            E=point.jacobian_eq,
            e=point.values.eq,
            I=point.jacobian_ineq,
            i=point.values.ineq,
            lower=bounds.lower - point.x,
            upper=bounds.upper - point.x,
            weights=weights,
        )

    def _search(
        self, point: Evaluation, d: Vector, now: float, expected: float, weights: Vector
    ) -> tuple[Vector, Values, float] | None:
        length = 1.0
        while length > 1e-10 and not self._expired():
            x = self._problem.bounds.project(point.x + length * d)
            values = self._problem.values(x)
            if values.finite and weighted_violation(values, weights) <= now - 1e-4 * length * expected:
                return x, values, length
            length *= 0.5
        return None

    def _none(self) -> Duals:
        problem = self._problem
        return Duals(np.zeros(problem.equalities), np.zeros(problem.inequalities), np.zeros(problem.size))
