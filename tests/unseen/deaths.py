"""Runs that die at every operation on files, one after the other: what goes on is the unbroken run.

Case n is the kind of run n modulo the number of kinds, dying at an operation of its own; the nightly cases are all
operations of all kinds. Of the names that were not synchronised none, half or all are lost with the power.
"""

from __future__ import annotations

import random
import tempfile
from collections.abc import Mapping
from functools import cache
from pathlib import Path

from tests.store.runs import KINDS, Run, files

MOST = 310
"""Operations of the longest run, at most."""
CI, NIGHTLY = 34, len(KINDS) * MOST


def case(seed: int) -> Mapping[str, int]:
    """One death."""
    kind = list(KINDS)[seed % len(KINDS)]
    wanted, count = _whole(kind)
    assert count <= MOST, f"{kind}: {count} operations; the nightly cases reach {MOST}"
    turn = seed // len(KINDS)
    at = random.Random(kind).sample(range(1, count + 1), count)[turn % count]
    with tempfile.TemporaryDirectory() as name:
        run = _run(kind)
        run.root = Path(name)
        assert run.broken("broken", at, lost=turn % 3 / 2).dead
        lost = not (run.root / "broken").exists()
        said = run.mended("broken")
        left = files(run.root / "broken")
        wrong = sorted(n for n in left.keys() | wanted.keys() if left.get(n) != wanted.get(n))
        assert not wrong, f"{kind}, operation {at}: {wrong} differ from the unbroken run's ({said})"
        assert [p.name for p in run.root.iterdir()] == ["broken"], f"{kind}, operation {at}: something is left"
    return {kind: 1, "anew": int(lost)}


def judge(tally: Mapping[str, int], cases: int) -> None:
    """Each kind was tried, and few runs began anew."""
    assert all(tally.get(kind, 0) for kind in KINDS)
    assert tally.get("anew", 0) <= cases // 2


@cache
def _run(kind: str) -> Run:
    return Run(Path(), kind)


@cache
def _whole(kind: str) -> tuple[dict[str, bytes], int]:
    """What the unbroken run leaves, and its number of operations."""
    with tempfile.TemporaryDirectory() as name:
        run = _run(kind)
        run.root = Path(name)
        count = run.operations("whole")
        return files(run.root / "whole"), count
