"""Report, figures and what is said without matplotlib."""

from __future__ import annotations

import builtins
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

from lagcompile.export.drawing import drawn
from lagcompile.ir.solution import History
from lagcompile.store.stop import Stop
from lagcompile.workbench.plot import draw_curves
from lagcompile.workbench.prepare import prepare
from lagcompile.workbench.report import facts, files, markdown, rows
from lagcompile.workbench.run import Outcome, solve
from lagcompile.workbench.spec import load
from tests.workbench.specs import MOONS, moons

PNG = b"\x89PNG"


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    folder = tmp_path_factory.mktemp("report")
    return solve(prepare(load(moons(folder))), folder=folder / "run", baseline=True, stop=Stop())


def test_a_written_report(found: Outcome) -> None:
    written, notes = files(found)
    assert notes == []
    text = written["report.md"].decode()
    assert "| extragradient | " in text
    assert "| backprop | " in text
    assert "![curves](curves.png)" in text
    assert "| h1 | layers.2 | " in text
    assert "softshrink" not in text
    assert str(found.certificate) in text
    for name in ("curves.png", "network.png"):
        assert written[name][:4] == PNG
    stored = json.loads(written["report.json"])
    assert stored == json.loads(json.dumps(facts(found)))
    assert stored["test"]["accuracy"] == found.test["accuracy"]
    assert stored["certificate"]["ok"] is True
    assert stored["baseline"]["gradient_evaluations"] == 60


def test_numbers_of_the_table(found: Outcome) -> None:
    main, rival = rows(found)
    assert main[0] == "extragradient"
    assert main[1] == f"{100 * found.test['accuracy']:.2f} %"
    assert main[3] == f"{found.defect:.1e}"
    assert (main[4], rival[4]) == ("60", "60")


def test_without_matplotlib(found: Outcome, monkeypatch: pytest.MonkeyPatch) -> None:
    original = builtins.__import__

    def missing(
        name: str,
        globals: Mapping[str, object] | None = None,
        locals: Mapping[str, object] | None = None,
        fromlist: Sequence[str] | None = (),
        level: int = 0,
    ) -> object:
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return original(name, globals, locals, fromlist, level)

    monkeypatch.setattr(builtins, "__import__", missing)
    written, notes = files(found)
    assert notes == ["No figures: figures need matplotlib: pip install 'lagcompile[plots]'"]
    text = written["report.md"].decode()
    assert "lagcompile[plots]" in text
    assert "![" not in text


def test_markdown_of_a_run_without_states(tmp_path: Path) -> None:
    path = tmp_path / "whole.yaml"
    path.write_text(MOONS.replace("split: {policy: at, after: [layers.2, layers.4]}", "split: {policy: none}"))
    found = solve(prepare(load(path, steps=3)), folder=None, stop=Stop())
    text = markdown(found, [], [])
    assert "Final defects" not in text
    assert rows(found)[0][3] == "-"


def test_many_stages_are_drawn(tmp_path: Path) -> None:
    path = tmp_path / "deep.yaml"
    widths = ", ".join(["2", *["4"] * 14, "2"])
    path.write_text(
        MOONS.replace("2, 8, 8, 2", widths).replace("split: {policy: at, after: [layers.2, layers.4]}", "split: 12")
    )
    assert drawn(prepare(load(path)).program, "png")[:4] == PNG


def test_curves_of_a_run_with_one_quantity() -> None:
    history = History(({"step": 1.0, "seconds": 0.1, "loss": 0.0}, {"step": 2.0, "seconds": 0.2, "loss": 1.0}))
    assert draw_curves({"one": (history, 2.0)})[:4] == PNG
