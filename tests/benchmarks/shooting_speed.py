"""Multiple shooting against CasADi with IPOPT on the Lorenz problem: one start, 100 starts, 10,000 steps.

`python -m tests.benchmarks.shooting_speed [step | short | long]`; `step` is the cost of a first-order step alone.

Out: `run()`. Invariant: both solve the same data from the same guesses to the same parameters (checked), take turns,
and are charged the CPU seconds of this process, so that other work on the machine counts little. Making the
data is not counted. CasADi's building of its graph is counted apart: it pays once per data set and stage length.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lagcompile.backends.shooting import FitResult, Shooting, ShootingExtragradient, fit
from lagcompile.backends.shooting_gradient import Descent
from lagcompile.backends.shooting_run import Run
from lagcompile.dynamics.functional import CellFunctions
from lagcompile.dynamics.starts import random_starts
from lagcompile.dynamics.systems import Example, examples
from lagcompile.dynamics.trajectories import Trajectories
from tests.benchmarks.shooting_rivals import Ipopt, Rollouts
from tests.benchmarks.timing import Row, at_most, side_by_side

LENGTH = 5
"""CasADi's stage length: where it is fastest and most reliable on this problem."""


def _ours(functions: CellFunctions, example: Example, guesses: Tensor, data: Trajectories) -> tuple[FitResult, float]:
    begin = time.process_time()
    result = fit(functions.rollout, data, starts=guesses, noise=example.noise, functions=functions)
    return result, time.process_time() - begin


def _agree(first: Tensor, second: Tensor) -> bool:
    return bool(((first - second) / second).abs().max() < 1e-4)


@dataclass(frozen=True)
class Times:
    """Median CPU seconds from one guess, and what each side spends once for a data set.

    Attributes:
        plain: ours.
        fused: ours with compiled functions.
        compiling: seconds of the first fit with compiled functions.
        theirs: CasADi's.
        building: seconds in which CasADi builds its problem.
        agreed: guesses from which all reach the same parameters; only these count.
    """

    plain: float
    fused: float
    compiling: float
    theirs: float
    building: float
    agreed: int


def _one_start(example: Example, guesses: Tensor) -> Times:
    solver = Ipopt(example, 0, LENGTH)
    rollout, data = example.rollout(), example.data()
    plain, fused = CellFunctions(rollout), CellFunctions(rollout, compile=True)
    _ours(plain, example, guesses[:1], data)
    _, compiling = _ours(fused, example, guesses[:1], data)
    rows = []
    for guess in guesses:
        first, ours = _ours(plain, example, guess[None], data)
        second, compiled = _ours(fused, example, guess[None], data)
        theta, _, rival = solver.solve(guess)
        if _agree(first.theta[0], theta) and _agree(second.theta[0], theta):
            rows.append((ours, compiled, rival))
    medians = [statistics.median(column) for column in zip(*rows, strict=True)]
    return Times(medians[0], medians[1], compiling, medians[2], solver.build_seconds, len(rows))


def step_cost(name: str = "lorenz", starts: int = 100, *, steps: int = 20, rounds: int = 5) -> list[Row]:
    """A first-order step, metric included, against two batched forward and backward passes of the same stages."""
    example = examples()[name]
    functions = CellFunctions(example.rollout(), compile=True)
    guesses = random_starts(functions.start(), starts, seed=1)
    rollouts = Rollouts.of(example, 0, guesses, 8, functions=functions)
    problem, first = rollouts.problem, rollouts.first(starts)
    rows = []
    for metric in ("blocks", "diagonal"):
        method = ShootingExtragradient.model_validate({"metric": metric, "iterations": steps, "tolerance": 1e-300})
        states = (first * problem.state_scale).clone()

        def descend(method: ShootingExtragradient = method, states: Tensor = states) -> None:
            with torch.no_grad():
                Descent(Run(problem, Shooting(), guesses, states, clock=0.0), method).solve()

        def passes(states: Tensor = states) -> None:
            with torch.no_grad():
                for _ in range(2 * steps):
                    values, sweep = problem.stages.taped(guesses, states)
                    sweep(values.defect, values.residual)

        ours, floor = side_by_side(descend, passes, rounds=rounds, warm_up=1)
        detail = f"{1e3 * ours / steps:.1f} ms against {1e3 * floor / steps:.1f} ms, {starts} starts, same kernels"
        words = f"shooting, {example.name}: extragradient step ({metric}) / two forward+backward passes of all stages"
        rows.append(at_most(words, ours / floor, 1.5, detail))
    return rows


