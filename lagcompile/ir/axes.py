"""The axes on which the systems differ: where a state starts, the weight of a defect, its multiplier.

In: nothing. Out: small tagged records (a union of pydantic classes is the registry). Invariant: a record says *what* is
computed; how is the runtime's business (`runtime/kkt.py`, `backends/tables.py`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Annotated, ClassVar, Literal, NamedTuple

from pydantic import Field

from lagcompile.ir.base import Frozen
from lagcompile.ir.tex import number


# ---------------------------------------------------------------- starts
class _Start(Frozen):
    tex: ClassVar[str]
    """Where a state starts, in words."""
    kind: str


class Forward(_Start):
    """A forward pass of the network."""

    tex = "a forward pass"
    kind: Literal["forward"] = "forward"


class Zeros(_Start):
    """All zeros."""

    tex = "zero"
    kind: Literal["zeros"] = "zeros"


class UnitSphere(_Start):
    """A random point of the unit sphere for each row."""

    tex = "the unit sphere"
    kind: Literal["unit_sphere"] = "unit_sphere"


class Observed(_Start):
    """Values that the user gives when the data are bound."""

    tex = "observations"
    kind: Literal["observed"] = "observed"


Start = Annotated[Forward | Zeros | UnitSphere | Observed, Field(discriminator="kind")]


# ---------------------------------------------------------------- rho: weight of the quadratic term
class _Weight(Frozen, ABC):
    augmented: ClassVar[bool] = False
    """Whether the term acts on what exceeds the tube, and is not part of the objective."""
    scheduled: ClassVar[bool] = False
    """Whether it changes from step to step."""
    kind: str

    @abstractmethod
    def at(self, step: int) -> float:
        """Weight at a step (counted from 0)."""

    @property
    @abstractmethod
    def text(self) -> str:
        """The weight as plain text."""

    @abstractmethod
    def tex(self, symbol: str) -> str:
        """Return the equation that defines the symbol, as TeX."""


class _Fixed(_Weight):
    value: float

    def at(self, step: int) -> float:
        """Weight at a step (counted from 0)."""
        return self.value

    @property
    def text(self) -> str:
        """The weight as plain text."""
        return f"{self.value:g}"

    def tex(self, symbol: str) -> str:
        """Return the equation that defines the symbol, as TeX."""
        return f"${symbol} = {number(self.value)}$"


class ConstantWeight(_Fixed):
    """The same weight at every step."""

    kind: Literal["constant"] = "constant"
    value: float = Field(ge=0)


class AugmentedWeight(_Fixed):
    """rho of the augmented Lagrangian of |r| <= epsilon, its slack eliminated (Rockafellar 1973).

    With the other kinds (rho/2) |r|^2 is part of the objective and acts inside a tube too. Here the tube is a true
    inequality: nothing acts inside it, the coupling is smooth across its edge, and the multiplier is the one that an
    exact solver finds. For G the identity it is the same as a constant weight.
    """

    augmented = True
    kind: Literal["augmented"] = "augmented"
    value: float = Field(gt=0)

    @property
    def text(self) -> str:
        """The weight as plain text."""
        return f"{self.value:g} on the excess"


class GeometricWeight(_Weight):
    """start * factor^(step // every), never above maximum (the method of auxiliary coordinates)."""

    scheduled = True
    kind: Literal["geometric"] = "geometric"
    start: float = Field(gt=0)
    factor: float = Field(gt=0)
    every: int = Field(ge=1)
    maximum: float = 1e12

    def at(self, step: int) -> float:
        """Weight at a step (counted from 0)."""
        return min(self.start * self.factor ** (step // self.every), self.maximum)

    @property
    def text(self) -> str:
        """The weight as plain text."""
        return f"{self.start:g} x{self.factor:g} every {self.every}, at most {self.maximum:g}"

    def tex(self, symbol: str) -> str:
        """Return the equation that defines the symbol, as TeX."""
        grown = rf"{number(self.start)} \cdot {number(self.factor)}^{{{_times(self.every)}}}"
        return _schedule(symbol, grown, self.maximum)


class LinearWeight(_Weight):
    """start + increment * (step // every), never above maximum (online AltMin)."""

    scheduled = True
    kind: Literal["linear"] = "linear"
    start: float = Field(ge=0)
    increment: float = Field(ge=0)
    every: int = Field(default=1, ge=1)
    maximum: float = 1e12

    def at(self, step: int) -> float:
        """Weight at a step (counted from 0)."""
        return min(self.start + self.increment * (step // self.every), self.maximum)

    @property
    def text(self) -> str:
        """The weight as plain text."""
        return f"{self.start:g} +{self.increment:g} every {self.every}, at most {self.maximum:g}"

    def tex(self, symbol: str) -> str:
        """Return the equation that defines the symbol, as TeX."""
        return _schedule(
            symbol, rf"{number(self.start)} + {number(self.increment)}\, {_times(self.every)}", self.maximum
        )


def _times(every: int) -> str:
    return "t" if every == 1 else rf"\lfloor t / {every} \rfloor"


def _schedule(symbol: str, grown: str, maximum: float) -> str:
    top = rf"\min\bigl({grown},\, {number(maximum)}\bigr)" if maximum < 1e12 else grown
    return f"${symbol}^{{(t)}} = {top}$ at step $t$"


Weight = Annotated[ConstantWeight | GeometricWeight | LinearWeight | AugmentedWeight, Field(discriminator="kind")]


# ---------------------------------------------------------------- multipliers
LayoutName = Literal["full", "example", "class", "scalar"]


class Layout(NamedTuple):
    """What one number of a multiplier covers: one feature or all; the rows of an example, of a class, or all rows."""

    name: LayoutName
    per_feature: bool
    rows: Literal["example", "class", "all"]
    words: str
    """Words that follow "multiplier" in TeX."""

    @property
    def each(self) -> bool:
        """Whether each defect has a number of its own."""
        return self.per_feature and self.rows == "example"

    def shape(self, rows: int, classes: int, features: tuple[int, ...]) -> tuple[int, ...]:
        """Return the shape of the multiplier of that many rows of defects."""
        held = {"example": rows, "class": classes, "all": 1}[self.rows]
        return (held, *(features if self.per_feature else (1 for _ in features)))


LAYOUTS: Mapping[LayoutName, Layout] = {
    laid.name: laid
    for laid in (
        Layout("full", per_feature=True, rows="example", words=""),
        Layout("example", per_feature=False, rows="example", words=", one number per example"),
        Layout("class", per_feature=True, rows="class", words=", one per class"),
        Layout("scalar", per_feature=False, rows="all", words=", one number"),
    )
}
"""Every layout; `runtime/kkt.py` reduces defects to any of them."""


class MultiplierOptions(Frozen):
    """How the multiplier of a constraint is laid out and started."""

    layout: LayoutName = "full"
    """full: one per example and feature; example: one per example; class: one per class and feature; scalar: one."""
    start: Literal["zero", "adjoint"] = "zero"
    """zero, or backprop's adjoint at the start."""
