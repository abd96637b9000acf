"""The driver: what a run folder holds, how it is made, interrupted and resumed; the baseline; final defects."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor

from lagcompile.backends.base import RunOptions
from lagcompile.check.certificate import Certificate
from lagcompile.ir.base import DataError
from lagcompile.ir.solution import Status
from lagcompile.runtime.rules import SGD
from lagcompile.store import folder as files
from lagcompile.store.stop import Stop
from lagcompile.workbench.baseline import backprop
from lagcompile.workbench.data import two_moons
from lagcompile.workbench.measure import outcome, state_defects
from lagcompile.workbench.prepare import prepare
from lagcompile.workbench.run import Outcome, load_weights, relift, solve
from lagcompile.workbench.schedule import Schedules
from lagcompile.workbench.spec import load
from tests.workbench.specs import MOONS, moons


def run(
    path: Path,
    folder: Path | None,
    *,
    steps: int | None = None,
    baseline: bool | None = None,
    force: bool = False,
    resume: bool = False,
) -> Outcome:
    prepared = prepare(load(path, steps=steps))
    return solve(prepared, folder=folder, baseline=baseline, force=force, resume=resume, stop=Stop())


def state(found: Outcome) -> Mapping[str, Tensor]:
    duals = {f"dual {n}": v for n, v in found.solution.multipliers.items()}
    return {**found.solution.model.state_dict(), **found.solution.states, **duals}


def same(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


def test_what_a_run_leaves(tmp_path: Path) -> None:
    found = run(moons(tmp_path), tmp_path / "runs" / "moons", baseline=True)
    place = tmp_path / "runs" / "moons"
    names = {p.name for p in place.iterdir()}
    assert names == {
        *(files.SPEC, files.PROGRAM, files.PROGRAM_JSON, files.LOG, files.MODEL, files.CERTIFICATE),
        *(f"{name}-{slot}.state" for name in ("checkpoint", "baseline") for slot in "ab"),
        *("lagcompile.sums", files.RUN_ID),
    }
    rows = [json.loads(line) for line in (place / files.LOG).read_text().splitlines()]
    assert [r["step"] for r in rows] == [5, 10, 15, 20, 25, 30]
    assert rows == [dict(r) for r in found.solution.history.rows]
    assert {"seconds", "loss", "defect", "outside", "dual"} <= set(rows[0])
    assert load(place / files.SPEC).spec == found.prepared.loaded.spec
    assert Certificate.load(place / files.CERTIFICATE) == found.certificate
    assert found.certificate.ok
    assert found.exit_code == 0
    model = load_weights(found.prepared, place / files.MODEL)
    assert same(model.state_dict(), found.solution.model.state_dict())
    assert found.solution.certificate == found.certificate
    assert found.certificate.check(relift(found.prepared, model)) == []
    with torch.no_grad():
        next(model.parameters())[0, 0] += 1e-6
    assert found.certificate.check(relift(found.prepared, model))[0].startswith(
        "the weights: the certificate was made for"
    )


def test_the_baseline_spends_the_same_gradients_from_the_same_weights(tmp_path: Path) -> None:
    found = run(moons(tmp_path), None, baseline=True)
    assert found.baseline is not None
    assert found.baseline.gradient_evaluations == found.solution.gradient_evaluations == 60
    assert found.baseline.status is Status.STEPS_DONE
    assert [r["step"] for r in found.baseline.history.rows] == [10, 20, 30, 40, 50, 60]
    assert found.baseline.history.column("loss")[-1] < found.baseline.history.column("loss")[0]
    assert run(moons(tmp_path), None).baseline is None
    no_steps = run(moons(tmp_path), None, steps=0, baseline=True)
    assert no_steps.baseline is not None
    assert no_steps.test == no_steps.baseline_test


def by_backprop(folder: Path, lr: float, more: str = "") -> Path:
    """The two moons by plain backprop, with a baseline."""
    head, rest = MOONS.split("formulation:")
    rule = f"weights: {{kind: sgd, lr: {lr}}}"
    method = f"method: {{kind: backprop, {rule}}}\nbaseline: {{run: true, {rule}}}\n"
    path = folder / "moons.yaml"
    path.write_text(head + method + rest[rest.index("run:") :] + more)
    return path


@pytest.mark.parametrize("schedule", ["", "schedule: {weights: {kind: decay, factor: 0.5, every: 7}}\n"])
def test_backprop_is_its_own_baseline(schedule: str, tmp_path: Path) -> None:
    """Two loops that share neither code nor the history of step sizes, with the same rows, in train mode."""
    found = run(by_backprop(tmp_path, 0.5, schedule), None)
    assert found.baseline is not None
    assert found.baseline.gradient_evaluations == found.solution.gradient_evaluations == 30
    theirs = found.baseline.model.state_dict()
    for name, value in found.solution.model.state_dict().items():
        torch.testing.assert_close(value, theirs[name], rtol=1e-5, atol=1e-6)
    assert not same(theirs, found.prepared.model.state_dict())
    assert found.exit_code == 0


def test_a_run_that_ends_worse_than_it_began_does_not_exit_well(tmp_path: Path) -> None:
    found = run(by_backprop(tmp_path, 1e3), None, baseline=False)
    assert found.solution.status is Status.WORSE
    assert found.exit_code == 1


def test_final_defects_are_those_of_the_states(tmp_path: Path) -> None:
    found = run(moons(tmp_path), None)
    x, layers = found.prepared.data.train_x, found.solution.model.eval()
    h1 = found.solution.states["h1"]
    stage = torch.nn.Sequential(*list(layers.modules())[2:5])
    with torch.no_grad():
        wanted = (stage(x) - h1).abs()
    first, second = found.defects
    assert (first.state, first.module) == ("h1", "layers.2")
    assert first.mean == pytest.approx(float(wanted.mean()), rel=1e-5)
    assert first.largest == pytest.approx(float(wanted.max()), rel=1e-5)
    assert found.defect == pytest.approx((first.mean + second.mean) / 2, rel=1e-4)


def test_defects_of_a_forward_pass_are_zero(tmp_path: Path) -> None:
    prepared = prepare(load(moons(tmp_path)))
    lifted, x = relift(prepared, prepared.model), prepared.data.train_x
    with torch.no_grad():
        values = lifted.network.glue([x])
    states = {s.name: values[s.node] for s in lifted.program.states}
    assert [(d.mean, d.largest, d.outside) for d in state_defects(lifted, states, x)] == [(0, 0, 0), (0, 0, 0)]


def test_a_resumed_run_is_the_unbroken_one(tmp_path: Path) -> None:
    path = tmp_path / "decay.yaml"
    schedule = "schedule: {weights: {kind: decay, factor: 0.5, every: 7}}\n"
    path.write_text(MOONS + schedule)
    whole = run(path, tmp_path / "whole")
    stop, place = Stop(), tmp_path / "broken"

    def look(name: str, total: int, row: Mapping[str, float]) -> None:
        stop.asked = row["step"] >= 15

    broken = solve(prepare(load(path)), folder=place, look=look, stop=stop)
    assert broken.solution.status is Status.INTERRUPTED
    assert broken.exit_code == 130
    assert broken.solution.steps == 15
    assert not same(state(broken), state(whole))
    resumed = run(path, place, resume=True)
    assert same(state(resumed), state(whole))
    log = (place / files.LOG).read_text().splitlines()
    assert [json.loads(line)["step"] for line in log] == [5, 10, 15, 20, 25, 30]


def test_resuming_another_spec_is_refused(tmp_path: Path) -> None:
    path, place = moons(tmp_path), tmp_path / "run"
    run(path, place)
    path.write_text(MOONS.replace("lr: 0.3", "lr: 0.4"))
    with pytest.raises(DataError, match="was run with another spec"):
        run(path, place, resume=True)
    path.write_text(MOONS)
    assert run(path, place, steps=35, resume=True).solution.steps == 35
    with pytest.raises(DataError, match="nothing to resume"):
        run(path, tmp_path / "none", resume=True)


def test_a_folder_that_is_there(tmp_path: Path) -> None:
    path, place = moons(tmp_path), tmp_path / "run"
    run(path, place, steps=5)
    with pytest.raises(DataError, match="exists: --force replaces it"):
        run(path, place)
    (place / "extra").write_text("old")
    run(path, place, steps=5, force=True)
    assert not (place / "extra").exists()
    other = tmp_path / "mine"
    other.mkdir()
    (other / "thesis.tex").write_text("precious")
    for name in ("notes", "spec.yaml"):  # somebody's project may hold a spec of that name
        (other / name).write_text("mine")
        with pytest.raises(DataError, match="is not a run folder"):
            run(path, other, force=True)
    assert (other / "thesis.tex").read_text() == "precious"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["mine", "moons.yaml", "run"]


def test_divergence_ends_with_finite_weights(tmp_path: Path) -> None:
    path = tmp_path / "wild.yaml"
    wild = MOONS.replace("{kind: sgd, lr: 0.3}", "{kind: sgd, lr: 1.0e+30}").replace("look_every: 5", "look_every: 1")
    path.write_text(wild.replace("{kind: adagrad, lr: 0.1}", "{kind: sgd, lr: 1.0e+10}"))
    found = run(path, tmp_path / "run")
    assert found.solution.status is Status.DIVERGED
    assert found.exit_code == 1
    assert all(torch.isfinite(v).all() for v in found.solution.model.state_dict().values())
    assert found.certificate.ok


def test_held_out_numbers() -> None:
    model = torch.nn.Linear(2, 2)
    x, y = torch.randn(2500, 2), torch.randint(0, 2, (2500,))
    found = outcome(model, x, y, loss=torch.nn.functional.cross_entropy)
    assert found["loss"] == pytest.approx(float(torch.nn.functional.cross_entropy(model(x), y).detach()), rel=1e-5)
    assert found["accuracy"] == pytest.approx(float((model(x).argmax(1) == y).float().mean()), abs=1e-6)
    assert model.training
    assert set(outcome(model, x, x, loss=torch.nn.functional.mse_loss)) == {"loss"}
    dropped = torch.nn.Sequential(model, torch.nn.Dropout(0.9))
    assert outcome(dropped, x, y, loss=torch.nn.functional.cross_entropy) == found  # in eval mode
    assert all(m.training for m in dropped.modules())


def test_a_baselines_random_numbers_depend_on_its_seed_alone() -> None:
    def weights(before: int, seed: int) -> Tensor:
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(2, 8), torch.nn.Dropout(0.5), torch.nn.Linear(8, 2))
        torch.manual_seed(before)
        options = RunOptions(steps=5, batch_size=64, seed=seed)
        found = backprop(
            *(model, two_moons(train=64), options),
            loss=torch.nn.functional.cross_entropy,
            rule=SGD(lr=0.5),
            schedules=Schedules(),
            evaluations=5,
            stop=Stop(),
        )
        return torch.cat([p.detach().flatten() for p in found.model.parameters()])

    assert torch.equal(weights(1, seed=0), weights(2, seed=0))
    assert not torch.allclose(weights(1, seed=0), weights(1, seed=3), atol=1e-3)  # all rows in each step: dropout's


def test_a_method_that_solves_at_once(tmp_path: Path) -> None:
    path = tmp_path / "exact.yaml"
    path.write_text(
        "lagcompile: 1\nname: exact\nmodel: {name: mlp, args: {widths: [2, 3, 2], activation: tanh}}\n"
        "data: {name: two_moons, args: {train: 8}}\nloss: cross_entropy\nsplit: 2\n"
        "formulation: {regularisers: [{kind: l2, on: weights, weight: 0.1}]}\nmethod: {kind: sqp}\n"
    )
    found = run(path, tmp_path / "exact")
    assert found.solution.status is Status.SOLVED
    assert found.conditions is not None
    assert found.conditions.ok
    assert found.exit_code == 0
    assert Certificate.load(tmp_path / "exact" / files.KKT) == found.conditions
    again = run(path, tmp_path / "exact", resume=True)
    assert again.solution.history.column("objective") == found.solution.history.column("objective")
    for name, value in found.solution.model.state_dict().items():
        assert torch.equal(again.solution.model.state_dict()[name], value)
