"""IPOPT through CasADi on the same exact program: an independent solver to compare with, not one to depend on.

In: an `Instance`. Out: a `Solution`, as `SQP` gives it. Invariant: functions, gradients, Jacobians and Hessians are
torch's exact ones, passed as callbacks; everything else (globalisation, linear algebra, multipliers) is IPOPT's.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from lagcompile.backends.sqp import SQP
from lagcompile.backends.sqp_derivatives import ProgramFunctions
from lagcompile.backends.sqp_program import ExactProgram
from lagcompile.backends.sqp_result import start_values
from lagcompile.backends.sqp_solver import DEFAULT_SECONDS, ExactSolver, Found, Written
from lagcompile.exact import KKT, Facts, IterationRow, IterationTable, Result, Status, Timings
from lagcompile.exact.linear import toarray
from lagcompile.ir.base import MissingExtraError
from lagcompile.ir.keeper import Keeper
from lagcompile.ir.solution import Solution

if TYPE_CHECKING:
    from lagcompile.exact.linear import Matrix


class Ipopt(ExactSolver):
    """IPOPT on the exact program, through CasADi (`pip install 'lagcompile[oracle]'`)."""

    kind: Literal["ipopt"] = "ipopt"
    tolerance: float = Field(default=1e-10, gt=0)
    """IPOPT's tolerance (of its scaled residual)."""
    max_iterations: int = Field(default=500, ge=0)
    """Iterations."""
    kinks: Literal["refuse", "accept"] = "refuse"
    """As for `SQP`."""
    trace: bool = False
    """As for `SQP`."""

    def found(
        self, exact: ExactProgram, start: Solution | None, seconds: float | None, written: Written, keeper: Keeper
    ) -> Found:
        """Solve an instance; see `ExactSolver.found`.

        Raises:
            MissingExtraError: CasADi is not installed.
            ProgramError: as for `SQP`.
        """
        z = exact.variables.pack(start_values(exact, start)) if keeper.state is None else keeper.state["x0"]
        functions = SQP(kinks=self.kinks, trace=self.trace).compiled(exact, z)
        keeper.between(0, lambda: {"x0": z})
        with keeper.at_once("IPOPT"):
            return Found(self.minimized(exact, functions, z, seconds or DEFAULT_SECONDS))

    def minimized(self, exact: ExactProgram, functions: ProgramFunctions, z: Tensor, seconds: float) -> Result:
        """The result in the form of the general solver's; its seconds do not hold CasADi's set-up."""
        casadi = _casadi()
        n, m, k = exact.sizes
        ended: list[KeyboardInterrupt] = []
        callbacks = _callbacks(casadi, functions, (n, m, k), ended)
        x = casadi.MX.sym("x", n)
        program = {"x": x, "f": callbacks["f"](x), "g": callbacks["g"](x) if m + k else casadi.MX(0, 1)}
        settings: dict[str, Any] = {
            "print_time": False,
            "no_nlp_grad": True,
            "ipopt.print_level": 0,
            "ipopt.sb": "yes",
            "ipopt.tol": self.tolerance,
            "ipopt.constr_viol_tol": self.tolerance,
            "ipopt.compl_inf_tol": self.tolerance,
            "ipopt.dual_inf_tol": self.tolerance,
            "ipopt.max_iter": self.max_iterations,
            "ipopt.max_wall_time": seconds,
            "ipopt.bound_relax_factor": 0.0,
            "grad_f": callbacks["grad_f"],
            "hess_lag": callbacks["hess_lag"],
        }
        if m + k:
            settings["jac_g"] = callbacks["jac_g"]
        solver = casadi.nlpsol("solver", "ipopt", program, settings)
        lower, upper = (side.numpy() for side in exact.variables.bounds())
        begin = time.perf_counter()
        found = solver(
            x0=z.numpy(),
            lbx=lower,
            ubx=upper,
            lbg=np.concatenate([np.zeros(m), np.full(k, -np.inf)]),
            ubg=np.zeros(m + k),
        )
        elapsed = time.perf_counter() - begin
        if ended:
            raise ended[0]
        return _result(found, solver.stats(), (n, m, k), elapsed)


def _casadi() -> Any:
    try:
        import casadi
    except ImportError as error:
        raise MissingExtraError("IPOPT needs CasADi: pip install 'lagcompile[oracle]'") from error
    return casadi


