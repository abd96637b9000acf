"""Options of `lagcompile.exact.minimize`.

In: keyword arguments of the user. Out: a frozen `Options`. Invariant: every value is checked here once; the solver
itself never re-checks them.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from lagcompile.ir.base import Frozen, ProgramError, SpecError


class Options(Frozen):
    """How to solve; the defaults suit programs with values near 1."""

    hessian: Literal["exact", "gauss_newton", "bfgs"] = "exact"
    """Curvature of the subproblems: exact Lagrangian Hessian, J'J of `residuals`, or damped BFGS."""
    solver: Literal["clarabel", "osqp"] = "clarabel"
    """Solver that cvxpy hands the subproblems to."""
    tolerance: float = Field(1e-8, gt=0)
    """Largest unscaled KKT residual (any of the four) of a point called optimal."""
    acceptable_tolerance: float = Field(1e-6, gt=0)
    """Largest residual of a point called acceptable when no further progress is made."""
    max_iterations: int = Field(300, ge=0)
    """Iterations, those of the feasibility restoration included."""
    time_limit: float = Field(600.0, gt=0)
    """Wall-clock seconds; checked between function evaluations and handed to the subproblem solver."""
    memory_limit: int | None = Field(None, gt=0)
    """Bytes that the run may need; None: 80 percent of what the machine has free."""
    unbounded_below: float = -1e15
    """Objective below which a feasible point counts as evidence of an unbounded program."""
    dense_limit: int = Field(20_000, ge=0)
    """Jacobians and Hessians with at most this many entries are dense; larger ones are detected and compressed."""
    trace: bool = False
    """Record dense derivatives once: evaluations become 2.5 to 4 times faster, recording takes tenths of a second;
    the functions must not branch on values."""
    reuse_active_set: bool = True
    """Try the last active set first; the subproblem solver runs only when that guess is not optimal."""
    direct: bool = True
    """Write values into cvxpy's compiled data; False solves every subproblem through `cvxpy.Problem.solve`."""
    deletion_filter: bool = True
    """After INFEASIBLE, look for a smallest conflicting set of constraints."""
    second_order: bool = True
    """After the run, compute the rank and curvature facts about the solution."""
    escape_saddles: bool = True
    """Leave a KKT point along negative curvature when there is any (exact Hessian, up to 500 variables)."""
    verbose: bool = False
    """Show the iteration table on the screen while solving."""


def parse_options(values: dict[str, Any]) -> Options:
    """Options from keyword arguments.

    Raises:
        ProgramError: for every unknown name or unusable value, all at once.
    """
    try:
        return Options(**values)
    except SpecError as error:
        raise ProgramError([p.replace("Options: ", "minimize: option ", 1) for p in error.problems]) from None