def run(long: bool = True) -> list[Row]:
    """Rows of the benchmark table; `long` with the one of 10,000 steps."""
    example = examples()["lorenz"]
    truth, data = CellFunctions(example.rollout()).start(), example.data()
    guesses = random_starts(truth, 100, seed=1)
    name = "shooting, Lorenz"
    t = _one_start(example, guesses[:9])
    rows = [*step_cost(), *_rows(f"{name}, one start", t, 1.5)]
    for words, compiled in (("", False), (", compiled", True)):
        functions = CellFunctions(example.rollout(), compile=compiled)
        if compiled:
            _ours(functions, example, guesses, data)
        result, together = _ours(functions, example, guesses, data)
        solved = sum(s.name == "SOLVED" for s in result.statuses)
        detail = f"{together:.2f} s, {solved} solved, CasADi {100 * t.theirs:.2f} s"
        figure = together / (100 * t.theirs)
        rows.append(at_most(f"{name}, 100 starts{words}: CPU seconds over 100 times CasADi's", figure, 0.1, detail))
    return [*rows, *run_long(3)] if long else rows


def run_long(count: int) -> list[Row]:
    """The rows of 10,000 steps from some guesses."""
    example = examples()["lorenz"].model_copy(update={"samples": 10001})
    guesses = random_starts(CellFunctions(example.rollout()).start(), count, seed=1)
    return _rows("shooting, Lorenz of 10,000 steps, one start", _one_start(example, guesses), 1.0)


def _rows(name: str, t: Times, bound: float) -> list[Row]:
    once = f"{t.agreed} guesses; once: CasADi {t.building:.1f} s, compiling {t.compiling:.1f} s"
    theirs = f"CasADi {t.theirs:.3f} s, {once}"
    whole = t.theirs + t.building
    return [
        at_most(f"{name}: CPU seconds over CasADi's", t.plain / t.theirs, bound, f"{t.plain:.3f} s, {theirs}"),
        at_most(
            f"{name}, compiled: CPU seconds over CasADi's", t.fused / t.theirs, bound, f"{t.fused:.3f} s, {theirs}"
        ),
        at_most(
            f"{name}: CPU seconds over CasADi's with its building", t.plain / whole, bound, f"{t.plain:.3f} s, {theirs}"
        ),
    ]


def main(part: str) -> None:
    """Measure a part, print it and keep it in results/shooting_speed.json and .md; other rows stay as they are."""
    torch.set_num_threads(1)
    parts = {"step": step_cost, "short": lambda: run(long=False), "long": lambda: run_long(3)}
    file = Path(__file__).parent / "results" / "shooting_speed.json"
    kept: dict[str, dict[str, Any]] = json.loads(file.read_text()) if file.exists() else {}
    for row in parts[part]():
        print(row, flush=True)
        kept[row.name] = asdict(row) | {"date": date.today().isoformat()}
    file.write_text(json.dumps(kept, indent=1) + "\n")
    lines = ["| what | measured | asked for | times |", "|---|---|---|---|"]
    for name, r in kept.items():
        mark = "" if r["reached"] else " (not reached)"
        lines.append(f"| {name} | {r['value']:.3g}{mark} | {r['target']} | {r['detail']} |")
    file.with_suffix(".md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "short")
