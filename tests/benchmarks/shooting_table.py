"""Which methods recover the parameters: `python -m tests.benchmarks.shooting_table [--starts 100] [--budget 60]`.

In: the problems of `lagcompile.dynamics.systems`. Out: results/shooting.json and .md beside this file. Invariant: a
cell that is there already is not computed again (delete the file, or its entry, to do so); seeds are in the file.
The budget is CPU seconds on one thread for all starts of a method together, compiling and building apart; where it
ends before every start has had its turn, `runs` says how many had.
"""

from __future__ import annotations

import argparse
import json
import statistics
from datetime import date
from pathlib import Path
from typing import Any

import torch

from lagcompile.dynamics.functional import CellFunctions
from lagcompile.dynamics.starts import random_starts
from lagcompile.dynamics.systems import Example, examples
from tests.benchmarks.shooting_rivals import (
    Method,
    adam,
    casadi,
    first_order,
    first_order_diagonal,
    lbfgs,
    polished,
    segments,
    sqp,
    sqp_compiled,
)

RESULTS = Path(__file__).parent / "results"
METHODS: dict[str, Method] = {
    "SQP (default options)": sqp,
    "extragradient": first_order,
    "CasADi + IPOPT": casadi,
    "backprop, Adam": adam,
    "extragradient, then SQP": polished,
    "backprop, L-BFGS": lbfgs,
    "segments from data, Adam": segments,
    "extragradient, diagonal metric": first_order_diagonal,
    "SQP, compiled": sqp_compiled,
}
TOLERANCE = 0.02


def measure(
    example: Example, method: Method, *, starts: int, factor: float, seed: int, budget: float
) -> dict[str, Any]:
    """One cell of the table."""
    truth = CellFunctions(example.rollout()).start()
    guesses = random_starts(truth, starts, factor=factor, seed=seed + 1)
    outcome = method(example, seed, guesses, budget)
    worst = ((outcome.theta - truth) / truth).abs().amax(1).nan_to_num(float("inf"))
    ratio = torch.maximum(outcome.theta / truth, truth / outcome.theta)
    ratio = torch.where(outcome.theta / truth > 0, ratio, float("inf")).amax(1).nan_to_num(float("inf"))
    return {
        "runs": len(worst),
        "within_factor_2": float((ratio <= 2.0).double().mean()),
        "recovered": float((worst < TOLERANCE).double().mean()),
        "median_error": float(worst.median()),
        "median_iterations": statistics.median(outcome.iterations),
        "median_seconds": statistics.median(outcome.seconds),
        "starts": starts,
        "factor": factor,
        "seed": seed,
        "budget": budget,
        "note": outcome.note,
        "date": date.today().isoformat(),
    }


def _share(value: float | None) -> str:
    return "not kept" if value is None else f"{value:.0%}"


def table(cells: dict[str, dict[str, Any]]) -> str:
    """The results as a Markdown table."""
    lines = [
        "| problem | method | starts within | budget (s) | runs | recovered (2 %) | ends within factor 2 | "
        "median iterations | median CPU seconds | note |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for key, cell in sorted(cells.items()):
        problem, name, _ = key.split(" / ")
        lines.append(
            f"| {problem} | {name} | factor {cell['factor']:g} | {cell['budget']:g} | {cell['runs']} | "
            f"{cell['recovered']:.0%} | {_share(cell['within_factor_2'])} | {cell['median_iterations']:g} | "
            f"{cell['median_seconds']:.3g} | {cell['note']} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure what is missing and write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--starts", type=int, default=100)
    parser.add_argument("--budget", type=float, default=20.0, help="CPU seconds for all starts of one method together")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--factor", type=float, default=5.0)
    parser.add_argument("--methods", nargs="*", default=list(METHODS))
    parser.add_argument("--problems", nargs="*", default=list(examples()))
    parser.add_argument("--threads", type=int, default=1)
    chosen = parser.parse_args()
    torch.set_num_threads(chosen.threads)
    RESULTS.mkdir(exist_ok=True)
    file = RESULTS / "shooting.json"
    cells: dict[str, dict[str, Any]] = json.loads(file.read_text()) if file.exists() else {}
    (RESULTS / "shooting.md").write_text(table(cells))
    for name in chosen.methods:
        for problem, example in examples(chosen.problems).items():
            key = f"{problem} / {name} / factor {chosen.factor:g} seed {chosen.seed}"
            if key in cells:
                continue
            cells[key] = measure(
                example,
                METHODS[name],
                starts=chosen.starts,
                factor=chosen.factor,
                seed=chosen.seed,
                budget=chosen.budget,
            )
            print(key, cells[key], flush=True)
            file.write_text(json.dumps(cells, indent=1, sort_keys=True) + "\n")
            (RESULTS / "shooting.md").write_text(table(cells))


if __name__ == "__main__":
    main()
