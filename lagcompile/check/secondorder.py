"""Second-order facts of a checked point: rank of the active gradients, complementarity, curvature.

In: a `CheckPoint`. Out: sentences. Invariant: Jacobian and Hessian are autograd's, of the program's own Lagrangian; the
conclusions are those of `exact.facts`, and where something was not computed the sentence says so.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from lagcompile.check.kinks import sentence
from lagcompile.check.point import CheckPoint
from lagcompile.exact.facts import describe
from lagcompile.exact.problem import Bounds, Evaluation, Values
from lagcompile.exact.residuals import Duals
from lagcompile.ir.program import DefectConstraint

LARGEST = 600


def second_order(point: CheckPoint, *, worst: float, tolerance: float, largest: int = LARGEST) -> Iterator[str]:
    """What rank and curvature imply.

    Args:
        point: the point.
        worst: its largest KKT residual.
        tolerance: to which it should hold.
        largest: number of variables up to which matrices are formed.
    """
    size = sum(v.numel() for v in point.leaves.values())
    if size > largest:
        yield f"second-order facts were not computed: {size} variables, more than {largest}"
        return
    if not math.isfinite(worst):
        yield "second-order facts were not computed: a residual is not finite"
        return
    reason = _not_smooth(point)
    if reason is not None:
        yield f"second-order facts were not computed: {reason}"
        return
    close = worst <= max(1e3 * tolerance, 1e-5)
    facts = describe(
        *_matrices(point), tolerance=min(max(tolerance, worst if close else 0.0), 1e-4), stationary=bool(close)
    )
    if not close:
        yield (
            f"not a KKT point (worst residual {worst:.1e}): {facts.active} active gradients of rank {facts.rank}; "
            "nothing is said about curvature"
        )
        return
    yield from facts.implications
    if facts.reduced_inertia is not None:
        plus, zero, minus = facts.reduced_inertia
        yield (
            f"reduced Hessian: {plus} positive, {zero} zero, {minus} negative eigenvalues; "
            f"{facts.active} active gradients of rank {facts.rank}"
        )


def _not_smooth(point: CheckPoint) -> str | None:
    if point.kinks:
        return f"the point lies at a kink ({sentence(point.kinks)})"
    if any(point.l1(leaf) for leaf in point.leaves):
        return "l1 terms have no Hessian"
    for c in point.program.defects:
        if c.transform.per_row and c.transform.half_width > 0 and c.name in point.defects:
            return f"the norm tube of {c.name} is not smooth"
        multiplier = point.program.multiplier_of(c.name)
        if multiplier is not None and multiplier.laid.rows == "class":
            return f"the multiplier of {c.name} is laid out by class"
    return None


def _matrices(point: CheckPoint) -> tuple[Evaluation, Duals, Bounds, np.ndarray]:
    """Point, multipliers, bounds and Hessian in the form of the general solver."""
    eq, ineq = _empty(), _empty()
    mu_eq, mu_ineq = _empty(), _empty()
    for c in point.program.defects:
        if c.name not in point.defects:
            continue
        r, epsilon = point.defects[c.name], c.transform.half_width
        force = point.forces[c.name] * point.shares[c.name]
        if c.relation == "<=" and c.transform.signed:
            ineq, mu_ineq = _more(ineq, r - epsilon), _more(mu_ineq, force)
        elif epsilon > 0:
            ineq = _more(_more(ineq, r - epsilon), -r - epsilon)
            mu_ineq = _more(_more(mu_ineq, force.clamp_min(0.0)), (-force).clamp_min(0.0))
        else:
            rows, mu = _equalities(point, c, r, force)
            eq, mu_eq = _more(eq, rows), _more(mu_eq, mu)
    for relation, rows, mu in point.values.values():
        if relation == "==":
            eq, mu_eq = _more(eq, rows), _more(mu_eq, mu)
        else:
            ineq, mu_ineq = _more(ineq, rows), _more(mu_ineq, mu)
    gradient = torch.cat([g.reshape(-1) for g in point.gradients(point.lagrangian(), graph=True).values()])
    hessian = _rows(point, gradient)
    low = np.concatenate([np.full(v.numel(), point.bounds(k)[0]) for k, v in point.leaves.items()])
    high = np.concatenate([np.full(v.numel(), point.bounds(k)[1]) for k, v in point.leaves.items()])
    x = torch.cat([v.detach().reshape(-1) for v in point.leaves.values()]).numpy()
    pull = -gradient.detach().numpy()
    at = ((x >= high - 1e-6) & (pull > 0)) | ((x <= low + 1e-6) & (pull < 0))
    values = Values(float(point.loss.detach()), eq.detach().numpy(), ineq.detach().numpy())
    evaluation = Evaluation(x, values, gradient.detach().numpy(), _rows(point, eq), _rows(point, ineq))
    duals = Duals(mu_eq.detach().numpy(), mu_ineq.detach().numpy(), np.where(at, pull, 0.0))
    return evaluation, duals, Bounds(low, high), 0.5 * (hessian + hessian.T)


def _equalities(point: CheckPoint, c: DefectConstraint, r: Tensor, force: Tensor) -> tuple[Tensor, Tensor]:
    """Return r for r = 0, or the sums that a reduced multiplier constrains, with their forces."""
    multiplier = point.program.multiplier_of(c.name)
    assert multiplier is not None
    if multiplier.laid.each or not c.transform.signed:
        return r, force
    rows = r.flatten(1).sum(1) if r.dim() > 1 else r
    one = force.reshape(force.shape[0], -1)[:, 0]
    return (rows, one) if multiplier.layout == "example" else (rows.sum().reshape(1), one[:1])


def _rows(point: CheckPoint, values: Tensor) -> np.ndarray:
    """Jacobian of a vector in all leaves."""
    size = sum(v.numel() for v in point.leaves.values())
    if values.numel() == 0 or not values.requires_grad:
        return np.zeros((values.numel(), size))
    found: Sequence[Tensor | None] = torch.autograd.grad(
        values,
        list(point.leaves.values()),
        torch.eye(values.numel(), dtype=torch.float64),
        retain_graph=True,
        is_grads_batched=True,
        allow_unused=True,
    )
    count = values.numel()
    parts = [
        torch.zeros(count, v.numel(), dtype=torch.float64) if g is None else g.reshape(count, -1)
        for v, g in zip(point.leaves.values(), found, strict=True)
    ]
    return torch.cat(parts, dim=1).numpy()


def _more(rows: Tensor, further: Tensor) -> Tensor:
    return torch.cat([rows, further.reshape(-1)])


def _empty() -> Tensor:
    return torch.zeros(0, dtype=torch.float64)
