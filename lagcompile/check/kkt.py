"""Unscaled KKT residuals of a solution, by constraint, state and parameter, from autograd alone.

In: an `Instance` and a `Solution` of any backend. Out: a `Certificate`. Invariant: no backend's code runs here;
residuals are in the units of the program's Lagrangian, and a certificate's facts claim only what was shown.

    stationarity        x - clip(soft(x - d L / d x, l1 weight), bounds): the gradient where nothing is at a bound
    primal feasibility  |r| where r = 0 is required, |r| - epsilon in tubes, distance from domains
    dual feasibility    a multiplier that is a size must cover the force on every defect it serves
    complementarity     multiplier times distance from the tube's edge
    global bound        objective above the bound that the solver claims to have proven, over max(1, |bound|)

At a kink (`check.kinks`) autograd takes one slope of many. Where a leaf is not stationary with it, others between the
one-sided ones are tried (`runtime.slopes`); what is left is not assessed, and holds only with a global bound.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from lagcompile.check.binding import bindings, in_sums, named_digest, solution_identities
from lagcompile.check.certificate import MODES, USUAL, Certificate, Kind, Residual, digest
from lagcompile.check.certificate import largest as largest_of
from lagcompile.check.derivative import Probe, not_the_derivative, padding_rows
from lagcompile.check.kinks import sentence
from lagcompile.check.point import CheckPoint, Leaf, check_point
from lagcompile.check.secondorder import LARGEST, second_order
from lagcompile.ir.alone import alone
from lagcompile.ir.arguments import expect_count, expect_positive
from lagcompile.ir.axes import Layout
from lagcompile.ir.base import SpecError
from lagcompile.ir.program import DefectConstraint
from lagcompile.ir.solution import Solution
from lagcompile.runtime.instance import Instance
from lagcompile.runtime.slopes import MOST, Slopes, fit_slopes

VARIES = 100.0
"""Factor of the tolerance: residuals cannot tell an objective that varies less from a constant."""
LISTED = 8
"""Number of violations that are listed by name."""
NONE_FOUND = "and no others were found with which it vanishes"
NOT_TRIED = "and others were not tried, since other conditions fail"


@alone
def certify_kkt(
    instance: Instance,
    solution: Solution,
    *,
    tolerance: float = USUAL["solution"],
    step: int | None = None,
    largest: int = LARGEST,
) -> Certificate:
    """Certificate of a solution's KKT conditions.

    Args:
        instance: what was solved; never changed.
        solution: of any backend; weights, states and multipliers by name.
        tolerance: largest residual.
        step: step at which scheduled quadratic weights are read; None: the solution's last.
        largest: variables up to which second-order facts are computed.

    Raises:
        ProgramError: states that are kept per class.
    """
    given: list[tuple[str, object, type]] = [("bind", instance, Instance), ("solve", solution, Solution)]
    for name, value, kind in given:
        if not isinstance(value, kind):
            raise SpecError(f"certify_kkt takes what {name} gave, got an object of type {type(value).__name__}")
    expect_positive("tolerance", tolerance)
    if step is not None:
        expect_count("step", step, 0)
    point = check_point(instance, solution, step=step)
    found = list(residuals(point))
    open_leaves = _at_kinks(point, found, tolerance)
    # where anything else fails, slopes cannot save the certificate, and looking for them costs many evaluations
    worth = bool(open_leaves) and all(v <= tolerance for kind, name, v in found if (kind, name) not in open_leaves)
    bent = _with_other_slopes(instance, solution, step, point, tolerance) if worth else None
    if bent is not None:
        found, open_leaves = bent, {}
    scale, doubts = _probed(instance, point, tolerance)
    residual = [
        Residual(kind=kind, name=name, mode="eval", value=value, tolerance=tolerance, scale=scale)
        for kind, name, value in found
        if (kind, name) not in open_leaves
    ]
    residual += _global(point, solution, tolerance)
    facts = [*point.facts, *_worst(point, tolerance)]
    if point.kinks and not any(kind.endswith("stationarity") and not v <= tolerance for kind, _, v in found):
        taken = "the slope that autograd takes" if bent is None else "slopes between the one-sided ones"
        facts.append(f"stationary with {taken} at {sentence(point.kinks)}")
    facts += second_order(point, worst=largest_of(v for _, _, v in found), tolerance=tolerance, largest=largest)
    said = solution.details.get("facts", ())
    facts += [f for f in said if f not in facts and _about_globality(f)]
    if any(r.kind == "global bound" for r in residual):
        facts.append(
            "global bound: feasibility and objective were measured here; that nothing lies below the bound is what the "
            "solver has proven, and was not proven again"
        )
    opened = (f"{said}, {NONE_FOUND if worth else NOT_TRIED}" for said in open_leaves.values())
    model = solution.model
    own = {
        "weights": named_digest(dict(model.named_parameters())),
        "buffers": named_digest(dict(model.named_buffers())),
    }
    exact: dict[str, Tensor] = {**solution.details.get("weights", {}), **solution.details.get("inputs", {})}
    return Certificate.made(
        solution_identities(point.program),
        claim="solution",
        **{**bindings(instance.network, point.program), **own, "model": type(model).__name__},
        values=named_digest({**exact, **solution.states, **solution.multipliers}),
        loss=point.program.objective.loss,
        rows=instance.examples,
        inputs=digest([t for t in [*instance.inputs, *pytree.tree_leaves(instance.target)] if isinstance(t, Tensor)]),
        modes=MODES["solution"],
        residuals=tuple(residual),
        facts=tuple(facts),
        unassessed=(*opened, *doubts),
    )


def _probed(instance: Instance, point: CheckPoint, tolerance: float) -> tuple[float, list[str]]:
    """Say by how much the Lagrangian varies, and why its gradient may say nothing."""
    copies = {f"{role} {name}": v.detach().clone() for (role, name), v in point.leaves.items()}
    names = {f"{role} {name}": (role, name) for role, name in point.leaves}

    def lagrangian(tensors: Mapping[str, Tensor]) -> Tensor:
        return point.at({names[n]: t for n, t in tensors.items()})

    def value() -> float:
        with torch.no_grad():
            return float(lagrangian(copies))

    probe = Probe(copies, {f"weight {n}": row for n, row in padding_rows(instance.module).items()})
    with probe.nearby():  # a gradient that was stopped is stopped there, too, and no kink is in the way
        moved = {n: t.detach().clone().requires_grad_() for n, t in copies.items()}
        gradients = torch.autograd.grad(lagrangian(moved), list(moved.values()), materialize_grads=True)
        for name, gradient in zip(moved, gradients, strict=True):
            probe.add(name, gradient)
        said = probe.disagreement(value)
    doubts = [not_the_derivative(instance.network, said)] if said else []
    varies = probe.variation(value)
    if not varies >= VARIES * tolerance:
        doubts.append(
            f"the objective varies by {varies:.1e} when the variables move by their own size: residuals up to "
            f"{tolerance:.0e} say nothing about it; scale the loss"
        )
    return varies, doubts


def _at_kinks(
    point: CheckPoint, found: Sequence[tuple[Kind, str, float]], tolerance: float
) -> dict[tuple[Kind, str], str]:
    """Stationarity that autograd's slopes do not show, of leaves whose gradient depends on the slope at a kink."""
    result: dict[tuple[Kind, str], str] = {}
    for kind, name, value in found:
        if not kind.endswith("stationarity") or value <= tolerance:
            continue
        here = [k for k in point.kinks if any(n == name for _, n in k.touched)]
        if here:
            result[kind, name] = (
                f"{kind} of {name}, at a kink ({sentence(here)}): with autograd's slopes there the residual is "
                f"{value:.1e}"
            )
    return result


