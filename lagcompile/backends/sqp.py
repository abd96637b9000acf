"""The exact checker: a program solved as one nonlinear program, in float64, to its KKT conditions.

In: an `Instance`. Out: a `Solution` whose states and multipliers compare with those of first-order methods and with
autograd's adjoints. Invariant: all rows of the data are in one program, modules are in eval mode, and the instance's
own modules are left as they were.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from lagcompile.backends.sqp_derivatives import ProgramFunctions
from lagcompile.backends.sqp_observe import kink_problems, nearest_kink, random_problems
from lagcompile.backends.sqp_program import ExactProgram
from lagcompile.backends.sqp_result import STATUS, start_multipliers, start_values
from lagcompile.backends.sqp_solver import DEFAULT_SECONDS, ExactSolver, Found, Written
from lagcompile.exact import IterationRow, Result, minimize
from lagcompile.ir.base import ProgramError
from lagcompile.ir.keeper import Keeper
from lagcompile.ir.solution import Solution, Status
from lagcompile.ir.symbols import Symbols
from lagcompile.ir.tex import display, number


class SQP(ExactSolver):
    """Sequential quadratic programming on the whole program (`lagcompile.exact.minimize`), with a certificate.

    For programs of up to a few thousand variables; larger ones are refused with the numbers. `RunOptions.steps` does
    not count here (`max_iterations` does), except that scheduled quadratic weights are read at that step.
    """

    FREE: ClassVar[frozenset[str]] = frozenset({"max_iterations", "time_limit", "memory_limit", "verbose"})
    kind: Literal["sqp"] = "sqp"
    hessian: Literal["exact", "gauss_newton", "bfgs"] = "exact"
    """Curvature of the subproblems; gauss_newton needs a mean squared error loss."""
    solver: Literal["clarabel", "osqp"] = "clarabel"
    """Solver of the quadratic subproblems, through cvxpy."""
    tolerance: float = Field(default=1e-8, gt=0)
    """Largest unscaled KKT residual of a point that counts as solved."""
    max_iterations: int = Field(default=300, ge=0)
    """Iterations."""
    time_limit: float | None = Field(default=None, gt=0)
    """Seconds; None takes the run's, or ten minutes."""
    memory_limit: int | None = Field(default=None, gt=0)
    """Bytes; None: 80 percent of what is free. What would not fit is refused with the numbers."""
    kinks: Literal["refuse", "accept"] = "refuse"
    """What to do about ReLU, abs, max and the like inside stages or loss: refuse with the module path, or solve and say
    how far the solution is from the nearest kink."""
    trace: bool = False
    """Trace derivatives of small programs once to plain tensor calls: seconds at the start, each evaluation faster."""
    verbose: bool = False
    """Show the iteration table while solving."""

    def found(
        self, exact: ExactProgram, start: Solution | None, seconds: float | None, written: Written, keeper: Keeper
    ) -> Found:
        """Solve an instance to its KKT conditions; see `ExactSolver.found`.

        Raises:
            ProgramError: kinks, random numbers in eval mode, states kept per class, or constraints without an exact
                form: every problem at once, with its stage and module path.
        """
        z = exact.variables.pack(start_values(exact, start)) if keeper.state is None else keeper.state["x0"]
        functions = self.compiled(exact, z)
        result = self.minimized(exact, functions, z, start, seconds, watch=written, keeper=keeper)
        near = self.kinks == "accept" and STATUS[result.status] is not Status.REFUSED
        said = nearest_kink(exact.observe(result.x).operations) if near else ""
        return Found(result, remarks=(said,) if said else ())

    def tex(self, symbols: Symbols) -> list[str]:
        """Return the quadratic subproblem and where iterations end."""
        hessian = {
            "exact": "the Hessian",
            "gauss_newton": "the Gauss-Newton matrix",
            "bfgs": "a quasi-Newton estimate",
        }[self.hessian]
        return [
            r"With $x = (\theta, h)$, objective $f$, equations $c(x) = 0$ and inequalities $g(x) \le 0$, each "
            "iteration solves",
            *display(
                r"\min_{p} \quad & \tfrac12 p^{\top} H p + \nabla f(x)^{\top} p",
                r"\text{subject to} \quad & c(x) + \nabla c(x)^{\top} p = 0, \qquad g(x) + \nabla g(x)^{\top} p \le 0",
            ),
            rf"with $H$ {hessian} of the Lagrangian, made convex where it is not, and steps along $p$ as long as a "
            rf"filter allows, until the KKT residuals are at most ${number(self.tolerance)}$.",
        ]

    def compiled(self, exact: ExactProgram, z: Tensor) -> ProgramFunctions:
        """The program's functions and derivatives, checked for kinks at a point.

        Raises:
            ProgramError: kinks (unless accepted), or random numbers.
        """
        operations = exact.observe(z).operations
        problems = list(random_problems(operations))
        if self.kinks == "refuse":
            problems += kink_problems(operations)
        if problems:
            raise ProgramError(problems)
        return ProgramFunctions(exact.fused, z, exact.sizes, trace=self.trace)

    def minimized(
        self,
        exact: ExactProgram,
        functions: ProgramFunctions,
        z: Tensor,
        start: Solution | None = None,
        time_limit: float | None = None,
        *,
        watch: Callable[[IterationRow], None] | None = None,
        keeper: Keeper | None = None,
    ) -> Result:
        """The general solver's result."""
        _, equalities, inequalities = exact.sizes
        extra: dict[str, Any] = {}
        if self.hessian == "gauss_newton":
            extra["residuals"] = residuals_of(exact)
        limit = self.time_limit or time_limit or DEFAULT_SECONDS
        return minimize(
            functions.objective,
            z,
            functions.eq if equalities else None,
            functions.ineq if inequalities else None,
            exact.variables.bounds(),
            multipliers=start_multipliers(exact, start),
            derivatives=functions,
            hessian=self.hessian,
            solver=self.solver,
            tolerance=self.tolerance,
            acceptable_tolerance=max(1e-6, self.tolerance),
            max_iterations=self.max_iterations,
            time_limit=limit,
            memory_limit=self.memory_limit,
            verbose=self.verbose,
            watch=watch,
            keeper=keeper,
            **extra,
        )


