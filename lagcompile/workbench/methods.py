"""The one place where a spec's `method.kind` finds its class: a union of frozen classes is the registry.

In: nothing. Out: `MethodSpec`. Invariant: a further method is one class in backends/ and one line here.
"""

from __future__ import annotations

from typing import Annotated, TypeAlias

from pydantic import Field

from lagcompile.backends.alternating import AltMin
from lagcompile.backends.augmented import AugmentedLagrangian
from lagcompile.backends.baselines import Backprop, DifferenceTargetPropagation, FeedbackAlignment
from lagcompile.backends.convex import Convex
from lagcompile.backends.first_order import DescentAscent, Extragradient, ExtragradientFromPast, OptimisticGradient
from lagcompile.backends.mip import MixedInteger
from lagcompile.backends.proximal import ProxProp
from lagcompile.backends.sqp import SQP

MethodSpec: TypeAlias = Annotated[
    Extragradient
    | ExtragradientFromPast
    | OptimisticGradient
    | DescentAscent
    | AugmentedLagrangian
    | AltMin
    | ProxProp
    | Backprop
    | DifferenceTargetPropagation
    | FeedbackAlignment
    | SQP
    | Convex
    | MixedInteger,
    Field(discriminator="kind"),
]