def _callbacks(
    casadi: Any, functions: ProgramFunctions, sizes: tuple[int, int, int], ended: list[KeyboardInterrupt]
) -> dict[str, Any]:
    """The functions that nlpsol asks for, with dense derivatives.

    CasADi lets no exception through: an interrupt goes to `ended`, and IPOPT gives up as all further numbers are NaN.
    """
    n, m, k = sizes
    dense, symmetric = casadi.Sparsity.dense, casadi.Sparsity.upper(n)

    class Wrapped(casadi.Callback):
        """A torch function of numpy vectors."""

        def __init__(
            self, name: str, inputs: Sequence[Any], outputs: Sequence[Any], call: Any, jacobian: Any = None
        ) -> None:
            casadi.Callback.__init__(self)
            self._inputs, self._outputs, self._call, self._jacobian = inputs, outputs, call, jacobian
            self._kept: list[Any] = []  # CasADi does not own the objects that it is given
            self.construct(name, {})

        def get_n_in(self) -> int:
            return len(self._inputs)

        def get_n_out(self) -> int:
            return len(self._outputs)

        def get_sparsity_in(self, i: int) -> Any:
            return self._inputs[i]

        def get_sparsity_out(self, i: int) -> Any:
            return self._outputs[i]

        def eval(self, arguments: Sequence[Any]) -> list[Any]:
            given = [np.array(a).reshape(-1) for a in arguments]
            try:
                results = [] if ended else self._call(*given)
            except KeyboardInterrupt as interrupt:
                ended.append(interrupt)
            if ended:
                return [casadi.DM(s, float("nan")) for s in self._outputs]
            return [
                casadi.DM(r) if s.is_dense() else casadi.DM(r)[s] for r, s in zip(results, self._outputs, strict=True)
            ]

    held: dict[str, tuple[Any, Any]] = {}  # IPOPT asks for parts of one point in separate calls

    def once(what: str, x: Any, compute: Any) -> Any:
        known = held.get(what)
        if known is None or not np.array_equal(known[0], x):
            held[what] = (x.copy(), compute(torch.from_numpy(x)))
        return held[what][1]

    def values(x: Any) -> Any:
        with torch.no_grad():
            return once("values", x, functions.value).numpy()

    def gradient(x: Any, p: Any) -> Any:
        return values(x)[0], once("first", x, functions.first_order).gradient

    def jacobian(x: Any, p: Any) -> Any:
        first = once("first", x, functions.first_order)
        return values(x)[1:], np.vstack([_dense(first.jacobian_eq), _dense(first.jacobian_ineq)])

    def hessian(x: Any, p: Any, weight: Any, multipliers: Any) -> Any:
        mu = torch.from_numpy(multipliers)
        full = functions.hessian(torch.from_numpy(x), float(weight[0]), mu[:m], mu[m:])
        return (np.triu(_dense(full)),)

    empty, vector = casadi.Sparsity(0, 0), dense(n, 1)
    return {
        "f": Wrapped("f", [vector], [dense(1, 1)], lambda x: (values(x)[0],)),
        "g": Wrapped("g", [vector], [dense(m + k, 1)], lambda x: (values(x)[1:],)),
        "grad_f": Wrapped("grad_f", [vector, empty], [dense(1, 1), vector], gradient),
        "jac_g": Wrapped("jac_g", [vector, empty], [dense(m + k, 1), dense(m + k, n)], jacobian),
        "hess_lag": Wrapped("hess_lag", [vector, empty, dense(1, 1), dense(m + k, 1)], [symmetric], hessian),
    }


def _dense(matrix: Matrix) -> Any:
    return np.asarray(toarray(matrix))


def _result(found: Any, stats: Any, sizes: tuple[int, int, int], seconds: float) -> Result:
    n, m, _ = sizes
    duals = np.array(found["lam_g"]).reshape(-1)
    word, steps = str(stats["return_status"]), stats.get("iterations", {})
    primal = steps.get("inf_pr", [float("nan")])
    dual = steps.get("inf_du", [float("nan")])
    rows = tuple(
        IterationRow(
            index=i,
            objective=steps["obj"][i],
            primal=primal[i],
            dual=dual[i],
            step=steps["alpha_pr"][i],
            step_norm=steps["d_norm"][i],
            regularisation=steps["regularization_size"][i],
            convexification=0.0,
            mode="step" if i else "start",
            trials=0,
            active=0,
        )
        for i in range(len(steps.get("obj", [])))
    )
    status = {
        "Solve_Succeeded": Status.OPTIMAL,
        "Solved_To_Acceptable_Level": Status.ACCEPTABLE,
        "Infeasible_Problem_Detected": Status.INFEASIBLE,
        "Diverging_Iterates": Status.UNBOUNDED,
        "Maximum_Iterations_Exceeded": Status.ITERATION_LIMIT,
        "Maximum_WallTime_Exceeded": Status.TIME_LIMIT,
    }.get(word, Status.STALLED)
    return Result(
        x=torch.from_numpy(np.array(found["x"]).reshape(n).copy()),
        objective=float(found["f"]),
        multipliers_eq=torch.from_numpy(duals[:m].copy()),
        multipliers_ineq=torch.from_numpy(duals[m:].copy()),
        multipliers_bounds=torch.from_numpy(np.array(found["lam_x"]).reshape(n).copy()),
        status=status,
        message=f"IPOPT: {word}",
        kkt=KKT(stationarity=dual[-1], primal=primal[-1], dual=0.0, complementarity=0.0),
        iterations=IterationTable(rows),
        facts=Facts(),
        conflict=None,
        timings=Timings(model=0.0, subproblem=0.0, compilation=0.0, total=seconds),
    )
