r"""G, the transform of a defect r: each says what it is called, how it prints, and what its multiplier is like.

In: nothing. Out: one record for each G and their union `Transform`. Invariant: text and TeX are said here and nowhere
else; values and slopes, which need tensors, are said once in `runtime/transforms.py`, one class for each record here.

To add a transform: its record, its name in the union below, and its class there.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from lagcompile.ir.base import Frozen
from lagcompile.ir.tex import number


class _Transform(Frozen, ABC):
    signed: ClassVar[bool] = True
    """The multiplier has either sign; that of a size (|r|, ||r||) is never negative."""
    augmentable: ClassVar[bool] = True
    """The constraint behind G is |r| <= half width, so that its augmented Lagrangian is defined."""
    identity: ClassVar[bool] = False
    """G(r) = r."""
    flat: ClassVar[bool] = False
    """G'(0) = 0: no finite multiplier holds a defect at zero."""
    meaning: ClassVar[str] = ""
    """TeX sentence on the operator that the formula uses; empty where it needs none."""

    @property
    def half_width(self) -> float:
        """Half width of the tube in which a defect counts as none; 0 where there is no tube."""
        return 0.0

    @property
    def norm(self) -> float:
        """Order of the norm of a row that the tube bounds; infinity where it bounds each entry by itself."""
        return math.inf

    @property
    def per_row(self) -> bool:
        """Whether G gives one number for each example instead of one for each entry."""
        return self.norm < math.inf

    @abstractmethod
    def text(self, r: str) -> str:
        """Return G(r) as plain text."""

    @abstractmethod
    def tex(self, r: str) -> str:
        """Return G(r) as TeX."""

    @abstractmethod
    def tex_excess(self, r: str, dual: str, rho: str) -> str:
        """Return, as TeX, what replaces G in the augmented Lagrangian (`runtime.transforms`, `excess`)."""


class _Tube(_Transform):
    epsilon: float = Field(ge=0)
    """Half width of the tube."""

    @property
    def half_width(self) -> float:
        """Half width of the tube."""
        return self.epsilon


_ENTRIES = r"$\lvert \cdot \rvert$ and $\max$ act by entries"


class Identity(_Transform):
    """G(r) = r."""

    identity = True
    kind: Literal["identity"] = "identity"

    def text(self, r: str) -> str:
        """Return G(r) as plain text."""
        return r

    def tex(self, r: str) -> str:
        """Return G(r) as TeX."""
        return r

    def tex_excess(self, r: str, dual: str, rho: str) -> str:
        """Return r: without a tube the augmented Lagrangian has a constant weight."""
        return r


class Abs(_Transform):
    """G(r) = |r|."""

    signed = False
    augmentable = False
    meaning = _ENTRIES
    kind: Literal["abs"] = "abs"

    def text(self, r: str) -> str:
        """Return G(r) as plain text."""
        return f"|{r}|"

    def tex(self, r: str) -> str:
        """Return G(r) as TeX."""
        return rf"\lvert {r} \rvert"

    def tex_excess(self, r: str, dual: str, rho: str) -> str:
        """Return the excess over a tube of width 0."""
        return _size_excess(self.tex(r), 0.0, dual, rho)


class Squared(_Transform):
    """G(r) = r^2 (no finite exact multiplier exists: G'(0) = 0)."""

    signed = False
    augmentable = False
    flat = True
    kind: Literal["squared"] = "squared"

    def text(self, r: str) -> str:
        """Return G(r) as plain text."""
        return f"({r})^2"

    def tex(self, r: str) -> str:
        """Return G(r) as TeX."""
        return rf"\bigl({r}\bigr)^{{\odot 2}}"

    def tex_excess(self, r: str, dual: str, rho: str) -> str:
        """Return the excess of |r|, the constraint that r^2 = 0 stands for, over a tube of width 0."""
        return _size_excess(rf"\lvert {r} \rvert", 0.0, dual, rho)


