"""Run specs: every problem of a file at once with its line; names resolved; the schema on disk is the class's."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from lagcompile.backends.first_order import Extragradient
from lagcompile.backends.sqp import SQP
from lagcompile.frontend.split import AtSplit, BalancedSplit
from lagcompile.ir.base import SpecError
from lagcompile.ir.yamlfile import dumps, validate
from lagcompile.workbench.cli import schema_text
from lagcompile.workbench.prepare import as_splits, fresh_model, prepare
from lagcompile.workbench.schedule import Cosine, Decay
from lagcompile.workbench.spec import Baseline, RunSpec, load
from tests.workbench.specs import MOONS, moons, replaced

ROOT = Path(__file__).parents[2]


def problems(path: Path, *trust: str) -> list[str]:
    with pytest.raises(SpecError) as caught:
        prepare(load(path, trust=trust)).executor()
    return [p.removeprefix(f"{path}:") for p in caught.value.problems]


def test_a_spec_stands_for_a_program(tmp_path: Path) -> None:
    loaded = load(moons(tmp_path), steps=7, seed=None)
    assert loaded.spec.run.steps == 7
    assert loaded.spec.run.batch_size == 16
    assert isinstance(loaded.spec.method, Extragradient)
    assert loaded.spec.rival == Baseline(run=False)
    prepared = prepare(loaded)
    assert prepared.program.name == "moons"
    assert prepared.program.objective.loss == "cross_entropy"
    assert [s.name for s in prepared.program.stages] == ["f0", "f1", "f2"]


def test_what_is_written_reads_back_equal(tmp_path: Path) -> None:
    spec = load(moons(tmp_path)).spec
    (tmp_path / "again.yaml").write_text(dumps(spec))
    assert validate(tmp_path / "again.yaml", RunSpec) == spec


def test_backend_is_short_for_the_kind_of_the_method(tmp_path: Path) -> None:
    head = MOONS[: MOONS.index("method:")]
    path = tmp_path / "moons.yaml"
    for text in ("backend: sqp\n", "backend: sqp\nmethod: {}\n", "backend: sqp\nmethod: {kind: sqp}\n"):
        path.write_text(head + text)
        assert load(path).spec.method == SQP()
    path.write_text(head + "backend: sqp\nmethod: {solver: osqp}\n")
    assert load(path).spec.method == SQP(solver="osqp")
    path.write_text(head + "backend: sqp\nmethod: {kind: convex}\n")
    with pytest.raises(SpecError) as caught:
        load(path)
    (problem,) = caught.value.problems
    assert problem.endswith(
        "moons.yaml:8: backend: 'sqp' here and 'convex' in method.kind say different things: keep one of them"
    )
    path.write_text(head + "backend: sqpp\n")
    with pytest.raises(SpecError, match=r"moons\.yaml:8: method\.kind: .*sqpp"):
        load(path)


def test_every_problem_of_the_form_at_once(tmp_path: Path) -> None:
    path = tmp_path / "moons.yaml"
    path.write_text(
        MOONS.replace("args: {widths", "arg: {widths")
        .replace("kind: extragradient", "kind: extragradien")
        .replace("batch_size: 16", "batch_size: 0")
        .replace("policy: at", "policy: cut")
        + "baselin: true\n"
    )
    found = problems(path)
    assert found[0] == "3: model.arg: unknown key, did you mean 'args'? Allowed here: args, name"
    assert found[1].startswith("5: split.policy: unknown policy 'cut'")
    assert found[2].startswith("9: method.kind: unknown kind 'extragradien', did you mean 'extragradient'?")
    assert found[3] == "13: run.batch_size: expected a positive integer, got 0"
    assert found[4].startswith("14: baselin: unknown key, did you mean 'baseline'?")
    assert len(found) == 5


def test_every_name_at_once(tmp_path: Path) -> None:
    path = tmp_path / "moons.yaml"
    text = MOONS.replace("name: mlp", "name: mpl").replace("train: 64", "trian: 64").replace("look_every: 5, ", "")
    path.write_text(
        text.replace("split: {policy: at, after: [layers.2, layers.4]}", "split: no.yaml\nloss: cross_entropi")
    )
    found = problems(path)
    assert found[0].startswith("3: model.name: unknown name 'mpl', did you mean 'mlp'?")
    assert found[1].startswith("4: data.name: 'two_moons' has no option 'trian', did you mean 'train'?")
    assert found[3].startswith("6: loss: unknown name 'cross_entropi', did you mean 'cross_entropy'?")
    assert found[2] == "5: split: there is no split spec 'no.yaml' in this file's folder"
    assert len(found) == 4


def test_data_and_model_problems_at_once(tmp_path: Path) -> None:
    path = tmp_path / "moons.yaml"
    path.write_text(MOONS.replace("train: 64", "train: 1").replace("[2, 8, 8, 2]", "[2]"))
    model, data = problems(path)
    assert data.startswith("4: data: two_moons: expected train >= 2")
    assert model.startswith("3: model: mlp(widths=[2], activation='tanh') failed: ValueError: widths:")


@pytest.mark.parametrize(
    ("old", "new", "problem"),
    [
        ("layers.4]", "layers.9]", "5: split: the model has no module and no graph node named 'layers.9'"),
        ("[2, 8, 8, 2]", "[3, 8, 8, 2]", "3: model: the model does not run on inputs of shape [8, 2]: RuntimeError"),
        ("  weight:", "  at: {nowhere: {}}\n  weight:", "6: formulation: formulation.at: no state is called 'nowhere'"),
        ("args: {train: 64, test: 32}", "args: {train: 0, test: 32}", "4: data: two_moons: expected train >= 2"),
        ("data:", "loss: mse\ndata:", "5: data: the model or the loss fails on the first 2 examples"),
        ("look_every", "device: cuda:99, look_every", "13: run.device: the device 'cuda:99' cannot be used here"),
        ("kind: extragradient", "kind: backprop", "11: method.states: unknown key; allowed here: kind, weights"),
        (
            "  weight: {kind: constant, value: 1.0}",
            "  storage: {kind: class_gaussian}",
            "6: formulation: the state h1 (layers.2), the state h2 (layers.4): kept per class, but the number of",
        ),
        ("layers.2, layers.4]}", "layers.2]}\nsplit: 3", "6: split: duplicate key, first given on line 5"),
        ("lagcompile: 1", "lagcompile: 2", "1: lagcompile: expected 1, got 2"),
        ("name: moons", "name: ../moons", "2: name:"),
        ("widths: [", "widths: !!python/name:os.system [", "3: model.args.widths: unknown tag"),
    ],
)
def test_one_problem_with_its_line(tmp_path: Path, old: str, new: str, problem: str) -> None:
    assert problems(replaced(tmp_path, old, new))[0].startswith(problem)


def test_impossible_number_of_stages(tmp_path: Path) -> None:
    path = replaced(tmp_path, "{policy: at, after: [layers.2, layers.4]}", "40")
    (problem,) = problems(path)
    assert problem.startswith("5: split:")
    assert "40" in problem


def test_a_schedule_for_what_the_method_does_not_have(tmp_path: Path) -> None:
    path = replaced(tmp_path, "split: {policy: at, after: [layers.2, layers.4]}", "split: {policy: none}")
    path.write_text(path.read_text() + "schedule: {states: {kind: cosine}}\n")
    (problem,) = problems(path)
    assert problem.startswith("14: schedule.states: method 'extragradient' has no step sizes of that group")


def test_split_as_number_and_as_file(tmp_path: Path) -> None:
    by_number = replaced(tmp_path, "{policy: at, after: [layers.2, layers.4]}", "2")
    assert load(by_number).split == BalancedSplit(stages=2)
    (tmp_path / "cuts.yaml").write_text("split: {policy: at, after: [layers.2]}\n")
    by_file = replaced(tmp_path, "{policy: at, after: [layers.2, layers.4]}", "cuts.yaml")
    assert load(by_file).split == AtSplit(after=("layers.2",))
    (tmp_path / "cuts.yaml").write_text("split: {policy: at, aftr: [layers.2]}\n")
    with pytest.raises(SpecError, match=r"cuts\.yaml:1: split\.aftr: unknown key, did you mean 'after'"):
        load(by_file)


def test_a_users_own_model_and_data(tmp_path: Path) -> None:
    (tmp_path / "zz_own.py").write_text(
        "import torch\n"
        "def data(*, n):\n"
        "    x = torch.randn(n, 2)\n"
        "    y = (x[:, 0] > 0).long()\n"
        "    return {'train': (x, y), 'test': (x, y), 'validation': torch.utils.data.TensorDataset(x, y)}\n"
        "def net():\n"
        "    return torch.nn.Sequential(torch.nn.Linear(2, 4), torch.nn.ReLU(), torch.nn.Linear(4, 2))\n"
        "def wrong():\n"
        "    return 3\n"
    )
    text = (
        MOONS.replace("{name: two_moons, args: {train: 64, test: 32}}", "{name: 'zz_own:data', args: {n: 20}}")
        .replace("{name: mlp, args: {widths: [2, 8, 8, 2], activation: tanh}}", "{name: 'zz_own:net'}")
        .replace("[layers.2, layers.4]", "['1']")
    )
    path = tmp_path / "own.yaml"
    path.write_text(text)
    prepared = prepare(load(path, trust=["zz_own"]))
    assert len(prepared.data.validation_x) == 20
    assert prepared.data.classes == ("0", "1")
    path.write_text(text.replace("zz_own:net", "zz_own:wrong").replace("zz_own:data', args: {n: 20}", "zz_own:wrong'"))
    model, data = problems(path, "zz_own")
    assert "'zz_own:wrong' gives a int, expected lagcompile.workbench.data.DataSplits or a mapping" in data
    assert "'zz_own:wrong' gives a int, expected a torch.nn.Module" in model


def test_the_seed_decides_the_weights(tmp_path: Path) -> None:
    path = moons(tmp_path)
    first, again, other = (fresh_model(load(path, seed=s)).state_dict() for s in (1, 1, 2))
    assert all(torch.equal(first[n], again[n]) for n in first)
    assert not all(torch.equal(first[n], other[n]) for n in first)


def test_data_that_is_none() -> None:
    with pytest.raises(Exception, match="gives a dict, expected"):
        as_splits({"train": 1}, "mine")


def test_schedules() -> None:
    cosine = Cosine(final=0.1)
    assert cosine.at(0, 100) == 1.0
    assert cosine.at(100, 100) == pytest.approx(0.1)
    assert cosine.at(50, 100) == pytest.approx(0.55)
    assert Cosine(final=0.1, until=0.5).at(50, 100) == Cosine(final=0.1, until=0.5).at(99, 100) == pytest.approx(0.1)
    assert Decay(factor=0.5, every=10).at(25, 100) == 0.25


def test_the_schema_on_disk_is_the_class() -> None:
    path = ROOT / "specs" / "schema.json"
    assert path.read_text() == schema_text(), "write it anew: lagcompile schema > specs/schema.json"
    assert set(json.loads(path.read_text())["properties"]) == {*RunSpec.model_fields, "backend"}


@pytest.mark.parametrize("path", sorted((ROOT / "specs").glob("*.yaml")), ids=lambda p: p.stem)
def test_each_spec_is_valid(path: Path) -> None:
    assert load(path).spec.name == path.stem
