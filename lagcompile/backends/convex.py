"""The convex fast path: affine stages and a convex loss make one cvxpy problem, and its solution is a global optimum.

In: an `Instance` whose stages are affine in everything that is solved for together: states (and inputs) with frozen
weights, or the weights of one affine stage whose inputs are data. Out: a `Solution` whose facts say "global optimum".
Invariant: affinity is proven from the operations that variables reach, not sampled; anything else is refused, never
solved locally under this name. It is a separate method because its claim differs from SQP's: a user who asks for a
global optimum must not get a local one.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from lagcompile.backends.convex_losses import ConvexLoss, convex_loss
from lagcompile.backends.sqp import SQP
from lagcompile.backends.sqp_constraints import Ball, Equal, Piece, Point
from lagcompile.backends.sqp_derivatives import ProgramFunctions
from lagcompile.backends.sqp_observe import Operation, random_problems
from lagcompile.backends.sqp_program import ExactProgram
from lagcompile.backends.sqp_result import spans, start_values
from lagcompile.backends.sqp_solver import DEFAULT_SECONDS, ExactSolver, Found, Written
from lagcompile.backends.sqp_values import Custom
from lagcompile.backends.sqp_variables import Values
from lagcompile.exact import KKT, Facts, IterationTable, Multipliers, Result, Status, Timings, minimize
from lagcompile.ir.alone import without_warnings
from lagcompile.ir.base import ProgramError
from lagcompile.ir.keeper import Keeper, Wait
from lagcompile.ir.solution import Solution
from lagcompile.ir.symbols import Symbols
from lagcompile.ir.tex import number

GAP = 1e-11
"""Duality gap and infeasibility at which Clarabel stops."""
SLACK = 1e-8
"""How far above the proven bound the objective may lie in float64."""


class Convex(ExactSolver):
    """One convex problem through cvxpy, for programs that are convex; others are refused with the reason."""

    kind: Literal["convex"] = "convex"
    tolerance: float = Field(default=1e-8, gt=0)
    """Largest unscaled KKT residual of a point that counts as solved."""
    time_limit: float | None = Field(default=None, gt=0)
    """Seconds; None takes the run's, or ten minutes."""

    def found(
        self, exact: ExactProgram, start: Solution | None, seconds: float | None, written: Written, keeper: Keeper
    ) -> Found:
        """Solve a convex instance; see `ExactSolver.found`. A start is not needed and not used.

        Raises:
            ProgramError: the program is not convex by its operations: each of them, with its stage and module path.
        """
        z = exact.variables.pack(start_values(exact, None))
        constant = constant_states(exact)
        operations = exact.observe(z, constant).operations
        loss = _checked(exact, z, operations)
        model = _Model(exact, z, constant)
        keeper.between(0, dict)
        with keeper.at_once("Clarabel") as wait:
            found = model.solve(loss, self.time_limit or seconds or DEFAULT_SECONDS, wait)
        if not found.status.solved:
            return Found(found)
        kinked = any(o.kinked for o in operations)
        functions = ProgramFunctions(exact.fused, z, exact.sizes, trace=False)
        result = found if kinked else self._polished(exact, functions, found)
        proof = f"global optimum: all stages are affine in the variables and {loss.name} is convex"
        bound = {} if model.bound is None else {"bound": {"value": model.bound, "slack": SLACK}}
        return Found(result, (proof,), details=bound)

    def tex(self, symbols: Symbols) -> list[str]:
        """Return what is solved, and how accurately."""
        return [
            "With the weights or the inputs fixed such that it is convex, the program is solved as a cone program, to "
            rf"residuals of at most ${number(self.tolerance)}$."
        ]

    def _polished(self, exact: ExactProgram, functions: ProgramFunctions, found: Result) -> Result:
        """Improve the point to the tolerance asked for, by Newton steps from the conic solver's primal and dual."""
        sqp = SQP(tolerance=self.tolerance, max_iterations=20)
        _, equalities, inequalities = exact.sizes
        better = minimize(
            functions.objective,
            found.x,
            functions.eq if equalities else None,
            functions.ineq if inequalities else None,
            exact.variables.bounds(),
            multipliers=Multipliers(found.multipliers_eq, found.multipliers_ineq, found.multipliers_bounds),
            derivatives=functions,
            tolerance=sqp.tolerance,
            max_iterations=sqp.max_iterations,
        )
        return better if better.status is Status.OPTIMAL or better.kkt.worst < found.kkt.worst else found


