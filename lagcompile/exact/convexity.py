"""Inertia correction: from an indefinite Hessian to a convex subproblem with the same solution where possible.

In: the Lagrangian Hessian, the constraint rows and a guess of the active ones. Out: a positive semidefinite matrix
and the matching linear term. Two means, in this order: (1) add rho/2 |A d + c|^2 over the active rows A, which
vanishes with its gradient at every step that satisfies them, so that step and multipliers stay those of the original
subproblem (used as in Gill, Saunders and Wong, 2015, "On the performance of SQP methods"); (2) add delta/2 |d|^2 when
the reduced Hessian itself is indefinite. Invariant: nothing is added to a Hessian that is already positive
semidefinite.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from lagcompile.exact.linear import (
    Matrix,
    Vector,
    add_diagonal,
    entries,
    is_sparse,
    largest,
    positive_semidefinite,
    row_norms,
    select_rows,
    stack_rows,
    weighted_gram,
)
from lagcompile.exact.problem import Bounds, Evaluation
from lagcompile.exact.residuals import WorkingSet


@dataclass(frozen=True)
class Convexified:
    """Matrix and linear term of a convex subproblem, with what was added."""

    H: Matrix
    g: Vector
    delta: float
    rho: float


class InertiaCorrection:
    """Remembers the last correction as the first guess for the next one."""

    def __init__(self) -> None:
        self._delta = 0.0
        self._rho = 0.0

    def state(self) -> tuple[float, float]:
        """The last correction."""
        return self._delta, self._rho

    def load(self, state: tuple[float, float]) -> None:
        """Go on from `state`."""
        self._delta, self._rho = state

    def apply(
        self, H: Matrix, point: Evaluation, working: WorkingSet, bounds: Bounds, *, floor: float = 0.0
    ) -> Convexified:
        """A convex subproblem in the step from `point`.

        Args:
            H: symmetric (n, n).
            point: where the constraints are linearised.
            working: constraints expected to be active.
            bounds: of the variables.
            floor: delta to start with (after an unbounded subproblem or a failed search).
        """
        scale = max(largest(entries(H)), 1e-8)
        slack = 1e-12 * max(1.0, scale)
        base = add_diagonal(H, np.full(len(point.x), floor)) if floor else H
        if positive_semidefinite(base, slack):
            return Convexified(base, point.gradient, floor, 0.0)
        gram, shift = _active_squares(point, working, bounds)
        rho = scale
        if gram is not None and not (is_sparse(gram) and gram.nnz > 50 * (H.nnz + len(point.x))):
            ladder = sorted({scale, 30.0 * scale, 1000.0 * scale, min(max(self._rho, scale), 1000.0 * scale)})
            for rho in ladder:
                lifted = base + rho * gram
                if positive_semidefinite(lifted, slack):
                    self._rho = rho
                    return Convexified(lifted, point.gradient + rho * shift, floor, rho)
            rho = 30.0 * scale
            base = base + rho * gram
        else:
            rho, shift = 0.0, np.zeros(len(point.x))
        delta = self._shift(base, scale, slack)
        self._delta = delta
        corrected = add_diagonal(base, np.full(len(point.x), delta))
        return Convexified(corrected, point.gradient + rho * shift, floor + delta, rho)

    def shift_only(self, H: Matrix, *, floor: float) -> tuple[Matrix, float]:
        """H plus the multiple of the identity that makes it positive semidefinite (for elastic subproblems)."""
        scale = max(largest(entries(H)), 1e-8)
        slack = 1e-12 * max(1.0, scale)
        base = add_diagonal(H, np.full(H.shape[0], floor))
        if positive_semidefinite(base, slack):
            return base, floor
        delta = self._shift(base, scale, slack)
        return add_diagonal(base, np.full(H.shape[0], delta)), floor + delta

    def _shift(self, base: Matrix, scale: float, slack: float) -> float:
        if not is_sparse(base):
            smallest = float(np.linalg.eigvalsh(base)[0])
            return -1.1 * smallest + 1e-8 * scale
        size = base.shape[0]
        delta = max(self._delta / 3.0, 1e-6 * scale)
        for _ in range(60):
            if positive_semidefinite(add_diagonal(base, np.full(size, delta)), slack):
                return delta
            delta *= 4.0
        return delta


def _active_squares(point: Evaluation, working: WorkingSet, bounds: Bounds) -> tuple[Matrix | None, Vector]:
    """A'DA and A'Dc of the active rows, each row scaled to length 1; bounds count as unit rows."""
    A = stack_rows(point.jacobian_eq, select_rows(point.jacobian_ineq, working.ineq))
    c = np.concatenate([point.values.eq, point.values.ineq[working.ineq]])
    fixed = bounds.lower == bounds.upper
    at = fixed | (working.sides != 0)
    if A.shape[0] == 0 and not at.any():
        return None, np.zeros(len(point.x))
    squares = row_norms(A) ** 2
    weights = np.where(squares > 1e-16, 1.0 / np.maximum(squares, 1e-16), 0.0)
    target = np.where(working.sides > 0, bounds.upper, bounds.lower)
    distance = np.where(at, point.x - np.where(at, target, 0.0), 0.0)
    return add_diagonal(weighted_gram(A, weights), at.astype(float)), A.T @ (weights * c) + distance
