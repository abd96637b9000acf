"""Each constraint of a program in exact form: smooth equalities and inequalities, and the way back to its multiplier.

In: one constraint with its multiplier's layout and scale. Out: `Piece`: rows of the solver's equalities and
inequalities as functions of a `Point`, names of the rows, multipliers in both directions. Invariant: the program's
Lagrangian c <lambda, G(r)> and the solver's <mu, rows> have the same gradient at a solution; with c the weight of a row
and n the number of features (where the coupling takes their mean), lambda = mu n / c.

    G identity, abs, squared, or epsilon = 0     r = 0                          lambda = mu (|mu| for abs)
    softshrink, hardshrink, abs_tube             r - eps <= 0, -r - eps <= 0    lambda = mu+ - mu- (|.| for abs_tube)
    norm_tube of order 2                         (|r|^2 - eps^2) / (2 eps) <= 0
    norm_tube of order 1                         r - t <= 0, -r - t <= 0, sum t - eps <= 0
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lagcompile.backends.sqp_variables import Values, example_feature
from lagcompile.ir.axes import LAYOUTS, Layout
from lagcompile.ir.transforms import Transform

Rows = tuple[Tensor | None, Tensor | None]
"""Equalities and inequalities, of any shape; None where there are none."""


@dataclass(frozen=True)
class Point:
    """The program evaluated at one vector of variables.

    Attributes:
        variables: blocks by key.
        states: state name -> (rows, ...features).
        predictions: state name -> what its stage gives, of the same shape.
        named: every value by the program's name of it, in full shape.
        output: the model's output.
    """

    variables: Values
    states: Mapping[str, Tensor]
    predictions: Mapping[str, Tensor]
    named: Mapping[str, Tensor]
    output: object

    def defect(self, state: str) -> Tensor:
        """Return r = prediction - state."""
        return self.predictions[state] - self.states[state]


@dataclass(frozen=True)
class Piece(ABC):
    """One constraint in exact form.

    Attributes:
        name: the constraint.
        state: the state that it is on, or the values that it reads.
        stage: the stage that writes the state; empty for value constraints.
        shape: shape of the constrained tensor, (rows, ...features) for defects.
        scale: n / c, the factor from the solver's multipliers to the program's.
    """

    name: str
    state: str
    stage: str
    shape: tuple[int, ...]
    scale: float

    @abstractmethod
    def rows(self, at: Point) -> Rows:
        """Values that must be zero, and values that must be at most zero."""

    @abstractmethod
    def multiplier(self, eq: Tensor, ineq: Tensor) -> Tensor:
        """The program's multiplier from the solver's, flat as `rows` gives them."""

    @abstractmethod
    def split(self, multiplier: Tensor) -> tuple[Tensor, Tensor]:
        """The solver's multipliers from the program's, for a warm start; flat."""

    def force(self, eq: Tensor, ineq: Tensor) -> Tensor | None:
        """dL/dr over the scale, (rows, ...features); None where it follows from the multiplier."""
        return None

    @property
    def facts(self) -> tuple[str, ...]:
        """What a reader of the multiplier must know."""
        return ()

    def place(self, row: int, *, equality: bool) -> str:
        """One row in the user's words."""
        index = torch.unravel_index(torch.tensor(row), self.row_shape(equality=equality))
        return f"stage {self.stage}, state {self.state}, {example_feature([int(i) for i in index])}"

    def row_shape(self, *, equality: bool) -> tuple[int, ...]:
        """Shape of the rows that `place` counts."""
        return self.shape if equality else (2 * self.shape[0], *self.shape[1:])

    def _empty(self) -> Tensor:
        return torch.zeros(0, dtype=torch.float64)


