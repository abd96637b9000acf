"""An exported folder for the tests."""

from __future__ import annotations

from pathlib import Path

import torch

import lagcompile as lc
from tests.nets import Residual


def residual(tmp_path: Path) -> tuple[lc.Lifted, Path]:
    """A residual network in three stages, and the folder it was written to."""
    torch.manual_seed(0)
    lifted = lc.lift(Residual(), (torch.randn(4, 6),), split=3)
    return lifted, lifted.save(tmp_path / "out")
