"""HiGHS through cvxpy: running it, its proven bound, products of numbers and expressions.

In: a cvxpy problem. Out: a status and a lower bound. Invariant: nothing here knows a network.
"""

from __future__ import annotations

from typing import Any

from lagcompile.backends.mip_forms import Vector
from lagcompile.exact import Status
from lagcompile.ir.keeper import Wait


def multiplied(weights: Vector, expression: Any) -> Any:
    """Elementwise product of numbers and a cvxpy expression."""
    import cvxpy as cp

    return cp.multiply(weights, expression)


def proven(problem: Any, *, whole: bool) -> float:
    """The lower bound at which HiGHS stopped; of a linear program (no binaries) its optimum."""
    info = problem.solver_stats.extra_stats
    offset = float(problem.value) - float(info.objective_function_value)
    return float(problem.value) if whole else float(info.mip_dual_bound) + offset


def run(cp: Any, problem: Any, options: dict[str, Any], wait: Wait) -> Status:
    """Solve; how it ended."""
    try:
        wait(lambda: problem.solve(solver=cp.HIGHS, **options))
    except cp.SolverError:
        return Status.STALLED
    return {
        "optimal": Status.OPTIMAL,
        "optimal_inaccurate": Status.ACCEPTABLE,
        "infeasible": Status.INFEASIBLE,
        "infeasible_or_unbounded": Status.INFEASIBLE,
        "user_limit": Status.TIME_LIMIT,
    }.get(str(problem.status), Status.STALLED)
