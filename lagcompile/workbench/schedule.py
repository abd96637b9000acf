"""How step sizes change over a run: a factor on the method's own step sizes, by group of variables.

In: step number and number of steps. Out: a factor. Invariant: the factor depends on nothing else, so a resumed run
takes the same steps as an unbroken one.
"""

from __future__ import annotations

import math
from typing import Annotated, Literal, TypeAlias

from pydantic import Field

from lagcompile.ir.base import Frozen


class Cosine(Frozen):
    """Half a cosine from 1 at the first step to `final` at the last one, or earlier."""

    kind: Literal["cosine"] = "cosine"
    final: float = Field(default=0.01, ge=0, le=1)
    """Factor at the end."""
    until: float = Field(default=1.0, gt=0, le=1)
    """Part of the run after which the factor stays at `final`, so that states settle while weights rest."""

    def at(self, step: int, steps: int) -> float:
        """Factor at a step (counted from 0) of a run of `steps`."""
        progress = min(1.0, step / max(1, steps) / self.until)
        return self.final + (1.0 - self.final) * 0.5 * (1.0 + math.cos(math.pi * progress))


class Decay(Frozen):
    """`factor` for every `every` steps, in jumps."""

    kind: Literal["decay"] = "decay"
    factor: float = Field(gt=0, le=1)
    every: int = Field(ge=1)

    def at(self, step: int, steps: int) -> float:
        """Factor at a step (counted from 0)."""
        return float(self.factor ** (step // self.every))


ScheduleSpec: TypeAlias = Annotated[Cosine | Decay, Field(discriminator="kind")]


class Schedules(Frozen):
    """Schedules of the step sizes of each group; a group without one keeps its step size."""

    weights: ScheduleSpec | None = None
    """Also used by the backprop baseline, over its own number of steps."""
    states: ScheduleSpec | None = None
    multipliers: ScheduleSpec | None = None

    def given(self) -> dict[str, Cosine | Decay]:
        """The schedules that are set, by group."""
        groups = {"weights": self.weights, "states": self.states, "multipliers": self.multipliers}
        return {name: schedule for name, schedule in groups.items() if schedule is not None}
