"""Test problems of Hock and Schittkowski, "Test Examples for Nonlinear Programming Codes" (Springer, 1981).

Out: `PROBLEMS`, a list of `Problem` with the published start and the published optimal objective. Inequalities are
written as g(x) <= 0 (the book writes g(x) >= 0). Invariant: optima are the book's, to as many digits as it prints, or
the closed form.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

INF = math.inf
Function = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Problem:
    number: int
    objective: Function
    x0: Sequence[float]
    optimum: float
    eq: Function | None = None
    ineq: Function | None = None
    lower: Sequence[float] | float = -INF
    upper: Sequence[float] | float = INF

    @property
    def name(self) -> str:
        return f"hs{self.number}"

    def start(self) -> Tensor:
        return torch.tensor(list(self.x0), dtype=torch.float64)

    def bounds(self) -> tuple[Tensor, Tensor]:
        n = len(self.x0)

        def side(value: Sequence[float] | float) -> Tensor:
            values = [value] * n if isinstance(value, float | int) else list(value)
            return torch.tensor(values, dtype=torch.float64)

        return side(self.lower), side(self.upper)


PROBLEMS: list[Problem] = []


def _add(
    number: int,
    x0: Sequence[float],
    optimum: float,
    objective: Callable[..., Tensor],
    *,
    eq: Callable[..., Sequence[Tensor]] | None = None,
    ineq: Callable[..., Sequence[Tensor]] | None = None,
    lower: Sequence[float] | float = -INF,
    upper: Sequence[float] | float = INF,
) -> None:
    """Functions take the variables as separate scalars, as the book writes them."""

    def stacked(function: Callable[..., Sequence[Tensor]]) -> Function:
        return lambda x: torch.stack(list(function(*x.unbind())))

    PROBLEMS.append(
        Problem(
            number,
            lambda x: objective(*x.unbind()),
            x0,
            optimum,
            None if eq is None else stacked(eq),
            None if ineq is None else stacked(ineq),
            lower,
            upper,
        )
    )


def _rosenbrock(a: Tensor, b: Tensor) -> Tensor:
    return 100 * (b - a**2) ** 2 + (1 - a) ** 2


exp, log, sin, cos, sqrt = torch.exp, torch.log, torch.sin, torch.cos, torch.sqrt

# bounds only
_add(1, [-2, 1], 0.0, _rosenbrock, lower=[-INF, -1.5])
_add(2, [-2, 1], 0.0504261879, _rosenbrock, lower=[-INF, 1.5])
_add(3, [10, 1], 0.0, lambda a, b: b + 1e-5 * (b - a) ** 2, lower=[-INF, 0.0])
_add(4, [1.125, 0.125], 8 / 3, lambda a, b: (a + 1) ** 3 / 3 + b, lower=[1.0, 0.0])
_add(
    5,
    [0, 0],
    -math.sqrt(3) / 2 - math.pi / 3,
    lambda a, b: sin(a + b) + (a - b) ** 2 - 1.5 * a + 2.5 * b + 1,
    lower=[-1.5, -3.0],
    upper=[4.0, 3.0],
)
# one equality
_add(6, [-1.2, 1], 0.0, lambda a, b: (1 - a) ** 2, eq=lambda a, b: [10 * (b - a**2)])
_add(7, [2, 2], -math.sqrt(3), lambda a, b: log(1 + a**2) - b, eq=lambda a, b: [(1 + a**2) ** 2 + b**2 - 4])
_add(8, [2, 1], -1.0, lambda a, b: 0 * a - 1, eq=lambda a, b: [a**2 + b**2 - 25, a * b - 9])
_add(
    9,
    [0, 0],
    -0.5,
    lambda a, b: sin(math.pi * a / 12) * cos(math.pi * b / 16),
    eq=lambda a, b: [4 * a - 3 * b],
)
_add(10, [-10, 10], -1.0, lambda a, b: a - b, ineq=lambda a, b: [3 * a**2 - 2 * a * b + b**2 - 1])
_add(11, [4.9, 0.1], -8.498464223, lambda a, b: (a - 5) ** 2 + b**2 - 25, ineq=lambda a, b: [a**2 - b])
_add(
    12,
    [0, 0],
    -30.0,
    lambda a, b: 0.5 * a**2 + b**2 - a * b - 7 * a - 7 * b,
    ineq=lambda a, b: [4 * a**2 + b**2 - 25],
)
_add(
    13,
    [-2, -2],
    1.0,
    lambda a, b: (a - 2) ** 2 + b**2,
    ineq=lambda a, b: [b - (1 - a) ** 3],
    lower=0.0,
)
_add(
    14,
    [2, 2],
    9 - 2.875 * math.sqrt(7),
    lambda a, b: (a - 2) ** 2 + (b - 1) ** 2,
    eq=lambda a, b: [a - 2 * b + 1],
    ineq=lambda a, b: [0.25 * a**2 + b**2 - 1],
)
_add(
    15,
    [-2, 1],
    306.5,
    _rosenbrock,
    ineq=lambda a, b: [1 - a * b, -a - b**2],
    upper=[0.5, INF],
)
_add(
    16,
    [-2, 1],
    0.25,
    _rosenbrock,
    ineq=lambda a, b: [-a - b**2, -(a**2) - b],
    lower=[-0.5, -INF],
    upper=[0.5, 1.0],
)
_add(
    17,
    [-2, 1],
    1.0,
    _rosenbrock,
    ineq=lambda a, b: [a - b**2, b - a**2],
    lower=[-0.5, -INF],
    upper=[0.5, 1.0],
)
_add(
    18,
    [2, 2],
    5.0,
    lambda a, b: 0.01 * a**2 + b**2,
    ineq=lambda a, b: [25 - a * b, 25 - a**2 - b**2],
    lower=[2.0, 0.0],
    upper=50.0,
)
_add(
    19,
    [20.1, 5.84],
    -6961.81381,
    lambda a, b: (a - 10) ** 3 + (b - 20) ** 3,
    ineq=lambda a, b: [100 - (a - 5) ** 2 - (b - 5) ** 2, (b - 5) ** 2 + (a - 6) ** 2 - 82.81],
    lower=[13.0, 0.0],
    upper=100.0,
)
_add(
    20,
    [-2, 1],
    81.5 - 25 * math.sqrt(3),
    _rosenbrock,
    ineq=lambda a, b: [-a - b**2, -(a**2) - b, 1 - a**2 - b**2],
    lower=[-0.5, -INF],
    upper=[0.5, INF],
)
_add(
    21,
    [-1, -1],
    -99.96,
    lambda a, b: 0.01 * a**2 + b**2 - 100,
    ineq=lambda a, b: [10 - 10 * a + b],
    lower=[2.0, -50.0],
    upper=50.0,
)
_add(22, [2, 2], 1.0, lambda a, b: (a - 2) ** 2 + (b - 1) ** 2, ineq=lambda a, b: [a + b - 2, a**2 - b])
_add(
    23,
    [3, 1],
    2.0,
    lambda a, b: a**2 + b**2,
    ineq=lambda a, b: [1 - a - b, 1 - a**2 - b**2, 9 - 9 * a**2 - b**2, b - a**2, a - b**2],
    lower=-50.0,
    upper=50.0,
)
_add(
    24,
    [1, 0.5],
    -1.0,
    lambda a, b: ((a - 3) ** 2 - 9) * b**3 / (27 * math.sqrt(3)),
    ineq=lambda a, b: [b - a / math.sqrt(3), -a - math.sqrt(3) * b, a + math.sqrt(3) * b - 6],
    lower=0.0,
)
_add(26, [-2.6, 2, 2], 0.0, lambda a, b, c: (a - b) ** 2 + (b - c) ** 4, eq=lambda a, b, c: [(1 + b**2) * a + c**4 - 3])
_add(27, [2, 2, 2], 0.04, lambda a, b, c: 0.01 * (a - 1) ** 2 + (b - a**2) ** 2, eq=lambda a, b, c: [a + c**2 + 1])
_add(28, [-4, 1, 1], 0.0, lambda a, b, c: (a + b) ** 2 + (b + c) ** 2, eq=lambda a, b, c: [a + 2 * b + 3 * c - 1])
_add(
    29,
    [1, 1, 1],
    -16 * math.sqrt(2),
    lambda a, b, c: -a * b * c,
    ineq=lambda a, b, c: [a**2 + 2 * b**2 + 4 * c**2 - 48],
)
_add(
    30,
    [1, 1, 1],
    1.0,
    lambda a, b, c: a**2 + b**2 + c**2,
    ineq=lambda a, b, c: [1 - a**2 - b**2],
    lower=[1.0, -10.0, -10.0],
    upper=10.0,
)
_add(
    31,
    [1, 1, 1],
    6.0,
    lambda a, b, c: 9 * a**2 + b**2 + 9 * c**2,
    ineq=lambda a, b, c: [1 - a * b],
    lower=[-10.0, 1.0, -10.0],
    upper=[10.0, 10.0, 1.0],
)
_add(
    32,
    [0.1, 0.7, 0.2],
    1.0,
    lambda a, b, c: (a + 3 * b + c) ** 2 + 4 * (a - b) ** 2,
    eq=lambda a, b, c: [1 - a - b - c],
    ineq=lambda a, b, c: [a**3 + 3 - 6 * b - 4 * c],
    lower=0.0,
)
_add(
    33,
    [0, 0, 3],
    math.sqrt(2) - 6,
    lambda a, b, c: (a - 1) * (a - 2) * (a - 3) + c,
    ineq=lambda a, b, c: [a**2 + b**2 - c**2, 4 - a**2 - b**2 - c**2],
    lower=0.0,
    upper=[INF, INF, 5.0],
)
_add(
    34,
    [0, 1.05, 2.9],
    -math.log(math.log(10)),
    lambda a, b, c: -a,
    ineq=lambda a, b, c: [exp(a) - b, exp(b) - c],
    lower=0.0,
    upper=[100.0, 100.0, 10.0],
)
_add(
    35,
    [0.5, 0.5, 0.5],
    1 / 9,
    lambda a, b, c: 9 - 8 * a - 6 * b - 4 * c + 2 * a**2 + 2 * b**2 + c**2 + 2 * a * b + 2 * a * c,
    ineq=lambda a, b, c: [a + b + 2 * c - 3],
    lower=0.0,
)
_add(
    36,
    [10, 10, 10],
    -3300.0,
    lambda a, b, c: -a * b * c,
    ineq=lambda a, b, c: [a + 2 * b + 2 * c - 72],
    lower=0.0,
    upper=[20.0, 11.0, 42.0],
)
_add(
    37,
    [10, 10, 10],
    -3456.0,
    lambda a, b, c: -a * b * c,
    ineq=lambda a, b, c: [a + 2 * b + 2 * c - 72, -a - 2 * b - 2 * c],
    lower=0.0,
    upper=42.0,
)
_add(
    38,
    [-3, -1, -3, -1],
    0.0,
    lambda a, b, c, d: (
        100 * (b - a**2) ** 2
        + (1 - a) ** 2
        + 90 * (d - c**2) ** 2
        + (1 - c) ** 2
        + 10.1 * ((b - 1) ** 2 + (d - 1) ** 2)
        + 19.8 * (b - 1) * (d - 1)
    ),
    lower=-10.0,
    upper=10.0,
)
_add(39, [2, 2, 2, 2], -1.0, lambda a, b, c, d: -a, eq=lambda a, b, c, d: [b - a**3 - c**2, a**2 - b - d**2])
_add(
    40,
    [0.8, 0.8, 0.8, 0.8],
    -0.25,
    lambda a, b, c, d: -a * b * c * d,
    eq=lambda a, b, c, d: [a**3 + b**2 - 1, a**2 * d - c, d**2 - b],
)
_add(
    41,
    [2, 2, 2, 2],
    52 / 27,
    lambda a, b, c, d: 2 - a * b * c,
    eq=lambda a, b, c, d: [a + 2 * b + 2 * c - d],
    lower=0.0,
    upper=[1.0, 1.0, 1.0, 2.0],
)
_add(
    42,
    [1, 1, 1, 1],
    28 - 10 * math.sqrt(2),
    lambda a, b, c, d: (a - 1) ** 2 + (b - 2) ** 2 + (c - 3) ** 2 + (d - 4) ** 2,
    eq=lambda a, b, c, d: [a - 2, c**2 + d**2 - 2],
)
_add(
    43,
    [0, 0, 0, 0],
    -44.0,
    lambda a, b, c, d: a**2 + b**2 + 2 * c**2 + d**2 - 5 * a - 5 * b - 21 * c + 7 * d,
    ineq=lambda a, b, c, d: [
        a**2 + b**2 + c**2 + d**2 + a - b + c - d - 8,
        a**2 + 2 * b**2 + c**2 + 2 * d**2 - a - d - 10,
        2 * a**2 + b**2 + c**2 + 2 * a - b - d - 5,
    ],
)
_add(
    44,
    [0, 0, 0, 0],
    -15.0,
    lambda a, b, c, d: a - b - c - a * c + a * d + b * c - b * d,
    ineq=lambda a, b, c, d: [
        a + 2 * b - 8,
        4 * a + b - 12,
        3 * a + 4 * b - 12,
        2 * c + d - 8,
        c + 2 * d - 8,
        c + d - 5,
    ],
    lower=0.0,
)
_add(
    45,
    [2, 2, 2, 2, 2],
    1.0,
    lambda a, b, c, d, e: 2 - a * b * c * d * e / 120,
    lower=0.0,
    upper=[1.0, 2.0, 3.0, 4.0, 5.0],
)
_add(
    46,
    [math.sqrt(2) / 2, 1.75, 0.5, 2, 2],
    0.0,
    lambda a, b, c, d, e: (a - b) ** 2 + (c - 1) ** 2 + (d - 1) ** 4 + (e - 1) ** 6,
    eq=lambda a, b, c, d, e: [a**2 * d + sin(d - e) - 1, b + c**4 * d**2 - 2],
)
_add(
    47,
    [2, math.sqrt(2), -1, 2 - math.sqrt(2), 0.5],
    0.0,
    lambda a, b, c, d, e: (a - b) ** 2 + (b - c) ** 3 + (c - d) ** 4 + (d - e) ** 4,
    eq=lambda a, b, c, d, e: [a + b**2 + c**3 - 3, b - c**2 + d - 1, a * e - 1],
)
_add(
    48,
    [3, 5, -3, 2, -2],
    0.0,
    lambda a, b, c, d, e: (a - 1) ** 2 + (b - c) ** 2 + (d - e) ** 2,
    eq=lambda a, b, c, d, e: [a + b + c + d + e - 5, c - 2 * (d + e) + 3],
)
_add(
    49,
    [10, 7, 2, -3, 0.8],
    0.0,
    lambda a, b, c, d, e: (a - b) ** 2 + (c - 1) ** 2 + (d - 1) ** 4 + (e - 1) ** 6,
    eq=lambda a, b, c, d, e: [a + b + c + 4 * d - 7, c + 5 * e - 6],
)
_add(
    50,
    [35, -31, 11, 5, -5],
    0.0,
    lambda a, b, c, d, e: (a - b) ** 2 + (b - c) ** 2 + (c - d) ** 4 + (d - e) ** 2,
    eq=lambda a, b, c, d, e: [a + 2 * b + 3 * c - 6, b + 2 * c + 3 * d - 6, c + 2 * d + 3 * e - 6],
)
_add(
    51,
    [2.5, 0.5, 2, -1, 0.5],
    0.0,
    lambda a, b, c, d, e: (a - b) ** 2 + (b + c - 2) ** 2 + (d - 1) ** 2 + (e - 1) ** 2,
    eq=lambda a, b, c, d, e: [a + 3 * b - 4, c + d - 2 * e, b - e],
)
_add(
    52,
    [2, 2, 2, 2, 2],
    1859 / 349,
    lambda a, b, c, d, e: (4 * a - b) ** 2 + (b + c - 2) ** 2 + (d - 1) ** 2 + (e - 1) ** 2,
    eq=lambda a, b, c, d, e: [a + 3 * b, c + d - 2 * e, b - e],
)
_add(
    53,
    [2, 2, 2, 2, 2],
    176 / 43,
    lambda a, b, c, d, e: (a - b) ** 2 + (b + c - 2) ** 2 + (d - 1) ** 2 + (e - 1) ** 2,
    eq=lambda a, b, c, d, e: [a + 3 * b, c + d - 2 * e, b - e],
    lower=-10.0,
    upper=10.0,
)
_add(
    55,
    [1, 2, 0, 0, 0, 2],
    19 / 3,
    lambda a, b, c, d, e, f: a + 2 * b + 4 * e + exp(a * d),
    eq=lambda a, b, c, d, e, f: [
        a + 2 * b + 5 * e - 6,
        a + b + c - 3,
        d + e + f - 2,
        a + d - 1,
        b + e - 2,
        c + f - 2,
    ],
    lower=0.0,
    upper=[1.0, INF, INF, 1.0, INF, INF],
)
_add(
    56,
    [
        1,
        1,
        1,
        math.asin(math.sqrt(1 / 4.2)),
        math.asin(math.sqrt(1 / 4.2)),
        math.asin(math.sqrt(1 / 4.2)),
        math.asin(math.sqrt(5 / 7.2)),
    ],
    -3.456,
    lambda a, b, c, d, e, f, g: -a * b * c,
    eq=lambda a, b, c, d, e, f, g: [
        a - 4.2 * sin(d) ** 2,
        b - 4.2 * sin(e) ** 2,
        c - 4.2 * sin(f) ** 2,
        a + 2 * b + 2 * c - 7.2 * sin(g) ** 2,
    ],
)
_add(
    60,
    [2, 2, 2],
    0.03256820025,
    lambda a, b, c: (a - 1) ** 2 + (a - b) ** 2 + (b - c) ** 4,
    eq=lambda a, b, c: [a * (1 + b**2) + c**4 - 4 - 3 * math.sqrt(2)],
    lower=-10.0,
    upper=10.0,
)
_add(
    61,
    [0, 0, 0],
    -143.6461422,
    lambda a, b, c: 4 * a**2 + 2 * b**2 + 2 * c**2 - 33 * a + 16 * b - 24 * c,
    eq=lambda a, b, c: [3 * a - 2 * b**2 - 7, 4 * a - c**2 - 11],
)
_add(
    62,
    [0.7, 0.2, 0.1],
    -26272.51448,
    lambda a, b, c: (
        -32.174
        * (
            255 * log((a + b + c + 0.03) / (0.09 * a + b + c + 0.03))
            + 280 * log((b + c + 0.03) / (0.07 * b + c + 0.03))
            + 290 * log((c + 0.03) / (0.13 * c + 0.03))
        )
    ),
    eq=lambda a, b, c: [a + b + c - 1],
    lower=0.0,
    upper=1.0,
)
_add(
    63,
    [2, 2, 2],
    961.7151721,
    lambda a, b, c: 1000 - a**2 - 2 * b**2 - c**2 - a * b - a * c,
    eq=lambda a, b, c: [8 * a + 14 * b + 7 * c - 56, a**2 + b**2 + c**2 - 25],
    lower=0.0,
)
_add(
    64,
    [1, 1, 1],
    6299.842428,
    lambda a, b, c: 5 * a + 50000 / a + 20 * b + 72000 / b + 10 * c + 144000 / c,
    ineq=lambda a, b, c: [4 / a + 32 / b + 120 / c - 1],
    lower=1e-5,
)
_add(
    65,
    [-5, 5, 0],
    0.9535288567,
    lambda a, b, c: (a - b) ** 2 + (a + b - 10) ** 2 / 9 + (c - 5) ** 2,
    ineq=lambda a, b, c: [a**2 + b**2 + c**2 - 48],
    lower=[-4.5, -4.5, -5.0],
    upper=[4.5, 4.5, 5.0],
)
_add(
    66,
    [0, 1.05, 2.9],
    0.5181632741,
    lambda a, b, c: 0.2 * c - 0.8 * a,
    ineq=lambda a, b, c: [exp(a) - b, exp(b) - c],
    lower=0.0,
    upper=[100.0, 100.0, 10.0],
)
_add(
    71,
    [1, 5, 5, 1],
    17.0140173,
    lambda a, b, c, d: a * d * (a + b + c) + c,
    eq=lambda a, b, c, d: [a**2 + b**2 + c**2 + d**2 - 40],
    ineq=lambda a, b, c, d: [25 - a * b * c * d],
    lower=1.0,
    upper=5.0,
)
_add(
    72,
    [1, 1, 1, 1],
    727.67937,
    lambda a, b, c, d: 1 + a + b + c + d,
    ineq=lambda a, b, c, d: [
        4 / a + 2.25 / b + 1 / c + 0.25 / d - 0.0401,
        0.16 / a + 0.36 / b + 0.64 / c + 0.64 / d - 0.010085,
    ],
    lower=0.001,
    upper=[4e5, 3e5, 2e5, 1e5],
)
_add(
    73,
    [1, 1, 1, 1],
    29.89437816,
    lambda a, b, c, d: 24.55 * a + 26.75 * b + 39 * c + 40.5 * d,
    eq=lambda a, b, c, d: [a + b + c + d - 1],
    ineq=lambda a, b, c, d: [
        5 - 2.3 * a - 5.6 * b - 11.1 * c - 1.3 * d,
        21
        + 1.645 * sqrt(0.28 * a**2 + 0.19 * b**2 + 20.5 * c**2 + 0.62 * d**2)
        - 12 * a
        - 11.9 * b
        - 41.8 * c
        - 52.1 * d,
    ],
    lower=0.0,
)
_add(
    76,
    [0.5, 0.5, 0.5, 0.5],
    -4.681818181,
    lambda a, b, c, d: a**2 + 0.5 * b**2 + c**2 + 0.5 * d**2 - a * c + c * d - a - 3 * b + c - d,
    ineq=lambda a, b, c, d: [a + 2 * b + c + d - 5, 3 * a + b + 2 * c - d - 4, 1.5 - b - 4 * c],
    lower=0.0,
)
_add(
    77,
    [2, 2, 2, 2, 2],
    0.24150513,
    lambda a, b, c, d, e: (a - 1) ** 2 + (a - b) ** 2 + (c - 1) ** 2 + (d - 1) ** 4 + (e - 1) ** 6,
    eq=lambda a, b, c, d, e: [a**2 * d + sin(d - e) - 2 * math.sqrt(2), b + c**4 * d**2 - 8 - math.sqrt(2)],
)
_add(
    78,
    [-2, 1.5, 2, -1, -1],
    -2.91970041,
    lambda a, b, c, d, e: a * b * c * d * e,
    eq=lambda a, b, c, d, e: [
        a**2 + b**2 + c**2 + d**2 + e**2 - 10,
        b * c - 5 * d * e,
        a**3 + b**3 + 1,
    ],
)
_add(
    79,
    [2, 2, 2, 2, 2],
    0.0787768209,
    lambda a, b, c, d, e: (a - 1) ** 2 + (a - b) ** 2 + (b - c) ** 2 + (c - d) ** 4 + (d - e) ** 4,
    eq=lambda a, b, c, d, e: [
        a + b**2 + c**3 - 2 - 3 * math.sqrt(2),
        b - c**2 + d + 2 - 2 * math.sqrt(2),
        a * e - 2,
    ],
)
for _number, _square in ((80, 0.0), (81, 0.5)):
    _add(
        _number,
        [-2, 2, 2, -1, -1],
        0.0539498478,
        lambda a, b, c, d, e, square=_square: exp(a * b * c * d * e) - square * (a**3 + b**3 + 1) ** 2,
        eq=lambda a, b, c, d, e: [
            a**2 + b**2 + c**2 + d**2 + e**2 - 10,
            b * c - 5 * d * e,
            a**3 + b**3 + 1,
        ],
        lower=[-2.3, -2.3, -3.2, -3.2, -3.2],
        upper=[2.3, 2.3, 3.2, 3.2, 3.2],
    )
_add(
    93,
    [5.54, 4.4, 12.02, 11.82, 0.702, 0.852],
    135.075961,
    lambda a, b, c, d, e, f: (
        0.0204 * a * d * (a + b + c)
        + 0.0187 * b * c * (a + 1.57 * b + d)
        + 0.0607 * a * d * e**2 * (a + b + c)
        + 0.0437 * b * c * f**2 * (a + 1.57 * b + d)
    ),
    ineq=lambda a, b, c, d, e, f: [
        2.07 - 0.001 * a * b * c * d * e * f,
        0.00062 * a * d * e**2 * (a + b + c) + 0.00058 * b * c * f**2 * (a + 1.57 * b + d) - 1,
    ],
    lower=0.0,
)
_add(
    100,
    [1, 2, 0, 4, 0, 1, 1],
    680.6300573,
    lambda a, b, c, d, e, f, g: (
        (a - 10) ** 2
        + 5 * (b - 12) ** 2
        + c**4
        + 3 * (d - 11) ** 2
        + 10 * e**6
        + 7 * f**2
        + g**4
        - 4 * f * g
        - 10 * f
        - 8 * g
    ),
    ineq=lambda a, b, c, d, e, f, g: [
        2 * a**2 + 3 * b**4 + c + 4 * d**2 + 5 * e - 127,
        7 * a + 3 * b + 10 * c**2 + d - e - 282,
        23 * a + b**2 + 6 * f**2 - 8 * g - 196,
        4 * a**2 + b**2 - 3 * a * b + 2 * c**2 + 5 * f - 11 * g,
    ],
)
_add(
    104,
    [6, 3, 0.4, 0.2, 6, 6, 1, 0.5],
    3.9511634396,
    lambda a, b, c, d, e, f, g, h: 0.4 * (a / g) ** 0.67 + 0.4 * (b / h) ** 0.67 + 10 - a - b,
    ineq=lambda a, b, c, d, e, f, g, h: [
        0.0588 * e * g + 0.1 * a - 1,
        0.0588 * f * h + 0.1 * a + 0.1 * b - 1,
        4 * c / e + 2 / (c**0.71 * e) + 0.0588 * g / c**1.3 - 1,
        4 * d / f + 2 / (d**0.71 * f) + 0.0588 * h / d**1.3 - 1,
        0.4 * (a / g) ** 0.67 + 0.4 * (b / h) ** 0.67 + 10 - a - b - 4.2,
        1 - (0.4 * (a / g) ** 0.67 + 0.4 * (b / h) ** 0.67 + 10 - a - b),
    ],
    lower=0.1,
    upper=10.0,
)
_add(
    106,
    [5000, 5000, 5000, 200, 350, 150, 225, 425],
    7049.248021,
    lambda a, b, c, d, e, f, g, h: a + b + c,
    ineq=lambda a, b, c, d, e, f, g, h: [
        0.0025 * (d + f) - 1,
        0.0025 * (e + g - d) - 1,
        0.01 * (h - e) - 1,
        833.33252 * d + 100 * a - a * f - 83333.333,
        1250 * e - 1250 * d + b * d - b * g,
        1250000 + c * e - 2500 * e - c * h,
    ],
    lower=[100.0, 1000.0, 1000.0, 10.0, 10.0, 10.0, 10.0, 10.0],
    upper=[10000.0, 10000.0, 10000.0, 1000.0, 1000.0, 1000.0, 1000.0, 1000.0],
)
_add(
    108,
    [1] * 9,
    -math.sqrt(3) / 2,
    lambda a, b, c, d, e, f, g, h, i: -0.5 * (a * d - b * c + c * i - e * i + e * h - f * g),
    ineq=lambda a, b, c, d, e, f, g, h, i: [
        c**2 + d**2 - 1,
        i**2 - 1,
        e**2 + f**2 - 1,
        a**2 + (b - i) ** 2 - 1,
        (a - e) ** 2 + (b - f) ** 2 - 1,
        (a - g) ** 2 + (b - h) ** 2 - 1,
        (c - e) ** 2 + (d - f) ** 2 - 1,
        (c - g) ** 2 + (d - h) ** 2 - 1,
        g**2 + (h - i) ** 2 - 1,
        b * c - a * d,
        -c * i,
        e * i,
        f * g - e * h,
    ],
    lower=[-INF] * 8 + [0.0],
)
_add(
    110,
    [9] * 10,
    -45.77846971,
    lambda *x: (log(torch.stack(x) - 2) ** 2 + log(10 - torch.stack(x)) ** 2).sum() - torch.stack(x).prod() ** 0.2,
    lower=2.001,
    upper=9.999,
)
_add(
    111,
    [-2.3] * 10,
    -47.76109026,
    lambda *x: _gibbs(torch.stack(x).exp()),
    eq=lambda *x: _balance([v.exp() for v in x]),
    lower=-100.0,
    upper=100.0,
)
_add(
    112,
    [0.1] * 10,
    -47.76109026,
    lambda *x: _gibbs(torch.stack(x)),
    eq=lambda *x: _balance(x),
    lower=1e-6,
)


def _gibbs(x: Tensor) -> Tensor:
    c = [-6.089, -17.164, -34.054, -5.914, -24.721, -14.986, -24.100, -10.708, -26.662, -22.179]
    return (x * (torch.tensor(c, dtype=torch.float64) + log(x / x.sum()))).sum()


def _balance(x: Sequence[Tensor]) -> list[Tensor]:
    return [
        x[0] + 2 * x[1] + 2 * x[2] + x[5] + x[9] - 2,
        x[3] + 2 * x[4] + x[5] + x[6] - 1,
        x[2] + x[6] + x[7] + 2 * x[8] + x[9] - 1,
    ]


_add(
    113,
    [2, 3, 5, 5, 1, 2, 7, 3, 6, 10],
    24.3062091,
    lambda a, b, c, d, e, f, g, h, i, j: (
        a**2
        + b**2
        + a * b
        - 14 * a
        - 16 * b
        + (c - 10) ** 2
        + 4 * (d - 5) ** 2
        + (e - 3) ** 2
        + 2 * (f - 1) ** 2
        + 5 * g**2
        + 7 * (h - 11) ** 2
        + 2 * (i - 10) ** 2
        + (j - 7) ** 2
        + 45
    ),
    ineq=lambda a, b, c, d, e, f, g, h, i, j: [
        4 * a + 5 * b - 3 * g + 9 * h - 105,
        10 * a - 8 * b - 17 * g + 2 * h,
        -8 * a + 2 * b + 5 * i - 2 * j - 12,
        3 * (a - 2) ** 2 + 4 * (b - 3) ** 2 + 2 * c**2 - 7 * d - 120,
        5 * a**2 + 8 * b + (c - 6) ** 2 - 2 * d - 40,
        0.5 * (a - 8) ** 2 + 2 * (b - 4) ** 2 + 3 * e**2 - f - 30,
        a**2 + 2 * (b - 2) ** 2 - 2 * a * b + 14 * e - 6 * f,
        -3 * a + 6 * b + 12 * (i - 8) ** 2 - 7 * j,
    ],
)