def constant_states(exact: ExactProgram) -> frozenset[str]:
    """States that data and frozen weights alone determine: written by such a stage, with r = 0."""
    states = {s.name for s in exact.program.states}
    free = {d.name for d in exact.program.data if d.free}
    trainable = {w.name for w in exact.program.weights if w.trainable}
    equal = {p.state for p in exact.pieces if isinstance(p, Equal)}
    moved: set[str] = set(free)
    if free:
        moved |= {n.name for n in exact.network.partition.graph.nodes if n.role == "data"}
    constant: set[str] = set()
    for stage in exact.program.stages:
        still = not moved & set(stage.reads) and not trainable & set(stage.weights)
        for name in stage.writes:
            if still and (name in equal or name not in states):
                constant.add(name)
            else:
                moved.add(name)
    return frozenset(constant & {name for role, name in exact.variables.keys if role == "state"})


def _checked(exact: ExactProgram, z: Tensor, operations: tuple[Operation, ...]) -> ConvexLoss:
    """The loss, after everything that is not convex was refused."""
    problems = list(random_problems(operations))
    seen: set[tuple[str, str]] = set()
    for o in operations:
        if o.place != "the loss" and not o.affine and (o.name, o.place) not in seen:
            seen.add((o.name, o.place))
            problems.append(f"{o.place}: {o.name} is not affine in the variables: use sqp (or mixed_integer for ReLU)")
    problems += [
        f"the constraint '{piece.name}' is a function, whose convexity is not known here: use sqp"
        for piece in exact.pieces
        if isinstance(piece, Custom)
    ]
    if exact.form.soft:
        problems.append("value constraints with a quadratic weight are not part of the convex path: use sqp")
    at = exact.point(z)
    loss = None
    if not isinstance(at.output, Tensor):
        problems.append("the output is not one tensor: use sqp")
    else:
        try:
            loss = convex_loss(exact.instance.loss, exact.target, tuple(at.output.shape), exact.program.objective.loss)
        except ProgramError as error:
            problems += error.problems
    if problems:
        raise ProgramError(problems)
    assert loss is not None
    return loss


