"""The filter and the acceptance rules of the line search.

In: violation (l1) and objective of trial points. Out: accept or not. Invariant: a pair once added stays dominated
until `clear`. Rules and constants: Waechter and Biegler, "Line search filter methods for nonlinear programming" (SIAM
J. Optim. 16, 2005), proven to converge globally; chosen over an l1 merit function because no penalty weight has to be
guessed while multipliers are still wrong, which they are at every start from a forward pass.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

GAMMA = 1e-5  # sufficient decrease of either measure
ARMIJO = 1e-4
SWITCH_OBJECTIVE = 2.3
SWITCH_VIOLATION = 1.1


@dataclass(frozen=True)
class Measure:
    """Violation and objective of a point."""

    violation: float
    objective: float


class Filter:
    """Pairs that no later iterate may be dominated by.

    Args:
        start: violation of the first point; trial points far above it are never accepted.
    """

    def __init__(self, start: float) -> None:
        self._most = max(1.0, 1.25 * start)
        self._least = 1e-4 * max(1.0, start)
        self._pairs: list[Measure] = []

    def clear(self, start: float) -> None:
        """Begin anew from a point of this violation (after a stall, or when a restoration could not help)."""
        self._pairs = []
        self._most = max(1.0, 1.25 * start)

    def state(self) -> Mapping[str, Any]:
        """What `load` takes."""
        return {"most": self._most, "pairs": [(p.violation, p.objective) for p in self._pairs]}

    def load(self, state: Mapping[str, Any]) -> None:
        """Go on from `state`, with the same start."""
        self._most, self._pairs = state["most"], [Measure(*pair) for pair in state["pairs"]]

    def add(self, measure: Measure) -> None:
        """Forbid the neighbourhood of a point that was left by a step that did not decrease the objective."""
        new = Measure((1 - GAMMA) * measure.violation, measure.objective - GAMMA * measure.violation)
        self._most = min(self._most, max(0.5 * (self._most + measure.violation), self._least))
        self._pairs = [p for p in self._pairs if p.violation < new.violation or p.objective < new.objective]
        self._pairs.append(new)

    def allows(self, trial: Measure) -> bool:
        """Whether the filter itself accepts the pair."""
        if not (math.isfinite(trial.violation) and math.isfinite(trial.objective)) or trial.violation > self._most:
            return False
        return all(trial.violation <= p.violation or trial.objective <= p.objective for p in self._pairs)

    def switches(self, now: Measure, slope: float, length: float) -> bool:
        """Whether a step counts as one that has to decrease the objective."""
        if slope >= 0 or now.violation > self._least:
            return False
        return bool(length * (-slope) ** SWITCH_OBJECTIVE > now.violation**SWITCH_VIOLATION)

    def accepts(self, now: Measure, trial: Measure, slope: float, length: float) -> bool:
        """Filter, then Armijo (objective steps) or sufficient decrease of either measure (other steps)."""
        if not self.allows(trial):
            return False
        rounding = 10.0 * float(np.finfo(float).eps) * max(1.0, abs(now.objective))
        if self.switches(now, slope, length):
            return trial.objective <= now.objective + ARMIJO * length * slope + rounding
        if now.violation <= 0.0:  # nothing to restore: only the objective can justify a step
            return trial.objective <= now.objective - GAMMA * trial.violation
        less = trial.violation <= (1 - GAMMA) * now.violation
        return less or trial.objective <= now.objective - GAMMA * now.violation

    def smallest_step(self, now: Measure, slope: float) -> float:
        """Step length below which the line search gives up (their equation 23, with a floor)."""
        bound = GAMMA
        if slope < 0:
            bound = min(bound, GAMMA * now.violation / -slope)
            if now.violation <= self._least:
                bound = min(bound, now.violation**SWITCH_VIOLATION / (-slope) ** SWITCH_OBJECTIVE)
        return max(0.05 * bound, 1e-13)
