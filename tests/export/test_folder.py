"""Exported folders: used in a process without the model's source; modes, ties, errors that name a file."""

from __future__ import annotations

import copy
import importlib
import json
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import lagcompile as lc
from lagcompile.export.load import read_manifest
from lagcompile.export.model import ExportedModel
from tests.coverage import smooth_loss
from tests.export.folders import residual
from tests.frontend.test_zoo import same
from tests.frontend.zoo import ZOO
from tests.nets import Residual, deep

SOURCE = '''
import torch
from torch import nn


class Picture(nn.Module):
    """Batch normalisation, dropout, a skip."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.drop, self.head = nn.Dropout(0.3), nn.Linear(64, 3)

    def forward(self, x):
        h = torch.relu(self.norm(self.conv(x)))
        return self.head(self.drop((h + torch.tanh(h)).flatten(1)))


class Words(nn.Module):
    """Token numbers, tied embeddings, sizes that cross a cut."""

    def __init__(self):
        super().__init__()
        self.token, self.norm = nn.Embedding(11, 8), nn.LayerNorm(8)
        self.inner, self.drop, self.head = nn.Linear(8, 8), nn.Dropout(0.2), nn.Linear(8, 11, bias=False)
        self.head.weight = self.token.weight

    def forward(self, x):
        h = self.token(x)
        z = self.drop(torch.tanh(self.inner(self.norm(h)))) + h
        return self.head(z.view(x.size(0), -1, 8).mean(1))

'''

FRESH = """
import copy, json, sys, torch
from safetensors.torch import load_file, save_file
import lagcompile as lc

folder = sys.argv[1]
report = {}
for name in ("Picture", "Words"):
    lifted = lc.load(f"{folder}/{name}")
    data = load_file(f"{folder}/{name}.data")
    torch.manual_seed(5)
    train = copy.deepcopy(lifted).train()(data["x"])
    predicted = lifted.eval()(data["x"])
    torch.manual_seed(6)
    loss = torch.nn.functional.cross_entropy
    method = lc.Extragradient(weights=lc.SGD(lr=0.1))
    options = lc.RunOptions(steps=3, batch_size=4, seed=1)
    solution = lifted.solve((data["x"], data["y"]), loss=loss, method=method, options=options)
    again = lc.load(f"{folder}/{name}")
    certificate = again.verify(data["x"], data["y"], loss=loss)
    assert certificate.dtype == "float64"
    report[name] = {"ok": certificate.ok, "text": str(certificate), "stages": len(lifted.stages)}
    found = {"train": train, "eval": predicted}
    found |= {f"state/{n}": t for n, t in solution.states.items()}
    found |= {f"multiplier/{n}": t for n, t in solution.multipliers.items()}
    found |= {f"weight/{n}": t.clone() for n, t in solution.model.state_dict().items()}
    save_file({n: t.detach().contiguous() for n, t in found.items()}, f"{folder}/{name}.found")
    assert "source_of_models" not in sys.modules
print(json.dumps(report))
"""


def inputs_of(name: str) -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    if name == "Picture":
        return torch.randn(9, 1, 4, 4), torch.arange(9) % 3
    return torch.randint(0, 11, (9, 6)), torch.arange(9) % 11


def test_used_in_a_process_without_the_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tmp_path / "models" / "source_of_models.py"
    source.parent.mkdir()
    source.write_text(SOURCE)
    monkeypatch.syspath_prepend(source.parent)
    module = importlib.import_module("source_of_models")
    expected: dict[str, dict[str, Tensor]] = {}
    for name in ("Picture", "Words"):
        x, y = inputs_of(name)
        torch.manual_seed(1)
        lifted = lc.lift(getattr(module, name)(), (x,), split=3)
        before = {n: t.clone() for n, t in lifted.module.state_dict().items()}
        lifted.save(tmp_path / name)
        assert all(torch.equal(before[n], t) for n, t in lifted.module.state_dict().items())
        save_file({"x": x, "y": y}, tmp_path / f"{name}.data")
        torch.manual_seed(5)
        found = {"train": copy.deepcopy(lifted).train()(x), "eval": lifted.eval()(x)}
        torch.manual_seed(6)
        options = lc.RunOptions(steps=3, batch_size=4, seed=1)
        method = lc.Extragradient(weights=lc.SGD(lr=0.1))
        solution = copy.deepcopy(lifted).solve((x, y), loss=nn.functional.cross_entropy, method=method, options=options)
        found |= {f"state/{n}": t for n, t in solution.states.items()}
        found |= {f"multiplier/{n}": t for n, t in solution.multipliers.items()}
        found |= {f"weight/{n}": t for n, t in solution.model.state_dict().items()}
        expected[name] = found
    source.unlink()
    for cached in source.parent.rglob("*.pyc"):
        cached.unlink()
    monkeypatch.delitem(sys.modules, "source_of_models")
    run = subprocess.run(
        [sys.executable, "-c", FRESH, str(tmp_path)], capture_output=True, text=True, cwd=tmp_path, check=False
    )
    assert run.returncode == 0, run.stderr
    report = json.loads(run.stdout.splitlines()[-1])
    stages = [json.loads((tmp_path / "Picture" / f"stage_{k}.json").read_text()) for k in (0, 1)]
    assert ["evaluation" in s for s in stages] == [False, True]  # a graph for each mode where they differ
    assert expected["Picture"]["weight/norm.num_batches_tracked"] == 3  # moved once a step
    for name, values in expected.items():
        assert report[name]["ok"], report[name]["text"]
        got = load_file(tmp_path / f"{name}.found")
        for key in ("token.weight", "head.weight") if name == "Words" else ():
            assert f"weight/{key}" in got
        assert got.keys() == values.keys()
        for key, value in values.items():
            torch.testing.assert_close(got[key], value.detach(), rtol=1e-6, atol=1e-6, msg=f"{name}: {key}")