def _with_other_slopes(
    instance: Instance, solution: Solution, step: int | None, point: CheckPoint, tolerance: float
) -> list[tuple[Kind, str, float]] | None:
    """Residuals with slopes that make every leaf at a kink stationary; None where none were found."""
    touched = {leaf for k in point.kinks for leaf in k.touched}
    counting = Slopes()
    check_point(instance, solution, step=step, slopes=counting)
    if counting.seen != len(point.kinks) or counting.used > MOST:
        return None  # a kink whose slope cannot be chosen here, or too many of them

    def at(slopes: Tensor) -> CheckPoint:
        return check_point(instance, solution, step=step, slopes=Slopes(slopes))

    def residual(slopes: Tensor) -> Tensor:
        here = at(slopes)
        gradients = here.gradients(here.lagrangian())
        return torch.cat(
            [stationarity(here, leaf, gradients[leaf]).reshape(-1) for leaf in here.leaves if leaf in touched]
        )

    found = list(residuals(at(fit_slopes(residual, counting.used, 0.1 * tolerance))))
    names = {name for _, name in touched}
    open_ = [v for kind, name, v in found if kind.endswith("stationarity") and name in names and not v <= tolerance]
    return None if open_ else found


def _global(point: CheckPoint, solution: Solution, tolerance: float) -> list[Residual]:
    """Objective above the solver's proven bound, where it gives one."""
    bound = solution.details.get("bound")
    if bound is None:
        return []
    value, slack = objective_of(point) - float(bound["value"]), float(bound["slack"])
    size = max(1.0, abs(float(bound["value"])))
    name = "objective above the proven bound"
    above = 0.0 if value < 0.0 else value / size  # a NaN stays one
    return [
        Residual(kind="global bound", name=name, mode="eval", value=above, tolerance=max(tolerance, slack), scale=size)
    ]


