"""Line search along a step, with second-order corrections.

In: a point, a step and the filter. Out: the accepted trial, or None. Invariant: every trial lies within the bounds
(steps do, and trials are convex combinations); a trial whose functions are not finite only shortens the step.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from lagcompile.exact.filter import Filter, Measure
from lagcompile.exact.linear import Vector, largest
from lagcompile.exact.problem import Evaluation, Problem, Values
from lagcompile.exact.quadratic import Outcome, QuadraticData, QuadraticSolution

Solve = Callable[[QuadraticData], QuadraticSolution]


@dataclass(frozen=True)
class Trial:
    """An accepted point."""

    x: Vector
    values: Values
    length: float
    corrected: bool
    trials: int
    solution: QuadraticSolution


def measure(values: Values) -> Measure:
    """What the filter looks at."""
    return Measure(values.violation, values.objective)


def line_search(
    problem: Problem,
    point: Evaluation,
    data: QuadraticData,
    solution: QuadraticSolution,
    filter: Filter,
    *,
    solve: Solve,
    expired: Callable[[], bool],
    shortest: float = 0.0,
    expand: bool = False,
) -> Trial | None:
    """Backtrack from the full step until the filter accepts; try corrected full steps first.

    Args:
        data: the subproblem that gave the step (the corrections change its constants).
        solve: solves a subproblem.
        expired: says that time is up.
        shortest: give up below this length even where the filter's rule would continue.
        expand: the subproblem was unbounded: continue along an accepted full step while the objective falls.
    """
    now = measure(point.values)
    slope = float(point.gradient @ solution.d)
    least = max(filter.smallest_step(now, slope), shortest)
    length, trials = 1.0, 0
    tiny = largest(solution.d) <= 1e-14 * (1.0 + largest(point.x))
    while length >= least and not expired():
        x = problem.bounds.project(point.x + length * solution.d)
        values = problem.values(x)
        trials += 1
        trial = measure(values)
        if (tiny and values.finite) or (values.finite and filter.accepts(now, trial, slope, length)):
            if not tiny and not filter.switches(now, slope, length):
                filter.add(now)
            found = Trial(x, values, length, False, trials, solution)
            return _expanded(problem, point, found) if expand and length == 1.0 else found
        if length == 1.0 and values.finite and trial.violation >= now.violation:
            corrected = _corrected(problem, point, data, solution, values, filter, solve, slope)
            if corrected is not None:
                return replace(corrected, trials=corrected.trials + trials)
        length *= 0.5
    return None


def _expanded(problem: Problem, point: Evaluation, trial: Trial) -> Trial:
    """Lengthen a full step tenfold as long as that is feasible to the same degree and lowers the objective."""
    allowed = max(point.values.violation, trial.values.violation)
    while trial.length < 1e25:
        x = problem.bounds.project(point.x + 10.0 * trial.length * trial.solution.d)
        values = problem.values(x)
        lower = values.finite and values.objective < trial.values.objective and values.violation <= allowed
        if not lower:
            break
        trial = replace(trial, x=x, values=values, length=10.0 * trial.length, trials=trial.trials + 1)
    return trial


def _corrected(
    problem: Problem,
    point: Evaluation,
    data: QuadraticData,
    solution: QuadraticSolution,
    values: Values,
    filter: Filter,
    solve: Solve,
    slope: float,
) -> Trial | None:
    """Second-order corrections: aim at the constraints' values where the step led, at most four times."""
    now = measure(point.values)
    step, reached = solution.d, values
    previous = np.inf
    for attempt in range(1, 5):
        bent = replace(data, e=reached.eq - data.E @ step, i=reached.ineq - data.I @ step)
        answer = solve(bent)
        if answer.outcome is not Outcome.OPTIMAL:
            return None
        x = problem.bounds.project(point.x + answer.d)
        reached, step = problem.values(x), answer.d
        trial = measure(reached)
        if not reached.finite or trial.violation > 0.99 * previous:
            return None
        previous = trial.violation
        if filter.accepts(now, trial, slope, 1.0):
            if not filter.switches(now, slope, 1.0):
                filter.add(now)
            return Trial(x, reached, 1.0, True, attempt, solution)
    return None
