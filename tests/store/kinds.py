"""Every kind of run that is kept in a folder, by name."""

from __future__ import annotations

import shutil
import tempfile
import weakref
from functools import cache
from pathlib import Path

from tests.store.benches import Bench
from tests.store.fits import FITS, Fit
from tests.store.runs import KINDS, Run

ALL = (*KINDS, *FITS, "bench")


def run(kind: str, root: Path, *, resume: bool) -> None:
    """Run a kind in the folder `run` of a place, or resume it there."""
    kept = made(kind)
    kept.root = root
    kept("run", resume=resume)


@cache
def made(kind: str) -> Run | Fit | Bench:
    """Make what is run, once."""
    if kind in KINDS:
        return Run(Path(), kind)
    if kind == "bench":
        return Bench(Path())
    place = Path(tempfile.mkdtemp())
    fit = Fit(place, kind)
    weakref.finalize(fit, shutil.rmtree, place)
    return fit
