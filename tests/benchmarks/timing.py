"""How benchmarks measure: alternating runs of two things in one process, so that a ratio compares like with like."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Row:
    """One line of the benchmark table.

    Attributes:
        name: what is measured.
        value: the figure (a ratio where two things are compared).
        target: what was asked for, as text such as "<= 1.25".
        reached: whether the target is met.
        detail: the measured times behind the figure.
    """

    name: str
    value: float
    target: str
    reached: bool
    detail: str


def at_most(name: str, value: float, bound: float, detail: str) -> Row:
    """A row whose figure should not exceed a bound."""
    return Row(name, value, f"<= {bound:g}", value <= bound, detail)


def at_least(name: str, value: float, bound: float, detail: str) -> Row:
    """A row whose figure should reach a bound."""
    return Row(name, value, f">= {bound:g}", value >= bound, detail)


def side_by_side(
    first: Callable[[], object],
    second: Callable[[], object],
    *,
    rounds: int = 15,
    warm_up: int = 3,
    clock: Callable[[], float] = time.process_time,
) -> tuple[float, float]:
    """Median seconds of two callables that take turns, so that a noisy neighbour hits both.

    Seconds are of the processor unless another clock is given: on a shared machine the wall clock measures the others.
    """
    for _ in range(warm_up):
        first()
        second()
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(rounds):
        for call, found in zip((first, second), times, strict=True):
            start = clock()
            call()
            found.append(clock() - start)
    return statistics.median(times[0]), statistics.median(times[1])


def ms(seconds: float) -> str:
    """Milliseconds as text."""
    return f"{seconds * 1e3:.2f} ms"