class Softshrink(_Tube):
    """G(r) = sign(r) max(|r| - epsilon, 0): Local Propagation's lin_eps, DistProp's equation (3)."""

    meaning = r"$\mathcal{S}_{\epsilon}(r) = \operatorname{sign}(r) \max(\lvert r \rvert - \epsilon,\, 0)$ by entries"
    kind: Literal["softshrink"] = "softshrink"

    def text(self, r: str) -> str:
        """Return G(r) as plain text."""
        return f"softshrink({r}, {self.epsilon:g})"

    def tex(self, r: str) -> str:
        """Return G(r) as TeX."""
        return rf"\mathcal{{S}}_{{{number(self.epsilon)}}}\bigl({r}\bigr)"

    def tex_excess(self, r: str, dual: str, rho: str) -> str:
        """Return r less its projection on the tube, shifted by the multiplier."""
        return _signed_excess(r, self.epsilon, dual, rho)


class Hardshrink(_Tube):
    """G(r) = r where |r| > epsilon, else 0: what DistProp's authors run."""

    meaning = r"$\mathcal{H}_{\epsilon}(r) = r$ where $\lvert r \rvert > \epsilon$ and $0$ elsewhere, by entries"
    kind: Literal["hardshrink"] = "hardshrink"

    def text(self, r: str) -> str:
        """Return G(r) as plain text."""
        return f"hardshrink({r}, {self.epsilon:g})"

    def tex(self, r: str) -> str:
        """Return G(r) as TeX."""
        return rf"\mathcal{{H}}_{{{number(self.epsilon)}}}\bigl({r}\bigr)"

    def tex_excess(self, r: str, dual: str, rho: str) -> str:
        """Return r less its projection on the tube, shifted by the multiplier."""
        return _signed_excess(r, self.epsilon, dual, rho)


class AbsTube(_Tube):
    """G(r) = max(|r| - epsilon, 0): Local Propagation's abs_eps."""

    signed = False
    meaning = _ENTRIES
    kind: Literal["abs_tube"] = "abs_tube"

    def text(self, r: str) -> str:
        """Return G(r) as plain text."""
        return f"relu(|{r}| - {self.epsilon:g})"

    def tex(self, r: str) -> str:
        """Return G(r) as TeX."""
        return rf"\max\bigl(\lvert {r} \rvert - {number(self.epsilon)},\, 0\bigr)"

    def tex_excess(self, r: str, dual: str, rho: str) -> str:
        """Return the excess of |r| over the tube, or what the multiplier holds it at."""
        return _size_excess(rf"\lvert {r} \rvert", self.epsilon, dual, rho)


class NormTube(_Tube):
    """G(r) = max(||r|| - epsilon, 0), one number per example: DistProp's scalar form for ImageNet."""

    signed = False
    kind: Literal["norm_tube"] = "norm_tube"
    epsilon: float = Field(ge=0)
    """Norm below which nothing acts."""
    order: Literal[1, 2] = 1
    """Of the norm: 1 for the sum of sizes, 2 for Euclid's."""

    @property
    def norm(self) -> float:
        """Order of the norm."""
        return float(self.order)

    def text(self, r: str) -> str:
        """Return G(r) as plain text."""
        return f"relu(||{r}||_{self.order} - {self.epsilon:g})"

    def tex(self, r: str) -> str:
        """Return G(r) as TeX."""
        return rf"\max\bigl({self._norm(r)} - {number(self.epsilon)},\, 0\bigr)"

    def tex_excess(self, r: str, dual: str, rho: str) -> str:
        """Return the excess of ||r|| over the tube, or what the multiplier holds it at."""
        return _size_excess(self._norm(r), self.epsilon, dual, rho)

    def _norm(self, r: str) -> str:
        return rf"\lVert {r} \rVert_{{{self.order}}}"


def _signed_excess(r: str, epsilon: float, dual: str, rho: str) -> str:
    width = number(epsilon)
    return rf"{r} - \operatorname{{clip}}\bigl({r} + {dual} / {rho},\, -{width},\, {width}\bigr)"


def _size_excess(size: str, epsilon: float, dual: str, rho: str) -> str:
    return rf"\max\bigl({size} - {number(epsilon)},\, -{dual} / {rho}\bigr)"


Transform = Annotated[
    Identity | Abs | Squared | Softshrink | Hardshrink | AbsTube | NormTube, Field(discriminator="kind")
]
