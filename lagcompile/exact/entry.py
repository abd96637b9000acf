"""The general entry: minimise a torch function under torch constraints, exactly.

In: torch functions of a flat float64 tensor, a start, bounds, options. Out: a `Result`. Invariant: wrong input raises
a `LagcompileError` before anything is solved; everything that can happen afterwards is a `Status`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lagcompile.exact import memory
from lagcompile.exact.conflict import find_conflict
from lagcompile.exact.derivatives import Derivatives, Function
from lagcompile.exact.facts import describe
from lagcompile.exact.linear import Matrix, Vector, finite, largest
from lagcompile.exact.options import Options, parse_options
from lagcompile.exact.problem import Bounds, Problem
from lagcompile.exact.residuals import Duals
from lagcompile.exact.restoration import Restoration
from lagcompile.exact.result import KKT, Conflict, Facts, IterationRow, IterationTable, Multipliers, Result, Timings
from lagcompile.exact.sparsity import OutOfTimeError
from lagcompile.exact.sqp import SQP, Run
from lagcompile.exact.status import Status
from lagcompile.exact.subproblem import SubproblemCache
from lagcompile.exact.table import screen
from lagcompile.ir.base import ProgramError
from lagcompile.ir.keeper import Keeper, Unkept

NO_MULTIPLIERS = "The active gradients are dependent and the multipliers diverge: there may be none at the solution."
LARGE_MULTIPLIERS = 1e6  # times the objective's gradient: above it, multipliers count as diverging


def minimize(
    objective: Function,
    x0: Tensor,
    eq: Function | None = None,
    ineq: Function | None = None,
    bounds: tuple[Tensor, Tensor] | None = None,
    *,
    multipliers: Multipliers | None = None,
    derivatives: Derivatives | None = None,
    residuals: Function | None = None,
    watch: Callable[[IterationRow], None] | None = None,
    keeper: Keeper | None = None,
    **options: Any,
) -> Result:
    """Minimise objective(x) subject to eq(x) = 0, ineq(x) <= 0 and lower <= x <= upper by an SQP method.

    Args:
        objective: x (n,) -> one number. Functions must be differentiable by torch.func, and return float64.
        x0: start, (n,) float64; moved into the bounds first.
        eq: x -> (m,), zero when satisfied.
        ineq: x -> (k,), at most zero when satisfied.
        bounds: lower and upper bounds, both (n,), with infinities.
        multipliers: warm start, for instance `result.multipliers` of an earlier run.
        derivatives: own (sparse) derivatives in place of torch.func's.
        residuals: x -> (r,) with objective = |residuals|^2 / 2, needed by hessian="gauss_newton".
        watch: called with each row of the iteration table as it is written.
        keeper: keeps the run between two iterations, and has the state to go on from; arguments must then be the same.
        options: fields of `lagcompile.exact.Options`.

    Returns:
        The final point with its multipliers, `status`, unscaled `kkt` residuals, iteration table and facts.

    Raises:
        ProgramError: for invalid arguments: shapes, dtypes, unknown options. All are reported at once.
    """
    kept = Unkept() if keeper is None else keeper
    begin = time.perf_counter() - (0.0 if kept.state is None else kept.state["seconds"])
    chosen = parse_options(options)
    if not isinstance(x0, Tensor):
        raise ProgramError(f"x0 takes a tensor of float64 numbers, got an object of type {type(x0).__name__}")
    box, duals = _arguments(x0, bounds, multipliers, chosen, residuals)
    n = len(x0)
    crossed = np.flatnonzero(box.lower > box.upper)
    if crossed.size:
        pairs = ", ".join(f"{i}: {box.lower[i]:g} > {box.upper[i]:g}" for i in crossed[:10])
        return _refused(x0, Status.INCONSISTENT_BOUNDS, f"{crossed.size} variables ({pairs})", begin)
    if not np.isfinite(x0.numpy()).all():
        where = np.flatnonzero(~np.isfinite(x0.numpy()))[:10]
        return _refused(x0, Status.NON_FINITE, f"x0 at {', '.join(map(str, where))}", begin)
    problem = Problem(objective, x0, eq, ineq, box)
    rows = problem.equalities + problem.inequalities
    refusal = memory.before_start(n, rows, chosen, own_derivatives=derivatives is not None)
    if refusal is not None:
        return _refused(x0, Status.TOO_LARGE, refusal, begin, problem)
    duals = _check_duals(duals, problem)
    deadline = begin + chosen.time_limit
    problem.attach(derivatives, residuals, chosen, deadline=deadline)
    try:
        show = screen(chosen.verbose, watch)
        return _solve(problem, box.project(x0.numpy()), duals, residuals, chosen, begin, show=show, keeper=kept)
    except OutOfTimeError:
        return _refused(x0, Status.TIME_LIMIT, f"{chosen.time_limit:g} s, while finding the sparsity", begin, problem)
    except MemoryError:
        return _refused(x0, Status.TOO_LARGE, "memory ran out while solving", begin, problem)


def _solve(
    problem: Problem,
    x: Vector,
    duals: Duals | None,
    residuals: Function | None,
    options: Options,
    begin: float,
    *,
    show: Callable[[IterationRow], None],
    keeper: Keeper,
) -> Result:
    start = torch.from_numpy(x)
    values = problem.values(x)
    if not values.finite:
        return _refused(start, Status.NON_FINITE, "function values at the start", begin, problem)
    _check_residuals(residuals, start, values.objective)
    point = problem.evaluate(x, values)
    if not point.finite:
        return _refused(start, Status.NON_FINITE, "derivatives at the start", begin, problem)
    if options.hessian != "bfgs" and problem.size**2 > options.dense_limit:
        ones = np.ones(problem.equalities), np.ones(problem.inequalities)
        matrix = problem.hessian(x, 1.0, *ones) if options.hessian == "exact" else problem.gauss_newton(x)
        refusal = memory.after_detection(matrix, (point.jacobian_eq, point.jacobian_ineq), options)
        if refusal is not None:
            return _refused(start, Status.TOO_LARGE, refusal, begin, problem)
    subproblems = SubproblemCache(solver=options.solver, direct=options.direct)
    solver = SQP(problem, options, subproblems=subproblems, show=show, begin=begin, keeper=keeper)
    run = solver.run(point, duals)
    facts, conflict = Facts(), None
    if run.status is Status.INFEASIBLE and run.forces is not None:
        conflict = _conflict(problem, run, run.forces, solver, options)
    elif options.second_order and run.status is not Status.INTERRUPTED:
        facts = _facts(problem, run, options)
        facts = facts.model_copy(update={"implications": (*facts.implications, *_ran_away(run, x))})
    timings = Timings(
        model=problem.seconds - problem.preparation_seconds,
        subproblem=subproblems.seconds,
        compilation=subproblems.compilation_seconds + problem.preparation_seconds,
        total=time.perf_counter() - begin,
    )
    judged = _judged(run, facts, options)
    if judged.status is Status.RANK_DEFICIENT:
        facts = Facts(active=facts.active, rank=facts.rank, licq=facts.licq, implications=(NO_MULTIPLIERS,))
    return _result(judged, facts, conflict, timings)


def _conflict(problem: Problem, run: Run, forces: Duals, solver: SQP, options: Options) -> Conflict:
    quiet = Restoration(problem, solve=solver.solve, expired=solver.expired, record=lambda *_: None)
    return find_conflict(
        problem,
        run.final.point,
        forces,
        restoration=quiet,
        tolerance=options.acceptable_tolerance,
        delete=options.deletion_filter,
        expired=solver.expired,
    )


def _judged(run: Run, facts: Facts, options: Options) -> Run:
    """Say RANK_DEFICIENT where dependent gradients are the reason why multipliers diverge or do not exist."""
    final = run.final
    if facts.rank is None or facts.licq or run.status in (Status.UNBOUNDED, Status.NON_FINITE, Status.INFEASIBLE):
        return run
    diverged = final.duals.largest > LARGE_MULTIPLIERS * max(largest(final.point.gradient), 1.0)
    missing = not run.status.solved and facts.licq is False and final.kkt.primal <= options.acceptable_tolerance
    if not diverged and not missing:
        return run
    message = (
        f"{facts.active} active gradients of rank {facts.rank}; largest multiplier {final.duals.largest:.1e}; "
        f"otherwise {run.status.label}: {run.message}"
    )
    return replace(run, status=Status.RANK_DEFICIENT, message=message)


def _facts(problem: Problem, run: Run, options: Options) -> Facts:
    final = run.final
    hessian: Matrix = problem.hessian(final.point.x, 1.0, final.duals.eq, final.duals.ineq)
    if not finite(hessian):
        return Facts()
    return describe(
        final.point,
        final.duals,
        problem.bounds,
        hessian,
        tolerance=min(max(options.tolerance, final.kkt.worst), 1e-4),
        stationary=run.status.solved,
    )


FAR = 1e6


def _ran_away(run: Run, start: Vector) -> Iterator[str]:
    """A gradient below the tolerance far out may belong to an objective that only levels off."""
    size, before = largest(run.final.point.x), largest(start)
    if run.status.solved and size > FAR * max(1.0, before):
        yield (
            f"The point lies far out (largest component {size:.1e}, at the start {before:.1e}): the gradient may be "
            "small because the objective levels off there, and it may have no minimum at all; bound the variables."
        )


def _result(run: Run, facts: Facts, conflict: Conflict | None, timings: Timings) -> Result:
    status, message = run.status, run.message
    final = run.final
    return Result(
        x=torch.from_numpy(final.point.x.copy()),
        objective=final.point.values.objective,
        multipliers_eq=torch.from_numpy(final.duals.eq.copy()),
        multipliers_ineq=torch.from_numpy(final.duals.ineq.copy()),
        multipliers_bounds=torch.from_numpy(final.duals.bounds.copy()),
        status=status,
        message=message,
        kkt=final.kkt,
        iterations=IterationTable(run.rows),
        facts=facts,
        conflict=conflict,
        timings=timings,
    )


def _refused(x0: Tensor, status: Status, message: str, begin: float, problem: Problem | None = None) -> Result:
    """A result without a run: nothing was computed, so every number is NaN or zero."""
    nan = float("nan")
    eq, ineq = (0, 0) if problem is None else (problem.equalities, problem.inequalities)
    return Result(
        x=x0.clone(),
        objective=nan,
        multipliers_eq=torch.zeros(eq, dtype=torch.float64),
        multipliers_ineq=torch.zeros(ineq, dtype=torch.float64),
        multipliers_bounds=torch.zeros(len(x0), dtype=torch.float64),
        status=status,
        message=message,
        kkt=KKT(stationarity=nan, primal=nan, dual=nan, complementarity=nan),
        iterations=IterationTable(()),
        facts=Facts(),
        conflict=None,
        timings=Timings(model=0.0, subproblem=0.0, compilation=0.0, total=time.perf_counter() - begin),
    )


def _arguments(
    x0: Tensor,
    bounds: tuple[Tensor, Tensor] | None,
    multipliers: Multipliers | None,
    options: Options,
    residuals: Function | None,
) -> tuple[Bounds, Duals | None]:
    """Check shapes and dtypes of everything that is a tensor; all problems in one error."""
    problems = []
    if x0.dtype != torch.float64 or x0.dim() != 1 or x0.numel() == 0:
        problems.append(f"x0 must be a flat, non-empty float64 tensor, it is {_shape(x0)}")
    if (options.hessian == "gauss_newton") != (residuals is not None):
        problems.append("hessian='gauss_newton' and residuals= belong together: give both or neither")
    n = x0.numel()
    lower, upper = np.full(n, -np.inf), np.full(n, np.inf)
    if bounds is not None:
        for name, side in zip(("lower", "upper"), bounds, strict=True):
            if side.dtype != torch.float64 or tuple(side.shape) != (n,):
                problems.append(f"{name} bounds must be float64 of shape ({n},), they are {_shape(side)}")
            elif bool(torch.isnan(side).any()):
                problems.append(f"{name} bounds hold NaN: use infinities where there is no bound")
        if not problems:
            lower, upper = bounds[0].detach().numpy().copy(), bounds[1].detach().numpy().copy()
    if problems:
        raise ProgramError([f"minimize: {problem}" for problem in problems])
    if multipliers is None or (multipliers.eq is None and multipliers.ineq is None and multipliers.bounds is None):
        return Bounds(lower, upper), None
    parts = [multipliers.eq, multipliers.ineq, multipliers.bounds]
    eq, ineq, box = (np.zeros(0) if part is None else part.detach().numpy().copy() for part in parts)
    return Bounds(lower, upper), Duals(eq, ineq, box if box.size else np.zeros(n))


def _check_duals(duals: Duals | None, problem: Problem) -> Duals | None:
    """Fill in parts of a warm start that were left out; shapes that do not fit are errors."""
    if duals is None:
        return None
    wanted = (problem.equalities, problem.inequalities, problem.size)
    filled, problems = [], []
    for name, part, size in zip(("eq", "ineq", "bounds"), (duals.eq, duals.ineq, duals.bounds), wanted, strict=True):
        vector = np.zeros(size) if part.size == 0 else part
        if vector.shape != (size,) or vector.dtype != np.float64:
            problems.append(f"minimize: multipliers.{name} must be float64 of shape ({size},), it is {vector.shape}")
        elif not np.isfinite(vector).all():
            problems.append(f"minimize: multipliers.{name} are not finite")
        filled.append(vector)
    if problems:
        raise ProgramError(problems)
    return Duals(filled[0], np.maximum(filled[1], 0.0), filled[2])


def _check_residuals(residuals: Function | None, start: Tensor, objective: float) -> None:
    if residuals is None:
        return
    squares = 0.5 * float(residuals(start).detach().square().sum())
    if abs(squares - objective) > 1e-8 * (1.0 + abs(objective)):
        raise ProgramError(
            f"minimize: objective(x0) = {objective:.10g} but |residuals(x0)|^2 / 2 = {squares:.10g}: "
            "gauss_newton needs them to be the same function"
        )


def _shape(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} of shape {tuple(tensor.shape)}"
