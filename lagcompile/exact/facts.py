"""What is true at the final point beyond the KKT residual.

In: the final point, its multipliers, the Hessian of the Lagrangian. Out: `Facts`. Invariant: True and False are only
said when shown (to the stated tolerances); everything else is None, and sentences follow the values. Source of the
conditions: Nocedal and Wright, Numerical Optimization (2006), theorems 12.5 and 12.6.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.linalg import qr

from lagcompile.exact.linear import Mask, Matrix, Vector, entries, largest, row_norms, toarray
from lagcompile.exact.problem import Bounds, Evaluation
from lagcompile.exact.residuals import Duals
from lagcompile.exact.result import Facts

LARGEST_DENSE = 25_000_000  # entries of the active Jacobian up to which ranks are computed
DEPENDENT = 1e-8  # pivot below which gradients are called dependent; rows longer than 1 are scaled to length 1
NEARLY_DEPENDENT = 10.0  # times the square root of the tolerance: pivot below which independence is not claimed
CURVATURE_TOLERANCE = 1e-7  # relative to the largest entry of the Hessian


def describe(
    point: Evaluation, duals: Duals, bounds: Bounds, hessian: Matrix, *, tolerance: float, stationary: bool
) -> Facts:
    """Rank, complementarity and curvature at the final point.

    Args:
        hessian: of the Lagrangian, (n, n).
        tolerance: to which the KKT conditions hold.
        stationary: whether they do; else only the rank of the active gradients is reported.
    """
    n = len(point.x)
    if n * max(n, len(point.values.eq) + len(point.values.ineq)) > LARGEST_DENSE:
        return Facts()
    active = active_gradients(point, duals, bounds, near=np.sqrt(tolerance))
    count, weak = active.rows.shape[0], active.weak
    rank, null, pivot = null_space(active.rows)
    licq = None if rank == count and pivot < NEARLY_DEPENDENT * np.sqrt(tolerance) else rank == count
    if not stationary:
        return Facts(active=count, rank=rank, licq=licq)
    wide = null_space(active.rows[~weak])[1] if weak.any() else null
    reduced, limit = _curvatures(hessian, null)
    wider, _ = _curvatures(hessian, wide)
    inertia = (int((reduced > limit).sum()), int((np.abs(reduced) <= limit).sum()), int((reduced < -limit).sum()))
    strict: bool | None = None
    if licq is not None and bool((wider > limit).all()):
        strict = True
    elif licq and inertia[2]:
        strict = False
    facts = Facts(
        active=count,
        rank=rank,
        licq=licq,
        strict_complementarity=not weak.any(),
        weakly_active=int(weak.sum()),
        reduced_inertia=inertia,
        smallest_curvature=float(wider[0]) if wider.size else None,
        strict_local_minimum=strict,
        multipliers_unique=True if licq else False if licq is False and not weak.any() else None,
    )
    return facts.model_copy(update={"implications": tuple(_sentences(facts))})


def _curvatures(hessian: Matrix, basis: Matrix) -> tuple[Vector, float]:
    """Eigenvalues of the Hessian on a subspace, ascending, and the size below which they count as zero."""
    limit = CURVATURE_TOLERANCE * max(largest(entries(hessian)), 1e-8)
    if basis.shape[1] == 0:
        return np.zeros(0), limit
    return np.linalg.eigvalsh(basis.T @ (hessian @ basis)), limit


@dataclass(frozen=True)
class ActiveGradients:
    """Outward gradients of active constraints (count, n), of length at most 1; `weak` ones have no multiplier."""

    rows: Matrix
    weak: Mask


def active_gradients(point: Evaluation, duals: Duals, bounds: Bounds, *, near: float) -> ActiveGradients:
    """Equalities, inequalities and bounds that are within `near` of their limit or carry a multiplier."""
    positive = 1e-8 * (1.0 + duals.largest) if duals.largest < 1e8 else 1e-8
    ineq = (point.values.ineq > -near) | (duals.ineq > positive)
    fixed = bounds.lower == bounds.upper
    upper = (bounds.upper - point.x < near) | (duals.bounds > positive)
    lower = (point.x - bounds.lower < near) | (duals.bounds < -positive)
    at = upper | lower
    unit = np.eye(len(point.x))[at] * np.where(upper, 1.0, -1.0)[at][:, None]
    rows = np.vstack([toarray(point.jacobian_eq), toarray(point.jacobian_ineq)[ineq], unit])
    scaled = rows / np.maximum(row_norms(rows), 1.0)[:, None]
    weak: Mask = np.concatenate(
        [
            np.zeros(len(point.values.eq), dtype=bool),
            duals.ineq[ineq] <= positive,
            (np.abs(duals.bounds) <= positive)[at] & ~fixed[at],
        ]
    )
    return ActiveGradients(scaled, weak)


def null_space(rows: Matrix) -> tuple[int, Matrix, float]:
    """Rank, orthonormal basis (n, n - rank) of the null space and smallest pivot, by pivoted QR of the transpose."""
    count, n = rows.shape
    if count == 0:
        return 0, np.eye(n), 1.0
    Q, R, _ = qr(rows.T, mode="full", pivoting=True, check_finite=False)
    pivots = np.abs(np.diag(R))
    rank = int((pivots > DEPENDENT).sum())
    return rank, Q[:, rank:], float(pivots.min()) if count <= n else 0.0


def _sentences(facts: Facts) -> list[str]:
    said = []
    if facts.licq:
        said.append("The active gradients are independent (LICQ): the multipliers are unique.")
    elif facts.licq is None:
        said.append("The active gradients are nearly dependent: uniqueness of the multipliers is undecided.")
    elif facts.multipliers_unique is False:
        said.append(
            f"The {facts.active} active gradients have rank {facts.rank}: the multipliers are not unique, "
            "only their stationarity residual is meaningful."
        )
    else:
        said.append(f"The {facts.active} active gradients have rank {facts.rank}: the multipliers need not be unique.")
    if facts.weakly_active:
        which = "constraint carries" if facts.weakly_active == 1 else "constraints carry"
        said.append(f"{facts.weakly_active} active {which} no multiplier: sensitivities are one-sided there.")
    if facts.strict_local_minimum:
        said.append("The second-order sufficient condition holds: a strict local minimum.")
    elif facts.strict_local_minimum is False:
        said.append("The reduced Hessian has a negative eigenvalue: a stationary point that is not a local minimum.")
    else:
        said.append("The second-order test is undecided: stationary, possibly a minimum that is not strict.")
    return said
