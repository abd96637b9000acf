"""Every Python, YAML and bash block of the README runs, in a folder of its own and in the order of the text."""

from __future__ import annotations

import contextlib
import io
import os
import re
import shlex
import sys
from pathlib import Path

import pytest

from lagcompile.workbench.cli import main
from lagcompile.workbench.spec import load

README = (Path(__file__).parent.parent / "README.md").read_text()
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.DOTALL | re.MULTILINE)


def blocks(language: str) -> list[str]:
    return [text for kind, text in BLOCK.findall(README) if kind == language]


def test_blocks_are_of_known_kinds() -> None:
    # console and text show what is printed, or set up a machine; they are not run
    assert {kind for kind, _ in BLOCK.findall(README)} == {"python", "yaml", "bash", "console", "text"}


@pytest.mark.parametrize("number", range(len(blocks("python"))))
def test_python_block(number: int) -> None:
    exec(compile(blocks("python")[number], f"README.md, python block {number + 1}", "exec"), {"__name__": "readme"})


def command(line: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """What one line of a bash block prints: `lagcompile ...`, perhaps `> file`; in this process, to save imports."""
    words = shlex.split(line)
    target = words[words.index(">") + 1] if ">" in words else None
    monkeypatch.setattr(sys, "argv", words[: words.index(">")] if ">" in words else words)
    assert words[0] == "lagcompile"
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), pytest.raises(SystemExit) as caught:
        main()
    assert caught.value.code in (0, None), line
    if target is not None:
        Path(target).write_text(printed.getvalue())
    return printed.getvalue()


def test_yaml_and_bash_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (spec,) = blocks("yaml")
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "digits_small.yaml"
    path.write_text(spec)
    assert load(path).spec.name == path.stem
    lines = [line for block in blocks("bash") for line in block.splitlines()]
    assert len(lines) >= 7
    printed = [command(line, monkeypatch) for line in lines]
    assert (tmp_path / "runs" / "small" / "report.md").is_file()
    assert "certificate.json holds" in printed[3]
    assert printed[-1] == "the programs are equal\n"


def test_the_wrong_spec_of_the_text(tmp_path: Path) -> None:
    from lagcompile.ir.base import SpecError
    from lagcompile.workbench.prepare import prepare

    path = tmp_path / "digits_small.yaml"
    path.write_text(blocks("yaml")[0].replace("[flatten, relu3]", "[flatten, relu9]"))
    with pytest.raises(SpecError) as caught:
        prepare(load(path))
    assert caught.value.problems[0].replace(f"{tmp_path}{os.sep}", "") == blocks("text")[0].strip()


def test_places_for_measured_tables() -> None:
    for name in ("bench", "results"):
        assert re.search(rf"<!-- {name}:begin -->\n(.*\n)*<!-- {name}:end -->", README)