@pytest.mark.parametrize(
    "name",
    ["buffers of the model", "stochastic depth", "several", "no grad", "dataclass out", "auxiliary head"],
)
def test_both_modes_any_batch_and_buffers(name: str, tmp_path: Path) -> None:
    case = ZOO[name]
    torch.manual_seed(0)
    model = case.build()
    lifted = lc.lift(model, case.inputs(4), split=3, example_kwargs=case.kwargs(4))
    lifted.save(tmp_path / "out")
    loaded = lc.load(tmp_path / "out")
    assert loaded.program == lifted.program
    assert loaded.split == lifted.split
    for batch in (1, 2, 5):
        args, kwargs = case.inputs(batch), case.kwargs(batch)
        for training in (True, False):
            if batch == 1 and training:
                continue  # batch normalisation refuses it
            results, buffers = [], []
            for one in (lifted, loaded):
                twin = copy.deepcopy(one).train(training)
                torch.manual_seed(batch)
                results.append(twin(*args, **kwargs))
                torch.manual_seed(batch)
                results.append(copy.deepcopy(one).train(training).module(*args, **kwargs))
                buffers.append(twin.module.state_dict())
            plain = [list(_tensors(r)) for r in results]
            for other in plain[1:]:
                assert all(torch.equal(a, b) for a, b in zip(plain[0], other, strict=True))
            assert buffers[0].keys() == buffers[1].keys()
            assert all(torch.equal(buffers[0][n], buffers[1][n]) for n in buffers[0])
    args, kwargs = case.inputs(5), case.kwargs(5)
    certificate, expected = (one.verify(args, None, loss=smooth_loss, kwargs=kwargs) for one in (loaded, lifted))
    assert certificate.verdict == expected.verdict
    for said, as_lifted in zip(certificate.reasons, expected.reasons, strict=True):
        assert "the gradient is not the derivative of the loss" in said
        assert said.split("; look at")[0] == as_lifted.split("; look at")[0]  # the places have other names in a folder


def _tensors(value: object) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        return [t for v in value.values() for t in _tensors(v)]
    if isinstance(value, list | tuple):
        return [t for v in value for t in _tensors(v)]
    return [t for v in getattr(value, "__dict__", {}).values() for t in _tensors(v)]


def test_ties_names_and_the_state_dict(tmp_path: Path) -> None:
    lifted, folder = residual(tmp_path)
    loaded = lc.load(folder)
    assert isinstance(loaded.module, ExportedModel)
    assert loaded.module.get_parameter("third.weight") is loaded.module.get_parameter("second.weight")
    assert loaded.module.state_dict().keys() == lifted.module.state_dict().keys()
    twin = Residual()
    twin.load_state_dict(loaded.module.state_dict())
    x = torch.randn(3, 6)
    assert torch.equal(twin.eval()(x), loaded.eval()(x))
    assert "second.weight" in load_file(folder / "tensors.safetensors")
    assert "third.weight" not in load_file(folder / "tensors.safetensors")


def test_it_is_copied_pickled_and_exported_again(tmp_path: Path) -> None:
    lifted, folder = residual(tmp_path)
    loaded = lc.load(folder)
    x = torch.randn(3, 6)
    for twin in (copy.deepcopy(loaded), pickle.loads(pickle.dumps(loaded))):
        assert same(twin.eval()(x), lifted.eval()(x))
        assert twin.verify(x, None, loss=smooth_loss).ok
    again = lc.load(loaded.save(tmp_path / "again"))
    assert again.program == lifted.program
    assert same(again.eval()(x), lifted.eval()(x))


def test_named_tuples_pickle(tmp_path: Path) -> None:
    case = ZOO["named tuple out"]
    lifted = lc.lift(case.build(), case.inputs(4), split=2)
    loaded = lc.load(lifted.save(tmp_path / "out"))
    args = case.inputs(3)
    output, mine = lifted.eval()(*args), pickle.loads(pickle.dumps(loaded)).eval()(*args)
    assert mine._fields == output._fields
    assert all(torch.equal(a, b) for a, b in zip(_tensors(output), _tensors(mine), strict=True))


