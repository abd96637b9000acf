"""Runs that die at every operation on files, one after the other: what goes on is the unbroken run.

Case n is the kind of run n modulo the number of kinds, dying at an operation of its own; the nightly cases are all
operations of all kinds, fits by shooting included. Of the names that were not synchronised none, half or all are lost
with the power.
"""

from __future__ import annotations

import random
import shutil
import tempfile
import warnings
import weakref
from collections.abc import Mapping
from functools import cache
from pathlib import Path

from tests.store.dying import died
from tests.store.fits import FITS, Fit
from tests.store.runs import KINDS, Run, files

ALL = (*KINDS, *FITS)
MOST = 400
"""Operations of the longest run, at most."""
CI, NIGHTLY = 2 * len(ALL), len(ALL) * MOST


def case(seed: int) -> Mapping[str, int]:
    """One death."""
    kind = ALL[seed % len(ALL)]
    wanted, count = _whole(kind)
    assert count <= MOST, f"{kind}: {count} operations; the nightly cases reach {MOST}"
    turn = seed // len(ALL)
    at = random.Random(kind).sample(range(1, count + 1), count)[turn % count]
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        assert died(root, at, lambda: _run(kind, root, resume=False), lost=turn % 3 / 2).dead
        lost = not (root / "run").exists()
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            _run(kind, root, resume=not lost)
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


def _run(kind: str, root: Path, *, resume: bool) -> None:
    run = _made(kind)
    run.root = root
    run("run", resume=resume)


@cache
def _made(kind: str) -> Run | Fit:
    if kind in KINDS:
        return Run(Path(), kind)
    place = Path(tempfile.mkdtemp())
    weakref.finalize(made := Fit(place, kind), shutil.rmtree, place)
    return made


@cache
def _whole(kind: str) -> tuple[dict[str, bytes], int]:
    """What the unbroken run leaves, and its number of operations."""
    with tempfile.TemporaryDirectory() as name:
        count = died(Path(name), None, lambda: _run(kind, Path(name), resume=False)).done
        return files(Path(name) / "run"), count
