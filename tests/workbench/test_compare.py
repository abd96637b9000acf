"""Two split specs side by side."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import lagcompile as lc
from lagcompile.frontend.split import SplitFile
from lagcompile.ir.yamlfile import dump
from lagcompile.workbench.compare import compare_files
from tests.nets import deep


def test_split_specs_are_compared_by_place(tmp_path: Path) -> None:
    a, b = tmp_path / "a.yaml", tmp_path / "b.yaml"
    lifted = lc.lift(deep(6), (torch.randn(4, 5),), split=4)
    lifted.save_split(a)
    dump(SplitFile(split=lc.AtSplit(after=("1", ("5", "6"), "9"))), b)
    assert compare_files(a, b).splitlines()[3:] == [
        " split",
        "   policy: at",
        "   after 1",
        "-  after 3",
        "-  after 7",
        "+  after 5 and 6",
        "+  after 9",
    ]
    assert compare_files(a, a) == ""


def test_a_split_spec_is_no_program(tmp_path: Path) -> None:
    a, b = tmp_path / "a.yaml", tmp_path / "b.json"
    a.write_text("split: {policy: balanced, stages: 3}\n")
    b.write_text(lc.lift(deep(3), (torch.randn(4, 5),)).program.model_dump_json())
    with pytest.raises(lc.SpecError, match="a split spec cannot be compared with a program"):
        compare_files(a, b)
    with pytest.raises(lc.SpecError, match="there is no such file"):
        compare_files(a, tmp_path / "none.yaml")
