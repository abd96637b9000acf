r"""Which values a state may take: bounds, how they are kept, and how a domain prints.

In: nothing. Out: one record for each domain and their union `Domain`. Invariant: a reader asks for bounds and for how
they are kept, never for the class; maps and projections, which need tensors, are said once in `runtime/domains.py`.

To add a domain: its record, its name in the union below, and its class there.
"""

from __future__ import annotations

import math
from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from lagcompile.ir.base import Frozen
from lagcompile.ir.tex import number


class _Domain(Frozen):
    inferred: ClassVar[bool] = False
    """Lowering replaces it by another, which the operation that makes the state implies."""

    @property
    def bounds(self) -> tuple[float, float]:
        """Smallest and largest value."""
        return -math.inf, math.inf

    @property
    def bounded(self) -> bool:
        """Whether some number is left out."""
        return self.bounds != (-math.inf, math.inf)

    @property
    def map(self) -> str:
        """Name of the map of the stored variable that keeps values inside; empty where there is none."""
        return ""

    @property
    def flat(self) -> bool:
        """Whether the map has no slope at zero, where a variable would stay for ever."""
        return False

    @property
    def projected(self) -> bool:
        """Whether a projection after each step keeps values inside."""
        return self.bounded and not self.map

    @property
    def meaning(self) -> str:
        """TeX sentence on the map; empty where there is none."""
        return ""

    @property
    def span(self) -> str:
        """The values as plain text."""
        low, high = self.bounds
        if not self.bounded:
            return "free"
        return f"in [{low:g}, {high:g}]" if math.isfinite(high) else f">= {low:g}"

    @property
    def text(self) -> str:
        """The values, and what keeps a state there where that is said."""
        return self.span

    def tex(self, power: str) -> str:
        """Return the set of values as TeX, with the exponent that says how many; empty where nothing is left out."""
        low, high = self.bounds
        if not self.bounded:
            return ""
        inside = f"[{number(low)}, {number(high)}]" if math.isfinite(high) else rf"\mathbb{{R}}_{{\ge {number(low)}}}"
        return inside + power


class Free(_Domain):
    """Any real value."""

    kind: Literal["free"] = "free"


class NonNegative(_Domain):
    """Values >= 0, kept by a map of the stored variable or by projection after each step."""

    kind: Literal["nonnegative"] = "nonnegative"
    by: Literal["relu", "softplus", "project"] = "relu"

    @property
    def bounds(self) -> tuple[float, float]:
        """Zero and no largest value."""
        return 0.0, math.inf

    @property
    def map(self) -> str:
        """Return relu or softplus."""
        return "" if self.by == "project" else self.by

    @property
    def flat(self) -> bool:
        """Return whether the map is relu."""
        return self.by == "relu"

    @property
    def meaning(self) -> str:
        """TeX sentence on relu or softplus."""
        kept = {"relu": r"\max(\tilde{h}, 0)", "softplus": r"\log(1 + e^{\tilde{h}})"}.get(self.by)
        return "" if kept is None else rf"states $h \ge 0$ are kept as $h = {kept}$"

    @property
    def text(self) -> str:
        """The domain, and what keeps it."""
        return f"{self.span} ({self.by})"


class Range(_Domain):
    """Values in [lower, upper], kept by projection after each step."""

    kind: Literal["range"] = "range"
    lower: float
    upper: float

    @model_validator(mode="after")
    def _ordered(self) -> Range:
        if not self.lower <= self.upper:
            raise ValueError(f"lower ({self.lower:g}) must not be above upper ({self.upper:g})")
        return self

    @property
    def bounds(self) -> tuple[float, float]:
        """Lower and upper."""
        return self.lower, self.upper


class OfActivation(_Domain):
    """The range of the operation that makes the state: ReLU >= 0, tanh in [-1, 1], sigmoid in [0, 1], else free.

    Lowering replaces it by one of the others.
    """

    inferred = True
    kind: Literal["activation"] = "activation"

    @property
    def text(self) -> str:
        """The domain as plain text."""
        return "range of its activation"


Domain = Annotated[Free | NonNegative | Range | OfActivation, Field(discriminator="kind")]
