"""The policy `memory`: as many breakpoints as fit a budget of bytes.

In: a `Graph` with known shapes, a number of examples, a budget. Out: a `Partition`. Invariant: states, multipliers and
their optimiser rows of all examples fit the budget; among the cuts of that number that fit, the largest stage is as
small as possible.
"""

from __future__ import annotations

import re
from typing import Literal

import numpy as np
from pydantic import Field, field_validator

from lagcompile.frontend.balance import Context, Cuts, Ints, at_positions, cheapest, cuts_of, fits
from lagcompile.frontend.graph import Graph
from lagcompile.frontend.partition import Partition
from lagcompile.ir.base import Frozen, SplitError

_UNITS = {"b": 1, "kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40, "kb": 10**3, "mb": 10**6, "gb": 10**9}
_SIZE = re.compile(r"^\s*([0-9.]+)\s*([a-zA-Z]*)\s*$")


class MemorySplit(Frozen):
    """The most breakpoints whose states, multipliers and optimiser rows of all examples stay under a budget."""

    policy: Literal["memory"] = "memory"
    budget: int | str
    """Bytes, as a number or with a unit: "2 GiB"."""
    examples: int = Field(ge=1)
    """Rows of the data set."""
    state_slots: int = Field(default=1, ge=0)
    """Optimiser numbers for each state number (1 for Adagrad, 2 for Adam)."""
    dual_slots: int = Field(default=0, ge=0)
    """Optimiser numbers for each multiplier."""
    multipliers: bool = True
    """Whether each state has a multiplier of the same size."""

    @field_validator("budget")
    @classmethod
    def _readable(cls, value: int | str) -> int | str:
        bytes_of(value)
        return value

    def split(self, graph: Graph, context: Context | None = None) -> Partition:
        """Partition with as many breakpoints as the budget allows.

        Raises:
            SplitError: shapes are not known yet, or not even the narrowest breakpoint fits.
        """
        if not graph.shapes_known:
            raise SplitError("split by memory: shapes are not known yet, give example_inputs to lift")
        cuts = cuts_of(graph)
        places = cuts.preferred if len(cuts.preferred) else cuts.allowed
        factor = 1 + self.state_slots + (1 + self.dual_slots if self.multipliers else 0)
        size = cuts.bytes[places] * factor * self.examples
        count = int(np.searchsorted(np.cumsum(np.sort(size)), bytes_of(self.budget), side="right"))
        if count == 0:
            least = f"{int(size.min()):,} bytes" if len(size) else "no place to cut"
            raise SplitError(
                f"split by memory: no breakpoint fits {self.budget} for {self.examples:,} examples (the narrowest "
                f"needs {least})"
            )
        chosen = _spread(cuts, places, size, count, bytes_of(self.budget))
        reason = f"one of {count} within {self.budget}"
        return at_positions(graph, chosen, reason)


def _spread(cuts: Cuts, places: Ints, size: Ints, count: int, budget: int) -> list[int]:
    """Of the sets of `count` places within the budget, one with the smallest largest stage (bisection on the cap)."""
    total, work = int(cuts.work[-1]), cuts.work[places]
    low, high = -(-total // (count + 1)), total
    best = cheapest(work, size, total, count + 1, high)
    while low < high:
        middle = (low + high) // 2
        found = cheapest(work, size, total, count + 1, middle) if fits(work, total, count + 1, middle) else None
        if found is not None and int(size[found].sum()) <= budget:
            best, high = found, middle
        else:
            low = middle + 1
    return [int(places[i]) for i in best]


def bytes_of(value: int | str) -> int:
    """Bytes from a number or a text such as "512 MiB".

    Raises:
        ValueError: the text is not a size.
    """
    if isinstance(value, int):
        return value
    match = _SIZE.match(value)
    unit = _UNITS.get((match[2] or "b").lower()) if match else None
    if match is None or unit is None:
        raise ValueError(
            f"'{value}' is not a size: write a number of bytes, or a number with KiB, MiB, GiB, KB, MB or GB"
        )
    return int(float(match[1]) * unit)
