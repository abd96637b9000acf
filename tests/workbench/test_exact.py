"""`verify --exact` and `spy`: the functions behind the commands, on a spec of the user's own."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
import torch
from rich.console import Console
from torch import Tensor, nn
from typer.testing import CliRunner

import lagcompile as lc
from lagcompile.store.folder import load_tensors
from lagcompile.workbench.cli import app
from lagcompile.workbench.exact import verify_exact
from lagcompile.workbench.prepare import prepare
from lagcompile.workbench.progress import Display
from lagcompile.workbench.spec import load
from lagcompile.workbench.spy import spy
from tests.problems import normal

SPEC = f"""
lagcompile: 1
name: small
model: {{name: "{__name__}:net"}}
data: {{name: "{__name__}:data"}}
loss: mse
split: 2
formulation:
  weight: {{kind: constant, value: 1.0}}
  regularisers: [{{kind: l2, on: weights, weight: 0.2}}]
method:
  kind: extragradient
  weights: {{kind: sgd, lr: 0.4}}
  states: {{kind: sgd, lr: 0.2}}
  multipliers: {{kind: sgd, lr: 0.3}}
run: {{steps: 20, batch_size: 8}}
"""


def net() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 2), nn.Tanh(), nn.Linear(2, 2)).double()


def relu() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 2), nn.ReLU(), nn.Linear(2, 2)).double()


def data() -> dict[str, tuple[Tensor, Tensor]]:
    pair = normal(1, 8, 3), normal(2, 8, 2)
    return {"train": pair, "test": pair}


def wide() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 1000), nn.Tanh(), nn.Linear(1000, 2)).double()


def _spec(folder: Path, text: str) -> Path:
    path = folder / "small.yaml"
    path.write_text(text)
    return path


def test_backends_stand_side_by_side(tmp_path: Path) -> None:
    shown = io.StringIO()
    prepared = prepare(load(_spec(tmp_path, SPEC), trust=["tests"]))
    comparison = verify_exact(prepared, display=Display(Console(file=shown)))
    assert comparison.ok
    assert all(f"{line.backend}:\n" in shown.getvalue() for line in comparison.lines)
    assert "primal inf" in shown.getvalue()
    names = ["sqp", "ipopt", "extragradient", "sqp from extragradient"]
    assert [line.backend for line in comparison.lines] == names
    sqp, ipopt, rough, polished = comparison.lines
    assert polished.against == "extragradient"
    assert max(sqp.primal, sqp.dual) <= 1e-8
    if ipopt.distance is not None:
        assert ipopt.distance.primal <= 1e-6
    assert rough.distance is not None
    assert rough.distance.primal > 1e-3  # twenty steps are not enough, and the table says so
    assert "strict local minimum" in str(comparison)


def test_a_method_that_ends_near_another_minimum_is_compared_with_that_one(tmp_path: Path) -> None:
    """Hidden units with other signs are as good: SQP starts once more from what the method reached."""
    text = SPEC.replace("steps: 20", "steps: 600").replace(
        "  weight: {kind: constant, value: 1.0}",
        "  weight: {kind: augmented, value: 1.0}\n  transform: {kind: softshrink, epsilon: 0.05}",
    )
    comparison = verify_exact(prepare(load(_spec(tmp_path, text), trust=["tests"])))
    polished = comparison.lines[-1]
    assert polished.status == "solved"
    assert polished.distance is not None
    assert polished.distance.primal <= 1e-4
    assert polished.distance.multipliers <= 1e-4
    assert comparison.certificates["sqp from extragradient"].ok


def test_a_run_by_sqp_shows_its_iterations_on_the_screen_and_in_the_report(tmp_path: Path) -> None:
    method = SPEC[SPEC.index("method:") : SPEC.index("run:")]
    path = _spec(tmp_path, SPEC.replace(method, "method: {kind: sqp, hessian: bfgs, tolerance: 1.0e-6}\n"))
    found = CliRunner().invoke(app, ["solve", str(path), "--trust", "tests", "--out", str(tmp_path / "run")])
    assert found.exit_code == 1, found.output  # solved to 1e-6: the certificate asks for 1e-8, and says so
    assert "solved: the KKT conditions hold to the tolerance asked for" in found.output
    header = "iter        objective  primal inf    dual inf      step  regular.  kind"
    assert header in found.output
    report = (tmp_path / "run" / "report.md").read_text()
    for section in ("## KKT conditions at the solution", "## Iterations", "| 0 | "):
        assert section in report
    kept = json.loads((tmp_path / "run" / "report.json").read_text())
    assert kept["iterations"][-1]["dual_infeasibility"] <= 1e-6
    assert {"step_length", "regularisation", "objective"} <= set(kept["iterations"][0])
    assert not kept["conditions"]["unassessed"]
    assert (tmp_path / "run" / "curves.png").stat().st_size > 5_000


def test_an_infeasible_spec_names_what_excludes_each_other(tmp_path: Path) -> None:
    text = (
        SPEC[: SPEC.index("formulation:")] + "formulation: {frozen: ['*'], domain: {kind: range, lower: 2, upper: 3}}\n"
    )
    path = _spec(tmp_path, text + "method: {kind: sqp, solver: osqp}\n")
    found = CliRunner().invoke(app, ["solve", str(path), "--trust", "tests", "--out", str(tmp_path / "run")])
    assert found.exit_code == 1
    assert "infeasible: the constraints contradict each other" in found.output
    assert "the smallest set found that excludes each other: c_h1: stage f0, state h1, example" in found.output
    assert "excludes each other" in (tmp_path / "run" / "report.md").read_text()


@pytest.mark.parametrize("method", ["sqp", "mixed_integer"])
def test_inputs_that_were_solved_for_count_in_the_defects_of_the_report(tmp_path: Path, method: str) -> None:
    text = SPEC[: SPEC.index("formulation:")].replace(":net", ":net" if method == "sqp" else ":relu")
    text = text.replace("loss: mse", "loss: mse" if method == "sqp" else "loss: l1")
    text += "formulation: {frozen: ['*'], inputs: {input_1: {lower: -0.5, upper: 0.5}}}\n"
    path = _spec(tmp_path, text + f"method: {{kind: {method}}}\n")
    found = CliRunner().invoke(app, ["solve", str(path), "--trust", "tests", "--out", str(tmp_path / "run"), "--quiet"])
    assert found.exit_code == 0, found.output
    kept = json.loads((tmp_path / "run" / "report.json").read_text())
    assert kept["defects"][0]["largest"] <= 1e-6
    solved = load_tensors(tmp_path / "run" / "solution.pt")
    assert float(solved["inputs"]["input_1"].abs().max()) <= 0.5
    assert solved["multipliers"]["lambda1"].shape == solved["states"]["h1"].shape == (8, 2)


def test_a_refused_spec_says_how_much_it_would_need(tmp_path: Path) -> None:
    method = SPEC[SPEC.index("method:") : SPEC.index("run:")]
    path = _spec(tmp_path, SPEC.replace(method, "method: {kind: sqp, memory_limit: 1000}\n"))
    found = CliRunner().invoke(app, ["solve", str(path), "--trust", "tests", "--out", str(tmp_path / "run"), "--quiet"])
    assert "refused: the program does not fit this backend" in found.output
    assert "variables and" in found.output
    assert "the limit is" in found.output
    assert found.exit_code == 1


def test_what_is_too_large_is_refused_with_what_would_fit(tmp_path: Path) -> None:
    path = _spec(tmp_path, SPEC.replace(":net", ":wide"))
    with pytest.raises(lc.SpecError, match=r"14,002 variables .*, more than 5,000: it fits with no example at all"):
        verify_exact(prepare(load(path, trust=["tests"])))


def test_spy_draws_the_bands(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="pictures need Matplotlib: pip install 'lagcompile[plots]'")
    found = spy(prepare(load(_spec(tmp_path, SPEC), trust=["tests"])), tmp_path / "spy.png", examples=3)
    assert (tmp_path / "spy.png").stat().st_size > 5_000
    assert found.jacobian.shape == (6, 20)
    assert [b.label for b in found.columns] == ["f0 0.weight", "f0 0.bias", "h1", "f1 2.weight", "f1 2.bias"]
    assert [b.label for b in found.rows] == ["f0: h1"]
    assert not found.jacobian[:, 14:].any()  # the last stage's weights are in no defect
