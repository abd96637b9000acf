"""Which constraints exclude each other.

In: a point where the sum of violations is stationary, and the multipliers of that problem. Out: `Conflict`. The
constraints with a nonzero multiplier already form a conflict (to first order); a deletion filter (Chinneck and
Dravnieks, 1991) then drops each member in turn and keeps it out when the others still cannot be satisfied. Invariant:
every verdict comes from a restoration run from the same point; it is local evidence for nonlinear programs, a proof
only for linear ones.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from lagcompile.exact.linear import Vector
from lagcompile.exact.problem import Evaluation, Problem
from lagcompile.exact.residuals import Duals
from lagcompile.exact.restoration import Restoration, weighted_violation
from lagcompile.exact.result import Conflict

MOST_MEMBERS = 60


def find_conflict(
    problem: Problem,
    point: Evaluation,
    forces: Duals,
    *,
    restoration: Restoration,
    tolerance: float,
    delete: bool,
    expired: Callable[[], bool],
) -> Conflict:
    """The smallest conflicting set that could be found.

    Args:
        forces: multipliers of the violation problem at `point`.
        tolerance: violation that still counts as satisfied.
        delete: run the deletion filter; False returns the support of `forces`.
    """
    m = problem.equalities
    both = np.concatenate([np.abs(forces.eq), forces.ineq])
    violated = np.concatenate([np.abs(point.values.eq), point.values.ineq]) > tolerance
    weights = ((both > 1e-6) | violated).astype(float)
    members = np.flatnonzero(weights)
    irreducible = delete and len(members) <= MOST_MEMBERS
    pressed = forces.bounds
    if irreducible:
        for member in members:
            if expired():
                irreducible = False
                break
            without = weights.copy()
            without[member] = 0.0
            still = _conflict_without(restoration, point, without, tolerance)
            if still is not None:
                weights, pressed = without, still.bounds
    return Conflict(
        eq=tuple(int(i) for i in np.flatnonzero(weights[:m])),
        ineq=tuple(int(i) for i in np.flatnonzero(weights[m:])),
        lower=tuple(int(i) for i in np.flatnonzero(pressed < -1e-6)),
        upper=tuple(int(i) for i in np.flatnonzero(pressed > 1e-6)),
        irreducible=irreducible,
        violation=point.values.violation,
    )


def _conflict_without(restoration: Restoration, point: Evaluation, weights: Vector, tolerance: float) -> Duals | None:
    """Forces of the conflict that remains under these weights; None when the rest can be satisfied."""
    if not weights.any():
        return None
    run = restoration.run(
        point, weights=weights, enough=lambda p: weighted_violation(p.values, weights) <= tolerance, limit=100
    )
    left = weighted_violation(run.point.values, weights)
    return run.forces if run.stationary and left > tolerance else None
