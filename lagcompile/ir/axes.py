"""The axes on which the systems differ: where a state starts, the weight of a defect, its multiplier.

In: nothing. Out: small tagged records (a union of pydantic classes is the registry). Invariant: a record says *what* is
meant; how it is computed is the runtime's business (`runtime/kkt.py`, `backends/tables.py`).
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from lagcompile.ir.base import Frozen


# ---------------------------------------------------------------- starts
class Forward(Frozen):
    """A forward pass of the network."""

    tex: ClassVar[str] = "a forward pass"
    kind: Literal["forward"] = "forward"


class Zeros(Frozen):
    """All zeros."""

    tex: ClassVar[str] = "zero"
    kind: Literal["zeros"] = "zeros"


class UnitSphere(Frozen):
    """A random point of the unit sphere for each row."""

    tex: ClassVar[str] = "the unit sphere"
    kind: Literal["unit_sphere"] = "unit_sphere"


class Observed(Frozen):
    """Values given by the user when the data are bound."""

    tex: ClassVar[str] = "observations"
    kind: Literal["observed"] = "observed"


Start = Annotated[Forward | Zeros | UnitSphere | Observed, Field(discriminator="kind")]


# ---------------------------------------------------------------- rho: weight of the quadratic term
class ConstantWeight(Frozen):
    """The same weight at every step."""

    kind: Literal["constant"] = "constant"
    value: float = Field(ge=0)

    def at(self, step: int) -> float:
        """Weight at a step (counted from 0)."""
        return self.value


class GeometricWeight(Frozen):
    """start * factor^(step // every), never above maximum (the method of auxiliary coordinates)."""

    kind: Literal["geometric"] = "geometric"
    start: float = Field(gt=0)
    factor: float = Field(gt=0)
    every: int = Field(ge=1)
    maximum: float = 1e12

    def at(self, step: int) -> float:
        """Weight at a step (counted from 0)."""
        return min(self.start * self.factor ** (step // self.every), self.maximum)


class LinearWeight(Frozen):
    """start + increment * (step // every), never above maximum (online AltMin)."""

    kind: Literal["linear"] = "linear"
    start: float = Field(ge=0)
    increment: float = Field(ge=0)
    every: int = Field(default=1, ge=1)
    maximum: float = 1e12

    def at(self, step: int) -> float:
        """Weight at a step (counted from 0)."""
        return min(self.start + self.increment * (step // self.every), self.maximum)


class AugmentedWeight(Frozen):
    """rho of the augmented Lagrangian of |r| <= epsilon, its slack eliminated (Rockafellar 1973).

    With the other kinds (rho/2) |r|^2 is part of the objective and acts inside a tube too. Here the tube is a true
    inequality: nothing acts inside it, the coupling is smooth across its edge, and the multiplier is the one that an
    exact solver finds. For G the identity it is the same as a constant weight.
    """

    kind: Literal["augmented"] = "augmented"
    value: float = Field(gt=0)

    def at(self, step: int) -> float:
        """Weight at a step (counted from 0)."""
        return self.value


Weight = Annotated[ConstantWeight | GeometricWeight | LinearWeight | AugmentedWeight, Field(discriminator="kind")]


# ---------------------------------------------------------------- multipliers
class MultiplierOptions(Frozen):
    """How the multiplier of a constraint is laid out and started."""

    layout: Literal["full", "example", "class", "scalar"] = "full"
    """full: one per example and feature; example: one per example; class: one per class and feature; scalar: one."""
    start: Literal["zero", "adjoint"] = "zero"
    """zero, or backprop's adjoint at the start."""
