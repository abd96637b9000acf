"""The axes on which the systems differ: where a state lives and starts, the weight of a defect, its multiplier.

In: nothing. Out: small tagged records (a union of pydantic classes is the registry). Invariant: a record says *what* is
meant; how it is computed is the runtime's business (`runtime/kkt.py`, `runtime/tables.py`).
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from lagcompile.ir.base import Frozen

DType = Literal["float32", "float64", "bfloat16", "float16"]


# ---------------------------------------------------------------- storage: where a state lives
class Eliminated(Frozen):
    """No variable: the stage's output is used as it is (single shooting across this breakpoint)."""

    kind: Literal["eliminated"] = "eliminated"


class Transient(Frozen):
    """A variable that exists for one batch and is started anew in the next."""

    kind: Literal["transient"] = "transient"


class Table(Frozen):
    """A row for each example of the data set; a step touches the batch's rows only."""

    kind: Literal["table"] = "table"
    dtype: DType | None = None
    """Storage type of the rows; None keeps the state's own."""


class ClassGaussian(Frozen):
    """A Gaussian for each class: mean mu(y), standard deviation softplus(.), read through samples (DistProp)."""

    kind: Literal["class_gaussian"] = "class_gaussian"
    samples: int = Field(default=32, ge=1)
    """Synthetic examples drawn for each class (N)."""
    noise: Literal["fixed", "fresh"] = "fixed"
    """One draw for the whole run (a well-defined program) or a new one each step; shared by both half steps."""
    sigma: float = Field(default=1.0, gt=0)
    """Standard deviation at the start."""


class Shared(Frozen):
    """One value for all examples (a tensor without a batch axis)."""

    kind: Literal["shared"] = "shared"


Storage = Annotated[Eliminated | Transient | Table | ClassGaussian | Shared, Field(discriminator="kind")]


# ---------------------------------------------------------------- starts
class Forward(Frozen):
    """A forward pass of the network."""

    kind: Literal["forward"] = "forward"


class Zeros(Frozen):
    """All zeros."""

    kind: Literal["zeros"] = "zeros"


class UnitSphere(Frozen):
    """A random point of the unit sphere for each row."""

    kind: Literal["unit_sphere"] = "unit_sphere"


class Observed(Frozen):
    """Values given by the user when the data are bound."""

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
