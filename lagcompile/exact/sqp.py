"""The SQP iteration.

In: a `Problem` with finite values at its start, `Options`, optional multipliers. Out: `Run`, the best point found and
why the iteration ended. Each iteration: KKT test on unscaled residuals; Hessian; inertia correction; convex
subproblem (elastic when infeasible); filter line search with second-order correction; feasibility restoration when
that fails. Invariant: every point in the table is within the bounds and has finite values; the loop ends by iteration
count, by failure count and by clock.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from lagcompile.exact.convexity import Convexified
from lagcompile.exact.curvature import Curvature, DampedBFGS, ExactCurvature, GaussNewtonCurvature
from lagcompile.exact.escape import escape
from lagcompile.exact.filter import Filter
from lagcompile.exact.iterate import Iterate, first_iterate, next_iterate, no_duals
from lagcompile.exact.linear import finite, largest
from lagcompile.exact.options import Options
from lagcompile.exact.problem import Evaluation, Problem
from lagcompile.exact.quadratic import QuadraticData, QuadraticSolution
from lagcompile.exact.residuals import Duals, WorkingSet
from lagcompile.exact.restoration import Restoration
from lagcompile.exact.result import IterationRow, Mode
from lagcompile.exact.search import measure
from lagcompile.exact.status import Status
from lagcompile.exact.steps import Step, StepMaker
from lagcompile.exact.subproblem import SubproblemCache
from lagcompile.ir.keeper import Keeper

MOST_FAILURES = 8  # steps that could not be made or did not move, in a row
MOST_ESCAPES = 3
PATIENCE = 40  # iterations without progress, once the residual is acceptable


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
        begin: `time.perf_counter()` at which the run began.
        keeper: keeps the run between two iterations.
    """

    def __init__(
        self,
        problem: Problem,
        options: Options,
        *,
        subproblems: SubproblemCache,
        show: Callable[[IterationRow], None],
        begin: float,
        keeper: Keeper,
    ) -> None:
        self._problem = problem
        self._keeper, self._begin, self._turns = keeper, begin, 0
        self._options = options
        self._show = show
        self._curvature: Curvature = {
            "exact": lambda: ExactCurvature(problem),
            "gauss_newton": lambda: GaussNewtonCurvature(problem),
            "bfgs": lambda: DampedBFGS(problem.size),
        }[options.hessian]()
        self._steps = StepMaker(problem, options, subproblems=subproblems, remaining=self._remaining)
        self._rows: list[IterationRow] = []
        self._restoration = Restoration(
            problem, solve=self.solve, expired=self.expired, record=self._record_restoration
        )
        self._escapes = 0
        self._left: Iterate | None = None  # the last KKT point that was left again

    def solve(self, data: QuadraticData) -> QuadraticSolution:
        """Solve one subproblem."""
        return self._steps.solve(data)

    def expired(self) -> bool:
        """Whether the time is up, or a stop was asked for."""
        return self._steps.expired()

    def _remaining(self) -> float:
        return 0.0 if self._keeper.stopped else self._begin + self._options.time_limit - time.perf_counter()

    def run(self, point: Evaluation, duals: Duals | None) -> Run:
        """Iterate from `point` (finite, within the bounds) with the given or estimated multipliers.

        Where the keeper has a state, that is gone on from.
        """
        self._filter = Filter(point.values.violation)
        current = first_iterate(point, duals, self._problem.bounds)
        best, floor, failures, idle = current, 0.0, 0, 0
        if self._keeper.state is not None:
            current, best, floor, failures, idle = self._resumed(self._keeper.state)
        else:
            self._record(current, "start", 0.0, 0.0, None, 0)
        first = True
        while True:
            ended = self._ended(current, best)
            if first or ended is None:  # what a limit or a stop may have cut short is no place to go on from
                self._keeper.between(self._turns, self._state(current, best, floor, failures, idle))
            self._turns, first = self._turns + 1, False
            if ended is not None:
                left = self._escape(ended.final) if ended.status is Status.OPTIMAL else None
                if left is None:
                    return self._final(ended)
                current, best, floor, failures = left, left, 0.0, 0
                continue
            H = self._curvature.matrix(current.point, current.duals)
            if not finite(H):
                return self._run(Status.NON_FINITE, f"Hessian after iteration {len(self._rows) - 1}", best)
            step = self._steps.make(H, current, self._filter, floor)
            following: Iterate | Run | None
            if step.trial is None:
                if self.expired():
                    continue
                failures += 1
                if failures > MOST_FAILURES:
                    return self._final(self._stuck(current, best))
                following = self._recover(current, failures)
                floor = max(100.0 * floor, 1e-4) if following is None else 0.0
                following = current if following is None else following
            else:
                following = self._accept(current, step)
                floor = step.floor / 10.0 if step.floor > 1e-6 else 0.0
            if isinstance(following, Run):
                return self._final(following)
            if step.trial is not None:
                moved = largest(following.point.x - current.point.x) > 1e-14 * (1.0 + largest(current.point.x))
                failures = 0 if moved or following.kkt.worst < 0.999 * best.kkt.worst else failures + 1
                if failures > MOST_FAILURES:
                    return self._final(self._stuck(current, best))
            idle = 0 if following.kkt.worst < 0.999 * best.kkt.worst else idle + 1
            current = following
            best = current if current.better_than(best, self._options.tolerance) else best
            if idle > PATIENCE and best.kkt.worst <= self._options.acceptable_tolerance:
                return self._final(self._stuck(current, best))

    # keeping

    def _state(
        self, current: Iterate, best: Iterate, floor: float, failures: int, idle: int
    ) -> Callable[[], Mapping[str, Any]]:
        """Gives the state of this moment; nothing in it is changed in place later."""
        rows, seconds = tuple(self._rows), time.perf_counter() - self._begin
        held = {
            "x0": self._problem.x0,
            "turns": self._turns,
            "seconds": seconds,
            "loop": [floor, failures, idle],
            "escapes": self._escapes,
            "current": current.state(),
            "best": best.state(),
            "left": None if self._left is None else self._left.state(),
            "filter": self._filter.state(),
            "learnt": self._curvature.learnt,
            "steps": self._steps.state(),
        }
        return lambda: {**held, "rows": [row.model_dump() for row in rows]}

    def _resumed(self, state: Mapping[str, Any]) -> tuple[Iterate, Iterate, float, int, int]:
        problem, (floor, failures, idle) = self._problem, state["loop"]
        current, best = Iterate.of(state["current"], problem), Iterate.of(state["best"], problem)
        self._left = None if state["left"] is None else Iterate.of(state["left"], problem)
        self._turns, self._escapes = state["turns"], state["escapes"]
        self._rows = [IterationRow(**row) for row in state["rows"]]
        self._filter.load(state["filter"])
        self._curvature.learnt = state["learnt"]
        self._steps.load(state["steps"])
        return current, best, floor, failures, idle

    # ending

    def _ended(self, current: Iterate, best: Iterate) -> Run | None:
        options = self._options
        if self._keeper.stopped:
            return self._run(Status.INTERRUPTED, f"KKT residual {current.kkt.worst:.2e}", current)
        if current.kkt.worst <= options.tolerance:
            return self._run(Status.OPTIMAL, f"KKT residual {current.kkt.worst:.2e}", current)
        feasible = current.kkt.primal <= options.acceptable_tolerance * (1.0 + largest(current.point.x))
        if feasible and current.point.values.objective < options.unbounded_below:
            message = f"objective {current.point.values.objective:.3e} at a feasible point"
            return self._run(Status.UNBOUNDED, message, current)
        if len(self._rows) - 1 >= options.max_iterations:
            return self._stopped(Status.ITERATION_LIMIT, f"{options.max_iterations} iterations", current, best)
        if self.expired():
            return self._stopped(Status.TIME_LIMIT, f"{options.time_limit:g} s", current, best)
        return None

    def _stopped(self, status: Status, message: str, current: Iterate, best: Iterate) -> Run:
        """The best point when it is acceptable, else the last one (a small residual far from feasible says nothing)."""
        if best.kkt.worst <= self._options.acceptable_tolerance:
            return self._run(Status.ACCEPTABLE, f"KKT residual {best.kkt.worst:.2e} ({message})", best)
        return self._run(status, f"{message}; KKT residual {current.kkt.worst:.2e}", current)

    def _stuck(self, current: Iterate, best: Iterate) -> Run:
        if best.kkt.worst <= self._options.acceptable_tolerance:
            return self._run(Status.ACCEPTABLE, f"no further progress at KKT residual {best.kkt.worst:.2e}", best)
        return self._run(Status.STALLED, f"no acceptable step at KKT residual {current.kkt.worst:.2e}", current)

    def _run(self, status: Status, message: str, final: Iterate, forces: Duals | None = None) -> Run:
        return Run(status, message, final, self._steps.working, tuple(self._rows), forces)

    def _final(self, run: Run) -> Run:
        """The run, or the KKT point that was left before when leaving it led to nothing better."""
        left = self._left
        feasible = run.final.kkt.primal <= self._options.acceptable_tolerance
        lower = left is None or run.final.point.values.objective < left.point.values.objective
        if left is None or run.status in (Status.UNBOUNDED, Status.INTERRUPTED) or (feasible and lower):
            return run
        return self._run(Status.OPTIMAL, f"KKT residual {left.kkt.worst:.2e}", left)

    # moving

    def _accept(self, current: Iterate, step: Step) -> Iterate | Run:
        trial = step.trial
        if trial is None:
            return current
        point = self._problem.evaluate(trial.x, trial.values)
        if not point.finite:
            return self._run(Status.NON_FINITE, f"derivatives after iteration {len(self._rows) - 1}", current)
        following = next_iterate(
            current, point, trial, self._steps.working, self._problem.bounds, tolerance=self._options.tolerance
        )
        self._curvature.update(current.point, following.point, following.duals)
        moved = largest(point.x - current.point.x)
        self._record(following, step.mode, trial.length, moved, step.convex, trial.trials)
        return following

    def _escape(self, current: Iterate) -> Iterate | None:
        """Leave a KKT point along negative curvature; None at a minimum, or when that was tried often enough."""
        options = self._options
        limited = self._escapes >= MOST_ESCAPES or len(self._rows) - 1 >= options.max_iterations
        if not options.escape_saddles or options.hessian != "exact" or limited:
            return None
        left = self._left
        if left is not None and current.point.values.objective >= left.point.values.objective:
            return None
        hessian = self._curvature.matrix(current.point, current.duals)
        x = escape(self._problem, current, hessian) if finite(hessian) else None
        if x is None:
            return None
        point = self._problem.evaluate(x)
        if not point.finite:
            return None
        self._escapes += 1
        self._left = current
        self._filter.clear(point.values.violation)
        self._steps.forget()
        following = Iterate.at(point, current.duals, self._problem.bounds)
        self._record(following, "escape", 1.0, largest(x - current.point.x), None, 1)
        return following

    def _recover(self, current: Iterate, failures: int) -> Iterate | Run | None:
        """After a failed search: restore feasibility; None (and an empty filter) when the point is feasible already."""
        options, point, bounds = self._options, current.point, self._problem.bounds
        violation = point.values.violation
        if violation <= options.tolerance:
            self._filter.clear(violation)
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
        estimate = first_iterate(restored.point, None if failures < 3 else no_duals(restored.point), bounds)
        reached = restored.point.values.violation
        if restored.stationary and reached > options.acceptable_tolerance:
            message = f"sum of violations {reached:.3e} cannot be decreased locally"
            return self._run(Status.INFEASIBLE, message, estimate, restored.forces)
        if restored.stationary:
            self._filter.clear(reached)
        self._steps.forget()
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
            active=self._problem.equalities + self._steps.working.count,
        )
        self._rows.append(row)
        self._show(row)

    def _record_restoration(self, point: Evaluation, duals: Duals, length: float, norm: float) -> None:
        iterate = Iterate.at(point, duals, self._problem.bounds)
        self._record(iterate, "restoration", length, norm, None, 1)
