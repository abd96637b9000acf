"""From the general solver's result to a solution in the program's words.

In: `ExactProgram` and `exact.Result`. Out: named weights, states, inputs and multipliers, a `Status`, facts, and
violated constraints by stage, state, example and feature. Invariant: nothing is claimed that the result does not show.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lagcompile.backends.sqp_constraints import Piece
from lagcompile.backends.sqp_program import ExactProgram
from lagcompile.backends.sqp_variables import Values
from lagcompile.exact import IterationRow, Multipliers, Result
from lagcompile.exact import Status as ExactStatus
from lagcompile.frontend.copies import copied, renew
from lagcompile.ir.solution import History, Solution, Status

STATUS: Mapping[ExactStatus, Status] = {
    ExactStatus.OPTIMAL: Status.SOLVED,
    ExactStatus.ACCEPTABLE: Status.STALLED,
    ExactStatus.INFEASIBLE: Status.INFEASIBLE,
    ExactStatus.UNBOUNDED: Status.UNBOUNDED,
    ExactStatus.ITERATION_LIMIT: Status.STEPS_DONE,
    ExactStatus.TIME_LIMIT: Status.TIME_LIMIT,
    ExactStatus.INTERRUPTED: Status.INTERRUPTED,
    ExactStatus.NON_FINITE: Status.DIVERGED,
    ExactStatus.INCONSISTENT_BOUNDS: Status.INFEASIBLE,
    ExactStatus.RANK_DEFICIENT: Status.STALLED,
    ExactStatus.STALLED: Status.STALLED,
    ExactStatus.TOO_LARGE: Status.REFUSED,
}
TELLING = 100.0
"""Factor of the residual: an objective that varies less when variables move by their size is not shown optimal."""
NAMED = 30
"""Number of violated constraints that are listed by name."""


def spans(exact: ExactProgram) -> Iterator[tuple[Piece, slice, slice]]:
    """Pieces with their places among equalities and inequalities."""
    e = i = 0
    for piece in exact.pieces:
        eq, ineq = exact.spans[piece.name]
        yield piece, slice(e, e + eq), slice(i, i + ineq)
        e, i = e + eq, i + ineq


def start_values(exact: ExactProgram, start: Solution | None) -> Values:
    """Named values to start from: the program's own starts, or a solution's weights, states and inputs."""
    values = exact.initial()
    if start is not None:
        _take(exact, values, start)
    at = exact.at(values)
    for piece in exact.pieces:  # slacks as large as what they bound
        key = ("slack", piece.name)
        if key in values:
            known = piece.state in at.states and piece.name != f"|{piece.state}|"
            inner = at.defect(piece.state) if known else _inner(values, piece.state)
            values[key] = inner.detach().abs()
    return values


def _inner(values: Values, name: str) -> Tensor:
    return values["weight", name] if ("weight", name) in values else values["state", name]


def _take(exact: ExactProgram, values: Values, start: Solution) -> None:
    weights = dict(start.model.named_parameters()) | dict(start.details.get("weights", {}))
    inputs: Mapping[str, Tensor] = start.details.get("inputs", {})
    sources: dict[str, Mapping[str, Tensor]] = {"weight": weights, "state": start.states, "input": inputs}
    for role, name in values:
        source = sources.get(role, {})
        if name in source and source[name].numel() == values[role, name].numel():
            values[role, name] = source[name].detach().cpu().double().reshape(values[role, name].shape)


def start_multipliers(exact: ExactProgram, start: Solution | None) -> Multipliers | None:
    """The solver's multipliers from a solution's; None without any."""
    if start is None or not start.multipliers:
        return None
    parts: list[tuple[Tensor, Tensor]] = []
    for piece, eq, ineq in spans(exact):
        given = start.multipliers.get(multiplier_name(exact, piece))
        if given is None:
            parts.append((_zeros(eq.stop - eq.start), _zeros(ineq.stop - ineq.start)))
        else:
            parts.append(piece.split(given.cpu()))
    bounds = start.details.get("bounds")
    return Multipliers(
        eq=torch.cat([e for e, _ in parts]) if parts else _zeros(0),
        ineq=torch.cat([i for _, i in parts]) if parts else _zeros(0),
        bounds=None if bounds is None else exact.variables.pack({k: bounds[_text(k)] for k in exact.variables.keys}),
    )


def _zeros(count: int) -> Tensor:
    return torch.zeros(count, dtype=torch.float64)


def _text(key: tuple[str, str]) -> str:
    return f"{key[0]} {key[1]}"


def multiplier_name(exact: ExactProgram, piece: Piece) -> str:
    """The program's name of a constraint's multiplier."""
    found = exact.program.multiplier_of(piece.name)
    return f"lambda({piece.name})" if found is None else found.name


def solution_of(
    exact: ExactProgram, result: Result, *, original: nn.Module, history: History, seconds: float
) -> Solution:
    """Name what was reached."""
    values = {k: v.clone() for k, v in exact.variables.unpack(result.x.detach()).items()}
    multipliers, forces = {}, {}
    _, equalities, inequalities = exact.sizes
    all_eq = result.multipliers_eq if result.multipliers_eq.numel() else _zeros(equalities)  # a refused run has none
    all_ineq = result.multipliers_ineq if result.multipliers_ineq.numel() else _zeros(inequalities)
    for piece, eq, ineq in spans(exact):
        mu = all_eq[eq], all_ineq[ineq]
        multipliers[multiplier_name(exact, piece)] = piece.multiplier(*mu).detach().clone()
        force = piece.force(*mu)
        if force is not None:
            forces[piece.name] = force.detach().clone()
    weights = {name: v for (role, name), v in values.items() if role == "weight"}
    bounds = {_text(k): v.clone() for k, v in exact.variables.unpack(result.multipliers_bounds).items()}
    status, message = STATUS[result.status], result.message
    stayed = bool(list(result.iterations)) and result.iterations.count == 0  # solvers at once have no iterations
    if status is Status.SOLVED and stayed and not _told(exact, result):
        status = Status.STALLED
        message = "the start meets the tolerance because the objective hardly varies: scale the loss to values near 1"
    return Solution(
        model=recovered(original, weights),
        status=status,
        history=history,
        states={name: v for (role, name), v in values.items() if role == "state"},
        multipliers=multipliers,
        program=exact.program,
        steps=result.iterations.count,
        gradient_evaluations=len(result.iterations),
        seconds=seconds,
        details={
            "final": _final(exact, result),
            "weights": weights,
            "inputs": {name: v for (role, name), v in values.items() if role == "input"},
            "bounds": bounds,
            "forces": forces,
            "status": result.status.label,
            "advice": result.status.advice,
            "message": message,
            "objective": result.objective,
            "kkt": result.kkt.model_dump(),
            "facts": facts_of(exact, result),
            "violated": violated(exact, result),
            "conflict": excluding(exact, result),
            "timings": result.timings.model_dump(),
            "bytes": 8 * exact.variables.size,
        },
    )


def _told(exact: ExactProgram, result: Result) -> bool:
    """Whether residuals this small say anything: the objective varies by much more where the variables move."""
    x = result.x.detach()
    direction = torch.randn(x.shape, generator=torch.Generator().manual_seed(0), dtype=x.dtype)
    step = direction * torch.where(x == 0.0, 1.0, x.abs())
    with torch.no_grad(), exact.default_double():
        values = [float(exact.objective(exact.point(x + sign * step))) for sign in (0.0, 1.0, -1.0)]
    varies = max(abs(v - values[0]) for v in values[1:])
    return not 0.0 < varies <= TELLING * result.kkt.worst


def recovered(original: nn.Module, weights: Mapping[str, Tensor]) -> nn.Module:
    """Make a module of the user's class with these weights, in the original's types."""
    model = copied(original)
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, value in weights.items():
            parameters[name].copy_(value)
    renew(model)
    return model


def _final(exact: ExactProgram, result: Result) -> dict[str, float]:
    with torch.no_grad(), exact.default_double():
        at = exact.point(result.x)
        found = {"objective": float(exact.objective(at)), "loss": float(exact.loss(at))}
        defects = [at.defect(name).abs().reshape(-1) for name in at.states]
    if defects:
        flat = torch.cat(defects)
        found |= {"defect": float(flat.mean()), "largest_defect": float(flat.max())}
    return found


def facts_of(exact: ExactProgram, result: Result) -> tuple[str, ...]:
    """List what was shown beyond the residuals, and what a reader of the multipliers must know."""
    said = [*exact.form.facts, *(f for p in exact.pieces for f in p.facts), *result.facts.implications]
    inertia = result.facts.reduced_inertia
    if inertia is not None:
        said.append(
            f"Reduced Hessian: {inertia[0]} positive, {inertia[1]} zero, {inertia[2]} negative eigenvalues; "
            f"{result.facts.active} active gradients of rank {result.facts.rank}."
        )
    return tuple(said)


def violated(exact: ExactProgram, result: Result, tolerance: float = 1e-8) -> tuple[str, ...]:
    """Violated constraints in the user's words, largest first; of a conflict its members, named as such."""
    if result.x.numel() == 0 or not bool(torch.isfinite(result.x).all()):
        return ()
    with torch.no_grad(), exact.default_double():
        eq, ineq = exact.constraints(exact.point(result.x))
    conflict = result.conflict
    in_eq = set(conflict.eq) if conflict is not None else set()
    in_ineq = set(conflict.ineq) if conflict is not None else set()
    found: list[tuple[float, str]] = []
    for piece, e, i in spans(exact):
        for rows, members, equality in ((eq[e].abs(), in_eq, True), (ineq[i], in_ineq, False)):
            offset = e.start if equality else i.start
            for row, value in enumerate(rows.tolist()):
                if value > tolerance or row + offset in members:
                    mark = ", in the conflict" if row + offset in members else ""
                    place = piece.place(row, equality=equality)
                    found.append((value, f"{piece.name}: {place}: violated by {max(value, 0.0):.3g}{mark}"))
    if conflict is not None:
        for side, positions in (("lower", conflict.lower), ("upper", conflict.upper)):
            found += [(0.0, f"{side} bound of {exact.variables.describe(p)}, in the conflict") for p in positions]
    lower, upper = exact.variables.bounds()
    for p in torch.nonzero(lower > upper).flatten().tolist():
        text = f"{exact.variables.describe(p)}: lower bound {float(lower[p]):g} > upper bound {float(upper[p]):g}"
        found.append((float(lower[p] - upper[p]), text))
    found.sort(key=lambda pair: -pair[0])
    more = len(found) - NAMED
    listed = [text for _, text in found[:NAMED]]
    return (*listed, f"and {more} more") if more > 0 else tuple(listed)


def excluding(exact: ExactProgram, result: Result) -> tuple[str, ...]:
    """The smallest set of constraints found that exclude each other, by name; empty where none was looked for."""
    conflict = result.conflict
    if conflict is None:
        return ()
    found: list[str] = []
    for piece, e, i in spans(exact):
        for rows, members, equality in ((e, conflict.eq, True), (i, conflict.ineq, False)):
            inside = [m - rows.start for m in members if rows.start <= m < rows.stop]
            found += [f"{piece.name}: {piece.place(row, equality=equality)}" for row in inside]
    for side, positions in (("lower", conflict.lower), ("upper", conflict.upper)):
        found += [f"{side} bound of {exact.variables.describe(p)}" for p in positions]
    return tuple(found)


def row_of(row: IterationRow, seconds: float) -> Mapping[str, Any]:
    """A line of the iteration table as a history row.

    Args:
        row: the line.
        seconds: since the start, when it was written.
    """
    return {
        "step": float(row.index),
        "seconds": seconds,
        "objective": row.objective,
        "primal_infeasibility": row.primal,
        "dual_infeasibility": row.dual,
        "step_length": row.step,
        "step_norm": row.step_norm,
        "regularisation": row.regularisation,
        "kind": row.mode,
    }
