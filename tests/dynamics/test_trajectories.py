"""Trajectories: what is checked at the door, and how unequal lengths are padded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from lagcompile.dynamics import Trajectories, Trajectory, read_csv
from lagcompile.ir.base import DataError, SpecError


def test_unequal_lengths_are_padded_and_masked() -> None:
    a = Trajectory(torch.ones(5, 2), inputs=torch.ones(4, 1), name="a")
    b = Trajectory(torch.ones(3, 2), times=torch.tensor([0.0, 0.5, 2.0]), inputs=torch.ones(3, 1), name="b")
    data = Trajectories.stack([a, b])
    assert data.lengths == (5, 3)
    assert data.observations.shape == (2, 5, 2)
    assert data.mask[1].tolist() == [[True, True]] * 3 + [[False, False]] * 2
    assert data.inputs is not None
    assert data.inputs.shape == (2, 5, 1)
    assert bool((data.times[:, 1:] > data.times[:, :-1]).all())


def test_every_problem_of_every_trajectory_is_reported_at_once() -> None:
    bad_time = Trajectory(torch.ones(4, 1), times=torch.tensor([0.0, 1.0, 1.0, 2.0]), name="clock")
    missing = torch.ones(4, 1)
    missing[2] = float("nan")
    bad_value = Trajectory(missing, times=torch.tensor([0.0, 0.5, 1.0, 1.5]), name="sensor")
    with pytest.raises(DataError) as error:
        Trajectories.stack([bad_time, bad_value])
    assert error.value.problems == (
        "trajectory 'clock': time stamps must increase, but sample 2 has time 1 after 1: sort the rows or split the "
        "trajectory there",
        "trajectory 'sensor': output 0 is nan at sample 2 (time 1) without a mask: pass mask=~isnan(observations) to "
        "leave missing values out",
    )


def test_nan_under_a_mask_is_a_missing_value() -> None:
    values = torch.tensor([1.0, float("nan"), 3.0])
    data = Trajectories.single(values, mask=~torch.isnan(values))
    assert data.observations[0, :, 0].tolist() == [1.0, 0.0, 3.0]
    assert data.mask[0, :, 0].tolist() == [True, False, True]


def test_short_inputs_are_refused() -> None:
    with pytest.raises(DataError) as error:
        Trajectories.single(torch.ones(6, 1), inputs=torch.ones(3, 1))
    assert error.value.problems == (
        "trajectory '0': inputs end at sample 2 (time 2), the trajectory of 6 samples needs at least 5 rows of inputs",
    )


def test_inputs_cannot_be_missing() -> None:
    inputs = torch.tensor([0.0, float("inf"), 0.0])
    with pytest.raises(DataError, match=r"input 0 is inf at sample 1 \(time 1\): inputs cannot be masked"):
        Trajectories.single(torch.ones(3, 1), inputs=inputs)


def test_time_stamps_of_a_wrong_number_are_refused() -> None:
    with pytest.raises(DataError, match=r"^trajectory 'run': 4 samples need 4 time stamps, got shape \(3,\)$"):
        Trajectories.single(torch.ones(4, 1), times=torch.arange(3), inputs=torch.ones(4, 1), name="run")


def test_csv(tmp_path: Path) -> None:
    file = tmp_path / "run.csv"
    file.write_text("t, angle, torque\n0.0,1.0,0.5\n0.1,,0.5\n0.2,3.0,0.25\n")
    found = read_csv(file, outputs=["angle"], inputs=["torque"], time="t")
    data = Trajectories.stack([found])
    assert data.names == ("run",)
    assert data.mask[0, :, 0].tolist() == [True, False, True]
    assert data.times[0].tolist() == [0.0, 0.1, 0.2]
    with pytest.raises(DataError, match=r"has no column 'speed'; it has t, angle, torque"):
        read_csv(file, outputs=["speed"])


def test_csv_of_other_tongues_and_names_of_a_wrong_kind(tmp_path: Path) -> None:
    file = tmp_path / "run.csv"
    file.write_text("t;angle\n0,0;1,5\n0,1;2,5\n")
    with pytest.raises(DataError, match=r"separated by commas .and decimals by a point., here it seems to be ';'$"):
        read_csv(file, outputs=["angle"], time="t")
    file.write_text("t,angle\n0,1\n1,2\n")
    wrong: list[dict[str, Any]] = [
        {"outputs": "angle"},
        {"outputs": None},
        {"outputs": []},
        {"outputs": [1]},
        {"outputs": ["angle"], "time": 0},
        {"outputs": ["angle"], "inputs": "t"},
    ]
    for names in wrong:
        with pytest.raises(SpecError, match=r"(outputs|inputs|time) takes"):
            read_csv(file, **names)
