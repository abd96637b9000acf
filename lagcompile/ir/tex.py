"""How numbers and displays are written in TeX.

In: numbers, lines. Out: TeX. Invariant: what a person would write; numbers to ten digits.
"""

from __future__ import annotations

import math


def number(value: float) -> str:
    r"""Write a number as a person would: 0.05, 3, 10^{-3}, 2.5 \cdot 10^{-7}."""
    if value == 0 or not math.isfinite(value):
        return {math.inf: r"\infty", -math.inf: r"-\infty"}.get(value, f"{value:g}")
    shown = f"{value:.10g}"
    if "e" not in shown and len(shown.lstrip("-0.")) <= 4 and 1e-3 < abs(value) < 1e5:
        return shown
    exponent = math.floor(math.log10(abs(value)))
    mantissa = f"{value / 10.0**exponent:.6g}"
    power = f"10^{{{exponent}}}"
    return power if mantissa == "1" else rf"{mantissa} \cdot {power}"


def display(*lines: str) -> list[str]:
    """Lines of mathematics, aligned at their `&`."""
    body = [line + (r" \\" if i + 1 < len(lines) else "") for i, line in enumerate(lines)]
    return [r"\begin{align*}", *body, r"\end{align*}"]
