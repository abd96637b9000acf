"""Hand-written loops that the executors are compared with: step rules and a two-hidden-layer net, in plain PyTorch.

Rules stand as in their papers, one variable at a time; of lagcompile only `executor` makes use, for the other side.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

import lagcompile as lc
from lagcompile.backends.first_order import FirstOrder, FirstOrderExecutor

Move = Callable[[str, Tensor, Tensor, float], Tensor]
"""(name, value, gradient, sign) -> new value; sign -1 climbs."""


class HandSGD:
    """x - lr g."""

    def __init__(self, lr: float) -> None:
        self.lr = lr

    def __call__(self, name: str, value: Tensor, gradient: Tensor, rows: Tensor | None) -> Tensor:
        return value - self.lr * gradient


class HandAdagrad:
    """x - lr g / (sqrt(sum of squares) + 1e-10), the sum kept for every row of a table."""

    def __init__(self, lr: float) -> None:
        self.lr, self.sums = lr, dict[str, Tensor]()

    def __call__(self, name: str, value: Tensor, gradient: Tensor, rows: Tensor | None) -> Tensor:
        total = self.sums.setdefault(name, torch.zeros(_whole(value, rows), dtype=value.dtype))
        part = total if rows is None else total[rows]
        part = part + gradient**2
        if rows is None:
            self.sums[name] = part
        else:
            total[rows] = part
        return value - self.lr * gradient / (part.sqrt() + 1e-10)


class HandAdam:
    """Adam with its count kept for every row of a table."""

    def __init__(self, lr: float) -> None:
        self.lr, self.memory = lr, dict[tuple[str, int], tuple[Tensor, Tensor, int]]()

    def __call__(self, name: str, value: Tensor, gradient: Tensor, rows: Tensor | None) -> Tensor:
        if rows is None:
            return self._one(name, -1, value, gradient)
        return torch.stack([self._one(name, int(r), value[i], gradient[i]) for i, r in enumerate(rows)])

    def _one(self, name: str, row: int, value: Tensor, gradient: Tensor) -> Tensor:
        zero = torch.zeros_like(value)
        mean, square, count = self.memory.get((name, row), (zero, zero, 0))
        mean, square, count = 0.9 * mean + 0.1 * gradient, 0.999 * square + 0.001 * gradient**2, count + 1
        self.memory[name, row] = (mean, square, count)
        corrected = mean / (1 - math.pow(0.9, count))
        return value - self.lr * corrected / ((square / (1 - math.pow(0.999, count))).sqrt() + 1e-8)


HandRule = HandSGD | HandAdagrad | HandAdam
EXAMPLES = 50
"""Rows of every table in these tests (room for the hand rules' sums)."""


def _whole(value: Tensor, rows: Tensor | None) -> tuple[int, ...]:
    return tuple(value.shape) if rows is None else (EXAMPLES, *value.shape[1:])


def net() -> nn.Sequential:
    """4 - 5 - 6 - 3 with tanh, float64, always the same weights."""
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3)).double()


def data() -> tuple[Tensor, Tensor]:
    """50 inputs and classes."""
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(EXAMPLES, 4, generator=generator, dtype=torch.float64)
    return x, torch.arange(EXAMPLES) % 3


CUT = {"policy": "at", "after": ["1", "3"]}
RHO = 0.3


def lifted(**options: object) -> lc.Lifted:
    """The net cut behind both activations."""
    return lc.lift(net(), data()[0][:4], split=CUT, formulation=lc.Formulation.model_validate(options))


class HandLagrangian:
    """The Lagrangian of `net` at given weights, states and multipliers, with G the identity, and what moves it."""

    def __init__(self) -> None:
        self.x, self.y = data()
        model = net()
        self.weights = {n: p.detach().clone() for n, p in model.named_parameters()}
        with torch.no_grad():
            first = model[1](model[0](self.x))
            second = model[3](model[2](first))
        self.states = {"h1": first.clone(), "h2": second.clone()}
        self.duals = {"lambda1": torch.zeros_like(first), "lambda2": torch.zeros_like(second)}

    def gradients(
        self, w: dict[str, Tensor], h: dict[str, Tensor], duals: dict[str, Tensor], rows: Tensor
    ) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]:
        """Gradients of L in weights, and per example in states and multipliers, at the batch's rows."""
        w = {n: t.detach().clone().requires_grad_() for n, t in w.items()}
        h = {n: t.detach().clone().requires_grad_() for n, t in h.items()}
        f1 = torch.tanh(self.x[rows] @ w["0.weight"].T + w["0.bias"])
        f2 = torch.tanh(h["h1"] @ w["2.weight"].T + w["2.bias"])
        out = h["h2"] @ w["4.weight"].T + w["4.bias"]
        r1, r2 = f1 - h["h1"], f2 - h["h2"]
        coupling = (duals["lambda1"] * r1).sum() + (duals["lambda2"] * r2).sum()
        coupling = coupling + 0.5 * RHO * ((r1 * r1).sum() + (r2 * r2).sum())
        value = F.cross_entropy(out, self.y[rows]) + coupling / len(rows)
        found = torch.autograd.grad(value, [*w.values(), *h.values()])
        of_weights = dict(zip(w, found, strict=False))
        of_states = {n: g * len(rows) for n, g in zip(h, found[len(w) :], strict=True)}
        return of_weights, of_states, {"lambda1": r1.detach(), "lambda2": r2.detach()}


def executor(method: FirstOrder, **options: Any) -> FirstOrderExecutor:
    """An executor of a first-order method on the hand-written network and data."""
    instance = lifted(**options).bind(data(), loss=F.cross_entropy)
    return method.executor(instance)
