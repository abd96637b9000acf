"""Small fits by multiple shooting in folders, as `lagcompile solve` makes them."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from unittest import mock

from lagcompile.store.keeping import Clock
from lagcompile.workbench.shooting import solve

SYSTEM = """\
kind: shooting
name: map
system: {name: logistic, samples: 24, dt: 1.0, noise: 0.02, initial: [0.3], observed: [0]}
"""
FITS: Mapping[str, str] = {
    "shooting": "starts: {count: 3}\nmethod: {stage_length: 2, lengthen: 1}\n",
    "bounded": "starts: {count: 2}\nbounds: {r: [2.0, 5.0]}\nmethod: {stage_length: 2, iterations: 8}\n",
    "first_order": "starts: {count: 3}\nmethod: {kind: shooting_extragradient, iterations: 60, refresh: 10}\n",
    "diagonal": (
        "starts: {count: 2}\nmethod:\n  {kind: shooting_extragradient, iterations: 40, refresh: 10, metric: diagonal,"
        " polish: {iterations: 6}}\n"
    ),
}
"""What follows on the system, by name."""


class Fit:
    """A fit of a kind.

    Args:
        root: where the spec and folders are.
        kind: of `FITS`.
    """

    def __init__(self, root: Path, kind: str) -> None:
        self.root, self.path = root / "runs", root / f"{kind}.yaml"
        self.path.write_text(SYSTEM + FITS[kind])
        self.said: list[str] = []
        self.clock: Callable[[], float] = lambda: 0.0

    def __call__(self, name: str, **keywords: Any) -> int:
        """Fit into a folder, with a checkpoint after every third iteration and the clock at zero."""
        with (
            mock.patch.object(time, "perf_counter", side_effect=self.clock),
            mock.patch.object(Clock, "due", lambda self, step: step % 3 == 0),
        ):
            return solve(self.path, self.root / name, force=False, say=self.said.append, **keywords)