def residuals_of(exact: ExactProgram) -> Any:
    """Return a function z -> residuals with |residuals|^2 / 2 = objective, for Gauss-Newton.

    Raises:
        ProgramError: the loss is not the mean squared error, or there are l1 terms.
    """
    loss, program = exact.instance.loss, exact.program
    squared = loss is F.mse_loss or (isinstance(loss, nn.MSELoss) and loss.reduction in {"mean", "sum"})
    if not squared or exact.form.soft or any(t.kind == "l1" for t in program.objective.regularisers):
        raise ProgramError(
            f"hessian 'gauss_newton' needs a sum of squares: torch.nn.functional.mse_loss or torch.nn.MSELoss without "
            f"l1 terms, but the loss is '{program.objective.loss}': use hessian 'exact' or 'bfgs'"
        )
    summed = isinstance(loss, nn.MSELoss) and loss.reduction == "sum"
    mean = program.objective.reduction == "mean"

    def residuals(z: Tensor) -> Tensor:
        at = exact.point(z)
        assert isinstance(at.output, Tensor)
        error = (at.output - exact.target).reshape(-1)
        parts = [error * math.sqrt(2.0 / (1 if summed else error.numel()))]
        parts += [at.defect(p.state).reshape(-1) * math.sqrt(p.weight) for p in exact.form.penalties]
        for term in program.objective.regularisers:
            role = "weight" if term.on == "weights" else "state"
            for key, value in at.variables.items():
                if key[0] == role:
                    share = 1.0 / value.shape[0] if role == "state" and mean else 1.0
                    parts.append(value.reshape(-1) * math.sqrt(term.weight * share))
        return torch.cat(parts)

    return residuals
