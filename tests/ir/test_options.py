"""A wrong option or argument of the public Python functions: one SpecError where it is given, with its key."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import lagcompile
from tests.nets import deep

X = torch.randn(4, 5)
lc: Any = lagcompile  # calls below are wrong on purpose


@pytest.mark.parametrize(
    ("make", "problem"),
    [
        (lambda: lc.SGD(lr=float("nan")), "SGD: lr: expected a finite number, got nan"),
        (lambda: lc.SGD(lr=float("inf")), "SGD: lr: expected a finite number, got inf"),
        (lambda: lc.Adam(lr=1e300), "Adam: lr: expected a number of at most 3.4e+38 in size, got 1e+300"),
        (lambda: lc.RunOptions(steps="many"), "RunOptions: steps: expected a non-negative integer, got 'many'"),
        (lambda: lc.RunOptions(seed=1 << 70), "RunOptions: seed: expected an integer of at most 64 bits"),
        (lambda: lc.Extragradient(weights=3), "Extragradient: weights: "),
        (lambda: lc.Extragradient(wieghts=3), "Extragradient: wieghts: unknown key, did you mean 'weights'?"),
        (lambda: lc.lift(deep(2), X, formulation=X), "formulation takes a lagcompile.Formulation, got an object of"),
        (lambda: lc.lift(deep(2), X, lc.SGD(lr=1.0)), "split must be a number of stages"),
        (lambda: lc.lift(deep(2), X, 2).plan(10.5), "examples takes an integer of at least 1, got 10.5"),
        (lambda: lc.lift(deep(2), X, 2).plan(0), "examples takes an integer of at least 1, got 0"),
        (lambda: lc.lift(deep(2), X, 2).plan(True), "examples takes an integer of at least 1, got True"),
        (
            lambda: lc.lift(deep(2), X, 2).verify(X, X, loss=torch.nn.functional.mse_loss, tolerance=float("nan")),
            "tolerance takes a positive number, got nan",
        ),
        (
            lambda: lc.lift(deep(2), X, 2).solve((X, X), loss=torch.nn.functional.mse_loss, device="gpu"),
            "device takes a name such as 'cpu' or 'cuda:0', got 'gpu'",
        ),
    ],
)
def test_it_is_refused_by_name(make: Callable[[], object], problem: str) -> None:
    with pytest.raises(lc.LagcompileError) as caught:
        make()
    assert caught.value.problems[0].startswith(problem)


def test_the_least_count_is_taken() -> None:
    assert lc.lift(deep(2), X, 2).plan(1)
