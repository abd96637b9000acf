"""Constraints on values other than defects, and slacks of l1 terms, in exact form.

In: as for `sqp_constraints`. Out: further `Piece`s. Invariant: their multipliers are the solver's own (nothing is
averaged over examples here).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from lagcompile.backends.sqp_constraints import Piece, Point, Rows
from lagcompile.ir import trust
from lagcompile.ir.base import ProgramError
from lagcompile.ir.program import ValueConstraint


@dataclass(frozen=True)
class Bounded(Piece):
    """Bounds on a value that is not itself a variable."""

    lower: float | None = None
    upper: float | None = None

    def rows(self, at: Point) -> Rows:
        """Return lower - v and v - upper; v - lower where they coincide."""
        v = at.named[self.state].reshape(-1)
        if self.lower is not None and self.lower == self.upper:
            return v - self.lower, None
        sides = [] if self.lower is None else [self.lower - v]
        return None, torch.cat([*sides, *([] if self.upper is None else [v - self.upper])])

    def multiplier(self, eq: Tensor, ineq: Tensor) -> Tensor:
        """Return multipliers that are positive at the upper bound, negative at the lower one."""
        if eq.numel():
            return eq.reshape(self.shape)
        parts = ineq.reshape(-1, *self.shape)
        low = -parts[0] if self.lower is not None else torch.zeros(self.shape, dtype=torch.float64)
        return low if self.upper is None else low + parts[-1]

    def split(self, multiplier: Tensor) -> tuple[Tensor, Tensor]:
        """Give the negative part to the lower bound, the positive one to the upper."""
        mu = multiplier.double().reshape(-1)
        if self.lower is not None and self.lower == self.upper:
            return mu, self._empty()
        sides = [] if self.lower is None else [(-mu).clamp_min(0.0)]
        return self._empty(), torch.cat([*sides, *([] if self.upper is None else [mu.clamp_min(0.0)])])

    def place(self, row: int, *, equality: bool) -> str:
        """One bound of one number."""
        count = torch.Size(self.shape).numel()
        index = torch.unravel_index(torch.tensor(row % count), self.shape or (1,))
        below = not equality and self.lower is not None and row < count
        side = f">= {self.lower:g}" if below else f"<= {self.upper:g}" if not equality else f"= {self.lower:g}"
        return f"constraint {self.name}, {self.state}[{', '.join(str(int(i)) for i in index)}] {side}"


@dataclass(frozen=True)
class Custom(Piece):
    """A user's function of named values, == 0 or <= 0."""

    function: Callable[..., Tensor]
    reads: tuple[str, ...]
    equality: bool

    def rows(self, at: Point) -> Rows:
        """Return the function's value."""
        value = self.function(*(at.named[n] for n in self.reads))
        return (value, None) if self.equality else (None, value)

    def multiplier(self, eq: Tensor, ineq: Tensor) -> Tensor:
        """Return the solver's multipliers in the function's shape."""
        return (eq if self.equality else ineq).reshape(self.shape)

    def split(self, multiplier: Tensor) -> tuple[Tensor, Tensor]:
        """Return mu from lambda."""
        mu = multiplier.double().reshape(-1)
        return (mu, self._empty()) if self.equality else (self._empty(), mu.clamp_min(0.0))

    def place(self, row: int, *, equality: bool) -> str:
        """One number of the function's value."""
        index = torch.unravel_index(torch.tensor(row), self.shape or (1,))
        return f"constraint {self.name}({', '.join(self.reads)})[{', '.join(str(int(i)) for i in index)}]"


@dataclass(frozen=True)
class Absolute(Piece):
    """|v| <= t for an l1 regulariser of weights or states; no multiplier of the program belongs to it."""

    role: str = "weight"

    def rows(self, at: Point) -> Rows:
        """Return v - t, then -v - t."""
        v = at.variables["state" if self.role == "state" else "weight", self.state]
        t = at.variables["slack", self.name]
        return None, torch.stack([v - t, -v - t])

    def multiplier(self, eq: Tensor, ineq: Tensor) -> Tensor:
        """Return mu+ - mu-."""
        above, below = ineq.reshape(2, *self.shape)
        return above - below

    def split(self, multiplier: Tensor) -> tuple[Tensor, Tensor]:
        """Split mu into its positive and negative parts."""
        mu = multiplier.double().reshape(-1)
        return self._empty(), torch.cat([mu.clamp_min(0.0), (-mu).clamp_min(0.0)])

    def place(self, row: int, *, equality: bool) -> str:
        """The number."""
        return f"|{self.state}| <= its slack, entry {row % torch.Size(self.shape).numel()}"


def named_function(c: ValueConstraint) -> Callable[..., Tensor]:
    """The function of a value constraint.

    Raises:
        ProgramError: its name is not module:attribute of something callable that is trusted.
    """
    assert c.function is not None
    try:
        return trust.resolve(c.function)
    except trust.Refused as error:
        raise ProgramError(f"the constraint '{c.name}': {error}") from error


def violation(c: ValueConstraint, function: Callable[..., Tensor] | None, at: Point) -> Tensor:
    """|violation|^2 of a value constraint that is a penalty."""
    if function is not None:
        value = function(*(at.named[n] for n in c.reads))
        return ((value if c.relation == "==" else value.clamp_min(0.0)) ** 2).sum()
    total = torch.zeros((), dtype=torch.float64)
    for name in c.reads:
        v = at.named[name]
        if c.lower is not None:
            total = total + ((c.lower - v).clamp_min(0.0) ** 2).sum()
        if c.upper is not None:
            total = total + ((v - c.upper).clamp_min(0.0) ** 2).sum()
    return total