def _about_globality(fact: str) -> bool:
    return "global optimum" in fact or "kink" in fact


def objective(instance: Instance, solution: Solution, *, step: int | None = None) -> float:
    """Loss, regularisers and quadratic terms at a solution, without multipliers.

    Args:
        instance: what was solved; never changed.
        solution: of any backend.
        step: as for `certify_kkt`.
    """
    return objective_of(check_point(instance, solution, step=step))


def objective_of(point: CheckPoint) -> float:
    """Loss, regularisers and quadratic terms at a point."""
    extra = sum(point.l1(leaf) * float(x.detach().abs().sum()) for leaf, x in point.leaves.items())
    return float(point.smooth.detach()) + extra


def residuals(point: CheckPoint) -> Iterator[tuple[Kind, str, float]]:
    """All residuals of a point: kind, name, value."""
    gradients = point.gradients(point.lagrangian())
    for leaf, g in gradients.items():
        kind: Kind = "weight stationarity" if leaf[0] == "weight" else "state stationarity"
        yield kind, leaf[1], _top(stationarity(point, leaf, g))
    for c in point.program.defects:
        if c.name in point.defects:
            yield from _defect(point, c)
    for leaf, x in point.leaves.items():
        low, high = point.bounds(leaf)
        if low > -torch.inf or high < torch.inf:
            outside = torch.maximum(low - x.detach(), x.detach() - high).clamp_min(0.0)
            yield "primal feasibility", f"bounds of {leaf[1]}", _top(outside)
    for name, (relation, rows, mu) in point.values.items():
        value = rows.detach()
        yield "primal feasibility", name, _top(value if relation == "==" else value.clamp_min(0.0))
        if relation == "<=":
            yield "dual feasibility", name, _top((-mu).clamp_min(0.0))
            yield "complementarity", name, _top(mu * value)


def stationarity(point: CheckPoint, leaf: Leaf, gradient: Tensor) -> Tensor:
    """The natural residual of one leaf; its gradient where it is free and without l1 terms."""
    x, g, w = point.leaves[leaf].detach(), gradient.detach(), point.l1(leaf)
    low, high = point.bounds(leaf)
    if not w and low == -torch.inf and high == torch.inf:
        return g
    moved = x - g
    if w:
        moved = moved.sign() * (moved.abs() - w).clamp_min(0.0)
    return x - moved.clamp(low, high)


def violation(c: DefectConstraint, r: Tensor) -> Tensor:
    """Amount by which each defect (each row for norm tubes) fails."""
    r, epsilon = r.detach(), c.transform.half_width
    if c.relation == "<=" and c.transform.signed:
        return (r - epsilon).clamp_min(0.0)
    if c.transform.per_row:
        flat = r.flatten(1) if r.dim() > 1 else r[:, None]
        return (torch.linalg.vector_norm(flat, c.transform.norm, dim=1) - epsilon).clamp_min(0.0)
    return (r.abs() - epsilon).clamp_min(0.0)


