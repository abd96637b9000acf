"""Global optima of piecewise-linear networks with frozen weights and bounded inputs: a mixed-integer linear program.

In: an `Instance` whose free inputs have bounds, whose weights are frozen, whose defects are equalities. Out: a
`Solution` whose facts say "global optimum". Invariant: the claim is made only when HiGHS has proven it and a forward
pass at its inputs reproduces objective and constraints; big-M constants come from bounds that hold for every input.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from lagcompile.backends.mip_forms import PIECEWISE, Form, Forms, Switch, Vector
from lagcompile.backends.mip_highs import multiplied, proven, run
from lagcompile.backends.sqp_constraints import Equal, Point
from lagcompile.backends.sqp_observe import Operation
from lagcompile.backends.sqp_program import ExactProgram
from lagcompile.backends.sqp_result import spans, start_values
from lagcompile.backends.sqp_solver import DEFAULT_SECONDS, ExactSolver, Found, Written
from lagcompile.backends.sqp_values import Bounded, Custom
from lagcompile.backends.sqp_variables import Values, state_rows
from lagcompile.exact import KKT, Facts, IterationTable, Result, Status, Timings
from lagcompile.ir.base import ProgramError
from lagcompile.ir.keeper import Keeper, Wait
from lagcompile.ir.program import Program
from lagcompile.ir.solution import Solution
from lagcompile.ir.symbols import Symbols
from lagcompile.ir.tex import display, number
from lagcompile.runtime.slopes import MOST, Slopes, fit_slopes

REPRODUCED = 1e-5
"""Largest difference between the program's and a forward pass's objective, relative."""
STATIONARY = 1e-10
"""Residual at which slopes at kinks are good enough."""


class MixedInteger(ExactSolver):
    """HiGHS, through cvxpy, on the exact mixed-integer form; for up to about 100 ReLUs that may switch."""

    kind: Literal["mixed_integer"] = "mixed_integer"
    tighten: bool = True
    """Bound every ReLU by linear programs before the search, which shrinks its tree."""
    gap: float = Field(default=1e-6, ge=0)
    """Relative gap between the best point and the proven bound at which the search ends."""
    largest: int = Field(default=150, ge=0)
    """Switching ReLUs (binaries) above which the program is refused."""
    time_limit: float | None = Field(default=None, gt=0)
    """Seconds; None takes the run's, or ten minutes."""

    def problems(self, program: Program) -> Iterator[str]:
        """Say what has no exact form, which weights move, and which inputs have no bounds."""
        yield from super().problems(program)
        for w in program.weights:
            if w.trainable:
                yield (
                    f"the weight {w.name} moves: freeze it (formulation.frozen: ['*']), products with inputs are not "
                    "linear"
                )
        free = [d for d in program.data if d.free]
        if not free:
            yield "no input is free: name one in formulation.inputs, with bounds"
        for d in free:
            if d.lower is None or d.upper is None:
                yield f"the input {d.name} needs a lower and an upper bound, from which big-M constants follow"

    def found(
        self, exact: ExactProgram, start: Solution | None, seconds: float | None, written: Written, keeper: Keeper
    ) -> Found:
        """Solve an instance to global optimality; see `ExactSolver.found`. A start is not needed and not used.

        Raises:
            ProgramError: weights that move, inputs without bounds, operations that are not piecewise linear, tubes or
                penalties, or too many binaries: all of them, by name.
        """
        z = exact.variables.pack(start_values(exact, None))
        problems = [*self.problems(exact.program), *_problems(exact, exact.observe(z).operations)]
        if problems:
            raise ProgramError(problems)
        with keeper.at_once("HiGHS") as wait:
            search = _Search(exact, z, tighten=self.tighten)
            if len(search.binaries) > self.largest:
                raise ProgramError(
                    f"{len(search.binaries)} ReLUs may switch within the inputs' bounds, more than {self.largest}: "
                    "narrow the bounds, use fewer examples, or raise 'largest'"
                )
            keeper.between(0, dict)
            result, facts = search.solve(self.time_limit or seconds or DEFAULT_SECONDS, self.gap, wait)
        details: dict[str, Any] = {
            "binaries": len(search.binaries),
            "relus": len(search.forms.switches) + search.forms.stable,
        }
        if search.bound is not None and result.status is Status.OPTIMAL:
            details["bound"] = {"value": search.bound, "slack": max(self.gap, REPRODUCED)}
        return Found(result, facts, details=details)

    def tex(self, symbols: Symbols) -> list[str]:
        """Return the form of a unit, and where the search ends."""
        return [
            r"Each piecewise-linear unit is written with a binary $b \in \{0, 1\}$ and bounds $l \le z \le u$ of its "
            r"input, a unit $h = \max(z, 0)$ as",
            *display(r"h \ge z, \qquad h \ge 0, \qquad h \le z - l\,(1 - b), \qquad h \le u\, b"),
            rf"and the mixed-integer program is solved until the bounds on its optimum differ by at most "
            rf"${number(self.gap)}$, relatively.",
        ]


