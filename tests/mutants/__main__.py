"""Run seeded mutants against the tests that cover them; survivors are kept with the reason that a person gave.

    python -m tests.mutants [--count 300] [--seed 0] [--seconds 60] [--jobs 2] [--only TEXT]

A run that was cut off goes on where it was (in .mutants). Counts and survivors go to
tests/benchmarks/results/mutants.json; a survivor's `reason` is written there by hand and stays. Exit status 1: fewer
than 90 % killed, or a survivor without a reason.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from tests.mutants import children
from tests.mutants.covering import measure
from tests.mutants.draw import Mutant, draw
from tests.mutants.verdict import Journal, Judge, Verdict, judged

ROOT = Path(__file__).parents[2]
ROOMS = ("ir", "runtime", "check", "store")
RESULTS = ROOT / "tests/benchmarks/results/mutants.json"
KEPT = ROOT / ".mutants"
OTHERS = ("backends", "golden", "workbench")
"""Rooms whose tests take part too: those that stand on the four."""
LONG = {
    *("backends/test_agreement.py", "backends/test_mip.py", "workbench/test_coverage.py", "workbench/test_examples.py"),
    *("workbench/test_exact.py", "workbench/test_exporting.py", "workbench/test_shooting.py"),
    *("workbench/test_tables.py",),
}
"""Left out: without them the share of the killed is a lower bound."""
SHARE = 0.9
"""Of the mutants that must be killed."""


def main() -> int:
    """Draw, run, report."""
    parser = argparse.ArgumentParser(prog="python -m tests.mutants", description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=60.0, help="of tests for each mutant, the nearest first")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--only", default="", help="only mutants whose file or change has this text; nothing is kept")
    options = parser.parse_args()
    children.warm(ROOT)
    paths = [str(p.relative_to(ROOT)) for r in ROOMS for p in sorted((ROOT / "lagcompile" / r).rglob("*.py"))]
    tests = [p for room in (*ROOMS, *OTHERS) for p in sorted((ROOT / "tests" / room).glob("test_*.py"))]
    tests = [p for p in tests if str(p.relative_to(ROOT / "tests")) not in LONG]
    covering = measure(ROOT, paths, tests, KEPT / "covering", options.jobs)
    mutants = [m for m in draw(ROOT, paths, options.count, options.seed) if options.only in m.name]
    begin = time.monotonic()
    found = judged(
        mutants, Judge(ROOT, covering, options.seconds), Journal(KEPT / "verdicts.jsonl", covering), options.jobs
    )
    survivors = [(m, v) for m, v in zip(mutants, found, strict=True) if not v.killed]
    print(f"{len(mutants) - len(survivors)} of {len(mutants)} killed in {time.monotonic() - begin:.0f} s")
    if options.only:
        return 0
    listed = _listed(survivors)
    counts = {
        "mutants": len(mutants),
        "seed": options.seed,
        "seconds": options.seconds,
        "killed": len(mutants) - len(survivors),
    }
    hung = sum(v.killed and v.hung for v in found)
    kept = counts | {"killed by a limit of time": hung, "tests": len(covering.seconds), "survivors": listed}
    RESULTS.write_text(json.dumps(kept, indent=2) + "\n")
    return int(len(survivors) > (1 - SHARE) * len(mutants) or not all(s["reason"] for s in listed))


def _listed(survivors: Sequence[tuple[Mutant, Verdict]]) -> list[dict[str, object]]:
    """Survivors with what people wrote about them after earlier runs."""
    before = json.loads(RESULTS.read_text())["survivors"] if RESULTS.is_file() else []
    reasons = {s["mutant"]: s["reason"] for s in before}
    return [{"mutant": m.name, "line": m.line, "how": v.how, "reason": reasons.get(m.name, "")} for m, v in survivors]


if __name__ == "__main__":
    sys.exit(main())
