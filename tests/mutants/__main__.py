"""Run seeded mutants against the tests that cover them; survivors are kept with the reason that a person gave.

    python -m tests.mutants [--count 300] [--seed 0] [--jobs 2] [--only TEXT]

Counts and survivors go to tests/benchmarks/results/mutants.json; a survivor's `reason` is written there by hand and
stays. Exit status 1: fewer than 90 % killed, or a survivor without a reason.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path

import pytest
import torch  # every test needs it: imported once, before the first fork

from tests.mutants.covering import Covering, measure
from tests.mutants.draw import Mutant, draw

ROOT = Path(__file__).parents[2]
ROOMS = ("ir", "runtime", "check", "store")
RESULTS = ROOT / "tests/benchmarks/results/mutants.json"
KEPT = ROOT / ".mutants/covering.json"
SKIP = (
    *("tests/unseen", "tests/mutants", "tests/frontend", "tests/export", "tests/exact", "tests/dynamics"),
    *("tests/test_readme.py", "tests/test_threads.py"),
    *("tests/workbench/test_trust.py", "tests/workbench/test_examples.py"),
)
"""Long tests of other rooms: without them the share of the killed is a lower bound."""
SECONDS = 60.0
"""Time for one mutant's tests, as they took under coverage; the quickest come first."""
PATIENCE = 5.0
"""Tests that take this many times as long (and half a minute) have noticed something: they hang."""
SHARE = 0.9
"""Of the mutants that must be killed."""


def main() -> int:
    """Draw, run, report."""
    parser = argparse.ArgumentParser(prog="python -m tests.mutants", description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--only", default="", help="only mutants whose file or change has this text; nothing is kept")
    options = parser.parse_args()
    paths = [str(p.relative_to(ROOT)) for r in ROOMS for p in sorted((ROOT / "lagcompile" / r).rglob("*.py"))]
    covering = measure(ROOT, paths, KEPT, SKIP)
    mutants = [m for m in draw(ROOT, paths, options.count, options.seed) if options.only in m.name]
    begin = time.monotonic()
    survivors = run(mutants, covering, options.jobs)
    killed = len(mutants) - len(survivors)
    print(f"{killed} of {len(mutants)} killed in {time.monotonic() - begin:.0f} s")
    if options.only:
        return 0
    reasons = _reasons()
    listed = [{"mutant": m.name, "line": m.line, "reason": reasons.get(m.name, "")} for m in survivors]
    RESULTS.write_text(
        json.dumps({"mutants": len(mutants), "seed": options.seed, "killed": killed, "survivors": listed}, indent=2)
        + "\n"
    )
    return int(killed < SHARE * len(mutants) or not all(s["reason"] for s in listed))


def _reasons() -> dict[str, str]:
    """What people wrote about survivors of earlier runs."""
    if not RESULTS.is_file():
        return {}
    return {s["mutant"]: s["reason"] for s in json.loads(RESULTS.read_text())["survivors"]}


def run(mutants: Sequence[Mutant], covering: Covering, jobs: int) -> list[Mutant]:
    """The mutants that no covering test notices."""
    survivors = []
    work = [(m, *covering.tests(m.path, m.line, SECONDS)) for m in mutants]
    unchanged = [replace(m, source=(ROOT / m.path).read_text()) for m in mutants[:1]]
    with get_context("fork").Pool(jobs, initializer=_copy_tree) as pool:
        if any(verdict == "killed" for _, verdict in pool.map(_tried, [(u, *work[0][1:]) for u in unchanged])):
            raise SystemExit(f"tests that cover {mutants[0].path}:{mutants[0].line} fail without any change")
        for number, (mutant, verdict) in enumerate(pool.imap_unordered(_tried, work), 1):
            if verdict != "killed":
                survivors.append(mutant)
                print(f"[{number}/{len(work)}] {verdict}: {mutant.path}:{mutant.line} {mutant.change}", flush=True)
    return survivors


def _copy_tree() -> None:
    """Each worker changes a tree of its own; nothing is compiled to files, which could outlive a change."""
    place = Path(tempfile.mkdtemp(prefix="mutants-"))
    for name in ("lagcompile", "tests", "specs", "examples"):
        shutil.copytree(ROOT / name, place / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "Makefile"):
        if (ROOT / name).is_file():
            shutil.copy(ROOT / name, place / name)
    os.chdir(place)
    os.environ |= {"PYTHONPATH": str(place), "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}
    sys.dont_write_bytecode = True
    sys.path[:] = [str(place), *(p for p in sys.path if Path(p or ".").resolve() != ROOT)]
    for name in [n for n in sys.modules if n.split(".")[0] in {"lagcompile", "tests"}]:
        del sys.modules[name]
    torch.set_num_threads(1)


def _tried(work: tuple[Mutant, list[str], float]) -> tuple[Mutant, str]:
    """Run a mutant's tests in a child process; killed, survived, or not covered."""
    mutant, tests, seconds = work
    if not tests:
        return mutant, "not covered"
    path = Path(mutant.path)
    original = path.read_text()
    path.write_text(mutant.source)
    try:
        child = os.fork()
        if child == 0:
            _child(tests)
        return mutant, "survived" if _ended_well(child, PATIENCE * seconds + 30) else "killed"
    finally:
        path.write_text(original)


def _child(tests: list[str]) -> None:
    os.setpgrp()
    quiet = os.open(os.devnull, os.O_WRONLY)
    os.dup2(quiet, 1)
    os.dup2(quiet, 2)
    code = 1
    try:
        code = int(pytest.main(["-x", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", "-p", "no:cov", *tests]))
    finally:
        os._exit(code)


def _ended_well(child: int, patience: float) -> bool:
    """Whether the tests passed; tests that do not end in time have noticed something."""
    end = time.monotonic() + patience
    while time.monotonic() < end:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status) == 0
        time.sleep(0.05)
    os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return False


if __name__ == "__main__":
    sys.exit(main())
