"""How far two solutions of one program are apart, in primal and in multipliers.

In: two `Solution`s. Out: `Distance`. Invariant: largest absolute differences, by name, of what both hold; weights count
with the precision that each backend reached (exact ones where `details` has them).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from lagcompile.ir.solution import Solution


@dataclass(frozen=True)
class Distance:
    """Largest absolute differences.

    Attributes:
        primal: over weights, states and free inputs.
        multipliers: over multipliers; NaN where there is none in common.
        worst_primal: name of the variable that differs most.
        worst_multiplier: name of the multiplier that differs most.
    """

    primal: float
    multipliers: float
    worst_primal: str
    worst_multiplier: str


def distance(first: Solution, second: Solution) -> Distance:
    """Distance of two solutions of one program."""
    primal = _largest(_primal(first), _primal(second))
    duals = _largest(first.multipliers, second.multipliers)
    return Distance(primal[0], duals[0], primal[1], duals[1])


def _primal(solution: Solution) -> dict[str, Tensor]:
    trained = {w.name for w in solution.program.weights if w.trainable}
    weights = {n: p for n, p in solution.model.named_parameters() if n in trained}
    weights |= solution.details.get("weights", {})
    return {**weights, **solution.states, **solution.details.get("inputs", {})}


def _largest(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> tuple[float, str]:
    found = [(_apart(first[n], second[n]), n) for n in first if n in second and first[n].numel()]
    return max(found, key=lambda pair: math.inf if math.isnan(pair[0]) else pair[0], default=(math.nan, ""))


def _apart(first: Tensor, second: Tensor) -> float:
    if first.numel() != second.numel():
        return math.inf
    return float((first.detach().double().cpu().reshape(-1) - second.detach().double().cpu().reshape(-1)).abs().max())
