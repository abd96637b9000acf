"""What `lagcompile.exact.minimize` returns: plain records.

In: nothing. Out: `KKT`, `IterationRow`, `IterationTable`, `Facts`, `Conflict`, `Timings`, `Multipliers`, `Result`.
Invariant: records are frozen; all residuals are unscaled, in the units of the caller's functions.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from lagcompile.exact.status import Status
from lagcompile.ir.base import Measured

Mode = Literal["start", "step", "corrected", "elastic", "restoration", "escape"]


class KKT(Measured):
    """Unscaled first-order residuals, each a maximum over its components."""

    stationarity: float
    """max |grad f + J_eq' lam_eq + J_ineq' lam_ineq + lam_bounds|."""
    primal: float
    """Largest violation of an equality, an inequality or a bound."""
    dual: float
    """Largest wrong sign: negative inequality multipliers, bound multipliers on a side without a bound."""
    complementarity: float
    """max |multiplier * slack| over inequalities and bounds."""

    @property
    def worst(self) -> float:
        """The largest of the four."""
        return max(self.stationarity, self.primal, self.dual, self.complementarity)


class IterationRow(Measured):
    """One line of the iteration table, written before the step `step` is taken from this point."""

    index: int
    """Iteration number."""
    objective: float
    """Objective at the point."""
    primal: float
    """Largest constraint violation."""
    dual: float
    """Largest of the three other KKT residuals."""
    step: float
    """Step length that led here (0 for the start)."""
    step_norm: float
    """Largest component of the step that led here."""
    regularisation: float
    """Multiple of the identity that was added to the Hessian for that step."""
    convexification: float
    """Weight of the active constraints' squares that were added to the subproblem for that step."""
    mode: Mode
    """Kind of the step that led here."""
    trials: int
    """Points tried by the line search."""
    active: int
    """Constraints and bounds in the working set."""


@dataclass(frozen=True)
class IterationTable:
    """All rows of a run; `len` and iteration go over the rows."""

    rows: tuple[IterationRow, ...]

    @property
    def count(self) -> int:
        """Number of steps taken (the start is a row but no step)."""
        return max(len(self.rows) - 1, 0)

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[IterationRow]:
        return iter(self.rows)

    def __getitem__(self, index: int) -> IterationRow:
        return self.rows[index]


class Timings(Measured):
    """Where the seconds went."""

    model: float
    """Functions, Jacobians and Hessians."""
    subproblem: float
    """Quadratic subproblems: solving them."""
    compilation: float
    """Once for each pattern: building the cvxpy problems, detecting sparsity, recording derivatives (`trace`)."""
    total: float
    """Everything, wall clock."""


class Facts(Measured):
    """What was found out about the final point beyond the KKT residual; None: not computed (too large or not asked)."""

    active: int | None = None
    """Equalities, active inequalities and active bounds."""
    rank: int | None = None
    """Rank of their gradients."""
    licq: bool | None = None
    """Linear independence constraint qualification, rank == active; None also when too close to call."""
    strict_complementarity: bool | None = None
    """Every active inequality and bound has a positive multiplier."""
    weakly_active: int | None = None
    """Active inequalities and bounds with a multiplier of zero."""
    reduced_inertia: tuple[int, int, int] | None = None
    """Positive, zero and negative eigenvalues of the Lagrangian Hessian on the null space of all active gradients."""
    smallest_curvature: float | None = None
    """Smallest such eigenvalue when weakly active constraints do not restrict the space; None: empty space."""
    strict_local_minimum: bool | None = None
    """True only if the second-order sufficient condition was verified; False if a descent direction of second order
    was found; None if undecided."""
    multipliers_unique: bool | None = None
    """True by LICQ; False if another set of multipliers exists; None if undecided."""
    implications: tuple[str, ...] = ()
    """The same in sentences."""


class Conflict(Measured):
    """Constraints that could not be satisfied together, by index; found locally, around the final point."""

    eq: tuple[int, ...]
    """Equalities."""
    ineq: tuple[int, ...]
    """Inequalities."""
    lower: tuple[int, ...]
    """Variables whose lower bound takes part."""
    upper: tuple[int, ...]
    """Variables whose upper bound takes part."""
    irreducible: bool
    """Whether dropping any single member was seen to make the rest satisfiable (False: the search was cut short)."""
    violation: float
    """Sum of violations at the final point."""


@dataclass(frozen=True)
class Multipliers:
    """A warm start: multipliers of equalities, inequalities and bounds (None: estimate).

    Shapes: (equalities,), (inequalities,), (variables,); signs as in `Result`.
    """

    eq: Tensor | None = None
    ineq: Tensor | None = None
    bounds: Tensor | None = None


@dataclass(frozen=True)
class Result:
    """Final point of a run with everything that is known about it.

    Sign convention: L = objective + <multipliers_eq, eq> + <multipliers_ineq, ineq> + <multipliers_bounds, x>, with
    `multipliers_ineq >= 0` and `multipliers_bounds` positive at an upper bound, negative at a lower one.
    """

    x: Tensor
    objective: float
    multipliers_eq: Tensor
    multipliers_ineq: Tensor
    multipliers_bounds: Tensor
    status: Status
    message: str
    kkt: KKT
    iterations: IterationTable
    facts: Facts
    conflict: Conflict | None
    timings: Timings

    @property
    def multipliers(self) -> Multipliers:
        """All three, ready for `minimize(..., multipliers=)`."""
        return Multipliers(self.multipliers_eq, self.multipliers_ineq, self.multipliers_bounds)
