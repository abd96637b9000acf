"""Multiple-shooting specs on the command line."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lagcompile.ir.base import DataError
from lagcompile.workbench.shooting import is_shooting, solve

SPECS = Path(__file__).parents[2] / "specs"


def test_a_spec_is_fitted_and_drawn(tmp_path: Path) -> None:
    text = (SPECS / "shooting" / "pendulum.yaml").read_text().replace("count: 100", "count: 4")
    path = tmp_path / "pendulum.yaml"
    path.write_text(text)
    assert is_shooting(path)
    said: list[str] = []
    torch.manual_seed(0)
    assert solve(path, tmp_path / "run", force=False, say=said.append) == 0
    assert "4 guesses: 100% recover every parameter within 2 %" in said[0]
    written = {p.name for p in (tmp_path / "run").iterdir()}
    assert written == {"result.txt", "simulation.png", "defects.png", "parameters.png"}
    with pytest.raises(DataError, match="--force to write into it"):
        solve(path, tmp_path / "run", force=False, say=said.append)


def test_other_specs_are_not_taken(tmp_path: Path) -> None:
    assert not is_shooting(SPECS / "digits_extraprop.yaml")
