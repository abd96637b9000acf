"""What is true at the final point beyond the KKT residual.

In: the final point, its multipliers, the Hessian of the Lagrangian. Out: `Facts`. Invariant: True and False are only said
when shown (to the stated tolerances); everything else is None, and sentences follow the values.
Source of the conditions: Nocedal and Wright, Numerical Optimization (2006), theorems 12.5 and 12.6.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.linalg import qr

from lagcompile.exact.linear import Mask, Matrix, Vector, largest, row_norms, toarray
from lagcompile.exact.problem import Bounds, Evaluation
from lagcompile.exact.residuals import Duals
from lagcompile.exact.result import Facts

LARGEST_DENSE = 25_000_000  # entries of the active Jacobian up to which ranks are computed
RANK_TOLERANCE = 1e-8  # on rows of length 1
CURVATURE_TOLERANCE = 1e-7  # relative to the largest entry of the Hessian


def describe(point: Evaluation, duals: Duals, bounds: Bounds, hessian: Matrix, *, tolerance: float) -> Facts:
    """Rank, complementarity and curvature at a point that satisfies the KKT conditions to `tolerance`.

    Args:
        hessian: of the Lagrangian, (n, n).
    """
    active = active_gradients(point, duals, bounds, near=np.sqrt(tolerance))
    gradients, weak = active.rows, active.weak
    count, n = gradients.shape
    if count * n > LARGEST_DENSE or n * n > LARGEST_DENSE:
        return Facts(active=count, weakly_active=int(weak.sum()), strict_complementarity=not weak.any())
    rank, null = null_space(gradients)
    if weak.any():
        _, wide = null_space(gradients[~weak])
    else:
        wide = null
    dense = toarray(hessian)
    limit = CURVATURE_TOLERANCE * max(largest(dense.ravel()), 1e-8)
    reduced = np.linalg.eigvalsh(null.T @ dense @ null) if null.shape[1] else np.zeros(0)
    wider = np.linalg.eigvalsh(wide.T @ dense @ wide) if wide.shape[1] else np.zeros(0)
    inertia = (int((reduced > limit).sum()), int((np.abs(reduced) <= limit).sum()), int((reduced < -limit).sum()))
    strict = None
    if bool((wider > limit).all()):
        strict = True
    elif inertia[2] and rank == count:
        strict = False
    unique = True if rank == count else (None if weak.any() else False)
    facts = Facts(
        active=count,
        rank=rank,
        licq=rank == count,
        strict_complementarity=not weak.any(),
        weakly_active=int(weak.sum()),
        reduced_inertia=inertia,
        smallest_curvature=float(wider[0]) if wider.size else None,
        strict_local_minimum=strict,
        multipliers_unique=unique,
    )
    return facts.model_copy(update={"implications": tuple(_sentences(facts))})


@dataclass(frozen=True)
class ActiveGradients:
    """Gradients of active constraints pointing outwards (count, n), scaled to length 1; `weak` ones carry no multiplier."""

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
    unit = (
        (np.eye(len(point.x))[at] * np.where(upper, 1.0, -1.0)[at][:, None])
        if len(point.x) ** 2 <= LARGEST_DENSE
        else np.zeros((int(at.sum()), 0))
    )
    parts = [toarray(point.jacobian_eq), toarray(point.jacobian_ineq)[ineq]]
    rows = np.vstack([*parts, unit]) if unit.shape[1] == len(point.x) else np.vstack(parts)
    lengths = row_norms(rows)
    scaled = rows / np.where(lengths > 1e-12, lengths, 1.0)[:, None]
    weak: Mask = np.concatenate(
        [
            np.zeros(len(point.values.eq), dtype=bool),
            duals.ineq[ineq] <= positive,
            (np.abs(duals.bounds) <= positive)[at] & ~fixed[at],
        ]
    )
    return ActiveGradients(scaled, weak)


def null_space(rows: Vector) -> tuple[int, Vector]:
    """Rank and an orthonormal basis (n, n - rank) of the null space, by pivoted QR of the transpose."""
    count, n = rows.shape
    if count == 0:
        return 0, np.eye(n)
    Q, R, _ = qr(rows.T, mode="full", pivoting=True, check_finite=False)
    rank = int((np.abs(np.diag(R)) > RANK_TOLERANCE).sum())
    return rank, Q[:, rank:]


def _sentences(facts: Facts) -> list[str]:
    said = []
    if facts.licq:
        said.append("The active gradients are independent (LICQ): the multipliers are unique.")
    elif facts.multipliers_unique is False:
        said.append(
            f"The {facts.active} active gradients have rank {facts.rank}: the multipliers are not unique, "
            "only their stationarity residual is meaningful."
        )
    else:
        said.append(f"The {facts.active} active gradients have rank {facts.rank}: the multipliers need not be unique.")
    if facts.weakly_active:
        said.append(f"{facts.weakly_active} active constraints carry no multiplier: sensitivities are one-sided there.")
    if facts.strict_local_minimum:
        said.append("The second-order sufficient condition holds: a strict local minimum.")
    elif facts.strict_local_minimum is False:
        said.append("The reduced Hessian has a negative eigenvalue: a stationary point that is not a local minimum.")
    else:
        said.append("The second-order test is undecided: stationary, possibly a minimum that is not strict.")
    return said
