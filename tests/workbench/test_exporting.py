"""`lagcompile export`, and exported folders in the place of specs: what is written and printed, exit statuses."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

import lagcompile as lc
from lagcompile.check.certificate import Certificate
from lagcompile.ir.text import from_json
from lagcompile.workbench.models import MLP
from tests.workbench.specs import moons, replaced
from tests.workbench.test_cli import call

Captured = pytest.CaptureFixture[str]


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "120")


def test_folder_latex_and_drawing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Captured) -> None:
    spec = moons(tmp_path)
    assert call(monkeypatch, "export", spec, "--to", "out", "--latex", "moons.tex", "--draw", "moons.svg") == 0
    assert capsys.readouterr().out == "wrote out\nwrote moons.tex\nwrote moons.svg\n"
    assert Path("moons.tex").read_text().startswith("% lagcompile: needs amsmath and amssymb\n")
    assert r"\paragraph{Method: extragradient.}" in Path("moons.tex").read_text()
    assert lc.load("out").program.name == "moons"

    assert call(monkeypatch, "verify", "out", "--examples", "5", "--out", "certificate.json") == 0
    printed = capsys.readouterr().out
    assert "float64: ok" in printed
    assert "measured on 5 made-up examples" in printed
    assert Certificate.load(Path("certificate.json")).ok
    assert call(monkeypatch, "show", "out") == 0
    printed = capsys.readouterr().out
    assert printed.startswith("program moons\n")
    assert "exported from MLP by lagcompile" in printed
    assert call(monkeypatch, "show", "out", "--json") == 0
    assert from_json(capsys.readouterr().out) == lc.load("out").program
    assert call(monkeypatch, "show", "out", "--receipt") == 0
    assert "receipt for MLP, captured by" in capsys.readouterr().out
    assert call(monkeypatch, "export", "out", "--draw", "again.png", "--latex", "again.tex", "--document") == 0
    assert Path("again.tex").read_text().startswith(r"\documentclass")

    assert call(monkeypatch, "export", spec, "--to", "out") == 2
    captured = capsys.readouterr()
    assert captured.err == "out exists: name another folder, or ask to replace it (replace=True, --force)\n"
    assert call(monkeypatch, "export", spec, "--to", "out", "--force") == 0


def test_weights_of_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Captured) -> None:
    spec = moons(tmp_path)
    assert call(monkeypatch, "solve", spec, "--steps", "2", "--quiet") == 0
    weights = Path("runs/moons/model.pt")
    assert call(monkeypatch, "export", spec, "--to", "out", "--weights", weights) == 0
    capsys.readouterr()
    saved, state = torch.load(weights, weights_only=True), lc.load("out").module.state_dict()
    assert saved.keys() == state.keys()
    assert all(torch.equal(saved[n], state[n]) for n in saved)


def test_weights_that_are_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Captured) -> None:
    spec = moons(tmp_path)
    kinds: list[tuple[object, str]] = [
        ({1: torch.ones(2)}, "m.pt holds a dict, expected a dictionary of tensors by name"),
        ([torch.ones(2)], "m.pt holds a list, expected a dictionary of tensors by name"),
        ({"a": Path("x")}, "m.pt is damaged, or no file of tensors: it is no pickle of tensors and plain values"),
    ]
    for value, problem in kinds:
        torch.save(value, tmp_path / "m.pt")
        for command in (("verify", spec), ("export", spec, "--to", "out")):
            capsys.readouterr()
            assert call(monkeypatch, *command, "--weights", "m.pt") == 2
            said = capsys.readouterr().err
            assert said.startswith(problem)
            assert said.count("\n") == 1


def test_a_spec_solves_an_exported_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Captured) -> None:
    lc.lift(MLP([2, 6, 6, 2]), (torch.randn(4, 2),), split=2).save("out")
    spec = replaced(tmp_path, "split: {policy: at, after: [layers.2, layers.4]}", "split: 3")
    model = "{name: exported, args: {folder: out}}"
    spec.write_text(re.sub("model: .*", f"model: {model}", spec.read_text()))
    assert call(monkeypatch, "solve", spec, "--steps", "2", "--quiet") == 0
    capsys.readouterr()
    solved = torch.load("runs/moons/model.pt", weights_only=True)
    assert solved.keys() == lc.load("out").module.state_dict().keys()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "nothing to write: give --to FOLDER, --latex FILE or --draw FILE\n"),
        (("--draw", "x.jpg"), "--draw x.jpg: a drawing is an .svg, .png or .pdf file\n"),
        (("--latex", "absent/x.tex"), "--latex absent/x.tex: there is no folder absent\n"),
        (
            ("--draw", "x.svg", "--weights", "model.pt"),
            "--weights goes with --to: LaTeX and drawings hold no weights\n",
        ),
    ],
)
def test_wrong_options(
    arguments: tuple[str, ...], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Captured
) -> None:
    spec = moons(tmp_path)
    before = sorted(tmp_path.iterdir())
    assert call(monkeypatch, "export", spec, *arguments) == 2
    assert capsys.readouterr().err == message
    assert sorted(tmp_path.iterdir()) == before


def test_wrong_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Captured) -> None:
    (tmp_path / "empty").mkdir()
    for command in (("verify",), ("show",), ("export", "--draw", "x.svg")):
        assert call(monkeypatch, command[0], "empty", *command[1:]) == 2
        assert capsys.readouterr().err == "empty is not an exported folder: it has no manifest.json\n"
    assert call(monkeypatch, "verify", "empty", "--seed", "1", "--exact") == 2
    assert capsys.readouterr().err == "--exact, --seed applies only to a spec: empty is an exported folder\n"
    assert call(monkeypatch, "export", "empty", "--to", "out") == 2
    assert capsys.readouterr().err == "--to out: empty is a folder already, copy it\n"
    assert call(monkeypatch, "export", "absent.yaml", "--to", "out") == 2
    assert capsys.readouterr().err == "absent.yaml: there is no such file\n"
