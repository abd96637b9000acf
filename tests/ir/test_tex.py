"""Numbers in TeX, as a person would write them."""

from __future__ import annotations

import math

import pytest

from lagcompile.ir.tex import display, number


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0, "0"),
        (1.0, "1"),
        (-0.05, "-0.05"),
        (2.5, "2.5"),
        (0.01, "0.01"),
        (1e-3, "10^{-3}"),
        (-2.5e-7, r"-2.5 \cdot 10^{-7}"),
        (5e-4, r"5 \cdot 10^{-4}"),
        (9999.0, "9999"),
        (12345.0, r"1.2345 \cdot 10^{4}"),
        (1e5, "10^{5}"),
        (1e20, "10^{20}"),
        (math.inf, r"\infty"),
        (-math.inf, r"-\infty"),
        (math.nan, "nan"),
    ],
)
def test_numbers(value: float, text: str) -> None:
    assert number(value) == text


def test_all_lines_of_a_display_but_the_last_are_broken() -> None:
    assert display("a &= b", "c &= d") == [r"\begin{align*}", r"a &= b \\", "c &= d", r"\end{align*}"]