def test_a_stage_is_a_list_of_operators_that_any_tool_can_run(tmp_path: Path) -> None:
    lifted, folder = residual(tmp_path)
    assert {f.suffix for f in folder.iterdir()} == {".json", ".safetensors"}
    for file in folder.iterdir():  # it does not tell where on the machine the model stood
        assert str(Path(__file__).parent.parent).encode() not in file.read_bytes()
    program = json.loads((folder / "stage_1.json").read_text())
    tensors = load_file(folder / "tensors.safetensors")
    h, x = torch.randn(7, 12), torch.randn(7, 6)
    given = {"x": x, **dict.fromkeys(("tanh", "h1"), h)}
    graph = program["train"]
    values = dict(zip(graph["inputs"], (given[p["name"]] for p in program["reads"]), strict=True))

    def argument(data: Any) -> Any:
        if isinstance(data, list):
            return [argument(v) for v in data]
        if not isinstance(data, dict):
            return data
        return values[data["node"]] if "node" in data else tensors[data["tensor"]]

    for node in graph["nodes"]:
        _, name, overload = node["operator"].split(".")
        function = getattr(getattr(torch.ops.aten, name), overload)
        named = {k: argument(v) for k, v in node["kwargs"].items()}
        values[node["name"]] = function(*map(argument, node["args"]), **named)
    expected = lifted.stages["f1"](*(given[p["name"]] for p in program["reads"]))
    got = [argument(v) for v in graph["outputs"]]
    assert all(torch.equal(a, b) for a, b in zip(expected, got, strict=True))


def test_a_solution_comes_back(tmp_path: Path) -> None:
    x, y = torch.randn(12, 5), torch.randn(12, 5)
    lifted = lc.lift(deep(4), (x,), split=4)
    mse = nn.functional.mse_loss
    solution = lifted.solve((x, y), loss=mse, options=lc.RunOptions(steps=3, seed=0))
    folder = lifted.save(tmp_path / "out", solution=solution)
    back = lc.load_solution(folder)
    assert back.status is solution.status
    assert back.history.rows == solution.history.rows
    for mine, theirs in ((back.states, solution.states), (back.multipliers, solution.multipliers)):
        assert mine.keys() == theirs.keys()
        assert all(torch.equal(mine[n], theirs[n]) for n in theirs)
    assert torch.equal(back.model(x), solution.model(x))
    assert torch.equal(lc.load(folder)(x), solution.model(x))
    same_again = lc.load(lifted.save(tmp_path / "start")).solve(
        (x, y), loss=mse, options=lc.RunOptions(steps=3, seed=0)
    )
    for n, value in solution.multipliers.items():  # equal stages ran as one batched call in both
        torch.testing.assert_close(same_again.multipliers[n], value, rtol=1e-6, atol=1e-7)
    further = lc.load(folder).solve((x, y), loss=mse, start=back, options=lc.RunOptions(steps=1, seed=0))
    assert further.steps == 1
    with pytest.raises(lc.DataError, match="holds no solution"):
        lc.load_solution(tmp_path / "start")


class Fixed(nn.Module):
    """One batch size only."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.drop, self.b = nn.Linear(5, 6), nn.Dropout(0.5), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.drop(torch.tanh(self.a(x)).view(4, 3, 2).flatten(1)))


def test_what_is_frozen_and_what_is_not_persistent_stay_so(tmp_path: Path) -> None:
    model = Residual()
    model.first.weight.requires_grad_(False)
    model.register_buffer("scratch", torch.ones(3), persistent=False)
    loaded = lc.load(lc.lift(model, torch.randn(4, 6), split=2).save(tmp_path / "out"))
    frozen = {n for n, p in loaded.module.named_parameters() if not p.requires_grad}
    assert frozen == {"first.weight"} == {w.name for w in loaded.program.weights if not w.trainable}
    assert "scratch" in dict(loaded.module.named_buffers())
    assert loaded.module.state_dict().keys() == model.state_dict().keys()


def test_the_mode_and_a_fixed_batch_size_are_kept(tmp_path: Path) -> None:
    x = torch.randn(4, 5)
    lifted = lc.lift(Fixed().eval(), (x,), split=2)
    assert lifted.receipt is not None
    assert lifted.receipt.batch.startswith("fixed")
    with pytest.raises(lc.LiftError, match="give example_inputs: the model was captured for one batch size only"):
        lifted.save(tmp_path / "out")
    loaded = lc.load(lifted.save(tmp_path / "out", x))
    assert not loaded.module.training
    assert torch.equal(loaded(x), lifted(x))
    manifest = read_manifest(tmp_path / "out")
    assert (manifest.batch, manifest.rows) == (lifted.receipt.batch, 4)
    assert loaded.verify(x, None, loss=smooth_loss).ok
