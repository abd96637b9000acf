"""Records of quadratic subproblems.

In and out: plain numpy data. Invariant: the sign convention of multipliers is that of
`lagcompile.exact.result.Result`.

    minimise 1/2 d'H d + g'd   subject to   E d + e = 0,  I d + i <= 0,  lower <= d <= upper

and the elastic form, where a violation of E and I costs its weight instead of being forbidden.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Literal

from lagcompile.exact.linear import Matrix, Vector


class Outcome(Enum):
    """What the subproblem's solver said."""

    OPTIMAL = "optimal"
    INFEASIBLE = "infeasible"
    UNBOUNDED = "unbounded"
    FAILED = "failed"


@dataclass(frozen=True)
class QuadraticData:
    """Data of one subproblem in the step d.

    Shapes: H (n, n) positive semidefinite, g (n,), E (m, n), e (m,), I (k, n), i (k,), lower and upper (n,) with
    infinities; weights (m + k,) of violations, only in the elastic form.
    """

    H: Matrix
    g: Vector
    E: Matrix
    e: Vector
    I: Matrix  # noqa: E741 - the inequality rows
    i: Vector
    lower: Vector
    upper: Vector
    weights: Vector | None = None


@dataclass(frozen=True)
class QuadraticSolution:
    """Step d (n,) and multipliers; `bounds` positive at an upper bound, negative at a lower one."""

    outcome: Outcome
    d: Vector
    eq: Vector
    ineq: Vector
    bounds: Vector
    source: Literal["solver", "active set"] = "solver"
