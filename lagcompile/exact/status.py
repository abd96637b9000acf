"""Why a run of `lagcompile.exact.minimize` ended.

In: nothing. Out: `Status`, whose members carry a name and a sentence of advice. Invariant: a member never says more
than the run has shown; wrong input raises before a status exists, everything else that can happen has a member here.
"""

from __future__ import annotations

from enum import Enum


class Status(Enum):
    """Outcome of a run; `advice` says what to do about it."""

    OPTIMAL = (
        "optimal",
        "The unscaled KKT residual is below the tolerance; `facts` says what the second-order conditions add to that.",
    )
    ACCEPTABLE = (
        "acceptable",
        "The run stopped making progress with a KKT residual below `acceptable_tolerance` but above `tolerance`: "
        "rescale the functions to values near 1, or accept the point.",
    )
    INFEASIBLE = (
        "infeasible",
        "The sum of constraint violations is locally as small as it gets and still positive: look at `conflict` for "
        "the constraints that exclude each other, or start elsewhere (local evidence does not prove emptiness).",
    )
    UNBOUNDED = (
        "unbounded",
        "The objective fell below `unbounded_below` at feasible points: add the missing bound or regulariser.",
    )
    ITERATION_LIMIT = (
        "iteration_limit",
        "`max_iterations` were used up: read the iteration table; if the residual was still falling, start again from "
        "`x` with `multipliers=` or raise the limit.",
    )
    TIME_LIMIT = (
        "time_limit",
        "`time_limit` was used up: start again from `x` with `multipliers=`, raise the limit, or give `derivatives=`.",
    )
    INTERRUPTED = ("interrupted", "A stop was asked for: go on from what was kept, or from `x` with `multipliers=`.")
    NON_FINITE = (
        "non_finite",
        "A function or a derivative is NaN or infinite at the point named in `message`: move the start or bound the "
        "variables away from the edge of the functions' domain.",
    )
    INCONSISTENT_BOUNDS = (
        "inconsistent_bounds",
        "Some lower bounds exceed their upper bounds (indices in `message`): correct them.",
    )
    RANK_DEFICIENT = (
        "rank_deficient",
        "The active constraint gradients are dependent at the final point and no multipliers of moderate size satisfy "
        "the KKT conditions there: remove redundant constraints, write g(x) = 0 in place of g(x)^2 = 0.",
    )
    STALLED = (
        "stalled",
        "No acceptable step was found although the KKT residual is above the tolerance: check that the functions are "
        "twice differentiable near `x` and that their values carry enough digits.",
    )
    TOO_LARGE = (
        "too_large",
        "The run would need more memory than `memory_limit` (numbers in `message`): pass `derivatives=` with sparse "
        "matrices, use fewer variables, or raise the limit.",
    )

    def __init__(self, label: str, advice: str) -> None:
        self.label = label
        self.advice = advice

    @property
    def solved(self) -> bool:
        """Whether a KKT point was reached (to `tolerance` or to `acceptable_tolerance`)."""
        return self in (Status.OPTIMAL, Status.ACCEPTABLE)
