"""Iterates and their multipliers.

In: points, subproblem solutions. Out: `Iterate`, a point with the best multipliers at hand. Invariant: the KKT
residual stored with an iterate belongs to exactly its point and multipliers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from lagcompile.exact.problem import Bounds, Evaluation, Problem, Values
from lagcompile.exact.residuals import Duals, WorkingSet, bound_multipliers, kkt_residual, least_squares_duals
from lagcompile.exact.result import KKT
from lagcompile.exact.search import Trial

LARGEST_ESTIMATE = 1e3  # a first estimate beyond this is worth less than zeros (Waechter and Biegler, 2006)


@dataclass(frozen=True)
class Iterate:
    """A point, its multipliers and their KKT residual."""

    point: Evaluation
    duals: Duals
    kkt: KKT

    @classmethod
    def at(cls, point: Evaluation, duals: Duals, bounds: Bounds) -> Iterate:
        """With the residual computed."""
        return cls(point, duals, kkt_residual(point, duals, bounds))

    @classmethod
    def of(cls, state: Mapping[str, Any], problem: Problem) -> Iterate:
        """From `state`; derivatives are evaluated again."""
        point = problem.evaluate(state["x"], Values(*state["values"]))
        return cls.at(point, Duals(*state["duals"]), problem.bounds)

    def state(self) -> Mapping[str, Any]:
        """What `of` takes."""
        values, duals = self.point.values, self.duals
        return {
            "x": self.point.x,
            "values": (values.objective, values.eq, values.ineq),
            "duals": (duals.eq, duals.ineq, duals.bounds),
        }

    def better_than(self, other: Iterate, tolerance: float) -> bool:
        """Whether the KKT residual is not larger; below `tolerance` noise does not decide."""
        return max(self.kkt.worst, tolerance) <= other.kkt.worst


def first_iterate(point: Evaluation, duals: Duals | None, bounds: Bounds) -> Iterate:
    """The start, with the given multipliers, or least-squares ones unless they are very large."""
    if duals is not None:
        return Iterate.at(point, duals, bounds)
    near = point.values.ineq > -1e-8
    sides = np.where(point.x >= bounds.upper, 1.0, np.where(point.x <= bounds.lower, -1.0, 0.0))
    estimate = least_squares_duals(point, WorkingSet(near, sides), bounds)
    if estimate is None or estimate.largest > LARGEST_ESTIMATE:
        estimate = no_duals(point)
    return Iterate.at(point, estimate, bounds)


def no_duals(point: Evaluation) -> Duals:
    """All zero."""
    return Duals(np.zeros(len(point.values.eq)), np.zeros(len(point.values.ineq)), np.zeros(len(point.x)))


def next_iterate(
    current: Iterate, point: Evaluation, trial: Trial, working: WorkingSet, bounds: Bounds, *, tolerance: float
) -> Iterate:
    """The accepted point with the multipliers that fit it best.

    Candidates: those of the subproblem (damped with the step length), the same with bound multipliers that cancel the
    gradient, and least squares over the working set; the last must halve the residual to be taken.
    """
    found, old, t = trial.solution, current.duals, min(trial.length, 1.0)
    duals = Duals(
        old.eq + t * (found.eq - old.eq),
        np.maximum(old.ineq + t * (found.ineq - old.ineq), 0.0),
        old.bounds + t * (found.bounds - old.bounds),
    )
    damped = Iterate.at(point, duals, bounds)
    cancelled = replace(duals, bounds=bound_multipliers(point, duals.eq, duals.ineq, bounds))
    best = min(damped, Iterate.at(point, cancelled, bounds), key=lambda iterate: iterate.kkt.worst)
    if best.kkt.worst <= tolerance:
        return best
    fitted = least_squares_duals(point, working, bounds)
    if fitted is None:
        return best
    other = Iterate.at(point, fitted, bounds)
    return other if other.kkt.worst < 0.5 * best.kkt.worst else best