def _defect(point: CheckPoint, c: DefectConstraint) -> Iterator[tuple[Kind, str, float]]:
    r, force = point.defects[c.name].detach(), point.forces[c.name]
    multiplier = point.program.multiplier_of(c.name)
    assert multiplier is not None
    epsilon, share = c.transform.half_width, point.shares[c.name]
    if in_sums(point.program, c):
        yield "primal feasibility", f"{c.name} (sums)", _top(_summed(r, multiplier.laid, point.labels))
        return
    yield "primal feasibility", c.name, _top(violation(c, r))
    one_sided = c.relation == "<=" and c.transform.signed
    if one_sided:
        yield "dual feasibility", c.name, share * _top((-force).clamp_min(0.0))
        yield "complementarity", c.name, share * _top(force * (r - epsilon))
        return
    given = point.multipliers.get(multiplier.name)
    if not c.transform.signed and not c.transform.flat and given is not None and multiplier.laid.rows != "class":
        yield "dual feasibility", c.name, share * _uncovered(c, force, given.detach().cpu().double())
    if epsilon > 0.0:
        yield "complementarity", c.name, share * _slackness(c, r, force)


def _summed(r: Tensor, laid: Layout, labels: Tensor | None) -> Tensor:
    """Sums of the defects that share one number of a multiplier."""
    if not laid.per_feature:
        r = r.reshape(r.shape[0], -1).sum(1)
    if laid.rows == "example":
        return r
    if laid.rows == "all":
        return r.sum(0)
    assert labels is not None
    return torch.stack([r[labels == c].sum(0) for c in labels.unique()])


def _uncovered(c: DefectConstraint, force: Tensor, multiplier: Tensor) -> float:
    """Excess of the forces over the multiplier that must cover them."""
    size = force.abs()
    if c.transform.per_row:
        flat = force.flatten(1) if force.dim() > 1 else force[:, None]
        norm = torch.linalg.vector_norm(flat, 2 if c.transform.norm == 2 else torch.inf, dim=1)  # the dual norm
        size = norm.reshape(-1, *(1 for _ in force.shape[1:]))
    return _top(torch.maximum((size - multiplier).clamp_min(0.0), (-multiplier).clamp_min(0.0)))


def _slackness(c: DefectConstraint, r: Tensor, force: Tensor) -> float:
    """Force times distance from the edge that it pushes against."""
    epsilon = c.transform.half_width
    if not c.transform.per_row:
        return _top(torch.where(force > 0.0, force * (epsilon - r), force * (epsilon + r)))
    flat, push = r.reshape(r.shape[0], -1), force.reshape(r.shape[0], -1)
    dual = torch.linalg.vector_norm(push, 2 if c.transform.norm == 2 else torch.inf, dim=1)
    return _top(dual * epsilon - (flat * push).sum(1))


def _worst(point: CheckPoint, tolerance: float) -> Iterator[str]:
    """List the largest violations by stage, state, example and feature."""
    found: list[tuple[float, str]] = []
    for c in point.program.defects:
        if c.name not in point.defects:
            continue
        multiplier = point.program.multiplier_of(c.name)
        if multiplier is not None and not multiplier.laid.each and c.transform.signed:
            continue
        v = violation(c, point.defects[c.name])
        top = torch.topk(v.reshape(-1), min(LISTED, v.numel()))
        for value, i in zip(top.values.tolist(), top.indices.tolist(), strict=True):
            if value > tolerance:
                found.append((value, f"stage {c.stage}, state {c.state}, {place(i, v.shape)}"))
    found.sort(key=lambda pair: -pair[0])
    for value, text in found[:LISTED]:
        yield f"violated by {value:.2e}: {text}"


def place(position: int, shape: Sequence[int]) -> str:
    """Example and feature of a position in (rows, ...features)."""
    index = [int(i) for i in torch.unravel_index(torch.tensor(position), tuple(shape))]
    if len(index) == 1:
        return f"example {index[0]}"
    return f"example {index[0]}, feature {index[1] if len(index) == 2 else tuple(index[1:])}"


def _top(value: Tensor) -> float:
    value = value.detach()
    if value.numel() == 0:
        return 0.0
    return float(value.abs().max()) if bool(torch.isfinite(value).all()) else float("nan")