@dataclass(frozen=True)
class Equal(Piece):
    """r = 0, elementwise.

    Attributes:
        transform: G; a size gets the smallest multiplier that makes the point stationary.
        layout: of the multiplier.
        labels: class of each row, where the layout is by class.
        classes: number of classes.
    """

    transform: Transform
    layout: Layout
    labels: Tensor | None = None
    classes: int = 0

    def rows(self, at: Point) -> Rows:
        """Return the defect."""
        return at.defect(self.state), None

    def multiplier(self, eq: Tensor, ineq: Tensor) -> Tensor:
        """Return mu, |mu|, or the largest |mu| that one shared multiplier must cover."""
        mu = eq.reshape(self.shape) * self.scale
        if self.layout.each:
            return mu if self.transform.signed or self.transform.flat else mu.abs()
        axes = tuple(range(1, mu.dim()))
        if self.transform.norm == 2:  # the dual norm
            covered = torch.linalg.vector_norm(mu, dim=axes, keepdim=True)
        else:
            covered = mu.abs().amax(dim=axes, keepdim=True) if axes and not self.layout.per_feature else mu.abs()
        if self.layout.rows == "all":
            return covered.amax(dim=0, keepdim=True)
        if self.layout.rows == "class":
            assert self.labels is not None
            out = covered.new_zeros((self.classes, *covered.shape[1:]))
            index = self.labels.reshape(-1, *(1 for _ in covered.shape[1:])).expand_as(covered)
            return out.scatter_reduce(0, index, covered, "amax")
        return covered

    def split(self, multiplier: Tensor) -> tuple[Tensor, Tensor]:
        """Return what is known: mu where the multiplier is signed and full, else zeros."""
        if self.transform.signed and self.layout.each:
            return multiplier.double().reshape(-1) / self.scale, self._empty()
        return torch.zeros(torch.Size(self.shape).numel(), dtype=torch.float64), self._empty()

    def force(self, eq: Tensor, ineq: Tensor) -> Tensor | None:
        """Return mu where the program's multiplier holds only its size."""
        return None if self.transform.signed and self.layout.each else eq.reshape(self.shape) * self.scale

    @property
    def facts(self) -> tuple[str, ...]:
        """Where multipliers of G(r) are not those of r."""
        if self.transform.flat:
            return (f"{self.name}: G = r^2 has no finite multiplier (G'(0) = 0); the one given is that of r = 0",)
        if not self.transform.signed or not self.layout.each:
            return (f"{self.name}: the multiplier given is the smallest one that makes the point stationary",)
        return ()


@dataclass(frozen=True)
class Aggregate(Piece):
    """Sums of r over features, the rows of a class, or all rows, are zero: identity G with a reduced multiplier.

    Attributes:
        layout: of the multiplier.
        labels: class of each row, where the layout is by class.
        classes: number of classes.
    """

    layout: Layout
    labels: Tensor | None = None
    classes: int = 0

    def rows(self, at: Point) -> Rows:
        """Return the sums."""
        r = at.defect(self.state)
        if not self.layout.per_feature:
            r = r.flatten(1).sum(1) if r.dim() > 1 else r
        if self.layout.rows == "example":
            return r, None
        if self.layout.rows == "all":
            return r.sum(0, keepdim=True), None
        assert self.labels is not None
        hot = torch.nn.functional.one_hot(self.labels, self.classes).to(r.dtype)
        return torch.tensordot(hot, r, dims=([0], [0])), None

    def multiplier(self, eq: Tensor, ineq: Tensor) -> Tensor:
        """Return the solver's multipliers, rescaled, in the program's layout."""
        return (eq * self.scale).reshape(self.layout.shape(self.shape[0], self.classes, self.shape[1:]))

    def split(self, multiplier: Tensor) -> tuple[Tensor, Tensor]:
        """Return mu from lambda."""
        return multiplier.double().reshape(-1) / self.scale, self._empty()

    def row_shape(self, *, equality: bool) -> tuple[int, ...]:
        """One row for each sum."""
        shape = self.layout.shape(self.shape[0], self.classes, self.shape[1:])
        return shape if self.layout.per_feature else shape[:1]

    @property
    def facts(self) -> tuple[str, ...]:
        """A reduced multiplier enforces less than r = 0."""
        return (f"{self.name}: with a multiplier laid out '{self.layout.name}' only sums of defects are held at zero",)


@dataclass(frozen=True)
class OneSided(Piece):
    """r <= epsilon, elementwise."""

    epsilon: float = 0.0

    def rows(self, at: Point) -> Rows:
        """Return r - epsilon."""
        return None, at.defect(self.state) - self.epsilon

    def multiplier(self, eq: Tensor, ineq: Tensor) -> Tensor:
        """Return the solver's multipliers, rescaled to the program's."""
        return ineq.reshape(self.shape) * self.scale

    def split(self, multiplier: Tensor) -> tuple[Tensor, Tensor]:
        """Return mu from lambda."""
        return self._empty(), multiplier.double().reshape(-1).clamp_min(0.0) / self.scale

    def row_shape(self, *, equality: bool) -> tuple[int, ...]:
        """One row for each defect."""
        return self.shape


