"""The subproblem written in cvxpy.

In: sparsity patterns and the kinds of bounds. Out: a `cvxpy.Problem` for given numbers. Invariant: the order of numbers
in a source vector is H, g, E, e, I, i, fixed values, lower bounds, upper bounds, weights; constraints have that
order too.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import scipy.sparse as sp

from lagcompile.exact.linear import Mask, Vector
from lagcompile.exact.sparsity import Pattern

LARGEST_TABLE = 2e9  # bytes; cvxpy holds a dense table of variables x parameter entries while it canonicalises


@dataclass(frozen=True)
class Kinds:
    """Which variables are fixed, bounded below, bounded above, each (n,); fixed ones are in neither of the others."""

    fixed: Mask
    lower: Mask
    upper: Mask

    @classmethod
    def of(cls, lower: Vector, upper: Vector) -> Kinds:
        """From the bounds."""
        fixed = lower == upper
        return cls(fixed, np.isfinite(lower) & ~fixed, np.isfinite(upper) & ~fixed)

    def same_as(self, other: Kinds) -> bool:
        """Whether all three masks agree."""
        return all(
            np.array_equal(ours, theirs)
            for ours, theirs in (
                (self.fixed, other.fixed),
                (self.lower, other.lower),
                (self.upper, other.upper),
            )
        )


@dataclass
class Written:
    """A problem, its step variable, its own constraints (slacks of the elastic form left out) and its parameters."""

    problem: Any = None
    step: Any = None
    rows: list[Any] = field(default_factory=list)
    parameters: list[tuple[Any, Pattern | None]] = field(default_factory=list)


class QuadraticModel:
    """Writes subproblems of one sparsity.

    Args:
        patterns: of H, E and I.
        kinds: of bounds.
        elastic: whether violations have a price instead of being forbidden.

    The numbers are cvxpy Parameters (DPP): one problem serves for all values. Above `LARGEST_TABLE` they are constants,
    and `write` builds a new problem for each source, because canonicalising that many parameters would not fit.
    """

    def __init__(self, patterns: tuple[Pattern, Pattern, Pattern], kinds: Kinds, *, elastic: bool) -> None:
        self.patterns = patterns
        self.kinds = kinds
        self.elastic = elastic
        H, E, I = patterns  # noqa: E741
        n, m, k = H.shape[0], E.shape[0], I.shape[0]
        self.sizes = (n, m, k)
        bounds = [int(mask.sum()) for mask in (kinds.fixed, kinds.lower, kinds.upper)]
        self.lengths = [H.count, n, E.count, m, I.count, k, *bounds, m + k if elastic else 0]
        self.parametric = 8.0 * (n + 2) * sum(self.lengths) <= LARGEST_TABLE
        self._written: Written | None = None

    def write(self, source: Vector) -> Written:
        """The problem with these numbers."""
        if not self.parametric:
            return self._build(source)
        if self._written is None:
            self._written = self._build(None)
        self._assign(self._written, source)
        return self._written

    def _assign(self, written: Written, source: Vector) -> None:
        parts = np.split(source, np.cumsum(self.lengths)[:-1])
        for (parameter, pattern), part in zip(written.parameters, parts, strict=True):
            if parameter is None:
                continue
            if pattern is None:
                parameter.value = part
            else:
                parameter.value_sparse = sp.coo_array((part, (pattern.rows, pattern.cols)), shape=pattern.shape)

    def _build(self, source: Vector | None) -> Written:
        import cvxpy as cp

        written = Written()
        n, m, k = self.sizes
        parts = None if source is None else np.split(source, np.cumsum(self.lengths)[:-1])

        def number(pattern: Pattern | None = None) -> Any:
            """The next entry of the source as a parameter or a constant; None when it is empty."""
            place = len(written.parameters)
            made: Any = None
            if self.lengths[place] and parts is not None:
                made = cp.Constant(parts[place] if pattern is None else pattern.matrix(parts[place]))
            elif self.lengths[place] and pattern is None:
                made = cp.Parameter(self.lengths[place], nonneg=place == len(self.lengths) - 1)
            elif self.lengths[place] and pattern is not None:
                made = cp.Parameter(pattern.shape, sparsity=(pattern.rows, pattern.cols))
            written.parameters.append((made, pattern))
            return made

        d = written.step = cp.Variable(n)
        objective = 0.5 * cp.quad_form(d, number(self.patterns[0]), assume_PSD=True) + number() @ d
        E, e = number(self.patterns[1]), number()
        I, i = number(self.patterns[2]), number()  # noqa: E741
        fixed, lower, upper, weights = number(), number(), number(), number()
        slacks: list[Any] = []
        if m and not self.elastic:
            written.rows.append(E @ d + e == 0)
        elif m:
            over, under = cp.Variable(m), cp.Variable(m)
            written.rows.append(E @ d + e == over - under)
            objective = objective + weights[:m] @ (over + under)
            slacks += [over >= 0, under >= 0]
        if k and not self.elastic:
            written.rows.append(I @ d + i <= 0)
        elif k:
            excess = cp.Variable(k)
            written.rows.append(I @ d + i <= excess)
            objective = objective + weights[m:] @ excess
            slacks.append(excess >= 0)
        if fixed is not None:
            written.rows.append(d[np.flatnonzero(self.kinds.fixed)] == fixed)
        if lower is not None:
            written.rows.append(d[np.flatnonzero(self.kinds.lower)] >= lower)
        if upper is not None:
            written.rows.append(d[np.flatnonzero(self.kinds.upper)] <= upper)
        written.problem = cp.Problem(cp.Minimize(objective), written.rows + slacks)
        return written
