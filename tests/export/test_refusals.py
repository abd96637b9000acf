"""What an exported folder refuses, to be written and to be read, in words that name the file or the module."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

import lagcompile as lc
from tests.export.folders import residual, rewritten, sealed
from tests.frontend.zoo import ZOO
from tests.nets import Residual, deep


def test_a_solution_of_another_model_or_split_is_refused(tmp_path: Path) -> None:
    x, y = torch.randn(12, 5), torch.randn(12, 5)
    options = lc.RunOptions(steps=1, seed=0)
    mse = nn.functional.mse_loss
    lifted = lc.lift(deep(4), (x,), split=4)
    with pytest.raises(lc.LiftError, match=r"the solution is of another model: it differs in 4\.bias"):
        lifted.save(tmp_path / "a", solution=lc.lift(deep(2), (x,)).solve((x, y), loss=mse, options=options))
    with pytest.raises(lc.LiftError, match="its states are h1, those of the lifted model are h1, h2, h3"):
        lifted.save(tmp_path / "a", solution=lc.lift(deep(4), (x,), split=2).solve((x, y), loss=mse, options=options))
    assert list(tmp_path.iterdir()) == []


def test_mixed_modes_are_refused(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6), nn.Linear(6, 2))
    model[1].eval()
    lifted = lc.lift(model, (torch.randn(4, 5),), split=2)
    with pytest.raises(lc.LiftError, match=r"the model is in train mode, but 1 in eval mode: .* Call train"):
        lifted.save(tmp_path / "out")
    assert lc.load(lifted.eval().save(tmp_path / "out")).module.training is False


def test_every_damaged_file_is_named(tmp_path: Path) -> None:
    _, folder = residual(tmp_path)
    for file in sorted(folder.iterdir()):
        data = file.read_bytes()
        file.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
        with pytest.raises(lc.DataError) as caught:
            lc.load(folder)
        assert all(str(file) in p for p in caught.value.problems)
        file.unlink()
        with pytest.raises(lc.DataError) as caught:
            lc.load(folder)
        assert file.name in str(caught.value)
        file.write_bytes(data)
    lc.load(folder)


def test_a_manifest_that_was_changed_by_hand_is_refused(tmp_path: Path) -> None:
    _, folder = residual(tmp_path)
    data = json.loads((folder / "manifest.json").read_text())
    tensors = {n: {**t, "trainable": not t["trainable"]} for n, t in data["tensors"].items() if "trainable" in t}
    for change in ({"training": not data["training"]}, {"tensors": {**data["tensors"], **tensors}}, {"name": "other"}):
        (folder / "manifest.json").write_text(json.dumps({**data, **change}))
        with pytest.raises(lc.DataError, match=r"manifest\.json was changed after it was written"):
            lc.load(folder)


def test_versions_and_inner_damage(tmp_path: Path) -> None:
    _, folder = residual(tmp_path)
    text = (folder / "manifest.json").read_text()
    data = json.loads(text)
    for number in (1, 3, True, "2"):
        (folder / "manifest.json").write_text(json.dumps({**data, "format": number, "lagcompile": "9.0"}))
        with pytest.raises(
            lc.DataError, match=r"manifest\.json is of format .* \(written by lagcompile 9\.0\), .* format 2: .*again"
        ):
            lc.load(folder)
    (folder / "manifest.json").write_text("{")
    with pytest.raises(lc.DataError, match=r"manifest\.json:1:2: not valid JSON"):
        lc.load(folder)
    sealed(folder, {**data, "torch": "1.0"})
    stage = (folder / "stage_0.json").read_bytes()
    rewritten(folder, "stage_0.json", b"{")
    with pytest.raises(lc.DataError, match=r"stage_0\.json:1:2: not valid JSON.*written with torch 1\.0"):
        lc.load(folder)
    rewritten(folder, "stage_0.json", (folder / "stage_2.json").read_bytes())
    with pytest.raises(lc.DataError, match=r"stage_0\.json: it reads 'add', which is not there"):
        lc.load(folder)
    rewritten(folder, "stage_0.json", stage)
    program = json.loads((folder / "program.json").read_text())
    program["states"][0]["start"] = {"kind": "zeros"}
    rewritten(folder, "program.json", json.dumps(program).encode())
    with pytest.raises(lc.DataError, match=r"program\.json is not the program that the folder's stages give"):
        lc.load(folder)


def test_what_cannot_be_written_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    case = ZOO["layer drop"]
    lifted = lc.lift(case.build(), case.inputs(4), split=3)
    with pytest.raises(lc.LiftError, match=r"stage_\d cannot be written as a graph: .*zoo\.py:\d+"):
        lifted.save(tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
    _, folder = residual(tmp_path)
    with pytest.raises(lc.DataError, match="exists"):
        residual(tmp_path)
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "a.txt").write_text("mine")
    unknown = lc.lift(Residual())
    with pytest.raises(lc.DataError, match="is not an exported folder"):
        lc.lift(Residual(), (torch.randn(4, 6),)).save(tmp_path / "notes", replace=True)
    with pytest.raises(lc.LiftError, match="give example_inputs"):
        unknown.save(tmp_path / "new")
    unknown.save(folder, torch.randn(4, 6), replace=True)
    assert lc.load(folder).stages.keys() == unknown.resolve(torch.randn(4, 6)).stages.keys()
    with pytest.raises(lc.DataError, match=r"it has no manifest\.json"):
        lc.load(tmp_path / "notes")
