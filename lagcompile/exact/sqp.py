"""The SQP iteration.

In: a `Problem` with finite values at its start, `Options`, optional multipliers. Out: `Run`, the best point found and why
the iteration ended. Each iteration: KKT test on unscaled residuals; Hessian; inertia correction; convex subproblem (elastic
when infeasible); filter line search with second-order correction; feasibility restoration when that fails. Invariant: every
point in the table is within the bounds and has finite values; the loop ends by iteration count and by clock.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from lagcompile.exact.activeset import solve_with_active_set
from lagcompile.exact.convexity import Convexified, InertiaCorrection
from lagcompile.exact.curvature import Curvature, DampedBFGS, ExactCurvature, GaussNewtonCurvature
from lagcompile.exact.filter import Filter
from lagcompile.exact.linear import Matrix, Vector, finite, is_sparse, largest, row_norms, scale_rows
from lagcompile.exact.options import Options
from lagcompile.exact.problem import Evaluation, Problem
from lagcompile.exact.quadratic import Outcome, QuadraticData, QuadraticSolution
from lagcompile.exact.residuals import Duals, WorkingSet, bound_multipliers, kkt_residual, least_squares_duals
from lagcompile.exact.restoration import Restoration, modelled_violation
from lagcompile.exact.result import KKT, IterationRow
from lagcompile.exact.search import Trial, line_search, measure
from lagcompile.exact.status import Status
from lagcompile.exact.subproblem import SubproblemCache

Mode = Literal["start", "step", "corrected", "elastic", "restoration"]


@dataclass(frozen=True)
class Iterate:
    """A point, its multipliers and their KKT residual."""

    point: Evaluation
    duals: Duals
    kkt: KKT


@dataclass(frozen=True)
class Run:
    """How the iteration ended; `forces` are set when violations are stationary."""

    status: Status
    message: str
    final: Iterate
    working: WorkingSet
    rows: tuple[IterationRow, ...]
    forces: Duals | None = None


class SQP:
    """One run.

    Args:
        problem: the program with derivatives attached.
        options: of the run.
        subproblems: compiled cvxpy problems.
        show: called with every new row of the table.
        deadline: `time.perf_counter()` at which to stop.
    """

    def __init__(
        self,
        problem: Problem,
        options: Options,
        *,
        subproblems: SubproblemCache,
        show: Callable[[IterationRow], None],
        deadline: float,
    ) -> None:
        self._problem = problem
        self._options = options
        self._subproblems = subproblems
        self._show = show
        self._deadline = deadline
        self._curvature: Curvature = {
            "exact": lambda: ExactCurvature(problem),
            "gauss_newton": lambda: GaussNewtonCurvature(problem),
            "bfgs": lambda: DampedBFGS(problem.size),
        }[options.hessian]()
        self._correction = InertiaCorrection()
        self._working = WorkingSet(np.zeros(problem.inequalities, dtype=bool), np.zeros(problem.size))
        self._settled = False  # whether the working set came from a solved subproblem
        self._rows: list[IterationRow] = []
        self._restoration = Restoration(
            problem, solve=self.solve, expired=self.expired, record=self._record_restoration
        )

    def run(self, point: Evaluation, duals: Duals | None) -> Run:
        """Iterate from `point` (finite, within the bounds) with the given or estimated multipliers."""
        self._filter = Filter(point.values.violation)
        current = self._start(point, duals)
        best = current
        floor, failures = 0.0, 0
        self._record(current, "start", 0.0, 0.0, None, 0)
        while True:
            ended = self._ended(current)
            if ended is not None:
                status, message = ended
                if status in (Status.ITERATION_LIMIT, Status.TIME_LIMIT):
                    return self._stopped(status, message, best)
                return self._run(status, message, current)
            H = self._curvature.matrix(current.point, current.duals)
            if not finite(H):
                return self._run(Status.NON_FINITE, f"Hessian at iteration {len(self._rows) - 1}", best)
            trial, convex, mode, floor = self._step(H, current, floor)
            if trial is None:
                if self.expired():
                    continue
                failures += 1
                recovered = self._recover(current, failures)
                if isinstance(recovered, Run):
                    return recovered
                if recovered is None:
                    floor = max(100.0 * floor, 1e-4)
                    self._filter.clear(current.point.values.violation)
                    if failures > 6:
                        return self._stuck(best)
                else:
                    current, floor = recovered, 0.0
                    best = _better(best, current, self._options.tolerance)
                continue
            following = self._accept(current, trial)
            if following is None:
                return self._run(Status.NON_FINITE, f"derivatives after iteration {len(self._rows) - 1}", best)
            moved = largest(following.point.x - current.point.x)
            self._curvature.update(current.point, following.point, following.duals)
            current, floor = following, (floor / 10.0 if floor > 1e-6 else 0.0)
            self._record(current, mode, trial.length, moved, convex, trial.trials)
            progress = current.kkt.worst < 0.999 * best.kkt.worst
            best = _better(best, current, self._options.tolerance)
            tiny = moved <= 1e-14 * (1.0 + largest(current.point.x))
            failures = 0 if progress or not tiny else failures + 1
            if failures > 3:
                return self._stuck(best)

    # starting and ending

    def _start(self, point: Evaluation, duals: Duals | None) -> Iterate:
        given = duals
        if given is None:
            near = point.values.ineq > -1e-8
            bounds = self._problem.bounds
            sides = np.where(point.x >= bounds.upper, 1.0, np.where(point.x <= bounds.lower, -1.0, 0.0))
            given = least_squares_duals(point, WorkingSet(near, sides), bounds)
            if given is None or given.largest > 1e3:
                given = Duals(*(np.zeros(n) for n in (len(point.values.eq), len(near), len(sides))))
        return Iterate(point, given, kkt_residual(point, given, self._problem.bounds))

    def _ended(self, current: Iterate) -> tuple[Status, str] | None:
        options = self._options
        if current.kkt.worst <= options.tolerance:
            return Status.OPTIMAL, f"KKT residual {current.kkt.worst:.2e}"
        feasible = current.kkt.primal <= options.acceptable_tolerance * (1.0 + largest(current.point.x))
        if feasible and current.point.values.objective < options.unbounded_below:
            return Status.UNBOUNDED, f"objective {current.point.values.objective:.3e} at a feasible point"
        if len(self._rows) - 1 >= options.max_iterations:
            return Status.ITERATION_LIMIT, f"{options.max_iterations} iterations"
        if self.expired():
            return Status.TIME_LIMIT, f"{options.time_limit:g} s"
        return None

    def _stopped(self, status: Status, message: str, best: Iterate) -> Run:
        if best.kkt.worst <= self._options.acceptable_tolerance:
            return self._run(Status.ACCEPTABLE, f"KKT residual {best.kkt.worst:.2e} ({message})", best)
        return self._run(status, f"{message}; smallest KKT residual {best.kkt.worst:.2e}", best)

    def _stuck(self, best: Iterate) -> Run:
        if best.kkt.worst <= self._options.acceptable_tolerance:
            return self._run(Status.ACCEPTABLE, f"no further progress at KKT residual {best.kkt.worst:.2e}", best)
        return self._run(Status.STALLED, f"no acceptable step at KKT residual {best.kkt.worst:.2e}", best)

    def _run(self, status: Status, message: str, final: Iterate, forces: Duals | None = None) -> Run:
        return Run(status, message, final, self._working, tuple(self._rows), forces)

    def expired(self) -> bool:
        """Whether the time is up."""
        return time.perf_counter() >= self._deadline

    # one iteration

    def solve(self, data: QuadraticData) -> QuadraticSolution:
        """Solve a subproblem: by the last active set where that is verified to be right, else by cvxpy's solver."""
        scaled, factors = _normalised(data)
        answer = self._solve_scaled(scaled)
        if factors is None:
            return answer
        m = len(data.e)
        return replace(answer, eq=answer.eq * factors[:m], ineq=answer.ineq * factors[m:])

    def _solve_scaled(self, data: QuadraticData) -> QuadraticSolution:
        if data.weights is None and self._settled and self._options.reuse_active_set and not is_sparse(data.H):
            begin = time.perf_counter()
            guess = solve_with_active_set(data, self._working.ineq, self._working.sides, tolerance=1e-10)
            self._subproblems.seconds += time.perf_counter() - begin
            if guess is not None:
                return guess
        answer = self._subproblems.solve(data, time_limit=self._deadline - time.perf_counter())
        if answer.outcome is Outcome.OPTIMAL and data.weights is None and not is_sparse(data.H):
            chosen = _working_set(data, answer)
            polished = solve_with_active_set(data, chosen.ineq, chosen.sides, tolerance=1e-10)
            return answer if polished is None else replace(polished, source="solver")
        return answer

    def _step(self, H: Matrix, current: Iterate, floor: float) -> tuple[Trial | None, Convexified, Mode, float]:
        """Subproblem and line search; a step that had to be cut short is first tried again with more regularisation.

        A multiple of the identity shortens the step along the constraints and keeps the part towards them, which a
        short step length would shrink as well.
        """
        mode: Mode = "step"
        for attempt in range(5):
            data, convex, solution = self._subproblem(H, current, floor)
            if solution.outcome is not Outcome.OPTIMAL:
                mode = "elastic"
                data, convex, solution = self._elastic(H, current, floor)
            if solution.outcome is not Outcome.OPTIMAL:
                return None, convex, mode, floor
            trial = line_search(
                self._problem,
                current.point,
                data,
                solution,
                self._filter,
                solve=self.solve,
                expired=self.expired,
                shortest=0.1 if attempt < 4 else 0.0,
            )
            if trial is not None or self.expired():
                break
            d = solution.d
            curvature = abs(float(current.point.gradient @ d)) / max(float(d @ d), 1e-300)
            floor = max(10.0 * max(floor, convex.delta), min(curvature, 1e10), 1e-4)
        if trial is not None and trial.corrected:
            mode = "corrected"
        return trial, convex, mode, floor

    def _subproblem(
        self, H: Matrix, current: Iterate, floor: float
    ) -> tuple[QuadraticData, Convexified, QuadraticSolution]:
        """Convexify and solve; repeat while the active set that the convexification relied on turns out different."""
        point = current.point
        for attempt in range(12):
            convex = self._correction.apply(H, point, self._working, self._problem.bounds, floor=floor)
            data = self._data(point, convex)
            solution = self.solve(data)
            if solution.outcome is Outcome.INFEASIBLE:
                break
            if solution.outcome is not Outcome.OPTIMAL:
                floor = max(10.0 * floor, 1e-8)
                continue
            working = _working_set(data, solution)
            same = np.array_equal(working.ineq, self._working.ineq) and np.array_equal(
                working.sides, self._working.sides
            )
            self._working, self._settled = working, True
            if same or convex.rho == 0.0 or attempt >= 3:
                break
        if convex.rho > 0.0 and point.values.violation <= 1e-6 and float(point.gradient @ solution.d) >= 0.0:
            # rows guessed to be active but far from it bent the step uphill: rely on those that hold right here only
            convex = self._correction.apply(H, point, self._holding(point), self._problem.bounds, floor=floor)
            data = self._data(point, convex)
            solution = self.solve(data)
            if solution.outcome is Outcome.OPTIMAL:
                self._working = _working_set(data, solution)
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

    def _accept(self, current: Iterate, trial: Trial) -> Iterate | None:
        """The next iterate with the best multipliers at hand: those of the subproblem, or least squares near a solution."""
        point = self._problem.evaluate(trial.x, trial.values)
        if not point.finite:
            return None
        bounds = self._problem.bounds
        found = trial.solution
        old, t = current.duals, trial.length
        duals = Duals(
            old.eq + t * (found.eq - old.eq),
            np.maximum(old.ineq + t * (found.ineq - old.ineq), 0.0),
            old.bounds + t * (found.bounds - old.bounds),
        )
        candidate = Iterate(point, duals, kkt_residual(point, duals, bounds))
        cancelled = replace(duals, bounds=bound_multipliers(point, duals.eq, duals.ineq, bounds))
        candidate = min(candidate, Iterate(point, cancelled, kkt_residual(point, cancelled, bounds)), key=_worst)
        if candidate.kkt.worst > self._options.tolerance:
            fitted = least_squares_duals(point, self._working, bounds)
            if fitted is not None:
                other = Iterate(point, fitted, kkt_residual(point, fitted, bounds))
                if other.kkt.worst < 0.5 * candidate.kkt.worst:
                    candidate = other
        return candidate

    def _recover(self, current: Iterate, failures: int) -> Iterate | Run | None:
        """After a failed search: restore feasibility; None when the point is feasible already."""
        options, point = self._options, current.point
        violation = point.values.violation
        if violation <= options.tolerance:
            return None
        self._filter.add(measure(point.values))
        weights = np.ones(self._problem.equalities + self._problem.inequalities)

        def enough(candidate: Evaluation) -> bool:
            smaller = candidate.values.violation <= 0.9 * violation
            return smaller and self._filter.allows(measure(candidate.values))

        left = options.max_iterations - (len(self._rows) - 1)
        restored = self._restoration.run(point, weights=weights, enough=enough, limit=max(left, 0))
        if not restored.point.finite:
            return self._run(Status.NON_FINITE, "derivatives during the restoration", current)
        zero = Duals(np.zeros_like(current.duals.eq), np.zeros_like(current.duals.ineq), np.zeros(len(point.x)))
        estimate = self._start(restored.point, None if failures < 3 else zero)
        if restored.stationary:
            if restored.point.values.violation > max(options.acceptable_tolerance, options.tolerance):
                message = f"sum of violations {restored.point.values.violation:.3e} cannot be decreased locally"
                return self._run(Status.INFEASIBLE, message, estimate, restored.forces)
            self._filter.clear(restored.point.values.violation)
            if failures > 6:
                return self._stuck(estimate)
        self._settled = False
        return estimate

    # the table

    def _record(
        self, iterate: Iterate, mode: Mode, length: float, norm: float, convex: Convexified | None, trials: int
    ) -> None:
        kkt = iterate.kkt
        row = IterationRow(
            index=len(self._rows),
            objective=iterate.point.values.objective,
            primal=kkt.primal,
            dual=max(kkt.stationarity, kkt.dual, kkt.complementarity),
            step=length,
            step_norm=norm,
            regularisation=0.0 if convex is None else convex.delta,
            convexification=0.0 if convex is None else convex.rho,
            mode=mode,
            trials=trials,
            active=self._problem.equalities + self._working.count,
        )
        self._rows.append(row)
        self._show(row)

    def _record_restoration(self, point: Evaluation, duals: Duals, length: float, norm: float) -> None:
        iterate = Iterate(point, duals, kkt_residual(point, duals, self._problem.bounds))
        self._record(iterate, "restoration", length, norm, None, 1)


def _worst(iterate: Iterate) -> float:
    return iterate.kkt.worst


def _better(best: Iterate, current: Iterate, tolerance: float) -> Iterate:
    """The iterate with the smaller KKT residual; `tolerance` keeps noise from deciding."""
    return current if max(current.kkt.worst, tolerance) <= best.kkt.worst else best


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
