"""Every example runs, ends in an assertion, and stays short."""

from __future__ import annotations

import ast
import runpy
from pathlib import Path

import pytest

EXAMPLES = sorted((Path(__file__).parents[2] / "examples").glob("*.py"))


def test_there_are_examples() -> None:
    assert len(EXAMPLES) >= 4


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda p: p.stem)
def test_example(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = path.read_text()
    assert len(text.splitlines()) < 80
    assert any(isinstance(node, ast.Assert) for node in ast.walk(ast.parse(text)))
    monkeypatch.chdir(tmp_path)
    runpy.run_path(str(path), run_name="__main__")