def _problems(exact: ExactProgram, operations: tuple[Operation, ...]) -> list[str]:
    problems = [
        f"the constraint '{piece.name}' is not an equality: tubes are for sqp or convex"
        for piece in exact.pieces
        if not isinstance(piece, Equal | Bounded | Custom)
    ]
    if exact.form.penalties or exact.form.soft or exact.program.objective.regularisers:
        problems.append("quadratic terms and regularisers are not part of a mixed-integer linear program")
    seen: set[tuple[str, str]] = set()
    for o in operations:
        if not o.affine and o.name not in PIECEWISE and (o.name, o.place) not in seen:
            seen.add((o.name, o.place))
            problems.append(f"{o.place}: {o.name} is not piecewise linear: use sqp")
    return problems


class _Search:
    """The mixed-integer program of one exact program."""

    def __init__(self, exact: ExactProgram, z: Tensor, *, tighten: bool) -> None:
        self.exact = exact
        self.keys = [b.key for b in exact.variables.blocks if b.role == "input"]
        low, high, first = [], [], []
        lower, upper = (exact.variables.unpack(side) for side in exact.variables.bounds())
        values = exact.variables.unpack(z)
        for key in self.keys:
            low += lower[key].reshape(-1).tolist()
            high += upper[key].reshape(-1).tolist()
            first.append(values[key].reshape(-1))
        self.inputs = len(low)
        self.bounds = np.array(low), np.array(high)
        if bool((self.bounds[0] > self.bounds[1]).any()):
            raise ProgramError("some lower bounds of the inputs exceed their upper bounds")
        self.forms = Forms(low, high, tighten=tighten)
        self.outputs = self.forms.run(_trace(self, torch.cat(first)))
        self.objective = self._row(self.outputs[0], 0)
        self.binaries = self._unsafe()
        self.bound: float | None = None

    # ---------------------------------------------------------------- the function of the inputs
    def values(self, v: Tensor) -> Values:
        """Inputs, and states as a forward pass gives them."""
        parts = v.split([int(np.prod(self._shape(k))) for k in self.keys])
        values: Values = {k: p.reshape(self._shape(k)) for k, p in zip(self.keys, parts, strict=True)}
        env: dict[str, Any] = {**self.exact.data, **{k[1]: x for k, x in values.items()}}
        network = self.exact.network
        states = {s.node: s for s in self.exact.program.states}
        for stage in (network.prologue, *network.stages):
            env.update(zip(stage.writes, stage.module(*(env[n] for n in stage.reads)), strict=True))
        for node, state in states.items():
            if ("state", state.name) in self.exact.variables.keys:
                values["state", state.name] = state_rows(state, env[node])
        return values

    def _shape(self, key: tuple[str, str]) -> tuple[int, ...]:
        block = self.exact.variables.block(key)  # type: ignore[arg-type]
        assert block is not None
        return block.shape

    def function(self, v: Tensor) -> tuple[Tensor, ...]:
        """Loss, equalities, inequalities, of value constraints and of the states' domains (at most zero)."""
        values = self.values(v)
        at: Point = self.exact.at(values)
        eq, ineq = [torch.zeros(0, dtype=torch.float64)], [torch.zeros(0, dtype=torch.float64)]
        for piece in self.exact.pieces:
            if isinstance(piece, Equal):
                continue
            e, i = piece.rows(at)
            eq += [] if e is None else [e.reshape(-1)]
            ineq += [] if i is None else [i.reshape(-1)]
        for block in self.exact.variables.blocks:
            if block.role == "state":
                x = values[block.key].reshape(-1)
                ineq += [block.lower - x] if block.lower > -torch.inf else []
                ineq += [x - block.upper] if block.upper < torch.inf else []
        return self.exact.loss(at).reshape(1), torch.cat(eq), torch.cat(ineq)

    # ---------------------------------------------------------------- the program
    def _row(self, form: Form, i: int) -> Vector:
        row = np.zeros(len(self.forms.lower) + 1)
        found = form.columns[i].numpy()
        row[: len(found)] = found
        return row

    def _rows(self, form: Form) -> Vector:
        count = form.columns.shape[0]
        return (
            np.stack([self._row(form, i) for i in range(count)]) if count else np.zeros((0, len(self.forms.lower) + 1))
        )

    def _unsafe(self) -> list[Switch]:
        """Switches that need a binary: y >= max(x, 0) is enough where nothing gains from a larger y."""
        eq, ineq = self._rows(self.outputs[1]), self._rows(self.outputs[2])
        safe: set[int] = set()
        for s in reversed(self.forms.switches):
            column = s.index + 1
            harmless = self.objective[column] >= 0 and (ineq[:, column] >= 0).all() and (eq[:, column] == 0).all()
            later = [t for t in self.forms.switches if len(t.form) > column and t.form[column] != 0]
            if harmless and all(t.form[column] > 0 and t.index in safe for t in later):
                safe.add(s.index)
        return [s for s in self.forms.switches if s.index not in safe]

    def solve(self, seconds: float, gap: float, wait: Wait) -> tuple[Result, tuple[str, ...]]:
        """Search, then solve the linear program of the piece that was found, to remove the big-M tolerance."""
        import cvxpy as cp

        begin = time.perf_counter()
        count = len(self.forms.lower)
        u = cp.Variable(count)
        z = cp.Variable(len(self.binaries), boolean=True) if self.binaries else None
        problem = cp.Problem(cp.Minimize(self.objective[1:] @ u + self.objective[0]), self._constraints(u, z))
        options = {"time_limit": seconds, "mip_rel_gap": gap, "mip_abs_gap": gap}
        status = run(cp, problem, options, wait)
        if u.value is None:
            return self._result(None, (), status, begin), ()
        self.bound = proven(problem, whole=z is None)
        exact_u = self._piece(cp, np.round(np.asarray(z.value)) if z is not None else np.zeros(0))
        value, rows = exact_u if exact_u is not None else (np.asarray(u.value), ())
        return self._checked(value[: self.inputs], rows, status, float(problem.value), begin)

    def _constraints(self, u: Any, z: Any) -> list[Any]:
        lower, upper = np.array(self.forms.lower), np.array(self.forms.upper)
        constraints = [u >= lower, u <= upper]
        eq, ineq = self._rows(self.outputs[1]), self._rows(self.outputs[2])
        constraints += [eq[:, 1:] @ u + eq[:, 0] == 0] if len(eq) else []
        constraints += [ineq[:, 1:] @ u + ineq[:, 0] <= 0] if len(ineq) else []
        if self.forms.switches:
            forms = np.stack([np.pad(s.form, (0, len(lower) + 1 - len(s.form))) for s in self.forms.switches])
            index = [s.index for s in self.forms.switches]
            constraints.append(u[index] >= forms[:, 1:] @ u + forms[:, 0])
        if z is not None:
            forms = np.stack([np.pad(s.form, (0, len(lower) + 1 - len(s.form))) for s in self.binaries])
            low, high = np.array([s.lower for s in self.binaries]), np.array([s.upper for s in self.binaries])
            y = u[[s.index for s in self.binaries]]
            constraints += [
                y <= forms[:, 1:] @ u + forms[:, 0] - multiplied(low, 1 - z),
                y <= multiplied(high, z),
            ]
        return constraints

    def _piece(self, cp: Any, pattern: Vector) -> tuple[Vector, tuple[Any, ...]] | None:
        """Optimum on the piece on which the binaries' ReLUs are as found; its point and the inequalities' duals."""
        u = cp.Variable(len(self.forms.lower))
        constraints = self._constraints(u, None)
        for s, on in zip(self.binaries, pattern, strict=True):
            x = s.form[1:] @ u[: len(s.form) - 1] + s.form[0]
            constraints += [u[s.index] == x, x >= 0] if on else [u[s.index] == 0, x <= 0]
        problem = cp.Problem(cp.Minimize(self.objective[1:] @ u + self.objective[0]), constraints)
        if not run(cp, problem, {}, lambda made: made()).solved:
            return None
        eq, ineq = self.outputs[1].columns.shape[0], self.outputs[2].columns.shape[0]
        duals = [c.dual_value for c in constraints[2 : 2 + bool(eq) + bool(ineq)]]
        return np.asarray(u.value), tuple(np.atleast_1d(d) for d in duals)

    def _checked(
        self, v: Vector, duals: tuple[Any, ...], status: Status, bound: float, begin: float
    ) -> tuple[Result, tuple[str, ...]]:
        point = torch.from_numpy(np.clip(v, *self.bounds))
        with torch.no_grad():
            loss, eq, ineq = self.function(point)
        worst = max(float(eq.abs().max()) if eq.numel() else 0.0, float(ineq.max()) if ineq.numel() else 0.0)
        off = abs(float(loss) - bound)
        fits = off <= REPRODUCED * (1.0 + abs(bound)) and worst <= REPRODUCED
        if status is Status.OPTIMAL and not fits:
            status = Status.STALLED
        result = self._result(point, duals, status, begin)
        if status is not Status.OPTIMAL:
            return result, (f"not proven: objective off by {off:.1e}, constraints by {worst:.1e}",) if not fits else ()
        relus = len(self.forms.switches) + self.forms.stable
        least = bound if self.bound is None else min(self.bound, bound)
        return result, (
            f"global optimum: no input within the bounds gives less than {least:.8g}, proven by branch and bound over "
            f"{len(self.binaries)} binaries ({relus} ReLUs, of which {self.forms.stable} cannot switch)",
            "the multipliers are those of one choice of slopes at the kinks; there may be others",
        )

    def _result(self, v: Tensor | None, duals: tuple[Any, ...], status: Status, begin: float) -> Result:
        """Evaluate everything at the inputs found; the dual sweep gives the multipliers of states."""
        exact = self.exact
        _, m, k = exact.sizes
        mu_eq, mu_ineq = torch.zeros(m, dtype=torch.float64), torch.zeros(k, dtype=torch.float64)
        with torch.no_grad():
            values = start_values(exact, None) if v is None else self.values(v)
            x = exact.variables.pack(values)
        if v is not None:
            self._value_multipliers(mu_eq, mu_ineq, duals)
        gradient = self._gradient(x, mu_eq, mu_ineq) if v is None else self._swept(x, mu_eq, mu_ineq)
        lower, upper = exact.variables.bounds()
        at = ((x >= upper - 1e-9) & (gradient < 0)) | ((x <= lower + 1e-9) & (gradient > 0))
        bounds = torch.where(at, -gradient, torch.zeros_like(gradient))
        with torch.no_grad():
            fused = exact.fused(x)
        over = [torch.zeros(1, dtype=torch.float64), fused[1 : 1 + m].abs(), fused[1 + m :].clamp_min(0.0)]
        kkt = KKT(
            stationarity=float((gradient + bounds).abs().max()),
            primal=float(torch.cat(over).max()),
            dual=0.0,
            complementarity=float((mu_ineq * fused[1 + m :]).abs().max()) if k else 0.0,
        )
        return Result(
            x=x,
            objective=float(fused[0]),
            multipliers_eq=mu_eq,
            multipliers_ineq=mu_ineq,
            multipliers_bounds=bounds,
            status=status,
            message=f"HiGHS: {status.label}",
            kkt=kkt,
            iterations=IterationTable(()),
            facts=Facts(),
            conflict=None,
            timings=Timings(model=0.0, subproblem=0.0, compilation=0.0, total=time.perf_counter() - begin),
        )

    def _value_multipliers(self, mu_eq: Tensor, mu_ineq: Tensor, duals: tuple[Any, ...]) -> None:
        """Multipliers of value constraints from the linear program; those of domains are left to the bounds."""
        queue = list(duals)
        eq = torch.from_numpy(queue.pop(0).copy()) if self.outputs[1].columns.shape[0] and queue else None
        ineq = torch.from_numpy(queue.pop(0).copy()) if queue else None
        e = i = 0
        for piece, eq_place, ineq_place in spans(self.exact):
            if isinstance(piece, Equal):
                continue
            count, more = eq_place.stop - eq_place.start, ineq_place.stop - ineq_place.start
            if eq is not None:
                mu_eq[eq_place] = eq[e : e + count]
            if ineq is not None:
                mu_ineq[ineq_place] = ineq[i : i + more]
            e, i = e + count, i + more

    def _swept(self, x: Tensor, mu_eq: Tensor, mu_ineq: Tensor) -> Tensor:
        """Set the states' multipliers, with slopes at kinks that make the inputs stationary; the gradient with them."""
        counting = Slopes()
        self._gradient(x, mu_eq, mu_ineq, counting)
        lower, upper = self.exact.variables.bounds()
        defects = [(p.state, place) for p, place, _ in spans(self.exact) if isinstance(p, Equal)]

        def sweep(slopes: Tensor | None) -> Tensor:
            for _, place in defects:
                mu_eq[place] = 0.0
            for state, place in reversed(defects):
                gradient = self._gradient(x, mu_eq, mu_ineq, Slopes(slopes) if slopes is not None else None)
                mu_eq[place] = self.exact.variables.unpack(gradient)["state", state].reshape(-1)
            return self._gradient(x, mu_eq, mu_ineq, Slopes(slopes) if slopes is not None else None)

        def residual(slopes: Tensor) -> Tensor:
            return x - (x - sweep(slopes)).clamp(lower, upper)

        if not 0 < counting.used <= MOST:
            return sweep(None)
        return sweep(fit_slopes(residual, counting.used, STATIONARY))

    def _gradient(self, x: Tensor, mu_eq: Tensor, mu_ineq: Tensor, slopes: Slopes | None = None) -> Tensor:
        z = x.detach().clone().requires_grad_()
        with torch.enable_grad(), nullcontext() if slopes is None else slopes:
            fused = self.exact.fused(z)
            m = len(mu_eq)
            value = fused[0] + (mu_eq * fused[1 : 1 + m]).sum() + (mu_ineq * fused[1 + m :]).sum()
            (gradient,) = torch.autograd.grad(value, z)
        return gradient


def _trace(search: _Search, v: Tensor) -> Any:
    from torch.fx.experimental.proxy_tensor import make_fx

    graph = make_fx(lambda point: search.function(point))(v)  # not the method: its `self` would count as an argument
    graph.graph.eliminate_dead_code()
    graph.recompile()
    return graph
