"""Every Python, YAML and bash block of the README runs, in a folder of its own and in the order of the text."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

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


def test_yaml_and_bash_blocks(tmp_path: Path) -> None:
    (spec,) = blocks("yaml")
    path = tmp_path / "digits_small.yaml"
    path.write_text(spec)
    assert load(path).spec.name == path.stem
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONWARNINGS": "ignore",
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    }
    for block in blocks("bash"):
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", block], cwd=tmp_path, env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
    assert (tmp_path / "runs" / "small" / "report.md").is_file()
    assert "the programs are equal" in done.stdout


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
