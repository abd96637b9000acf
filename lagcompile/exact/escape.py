"""Leaving KKT points that are not minima.

In: a KKT point and the Hessian of the Lagrangian there. Out: a displacement of negative curvature, or None.
Invariant: the direction keeps strongly active constraints to first order and does not violate weakly active ones; it
is only proposed when the Lagrangian decreases along it.
"""

from __future__ import annotations

import numpy as np

from lagcompile.exact.facts import active_gradients, null_space
from lagcompile.exact.iterate import Iterate
from lagcompile.exact.linear import Matrix, Vector, largest, toarray
from lagcompile.exact.problem import Bounds, Problem

MOST_VARIABLES = 500  # the test needs dense eigenvectors
CURVATURE = 1e-6  # relative to the Hessian's largest entry


def escape(problem: Problem, current: Iterate, hessian: Matrix) -> Vector | None:
    """A nearby point from which the objective decreases to second order; None where no such direction is found."""
    bounds: Bounds = problem.bounds
    n = problem.size
    if n > MOST_VARIABLES:
        return None
    active = active_gradients(current.point, current.duals, bounds, near=1e-6)
    _, basis, _ = null_space(active.rows[~active.weak])
    if basis.shape[1] == 0:
        return None
    dense = toarray(hessian)
    values, vectors = np.linalg.eigh(basis.T @ dense @ basis)
    for index in np.flatnonzero(values < -CURVATURE * max(1.0, largest(dense.ravel()))):
        direction = basis @ vectors[:, index]
        outward = active.rows[active.weak] @ direction
        for sign in (1.0, -1.0):
            if outward.size and float((sign * outward).max()) > 1e-8:
                continue
            found = _along(problem, current, sign * direction)
            if found is not None:
                return found
    return None


def _along(problem: Problem, current: Iterate, direction: Vector) -> Vector | None:
    """The largest of a few displacements along which the Lagrangian decreases."""
    length = 0.1 * (1.0 + largest(current.point.x)) / max(largest(direction), 1e-300)
    start = current.point.values.objective
    for _ in range(8):
        x = problem.bounds.project(current.point.x + length * direction)
        values = problem.values(x)
        if values.finite:
            multiplied = current.duals.eq @ values.eq + current.duals.ineq @ values.ineq
            if values.objective + float(multiplied) + float(current.duals.bounds @ (x - current.point.x)) < start:
                return x
        length *= 0.25
    return None