class _Model:
    """The cvxpy problem of a convex program."""

    def __init__(self, exact: ExactProgram, z: Tensor, constant: frozenset[str]) -> None:
        import cvxpy as cp

        self.cp, self.exact, self.z, self.constant = cp, exact, z, constant
        self.x = cp.Variable(len(z))
        self.bound: float | None = None
        self.held: Values = {("state", name): exact.variables.unpack(z)["state", name].detach() for name in constant}
        self.lower, self.upper = (side.numpy().copy() for side in exact.variables.bounds())
        for block, start, stop in exact.variables.spans():
            if block.key in self.held:
                self.lower[start:stop] = self.upper[start:stop] = self.held[block.key].reshape(-1).numpy()

    def affine(self, read: Callable[[Point], Tensor]) -> Any:
        """A x + b of values that were shown to be affine; constant states count as data."""
        import scipy.sparse as sp

        def function(v: Tensor) -> Tensor:
            return read(self.exact.at({**self.exact.variables.unpack(v), **self.held})).reshape(-1)

        matrix = torch.func.jacrev(function)(self.z).detach().numpy()
        offset = function(self.z).detach().numpy() - matrix @ self.z.numpy()
        return sp.csr_array(matrix) @ self.x + offset

    def objective(self, loss: ConvexLoss) -> Any:
        """Loss, penalties, regularisers."""
        cp, exact = self.cp, self.exact
        total = loss.expression(cp, self.affine(_output))
        for penalty in exact.form.penalties:
            total = total + 0.5 * penalty.weight * cp.sum_squares(self.affine(_defect(penalty.state)))
        mean = exact.program.objective.reduction == "mean"
        for term in exact.program.objective.regularisers:
            role: Literal["weight", "state"] = "weight" if term.on == "weights" else "state"
            for block, start, stop in exact.variables.spans():
                weight = term.weight / (block.shape[0] if role == "state" and mean else 1)
                if term.kind == "l2" and block.role == role:
                    total = total + 0.5 * weight * cp.sum_squares(self.x[start:stop])
                elif term.kind == "l1" and block.role == "slack" and self._serves(block.name, role):
                    total = total + weight * cp.sum(self.x[start:stop])
        return total

    def _serves(self, slack: str, role: Literal["weight", "state"]) -> bool:
        return self.exact.variables.block((role, slack[1:-1])) is not None

    def constraints(self, piece: Piece) -> tuple[list[Any], list[Any]]:
        """Equalities and inequalities of one piece; none where its state is constant."""
        if piece.state in self.constant:
            return [], []
        if isinstance(piece, Ball):
            rows = self.cp.reshape(self.affine(_defect(piece.state)), (piece.shape[0], -1), order="C")
            return [], [self.cp.norm(rows[i], 2) <= piece.epsilon for i in range(piece.shape[0])]
        eq, ineq = self.exact.spans[piece.name]
        return (
            [self.affine(_side(piece, 0)) == 0] if eq else [],
            [self.affine(_side(piece, 1)) <= 0] if ineq else [],
        )

    def solve(self, loss: ConvexLoss, seconds: float, wait: Wait) -> Result:
        """Solve it; primal, dual and status in the general solver's form."""
        cp, begin = self.cp, time.perf_counter()
        pieces = [self.constraints(p) for p in self.exact.pieces]
        low, high = np.flatnonzero(np.isfinite(self.lower)), np.flatnonzero(np.isfinite(self.upper))
        box = [self.x[low] >= self.lower[low]] if low.size else []
        box += [self.x[high] <= self.upper[high]] if high.size else []
        problem = cp.Problem(cp.Minimize(self.objective(loss)), [c for e, i in pieces for c in (*e, *i)] + box)
        status, message = _run(cp, problem, seconds, wait)
        if status is Status.OPTIMAL:  # Clarabel's duality gap is below `GAP` then
            self.bound = float(problem.value) - GAP * max(1.0, abs(float(problem.value)))
        solved = self.x.value is not None
        point = torch.from_numpy(np.array(self.x.value, dtype=float)) if solved else self.z
        eq, ineq, bounds = [], [], np.zeros(len(self.z))
        for piece, (equalities, inequalities) in zip(self.exact.pieces, pieces, strict=True):
            counts = self.exact.spans[piece.name]
            eq.append(_dual(equalities, counts[0]))
            ineq.append(_dual(inequalities, counts[1]))
        sides = [(s, sign) for s, sign in ((low, -1.0), (high, 1.0)) if s.size]
        for (index, sign), constraint in zip(sides, box, strict=True):
            if constraint.dual_value is not None:
                bounds[index] += sign * np.atleast_1d(constraint.dual_value)
        empty = torch.zeros(0, dtype=torch.float64)
        mu_eq, mu_ineq = torch.cat([empty, *eq]), torch.cat([empty, *ineq])
        if solved:
            mu_eq = self._constant_multipliers(point, mu_eq, mu_ineq)
            for block, start, stop in self.exact.variables.spans():
                if block.key in self.held:
                    bounds[start:stop] = 0.0
        return self._result(point, (mu_eq, mu_ineq, torch.from_numpy(bounds)), status, message, begin)

    def _constant_multipliers(self, point: Tensor, mu_eq: Tensor, mu_ineq: Tensor) -> Tensor:
        """Adjoints of constant states, last first: their rows were data to the solver."""
        places = [(p, e) for p, e, _ in spans(self.exact) if p.state in self.constant]
        for piece, place in reversed(places):
            z = point.clone().requires_grad_()
            with torch.enable_grad():
                values = self.exact.fused(z)
                count = mu_eq.numel()
                value = values[0] + (mu_eq * values[1 : 1 + count]).sum() + (mu_ineq * values[1 + count :]).sum()
                (gradient,) = torch.autograd.grad(value, z)
            mu_eq = mu_eq.clone()
            mu_eq[place] = self.exact.variables.unpack(gradient)["state", piece.state].reshape(-1)
        return mu_eq

    def _result(
        self, point: Tensor, duals: tuple[Tensor, Tensor, Tensor], status: Status, message: str, begin: float
    ) -> Result:
        count = duals[0].numel()
        z = point.clone().requires_grad_()
        with torch.enable_grad():
            values = self.exact.fused(z)
            value = values[0] + (duals[0] * values[1 : 1 + count]).sum() + (duals[1] * values[1 + count :]).sum()
            (gradient,) = torch.autograd.grad(value, z)
        values = values.detach()
        over = [values[1 : 1 + count].abs(), values[1 + count :].clamp_min(0.0), torch.zeros(1, dtype=torch.float64)]
        kkt = KKT(
            stationarity=float((gradient + duals[2]).abs().max()),
            primal=float(torch.cat(over).max()),
            dual=0.0,
            complementarity=float((duals[1] * values[1 + count :]).abs().max()) if duals[1].numel() else 0.0,
        )
        return Result(
            x=point,
            objective=float(values[0]),
            multipliers_eq=duals[0],
            multipliers_ineq=duals[1],
            multipliers_bounds=duals[2],
            status=status,
            message=message,
            kkt=kkt,
            iterations=IterationTable(()),
            facts=Facts(),
            conflict=None,
            timings=Timings(model=0.0, subproblem=0.0, compilation=0.0, total=time.perf_counter() - begin),
        )


