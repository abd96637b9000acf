"""Multiple-shooting specs on the command line."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lagcompile.ir.base import BindError, DataError, SpecError
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
    assert {"spec.yaml", "result.txt", "simulation.png", "defects.png", "parameters.png", "log.jsonl"} <= written
    with pytest.raises(DataError, match="--force replaces it"):
        solve(path, tmp_path / "run", force=False, say=said.append)


MAP = """kind: shooting
name: map
system: {name: logistic, samples: 60, dt: 1.0, noise: 0.02, initial: [0.3], observed: [0]}
"""


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("dt: 1.0", "dt: -1.0", "3: system.dt: expected a positive number, got -1.0"),
        ("samples: 60", "samples: 1", "3: system.samples: expected "),
        ("[0.3]", "[0.3, 1.0]", "3: system: logistic has 1 states, initial has 2 numbers"),
        ("observed: [0]", "observed: [1]", "3: system: observed names components (1,); logistic has 0 to 0"),
        (
            "name: map",
            "method: {stage_length: 0}",
            "stage_length: expected a positive integer or 'conditioning', got 0",
        ),
        ("name: map", "method: {kind: newton}", "unknown kind 'newton'; known kinds: shooting, shooting_extragradient"),
    ],
)
def test_wrong_values_are_named_with_their_line(tmp_path: Path, old: str, new: str, message: str) -> None:
    path = tmp_path / "map.yaml"
    path.write_text(MAP.replace(old, new if old != "name: map" else f"{old}\n{new}"))
    with pytest.raises(SpecError) as error:
        solve(path, tmp_path / "run", force=False, say=print)
    assert message in str(error.value)
    assert not (tmp_path / "run").exists()


def test_a_bound_on_what_is_not_there_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "map.yaml"
    path.write_text(MAP + "bounds: {mass: [0, 1]}\n")
    with pytest.raises(BindError, match=r"bounds name the parameter 'mass'; the rollout has cell\.r"):
        solve(path, tmp_path / "run", force=False, say=print)


def test_an_exploding_simulation_is_named_and_ends_with_status_1(tmp_path: Path) -> None:
    """The first guess of seed 0 is r = 17: one stage over all samples overflows."""
    path = tmp_path / "map.yaml"
    path.write_text(MAP + "starts: {count: 1, factor: 5.0, seed: 0}\nmethod: {stage_length: 60}\n")
    said: list[str] = []
    assert solve(path, tmp_path / "run", force=False, say=said.append) == 1
    assert said[0].startswith("diverged: 0 of 1 starts solved")
    assert "the simulation is not finite in trajectory 'logistic' at time " in said[0]


def test_first_order_with_a_polish_and_a_stage_length_that_does_not_divide(tmp_path: Path) -> None:
    path = tmp_path / "map.yaml"
    options = "kind: shooting_extragradient, stage_length: 7, iterations: 20, polish: {iterations: 40}"
    path.write_text(MAP + "starts: {count: 2, factor: 1.1}\nmethod: {" + options + "}\n")
    said: list[str] = []
    solve(path, tmp_path / "run", force=False, say=said.append)
    assert "stages of 7" in said[0]


def test_other_specs_are_not_taken(tmp_path: Path) -> None:
    assert not is_shooting(SPECS / "digits_extraprop.yaml")