@dataclass(frozen=True)
class Tube(Piece):
    """|r| <= epsilon, elementwise, as two inequalities.

    Attributes:
        epsilon: half-width.
        transform: G; its multiplier has either sign, or is that of a size.
        layout: as for `Equal`; a reduced one only for sizes.
        labels: class of each row, where the layout is by class.
        classes: number of classes.
    """

    epsilon: float
    transform: Transform
    layout: Layout = LAYOUTS["full"]
    labels: Tensor | None = None
    classes: int = 0

    def rows(self, at: Point) -> Rows:
        """Return r - epsilon, then -r - epsilon."""
        r = at.defect(self.state)
        return None, torch.cat([r - self.epsilon, -r - self.epsilon])

    def multiplier(self, eq: Tensor, ineq: Tensor) -> Tensor:
        """Return mu+ - mu-, or what the multiplier of a size must cover."""
        signed = self._force(ineq)
        if self.transform.signed:
            return signed
        rest = (self.transform, self.layout, self.labels, self.classes)
        return Equal(self.name, self.state, self.stage, self.shape, 1.0, *rest).multiplier(signed.reshape(-1), ineq)

    def _force(self, ineq: Tensor) -> Tensor:
        above, below = ineq.reshape(2, *self.shape) * self.scale
        return above - below

    def force(self, eq: Tensor, ineq: Tensor) -> Tensor | None:
        """Return mu+ - mu- where the multiplier has no sign."""
        return None if self.transform.signed else self._force(ineq)

    def split(self, multiplier: Tensor) -> tuple[Tensor, Tensor]:
        """Split mu into its positive and negative parts."""
        if not self.transform.signed:
            return self._empty(), torch.zeros(2 * torch.Size(self.shape).numel(), dtype=torch.float64)
        mu = multiplier.double().reshape(-1) / self.scale
        return self._empty(), torch.cat([mu.clamp_min(0.0), (-mu).clamp_min(0.0)])

    def place(self, row: int, *, equality: bool) -> str:
        """One side of one defect."""
        count = torch.Size(self.shape).numel()
        index = [int(i) for i in torch.unravel_index(torch.tensor(row % count), self.shape)]
        side = "r <= epsilon" if row < count else "r >= -epsilon"
        return f"stage {self.stage}, state {self.state}, {example_feature(index)} ({side})"


@dataclass(frozen=True)
class Ball(Piece):
    """||r||_2 <= epsilon for each row, as (|r|^2 - epsilon^2) / (2 epsilon) <= 0: smooth, with the same multiplier."""

    epsilon: float
    layout: Layout

    def rows(self, at: Point) -> Rows:
        """Return (|r|^2 - epsilon^2) / (2 epsilon) of each row."""
        r = at.defect(self.state).flatten(1)
        return None, ((r * r).sum(1) - self.epsilon**2) / (2.0 * self.epsilon)

    def multiplier(self, eq: Tensor, ineq: Tensor) -> Tensor:
        """Return one number per row, or the largest."""
        mu = (ineq * self.scale).reshape(-1, *(1 for _ in self.shape[1:]))
        return mu.amax(dim=0, keepdim=True) if self.layout.rows == "all" else mu

    def split(self, multiplier: Tensor) -> tuple[Tensor, Tensor]:
        """Return mu from lambda."""
        flat = multiplier.double().reshape(-1).clamp_min(0.0) / self.scale
        return self._empty(), flat.expand(self.shape[0]) if self.layout.rows == "all" else flat

    def row_shape(self, *, equality: bool) -> tuple[int, ...]:
        """One row for each example."""
        return self.shape[:1]


@dataclass(frozen=True)
class Diamond(Piece):
    """||r||_1 <= epsilon for each row, with slacks t >= |r|."""

    epsilon: float
    layout: Layout

    def rows(self, at: Point) -> Rows:
        """Return r - t, -r - t and sum(t) - epsilon, flat."""
        r, t = at.defect(self.state), at.variables["slack", self.name]
        total = t.flatten(1).sum(1) - self.epsilon
        return None, torch.cat([(r - t).reshape(-1), (-r - t).reshape(-1), total])

    def multiplier(self, eq: Tensor, ineq: Tensor) -> Tensor:
        """Return the multiplier of the sum, one for each row, or the largest."""
        mu = (ineq[-self.shape[0] :] * self.scale).reshape(-1, *(1 for _ in self.shape[1:]))
        return mu.amax(dim=0, keepdim=True) if self.layout.rows == "all" else mu

    def force(self, eq: Tensor, ineq: Tensor) -> Tensor | None:
        """Return mu+ - mu-, which at kinks of the norm does not follow from the multiplier."""
        count = torch.Size(self.shape).numel()
        return ((ineq[:count] - ineq[count : 2 * count]) * self.scale).reshape(self.shape)

    def split(self, multiplier: Tensor) -> tuple[Tensor, Tensor]:
        """Return the multipliers of the sums; the solver has to find those of t >= |r|."""
        count = torch.Size(self.shape).numel()
        flat = multiplier.double().reshape(-1).clamp_min(0.0) / self.scale
        return self._empty(), torch.cat([torch.zeros(2 * count, dtype=torch.float64), flat.expand(self.shape[0])])

    def place(self, row: int, *, equality: bool) -> str:
        """A side of |r| <= t, or the sum of a row."""
        count = torch.Size(self.shape).numel()
        if row >= 2 * count:
            return f"stage {self.stage}, state {self.state}, example {row - 2 * count} (norm)"
        index = [int(i) for i in torch.unravel_index(torch.tensor(row % count), self.shape)]
        return f"stage {self.stage}, state {self.state}, {example_feature(index)}"
