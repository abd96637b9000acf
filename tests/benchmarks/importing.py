"""Time of `import lagcompile` against `import torch`, each in a fresh interpreter."""

from __future__ import annotations

import subprocess
import sys
import time

from tests.benchmarks.timing import Row, at_most, ms, side_by_side


def _import(name: str) -> None:
    subprocess.run([sys.executable, "-c", f"import {name}"], check=True)


def run() -> list[Row]:
    """The one comparison."""
    ours, torch = side_by_side(
        lambda: _import("lagcompile"), lambda: _import("torch"), rounds=7, warm_up=1, clock=time.perf_counter
    )
    return [at_most("import lagcompile / import torch", ours / torch, 1.5, f"{ms(ours)} against {ms(torch)}")]
