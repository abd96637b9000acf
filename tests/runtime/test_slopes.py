"""Chosen slopes at kinks: values stay, derivatives take them, everything else is autograd's."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from lagcompile.runtime.slopes import Slopes, fit_slopes

Function = Callable[[Tensor], Tensor]
CASES: list[tuple[str, Function, list[float], list[float]]] = [
    ("relu", torch.relu, [-1.0, 0.0, 2.0], [0.0, 0.25, 1.0]),
    ("module", nn.ReLU(), [0.0, 0.0, 2.0], [0.25, 0.75, 1.0]),
    ("leaky", lambda x: F.leaky_relu(x, 0.2), [-1.0, 0.0], [0.2, 0.2 + 0.25 * 0.8]),
    ("abs", lambda x: x.abs(), [-1.0, 0.0, 3.0], [-1.0, -0.5, 1.0]),
    ("clamp", lambda x: x.clamp(-1.0, 2.0), [-1.0, 0.5, 2.0, 3.0], [0.25, 1.0, 0.25, 0.0]),
    ("clamp_min", lambda x: torch.clamp_min(x, 1.0), [0.0, 1.0, 3.0], [0.0, 0.25, 1.0]),
    ("clamp_max", lambda x: torch.clamp_max(x, 1.0), [0.0, 1.0, 3.0], [1.0, 0.75, 0.0]),
    ("hardtanh", F.hardtanh, [-1.0, 0.0, 1.0], [0.25, 1.0, 0.25]),
    ("hardtanh bounds", lambda x: F.hardtanh(x, -2.0, 3.0), [-1.0, 1.0, 3.0, 4.0], [1.0, 1.0, 0.75, 0.0]),
    ("relu6", F.relu6, [0.0, 1.0, 6.0], [0.25, 1.0, 0.25]),
    ("amax", lambda x: x.amax().reshape(1), [1.0, 3.0, 3.0], [0.0, 0.75, 0.25]),
    ("tensor bound", lambda x: x.clamp(max=torch.ones(2)), [1.0, 3.0], [1.0, 0.0]),
    ("tensor bounds", lambda x: x.clamp(torch.zeros(2), torch.ones(2)), [0.5, 3.0], [1.0, 0.0]),
    ("smooth", torch.tanh, [0.0], [1.0]),
]


@pytest.mark.parametrize(("name", "function", "at", "expected"), CASES, ids=[c[0] for c in CASES])
def test_slopes_are_taken_at_kinks(name: str, function: Function, at: list[float], expected: list[float]) -> None:
    x = torch.tensor(at, dtype=torch.float64, requires_grad=True)
    slopes = Slopes(torch.tensor([0.25, 0.75], dtype=torch.float64))
    with slopes:
        value = function(x)
    torch.testing.assert_close(value, function(x), rtol=0.0, atol=0.0)
    (found,) = torch.autograd.grad(value.sum(), x)
    if name in {"clamp", "hardtanh", "relu6"}:  # the second kink takes the second slope, from 1 down to 0
        expected = [
            e if p != max(q for q in at if q in {1.0, 2.0, 6.0}) else 0.25 for e, p in zip(expected, at, strict=True)
        ]
    assert found.tolist() == pytest.approx(expected)
    several = {"module": 2, "clamp": 2, "hardtanh": 2, "relu6": 2}
    assert slopes.seen == several.get(name, 0 if name in {"tensor bound", "tensor bounds", "smooth"} else 1)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_l1_loss(reduction: str) -> None:
    x = torch.tensor([1.0, 2.0, 5.0], dtype=torch.float64, requires_grad=True)
    y = torch.tensor([1.0, 3.0, 4.0], dtype=torch.float64)
    with Slopes(torch.tensor([0.75], dtype=torch.float64)):
        value = F.l1_loss(x, y, reduction=reduction)
    torch.testing.assert_close(value, F.l1_loss(x, y, reduction=reduction))
    (found,) = torch.autograd.grad(value, x)
    scale = 3 if reduction == "mean" else 1
    assert (found * scale).tolist() == pytest.approx([0.5, -1.0, 1.0])


def test_what_no_variable_reaches_is_left_alone() -> None:
    slopes = Slopes()
    with slopes:
        torch.relu(torch.zeros(3, dtype=torch.float64))
    assert slopes.used == 0


def test_slopes_are_fitted_within_their_bounds() -> None:
    target = torch.tensor([0.3, 0.9], dtype=torch.float64)
    found = fit_slopes(lambda s: torch.stack([s[0] - target[0], s[0] * s[1] - 0.3 * target[1]]), 2, 1e-12)
    torch.testing.assert_close(found, target, rtol=0.0, atol=1e-8)
    far = fit_slopes(lambda s: s - 2.0, 1, 1e-12)
    assert float(far) == pytest.approx(1.0, abs=1e-6)
