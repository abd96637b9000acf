"""LaTeX of programs: golden texts, every method, braces and environments that close."""

from __future__ import annotations

import re
from typing import get_args

import pytest
import torch

import lagcompile as lc
from lagcompile.export.latex import latex
from lagcompile.ir.base import Frozen
from lagcompile.ir.symbols import text
from lagcompile.ir.tex import number
from lagcompile.workbench.methods import MethodSpec
from tests.export.programs import GOLDEN, NAMES, program
from tests.golden.programs import NAMES as SPEC_NAMES
from tests.golden.programs import program as spec_program
from tests.nets import deep


def well_formed(written: str) -> None:
    """Braces, delimiters, environments and mathematics close; nothing of Python's shines through."""
    depth = 0
    for part in re.findall(r"\\.|[{}]", written.replace("\n", " ")):
        depth += {"{": 1, "}": -1}.get(part, 0)
        assert depth >= 0
    assert depth == 0
    stack = []
    for what, name in re.findall(r"\\(begin|end)\{([a-z*]+)\}", written):
        if what == "begin":
            stack.append(name)
        else:
            assert stack.pop() == name
    assert not stack
    outside = re.sub(r"\\begin\{align\*\}.*?\\end\{align\*\}", "", written, flags=re.DOTALL).replace(r"\$", "")
    assert outside.count("$") % 2 == 0
    for line in outside.splitlines():
        assert line.count("$") % 2 == 0, line
    plain = re.sub(r"\$[^$]*\$", "", outside)
    assert not re.search(r"(?<!\\)[_^]", plain.replace("% lagcompile: needs amsmath and amssymb", "")), plain
    for block in re.findall(r"\\begin\{align\*\}\n(.*?)\\end\{align\*\}", written, flags=re.DOTALL):
        lines = block.strip().splitlines()
        assert not lines[-1].endswith(r"\\")
        assert all(line.endswith(r"\\") for line in lines[:-1])
        assert block.count(r"\bigl") == block.count(r"\bigr")
        assert block.count(r"\Bigl") == block.count(r"\Bigr")
    assert "None" not in written
    assert "nan" not in written


@pytest.mark.parametrize("name", NAMES)
def test_golden_text(name: str) -> None:
    written = latex(*program(name))
    assert written == (GOLDEN / f"{name}.tex").read_text()
    well_formed(written)


@pytest.mark.parametrize("name", SPEC_NAMES)
def test_every_system_of_the_papers(name: str) -> None:
    well_formed(latex(spec_program(name)))


def options_of() -> list[type[Frozen]]:
    union = get_args(MethodSpec)[0]
    return list(get_args(union))


@pytest.mark.parametrize("method", options_of(), ids=lambda m: m.__name__)
def test_every_method_has_formulas(method: type[Frozen]) -> None:
    lifted = lc.lift(deep(3), (torch.randn(4, 5),), split=3)
    written = lifted.to_latex(method())
    well_formed(written)
    assert r"\paragraph{Method: " in written


def test_weight_decay_is_part_of_a_step_rule() -> None:
    method = lc.DescentAscent(weights=lc.Adam(lr=1e-3, weight_decay=0.1), states=lc.SGD(lr=0.5))
    written = lc.lift(deep(3), (torch.randn(4, 5),), split=3).to_latex(method)
    assert r"Adam (step $10^{-3}$, weight decay $0.1$, $\beta = (0.9, 0.999)$)" in written
    assert "gradient (step $0.5$)" in written


def test_an_unknown_method_is_refused() -> None:
    class Other(Frozen):
        kind: str = "magic"

    lifted = lc.lift(deep(2), (torch.randn(4, 5),), split=2)
    with pytest.raises(lc.ProgramError, match="no LaTeX is known for the method 'magic'"):
        lifted.to_latex(Other())


def test_a_document_and_shapes_that_are_not_known() -> None:
    lifted = lc.lift(deep(3), split=3)
    written = lifted.to_latex()
    assert r"$x^{(i)}$ & $\mathbb{R}^{d}$ & data" in written
    assert r"$h_{1}^{(i)}$ & $\mathbb{R}^{d}$ & state" in written
    whole = latex(lifted.program, document=True)
    assert whole.startswith(r"\documentclass{article}")
    assert whole.endswith("\\end{document}\n")
    assert r"\paragraph{Lagrangian.}" not in lc.lift(deep(2), (torch.randn(4, 5),), split=1).to_latex()


def test_numbers_and_names() -> None:
    shown = {0.05: "0.05", 3.0: "3", 1e-3: "10^{-3}", 2.5e-7: r"2.5 \cdot 10^{-7}", 0.0: "0", 1e12: "10^{12}"}
    assert {n: number(n) for n in shown} == shown
    assert text("a_b%{c}") == r"a\_b\%\{c\}"
