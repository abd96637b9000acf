"""Runs that die at every operation on files, one after the other: what goes on is the unbroken run.

Case n is the kind of run n modulo the number of kinds (fits by shooting and rows of a bench are kinds, too), dying at
an operation of its own; the nightly cases are all operations of all kinds. Of the names that were not synchronised
none, half or all are lost with the power.
"""

from __future__ import annotations

import random
import tempfile
import warnings
from collections.abc import Mapping
from functools import cache
from pathlib import Path

from tests.store.dying import died
from tests.store.kinds import ALL, run
from tests.store.runs import files

MOST = 400
"""Operations of the longest run, at most."""
CI, NIGHTLY = len(ALL), len(ALL) * MOST


def case(seed: int) -> Mapping[str, int]:
    """One death."""
    kind = ALL[seed % len(ALL)]
    wanted, count = _whole(kind)
    assert count <= MOST, f"{kind}: {count} operations; the nightly cases reach {MOST}"
    turn = seed // len(ALL)
    at = random.Random(kind).sample(range(1, count + 1), count)[turn % count]
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        assert died(root, at, lambda: run(kind, root, resume=False), lost=turn % 3 / 2).dead
        lost = not (root / "run").exists()
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            run(kind, root, resume=not lost)
        left = files(root / "run")
        wrong = sorted(n for n in left.keys() | wanted.keys() if left.get(n) != wanted.get(n))
        told = [str(w.message) for w in said]
        assert not wrong, f"{kind}, operation {at}: {wrong} differ from the unbroken run's ({told})"
        assert [p.name for p in root.iterdir()] == ["run"], f"{kind}, operation {at}: something is left"
    return {kind: 1, "anew": int(lost)}


def judge(tally: Mapping[str, int], cases: int) -> None:
    """Each kind was tried, and few runs began anew."""
    assert all(tally.get(kind, 0) for kind in ALL)
    assert tally.get("anew", 0) <= cases // 2


@cache
def _whole(kind: str) -> tuple[dict[str, bytes], int]:
    """What the unbroken run leaves, and its number of operations."""
    with tempfile.TemporaryDirectory() as name:
        count = died(Path(name), None, lambda: run(kind, Path(name), resume=False)).done
        return files(Path(name) / "run"), count
