"""The command line: what each command prints, exit statuses, errors without a traceback or a half-made folder."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lagcompile.ir.text import from_json
from lagcompile.workbench.cli import main
from tests.workbench.specs import MOONS, moons, replaced

Captured = pytest.CaptureFixture[str]


def call(monkeypatch: pytest.MonkeyPatch, *arguments: str | Path) -> int:
    """Exit status of a command line, run in this process."""
    monkeypatch.setattr(sys, "argv", ["lagcompile", *map(str, arguments)])
    with pytest.raises(SystemExit) as caught:
        main()
    return int(caught.value.code or 0)


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "120")


def test_help_and_version(monkeypatch: pytest.MonkeyPatch, capsys: Captured) -> None:
    for command in ("show", "plan", "solve", "verify", "diff", "schema"):
        assert call(monkeypatch, command, "--help") == 0
        assert len(capsys.readouterr().out) > 200
    assert call(monkeypatch, "--version") == 0
    assert capsys.readouterr().out.startswith("lagcompile ")


def test_show_and_plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Captured) -> None:
    path = moons(tmp_path)
    assert call(monkeypatch, "show", path) == 0
    text = capsys.readouterr().out
    assert text.startswith("program moons\n")
    assert call(monkeypatch, "show", path, "--json") == 0
    assert str(from_json(capsys.readouterr().out)) == text
    assert call(monkeypatch, "show", path, "--receipt") == 0
    assert "receipt for MLP, captured by" in capsys.readouterr().out
    assert call(monkeypatch, "plan", path, "--examples", "1000000") == 0
    planned = capsys.readouterr().out
    assert "1,000,000 examples" in planned
    assert "8,000,000" in planned
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(("rule", "size"), [("sgd", "122.1 MiB"), ("adagrad", "183.1 MiB"), ("adam", "244.1 MiB")])
def test_the_plan_counts_the_rows_of_the_augmented_lagrangians_optimiser(
    rule: str, size: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Captured
) -> None:
    """Two states of 8 numbers: states, multipliers, and no, one or two slots for each number of a state."""
    path = moons(tmp_path)
    text = path.read_text()
    head, tail = text[: text.index("method:")], text[text.index("run:") :]
    path.write_text(f"{head}method: {{kind: augmented_lagrangian, states: {{kind: {rule}, lr: 0.1}}}}\n{tail}")
    assert call(monkeypatch, "plan", path, "--examples", "1000000") == 0
    assert f"{size} for states, multipliers" in capsys.readouterr().out


def test_solve_then_verify_then_tamper(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Captured) -> None:
    path = moons(tmp_path)
    assert call(monkeypatch, "solve", path, "--baseline", "--steps", "10") == 0
    printed = capsys.readouterr()
    assert printed.err == ""
    for words in (
        "program moons",
        "solve 5/10",
        "backprop 20/20",
        "certificate for MLP",
        "Report: runs/moons/report.md",
    ):
        assert words in printed.out
    folder = tmp_path / "runs" / "moons"
    assert {"report.md", "report.json", "curves.png", "network.png", "model.pt"} <= {p.name for p in folder.iterdir()}

    certificate = folder / "certificate.json"
    assert call(monkeypatch, "verify", path, "--against", certificate) == 0
    assert f"{certificate} holds" in capsys.readouterr().out
    assert call(monkeypatch, "verify", path, "--against", certificate, "--weights", folder / "model.pt") == 0
    capsys.readouterr()
    assert call(monkeypatch, "verify", path, "--against", certificate, "--examples", "32") == 1
    assert "the inputs: the certificate was made for" in capsys.readouterr().err

    whole = certificate.read_text()
    stored = json.loads(whole)
    stored["residuals"].pop()
    certificate.write_text(json.dumps(stored))
    assert call(monkeypatch, "verify", path, "--against", certificate) == 2
    assert capsys.readouterr().err.startswith(f"{certificate} is damaged or was changed: ")
    (tmp_path / "mine").mkdir()
    copy = tmp_path / "mine" / certificate.name
    shutil.copy(folder / "model.pt", copy.parent)
    copy.write_text(json.dumps(stored))
    assert call(monkeypatch, "verify", path, "--against", copy) == 2
    assert "the certificate was changed after it was made" in capsys.readouterr().err
    certificate.write_text(whole)
    (folder / "model.pt").unlink()
    assert call(monkeypatch, "verify", path, "--against", certificate) == 2
    assert capsys.readouterr().err == f"there is no file {folder / 'model.pt'}\n"
    copy.write_text(whole)
    (copy.parent / "model.pt").unlink()
    certificate = copy
    assert call(monkeypatch, "verify", path, "--against", certificate) == 1
    assert "the weights: the certificate was made for" in capsys.readouterr().err
    other = replaced(tmp_path, "after: [layers.2, layers.4]", "after: [layers.2]")
    assert call(monkeypatch, "verify", other, "--against", certificate) == 1
    assert "the program: the certificate was made for" in capsys.readouterr().err


def test_verify_fresh_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Captured) -> None:
    path = moons(tmp_path)
    assert call(monkeypatch, "verify", path, "--out", tmp_path / "fresh.json") == 0
    assert "measured on fresh weights" in capsys.readouterr().out
    assert call(monkeypatch, "verify", path, "--against", tmp_path / "fresh.json") == 0
    impossible = replaced(tmp_path, "lagcompile: 1", "lagcompile: 1\ntolerance: 1.0e-300")
    status = call(monkeypatch, "verify", impossible)
    assert status == (1 if "FAILS" in capsys.readouterr().out else 0)
    assert call(monkeypatch, "verify", path, "--against", tmp_path / "none.json") == 2
    assert "none.json: there is no such file" in capsys.readouterr().err


def test_diff(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Captured) -> None:
    other = tmp_path / "other.yaml"
    other.write_text(MOONS.replace("value: 1.0", "value: 2.0").replace("[layers.2, layers.4]", "[layers.2]"))
    path = moons(tmp_path)
    assert call(monkeypatch, "diff", path, path) == 0
    assert capsys.readouterr().out == "the programs are equal\n"
    assert call(monkeypatch, "diff", path, other) == 0
    text = capsys.readouterr().out
    assert "-    c_h2:" in text
    assert "+    1: after layers.2" not in text
    assert "-    2: after layers.4" in text
    call(monkeypatch, "show", path, "--json")
    (tmp_path / "moons.json").write_text(capsys.readouterr().out)
    assert call(monkeypatch, "diff", tmp_path / "moons.json", path) == 0
    assert capsys.readouterr().out == "the programs are equal\n"
    (tmp_path / "broken.json").write_text("{}")
    assert call(monkeypatch, "diff", tmp_path / "broken.json", tmp_path / "absent.yaml") == 2
    said = capsys.readouterr().err
    assert "broken.json:1: required key 'data' is missing" in said
    assert "absent.yaml: there is no such file" in said


def test_wrong_input_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Captured) -> None:
    path = replaced(tmp_path, "layers.4]", "layers.7]")
    for command in ("show", "plan", "solve", "verify"):
        assert call(monkeypatch, command, path) == 2
        said = capsys.readouterr()
        assert said.out == ""
        assert said.err.startswith(f"{path}:5: split: the model has no module")
        assert "Traceback" not in said.err
    assert call(monkeypatch, "solve", moons(tmp_path), "--force", "--resume") == 2
    assert call(monkeypatch, "solve", moons(tmp_path), "--resume") == 2
    assert call(monkeypatch, "solve", moons(tmp_path), "--steps", "-1") == 2
    assert call(monkeypatch, "solve", moons(tmp_path), "--device", "cuda:77") == 2
    assert [p.name for p in tmp_path.iterdir()] == ["moons.yaml"]


def test_missing_data_says_how_to_get_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Captured) -> None:
    monkeypatch.delenv("LAGCOMPILE_DATA", raising=False)
    path = tmp_path / "m.yaml"
    path.write_text(MOONS.replace("{name: two_moons, args: {train: 64, test: 32}}", "{name: mnist}"))
    assert call(monkeypatch, "solve", path) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"{path}:4: data: the environment variable LAGCOMPILE_DATA is not set")
    assert "torchvision.datasets.MNIST" in said
    assert not (tmp_path / "runs").exists()


def test_quiet_prints_the_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Captured) -> None:
    assert call(monkeypatch, "solve", moons(tmp_path), "--quiet", "--steps", "2", "--out", "q") == 0
    text = capsys.readouterr().out
    assert "program" not in text
    assert "test accuracy" in text


def test_schema(monkeypatch: pytest.MonkeyPatch, capsys: Captured) -> None:
    assert call(monkeypatch, "schema") == 0
    assert "formulation" in json.loads(capsys.readouterr().out)["properties"]


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_a_signal_ends_a_run_with_a_report(tmp_path: Path, number: int, status: int) -> None:
    path = replaced(tmp_path, "steps: 30", "steps: 1000000")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, "-m", "lagcompile.workbench.cli", "solve", str(path)]
    log = tmp_path / "runs" / "moons" / "log.jsonl"
    with subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, text=True) as process:
        deadline = time.monotonic() + 120
        while not (log.is_file() and log.read_text()):
            assert time.monotonic() < deadline
            assert process.poll() is None
            time.sleep(0.05)
        process.send_signal(number)
        out, _ = process.communicate(timeout=120)
    assert process.returncode == status
    assert "interrupted: stopped by the user" in out
    report = json.loads((log.parent / "report.json").read_text())
    assert report["status"] == "interrupted"
    assert 0 < report["steps"] < 1000000
    assert (log.parent / "checkpoint-b.state").is_file()


@pytest.mark.parametrize("command", ["show", "plan"])
def test_what_a_method_is_not_defined_on_is_said_before_a_run(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Captured
) -> None:
    text = MOONS.replace("kind: extragradient\n", "kind: proxprop\n").replace(
        "  states: {kind: adagrad, lr: 0.1}\n  multipliers: {kind: sgd, lr: 0.3}\n", ""
    )
    spec = tmp_path / "moons.yaml"
    spec.write_text(text)
    assert call(monkeypatch, command, spec) == 2
    said = capsys.readouterr().err
    assert "method: " in said
    assert "storage: {kind: transient}" in said
