"""One step of the iteration: convexified subproblem, elastic subproblem, line search.

In: an iterate, its Hessian, the filter. Out: a `Step`. Invariant: the working set is always that of the last
subproblem that was solved; a subproblem's answer does not depend on it (a wrong guess only costs time).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from lagcompile.exact.activeset import solve_with_active_set
from lagcompile.exact.convexity import Convexified, InertiaCorrection
from lagcompile.exact.filter import Filter
from lagcompile.exact.iterate import Iterate
from lagcompile.exact.linear import Matrix, Vector, largest, row_norms, scale_rows
from lagcompile.exact.options import Options
from lagcompile.exact.problem import Evaluation, Problem
from lagcompile.exact.quadratic import Outcome, QuadraticData, QuadraticSolution
from lagcompile.exact.residuals import WorkingSet
from lagcompile.exact.restoration import modelled_violation
from lagcompile.exact.result import Mode
from lagcompile.exact.search import Trial, line_search
from lagcompile.exact.subproblem import SubproblemCache


@dataclass(frozen=True)
class Step:
    """Outcome of one attempt; `trial` is None when no acceptable point was found.

    Attributes: floor is the regularisation asked for, convex what was really added.
    """

    trial: Trial | None
    convex: Convexified
    mode: Mode
    floor: float


class StepMaker:
    """Makes steps and remembers the working set between them.

    Args:
        problem: the program.
        options: of the run.
        subproblems: compiled cvxpy problems.
        remaining: seconds left.
    """

    def __init__(
        self,
        problem: Problem,
        options: Options,
        *,
        subproblems: SubproblemCache,
        remaining: Callable[[], float],
    ) -> None:
        self._problem = problem
        self._options = options
        self._subproblems = subproblems
        self._remaining = remaining
        self._correction = InertiaCorrection()
        self.working = WorkingSet(np.zeros(problem.inequalities, dtype=bool), np.zeros(problem.size))
        self._settled = False  # whether the working set came from a solved subproblem
        self._unbounded = False  # whether the last subproblem had no solution before it was regularised

    def expired(self) -> bool:
        """Whether the time is up."""
        return self._remaining() <= 0.0

    def state(self) -> Mapping[str, Any]:
        """What the next step depends on."""
        return {
            "working": (self.working.ineq, self.working.sides),
            "settled": self._settled,
            "correction": self._correction.state(),
            "patterns": self._subproblems.state(),
        }

    def load(self, state: Mapping[str, Any]) -> None:
        """Go on from `state`."""
        self.working, self._settled = WorkingSet(*state["working"]), state["settled"]
        self._correction.load(state["correction"])
        self._subproblems.load(state["patterns"])

    def forget(self) -> None:
        """Do not guess that the working set still holds (after the point has jumped)."""
        self._settled = False

    def make(self, H: Matrix, current: Iterate, filter: Filter, floor: float) -> Step:
        """Subproblem and line search; a step that had to be cut short is first tried again with more regularisation.

        A multiple of the identity shortens the step along the constraints and keeps the part towards them, which a
        short step length would shrink as well.
        """
        mode: Mode = "step"
        for attempt in range(5):
            data, convex, solution = self._subproblem(H, current, floor)
            expand = self._unbounded
            if solution.outcome is not Outcome.OPTIMAL:
                mode = "elastic"
                data, convex, solution = self._elastic(H, current, floor)
            if solution.outcome is not Outcome.OPTIMAL:
                return Step(None, convex, mode, floor)
            trial = line_search(
                self._problem,
                current.point,
                data,
                solution,
                filter,
                solve=self.solve,
                expired=self.expired,
                shortest=0.1 if attempt < 4 else 0.0,
                expand=expand,
            )
            if trial is not None or self.expired():
                break
            d = solution.d
            curvature = abs(float(current.point.gradient @ d)) / max(float(d @ d), 1e-300)
            floor = max(10.0 * max(floor, convex.delta), min(curvature, 1e10), 1e-4)
        if trial is not None and trial.corrected:
            mode = "corrected"
        return Step(trial, convex, mode, floor)

    def _subproblem(
        self, H: Matrix, current: Iterate, floor: float
    ) -> tuple[QuadraticData, Convexified, QuadraticSolution]:
        """Convexify and solve; repeat while the active set that the convexification relied on turns out different."""
        point = current.point
        self._unbounded = False
        for attempt in range(12):
            convex = self._correction.apply(H, point, self.working, self._problem.bounds, floor=floor)
            data = self._data(point, convex)
            solution = self.solve(data)
            if solution.outcome is Outcome.INFEASIBLE:
                break
            if solution.outcome is not Outcome.OPTIMAL:
                self._unbounded |= solution.outcome is Outcome.UNBOUNDED
                floor = max(10.0 * floor, 1e-8)
                continue
            working = _working_set(data, solution)
            same = np.array_equal(working.ineq, self.working.ineq) and np.array_equal(working.sides, self.working.sides)
            self.working, self._settled = working, True
            if same or convex.rho == 0.0 or attempt >= 3:
                break
        if convex.rho > 0.0 and point.values.violation <= 1e-6 and float(point.gradient @ solution.d) >= 0.0:
            # rows guessed to be active but far from it bent the step uphill: rely on those that hold right here only
            convex = self._correction.apply(H, point, self._holding(point), self._problem.bounds, floor=floor)
            data = self._data(point, convex)
            solution = self.solve(data)
            if solution.outcome is Outcome.OPTIMAL:
                self.working = _working_set(data, solution)
        return data, convex, solution

    def _holding(self, point: Evaluation) -> WorkingSet:
        """Inequalities and bounds that hold with equality at the point itself."""
        bounds = self._problem.bounds
        sides = np.where(point.x >= bounds.upper, 1.0, np.where(point.x <= bounds.lower, -1.0, 0.0))
        return WorkingSet(point.values.ineq >= -1e-10, np.where(bounds.lower == bounds.upper, 0.0, sides))

    def _data(self, point: Evaluation, convex: Convexified) -> QuadraticData:
        bounds = self._problem.bounds
        return QuadraticData(
            H=convex.H,
            g=convex.g,
            E=point.jacobian_eq,
            e=point.values.eq,
            I=point.jacobian_ineq,
            i=point.values.ineq,
            lower=bounds.lower - point.x,
            upper=bounds.upper - point.x,
        )

    def _elastic(
        self, H: Matrix, current: Iterate, floor: float
    ) -> tuple[QuadraticData, Convexified, QuadraticSolution]:
        """The subproblem with violations at a price, raised until they shrink (elastic mode)."""
        point = current.point
        matrix, delta = self._correction.shift_only(H, floor=max(floor, 1e-8))
        convex = Convexified(matrix, point.gradient, delta, 0.0)
        base = self._data(point, convex)
        rows = self._problem.equalities + self._problem.inequalities
        price = max(10.0, 2.0 * largest(current.duals.eq), 2.0 * largest(current.duals.ineq), largest(point.gradient))
        unit = np.ones(rows)
        now = modelled_violation(base, np.zeros(len(point.x)), unit)
        for _ in range(4):
            data = replace(base, weights=np.full(rows, price))
            solution = self.solve(data)
            if solution.outcome is Outcome.OPTIMAL and modelled_violation(base, solution.d, unit) <= 0.9 * now:
                return base, convex, solution
            price *= 100.0
        return base, convex, replace(solution, outcome=Outcome.FAILED)

    def solve(self, data: QuadraticData) -> QuadraticSolution:
        """Solve a subproblem: by the last active set where that is verified to be right, else by cvxpy's solver."""
        scaled, factors = _normalised(data)
        answer = self._solve_scaled(scaled)
        if factors is None:
            return answer
        m = len(data.e)
        return replace(answer, eq=answer.eq * factors[:m], ineq=answer.ineq * factors[m:])

    def _solve_scaled(self, data: QuadraticData) -> QuadraticSolution:
        if data.weights is None and self._settled and self._options.reuse_active_set:
            begin = time.perf_counter()
            guess = solve_with_active_set(data, self.working.ineq, self.working.sides, tolerance=1e-10)
            self._subproblems.seconds += time.perf_counter() - begin
            if guess is not None:
                return guess
        answer = self._subproblems.solve(data, time_limit=self._remaining())
        if answer.outcome is Outcome.OPTIMAL and data.weights is None:
            chosen = _working_set(data, answer)
            polished = solve_with_active_set(data, chosen.ineq, chosen.sides, tolerance=1e-10)
            return answer if polished is None else replace(polished, source="solver")
        return answer


