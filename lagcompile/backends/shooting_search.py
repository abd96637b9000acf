"""Acceptance of trial points: a penalty function while defects are soft, a filter once they are hard.

In: objective and violation of each start before and after a trial step. Out: which starts accept. Invariant: all starts
are judged at once and each by its own history.
"""

from __future__ import annotations

import torch
from torch import Tensor

_ENVELOPE = 1e-5
ROUNDING = 1e-11
"""Relative change of an objective that counts as none."""


class Filter:
    """Pairs (objective, violation) that a start has visited (Fletcher and Leyffer 2002).

    Args:
        starts: number of starts.
        capacity: most entries of one start.
        like: a tensor of the dtype and device.
    """

    def __init__(self, starts: int, capacity: int, like: Tensor) -> None:
        self.objective = torch.full((starts, capacity), float("inf"), dtype=like.dtype, device=like.device)
        self.violation = torch.full_like(self.objective, float("inf"))

    def add(self, index: Tensor, slot: int, objective: Tensor, violation: Tensor) -> None:
        """Enter the present pairs of some starts in a slot of this iteration."""
        self.objective[index, slot] = objective
        self.violation[index, slot] = violation

    def clear(self, index: Tensor) -> None:
        """Forget everything about some starts, because their objective has changed its meaning."""
        self.objective[index] = float("inf")
        self.violation[index] = float("inf")

    def accepts(self, index: Tensor, objective: Tensor, violation: Tensor, tiny: Tensor) -> Tensor:
        """Which starts improve on every entry in objective or violation.

        Args:
            index: the starts.
            objective: their trial objectives.
            violation: their trial violations.
            tiny: violation that counts as none; there an objective equal up to rounding is accepted.
        """
        f, v = self.objective[index], self.violation[index]
        better = (objective[:, None] <= f - _ENVELOPE * v) | (violation[:, None] <= (1 - _ENVELOPE) * v)
        level = (objective[:, None] <= f * (1 + ROUNDING) + 1e-300) & (violation <= tiny)[:, None]
        return (better | level | torch.isinf(f)).all(1)
