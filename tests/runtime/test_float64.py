"""What runs in float64 is what the model computes."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lagcompile as lc
from lagcompile.check.kkt import certify_kkt
from lagcompile.runtime.float64 import in_float64

MADE: dict[str, Callable[[Tensor], Tensor]] = {
    "tensor": lambda n: torch.tensor([0.1, 0.2]),
    "a number": lambda n: torch.tensor(0.1),
    "full": lambda n: torch.full((2,), 0.1),
    "rand": lambda n: torch.rand(3),
    "linspace": lambda n: torch.linspace(0, 1, 7),
    "arange": lambda n: torch.arange(0, 1, 0.1),
    "window": lambda n: torch.hann_window(8),
    "explicit": lambda n: torch.ones(2, dtype=torch.float16),
    "parameter": lambda n: nn.Parameter(torch.zeros(2)),
    "layer": lambda n: nn.Linear(2, 2).weight,
    "divided": lambda n: n / 3,
    "times": lambda n: n * 0.1,
    "times from the left": lambda n: 0.1 * n,
    "power": lambda n: 10.0 ** (n * -0.1),
    "root": lambda n: n.sqrt(),
    "mask": lambda n: torch.where(n > 1, 0.1, -0.3),
    "mask divided": lambda n: (n > 1) * 0.3,
    "exp": lambda n: torch.exp(n),
    "cast": lambda n: n.float() * 0.1,
    "type": lambda n: n.type("torch.FloatTensor") / 3,
    "to": lambda n: n.to(torch.bfloat16) / 7,
    "complex": lambda n: torch.complex(n * 0.1, n * 0.2),
    "new": lambda n: torch.Tensor(2, 2).zero_().double() + 0.1,
}


@pytest.mark.parametrize("name", MADE)
def test_what_is_made_of_numbers_and_integers_has_double_precision(name: str) -> None:
    numbers = torch.arange(1, 5)
    before = torch.get_default_dtype()
    torch.manual_seed(0)
    with in_float64():
        found = MADE[name](numbers).detach()
    assert found.dtype in (torch.float64, torch.complex128)
    if name in ("rand", "layer"):
        return
    try:
        torch.set_default_dtype(torch.float64)
        expected = MADE[name](numbers).detach().to(found.dtype)
    finally:
        torch.set_default_dtype(before)
    exact = name not in ("cast", "type", "to")  # in the other run these leave float64
    torch.testing.assert_close(found, expected, rtol=1e-15 if exact else 1e-2, atol=0.0)


def test_other_threads_keep_their_default_dtype() -> None:
    stop, seen = threading.Event(), set[torch.dtype]()

    def make() -> None:
        while not stop.is_set():
            seen.update(t.dtype for t in (torch.ones(1), torch.tensor(0.1), torch.arange(3) / 2))

    class Casting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.last = nn.Linear(3, 2), nn.Linear(2, 1)

        def forward(self, x: Tensor) -> Tensor:
            result: Tensor = self.last(torch.tanh(self.layer(x)).half().float())
            return result * torch.tensor(0.5)

    torch.manual_seed(0)
    formulation = lc.Formulation(regularisers=(lc.Regulariser(kind="l2", on="weights", weight=0.1),))
    x, y = torch.randn(4, 3), torch.randn(4, 1)
    lifted = lc.lift(Casting(), x, split=2, formulation=formulation)
    thread = threading.Thread(target=make)
    thread.start()
    try:
        for _ in range(3):
            lifted.verify(x, y, loss=nn.functional.mse_loss)
            solution = lifted.solve((x, y), loss=nn.functional.mse_loss, method=lc.SQP(max_iterations=3))
            certify_kkt(lifted.bind((x, y), loss=nn.functional.mse_loss), solution)
    finally:
        stop.set()
        thread.join()
    assert seen == {torch.float32}


@pytest.mark.parametrize(
    ("groups", "channels", "kernel", "settings"),
    [
        (8, (8, 16), (3, 3), {"padding": 1}),
        (6, (6, 6), (7, 7), {"stride": 2, "padding": (3, 2), "dilation": (1, 2)}),
        (4, (16, 8), (3, 1), {"stride": (2, 1)}),
        (2, (4, 6), (1, 1), {"bias": False}),
        (3, (3, 3), (3, 3), {"padding": "same"}),
        (3, (3, 3), (3, 3), {"padding": 1, "padding_mode": "circular"}),
    ],
)
def test_grouped_convolutions(
    groups: int, channels: tuple[int, int], kernel: tuple[int, int], settings: dict[str, Any]
) -> None:
    torch.manual_seed(0)
    layer = nn.Conv2d(*channels, kernel, groups=groups, **settings).double()
    x = torch.randn(3, channels[0], 16, 17, dtype=torch.float64, requires_grad=True)

    def gradients(y: Tensor) -> tuple[Tensor, ...]:
        return y, *torch.autograd.grad((y * y.sin()).sum(), [x, *layer.parameters()])

    expected = gradients(layer(x))
    with in_float64():
        found = gradients(layer(x))
    for a, b in zip(expected, found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_products_of_experts_are_certified_in_float64() -> None:
    class Experts(nn.Module):
        """A mixture of experts as transformers computes it: rows sorted by expert, one grouped product."""

        def __init__(self) -> None:
            super().__init__()
            self.inner, self.gate, self.outer = nn.Linear(6, 16), nn.Linear(16, 3), nn.Linear(8, 2)
            self.experts = nn.Parameter(torch.randn(3, 16, 8) / 4)

        def forward(self, x: Tensor) -> Tensor:
            h = torch.tanh(self.inner(x))
            weight, expert = self.gate(h).softmax(-1).max(-1)
            order = expert.argsort()
            ends = torch.bincount(expert, minlength=3).cumsum(0).to(torch.int32)
            product = torch.nn.functional.grouped_mm(h[order], self.experts, offs=ends)
            return self.outer(product[order.argsort()] * weight[:, None])

    torch.manual_seed(0)
    x, y = torch.randn(12, 6), torch.randint(2, (12,))
    lifted = lc.lift(Experts(), x, split=2)
    assert lifted.verify(x, y, loss=nn.functional.cross_entropy).ok