def _working_set(data: QuadraticData, solution: QuadraticSolution) -> WorkingSet:
    """Active according to the subproblem: multiplier larger than slack."""
    slack = -(data.I @ solution.d + data.i)
    up = data.upper - solution.d < solution.bounds
    down = solution.d - data.lower < -solution.bounds
    fixed = data.lower == data.upper
    return WorkingSet(solution.ineq > slack, np.where(fixed, 0.0, up.astype(float) - down.astype(float)))


def _normalised(data: QuadraticData) -> tuple[QuadraticData, Vector | None]:
    """Rows whose length is far from 1 brought to length 1, so that one tolerance fits all; with the factors used."""
    lengths = np.concatenate([row_norms(data.E), row_norms(data.I)])
    far = (lengths < 1e-3) | (lengths > 1e4)
    if not far.any():
        return data, None
    factors = np.where(far & (lengths > 1e-150), 1.0 / np.maximum(lengths, 1e-150), 1.0)
    m = len(data.e)
    upper, lower = factors[:m], factors[m:]
    return (
        replace(
            data,
            E=scale_rows(data.E, upper),
            e=data.e * upper,
            I=scale_rows(data.I, lower),
            i=data.i * lower,
            weights=None if data.weights is None else data.weights / factors,
        ),
        factors,
    )
