"""Multiple shooting against CasADi with IPOPT on the Lorenz problem: one start, 100 starts, 10,000 steps.

Out: `run()`. Invariant: both solve the same data from the same guesses to the same parameters (checked), take turns,
and are charged the CPU seconds of this process, so that other work on the machine counts little. CasADi's building of
its graph is counted apart: it pays once per data set and stage length.
"""

from __future__ import annotations

import statistics
import time

import torch
from torch import Tensor

from lagcompile.backends.shooting import FitResult, fit
from lagcompile.dynamics.functional import CellFunctions
from lagcompile.dynamics.starts import random_starts
from lagcompile.dynamics.systems import Example, examples
from tests.benchmarks.shooting_rivals import Ipopt
from tests.benchmarks.timing import Row, at_most

LENGTH = 5
"""CasADi's stage length: where it is fastest and most reliable on this problem."""


def _ours(example: Example, guesses: Tensor) -> tuple[FitResult, float]:
    rollout, data = example.rollout(), example.data()
    begin = time.process_time()
    result = fit(rollout, data, starts=guesses, noise=example.noise)
    return result, time.process_time() - begin


def _agree(first: Tensor, second: Tensor) -> bool:
    return bool(((first - second) / second).abs().max() < 1e-4)


def _one_start(example: Example, guesses: Tensor) -> tuple[float, float, Ipopt]:
    """Median seconds of ours and of CasADi over guesses from which both reach the same parameters."""
    solver = Ipopt(example, 0, LENGTH)
    ours, theirs = [], []
    _ours(example, guesses[:1])
    for guess in guesses:
        result, seconds = _ours(example, guess[None])
        theta, _, rival = solver.solve(guess)
        if _agree(result.theta[0], theta):
            ours.append(seconds)
            theirs.append(rival)
    return statistics.median(ours), statistics.median(theirs), solver


def run() -> list[Row]:
    """Rows of the benchmark table."""
    example = examples()["lorenz"]
    truth = CellFunctions(example.rollout()).start()
    guesses = random_starts(truth, 100, seed=1)
    ours, theirs, solver = _one_start(example, guesses[:12])
    detail = f"{ours:.3f} s, CasADi {theirs:.3f} s"
    built = theirs + solver.build_seconds
    rows = [
        at_most("shooting, Lorenz, one start: time over CasADi's, without its building", ours / theirs, 1.5, detail),
        at_most(
            "shooting, Lorenz, one start: time over CasADi's, with its building",
            ours / built,
            1.5,
            f"{ours:.3f} s, CasADi {built:.3f} s",
        ),
    ]
    result, together = _ours(example, guesses)
    solved = sum(s.name == "SOLVED" for s in result.statuses)
    rows.append(
        at_most(
            "shooting, Lorenz, 100 starts: time over 100 of CasADi's",
            together / (100 * theirs),
            0.1,
            f"{together:.2f} s, {solved} solved, CasADi {100 * theirs:.2f} s",
        )
    )
    long = example.model_copy(update={"samples": 10001})
    ours, theirs, solver = _one_start(long, guesses[:3])
    built = theirs + solver.build_seconds
    for what, rival in (("without", theirs), ("with", built)):
        rows.append(
            at_most(
                f"shooting, Lorenz of 10,000 steps, one start: time over CasADi's, {what} its building",
                ours / rival,
                1.0,
                f"{ours:.2f} s, CasADi {rival:.2f} s",
            )
        )
    return rows


if __name__ == "__main__":
    torch.set_num_threads(1)
    for row in run():
        print(row)
