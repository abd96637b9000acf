"""Which exact form each constraint of a program takes.

In: a program, its variables, the classes of the rows. Out: `Form`: pieces, and what goes to the objective instead.
Invariant: everything that has no exact form is refused here, all of it at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lagcompile.backends.sqp_constraints import Aggregate, Ball, Diamond, Equal, OneSided, Piece, Point, Tube
from lagcompile.backends.sqp_values import Absolute, Bounded, Custom, named_function
from lagcompile.backends.sqp_variables import Variables
from lagcompile.ir.axes import Layout
from lagcompile.ir.base import ProgramError
from lagcompile.ir.program import DefectConstraint, Program, ValueConstraint

Common = tuple[str, str, str, tuple[int, ...], float]
Rest = tuple[Layout, Tensor | None, int]


@dataclass(frozen=True)
class Penalty:
    """(rho/2) |r|^2 in the objective: of a pure penalty, or inside a tube."""

    state: str
    weight: float


@dataclass
class Form:
    """Pieces and penalties of a program.

    Attributes:
        pieces: constraints in exact form, defects first.
        penalties: quadratic terms of defects.
        soft: value constraints that are penalties, with their function and weight.
        facts: what was decided on the way.
    """

    program: Program
    variables: Variables
    labels: Tensor | None
    step: int
    pieces: list[Piece] = field(default_factory=list)
    penalties: list[Penalty] = field(default_factory=list)
    soft: list[tuple[ValueConstraint, Callable[..., Tensor] | None, float]] = field(default_factory=list)
    facts: list[str] = field(default_factory=list)

    def build(self, example: Callable[[], Point]) -> Form:
        """Find the form of every constraint.

        Args:
            example: the program evaluated anywhere, for the shapes of values.

        Raises:
            ProgramError: constraints without an exact form.
        """
        problems: list[str] = []
        for part in self._parts(example):
            try:
                self.pieces += part()
            except ProgramError as error:
                problems += error.problems
        if problems:
            raise ProgramError(problems)
        return self

    def _parts(self, example: Callable[[], Point]) -> Iterator[Callable[[], list[Piece]]]:
        for state in self.program.states:
            if not state.storage.variable:
                continue
            constraint = self.program.defect_of(state.name)
            block = self.variables.block(("state", state.name))
            assert constraint is not None
            assert block is not None
            yield lambda c=constraint, b=block: list(self._defect(c, b.shape))  # type: ignore[misc]
        for c in self.program.constraints:
            if isinstance(c, ValueConstraint):
                yield lambda c=c: list(self._value(c, example))  # type: ignore[misc]
        slacks = {b.name for b in self.variables.blocks if b.role == "slack"}
        for block in self.variables.blocks:
            name = f"|{block.name}|"
            if name in slacks and block.role in {"weight", "state"}:
                yield lambda b=block, n=name: [Absolute(n, b.name, b.stage, b.shape, 1.0, b.role)]  # type: ignore[misc]

    def _defect(self, c: DefectConstraint, shape: tuple[int, ...]) -> Iterator[Piece]:
        program = self.program
        share = 1.0 / shape[0] if program.objective.reduction == "mean" else 1.0
        if c.features == "mean":
            share /= max(1, torch.Size(shape[1:]).numel())
        multiplier = program.multiplier_of(c.name)
        # an augmented weight is the method's: the program's objective does not hold it
        rho = 0.0 if c.weight is None or c.weight.augmented else c.weight.at(self.step)
        if rho and c.weight is not None and c.weight.scheduled:
            self.facts.append(f"{c.name}: the quadratic weight follows a schedule; solved with its value {rho:g}")
        penalty = [Penalty(c.state, rho * share)] if rho else []
        if multiplier is None:
            self.penalties += penalty
            return
        common: Common = (c.name, c.state, c.stage, shape, 1.0 / share)
        layout, epsilon = multiplier.laid, c.transform.half_width
        rest: Rest = (layout, self.labels, program.classes or 0)
        signed = c.transform.signed
        if c.relation == "<=" and signed:
            if not layout.each:
                raise ProgramError(f"the constraint '{c.name}' is an inequality: lay its multiplier out 'full'")
            self.penalties += penalty
            yield OneSided(*common, epsilon)
        elif epsilon == 0.0 and signed and not layout.each:
            self.penalties += penalty
            yield Aggregate(*common, *rest)
        elif epsilon == 0.0:
            yield Equal(*common, c.transform, *rest)
        else:
            self.penalties += penalty
            yield self._tube(c, common, rest, epsilon)

    def _tube(self, c: DefectConstraint, common: Common, rest: Rest, epsilon: float) -> Piece:
        layout, labels, classes = rest
        if c.transform.per_row:
            form = Ball if c.transform.norm == 2 else Diamond
            return form(*common, epsilon, layout)
        if not layout.each and c.transform.signed:
            raise ProgramError(
                f"the constraint '{c.name}': the sum of {c.transform.kind}(r) over what a multiplier laid out "
                f"'{layout.name}' serves is neither smooth nor a tube: lay the multiplier out 'full', or use abs_tube"
            )
        return Tube(*common, epsilon, c.transform, layout, labels, classes)

    def _value(self, c: ValueConstraint, example: Callable[[], Point]) -> Iterator[Piece]:
        function = None if c.function is None else named_function(c)
        if not self.program.requires(c):
            assert c.weight is not None
            self.soft.append((c, function, c.weight.at(self.step)))
            return
        at = example()
        if function is not None:
            try:
                value = function(*(at.named[n] for n in c.reads))
            except Exception as error:  # a user's function may raise anything
                raise ProgramError(f"the constraint '{c.name}': {c.function} fails: {error}") from error
            if not isinstance(value, Tensor):
                kind = type(value).__name__
                raise ProgramError(f"the constraint '{c.name}': {c.function} gives a {kind}, expected a tensor")
            yield Custom(c.name, ", ".join(c.reads), "", tuple(value.shape), 1.0, function, c.reads, c.relation == "==")
            return
        variables = {name for role, name in self.variables.keys if role != "slack"}
        for name in c.reads:
            if name not in variables:
                label = c.name if len(c.reads) == 1 else f"{c.name}[{name}]"
                yield Bounded(label, name, "", tuple(at.named[name].shape), 1.0, c.lower, c.upper)