def _output(at: Point) -> Tensor:
    assert isinstance(at.output, Tensor)
    return at.output


def _defect(state: str) -> Callable[[Point], Tensor]:
    return lambda at: at.defect(state)


def _side(piece: Piece, side: Literal[0, 1]) -> Callable[[Point], Tensor]:
    def read(at: Point) -> Tensor:
        rows = piece.rows(at)[side]
        assert rows is not None
        return rows

    return read


def _dual(constraints: list[Any], count: int) -> Tensor:
    found = [np.atleast_1d(c.dual_value).reshape(-1) for c in constraints if c.dual_value is not None]
    flat = np.concatenate(found) if found else np.zeros(count)
    return torch.from_numpy(np.array(flat, dtype=float))


def _run(cp: Any, problem: Any, seconds: float, wait: Wait) -> tuple[Status, str]:
    settings = {"tol_gap_abs": GAP, "tol_gap_rel": GAP, "tol_feas": GAP, "time_limit": seconds}

    def call() -> None:
        with without_warnings():  # an inaccurate solution is polished, and its status says so
            problem.solve(solver=cp.CLARABEL, **settings)

    try:
        wait(call)
    except cp.SolverError as error:
        return Status.STALLED, f"Clarabel: {error}"
    word = str(problem.status)
    found = {
        "optimal": Status.OPTIMAL,
        "optimal_inaccurate": Status.ACCEPTABLE,
        "infeasible": Status.INFEASIBLE,
        "infeasible_inaccurate": Status.INFEASIBLE,
        "unbounded": Status.UNBOUNDED,
        "unbounded_inaccurate": Status.UNBOUNDED,
        "user_limit": Status.TIME_LIMIT,
    }
    return found.get(word, Status.STALLED), f"Clarabel: {word}"
