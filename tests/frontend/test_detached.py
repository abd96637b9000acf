"""Memory that autograd sees in two ways: writes through `detach()` and `.data`, and memory shared in one mode only."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lagcompile as lc


class _Base(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.drop = nn.Linear(6, 6), nn.Linear(6, 6), nn.Dropout(0.3)


class ThroughData(_Base):
    """A write with gradients through `.data`: the other name of the memory has none of them."""

    def forward(self, x: Tensor) -> Any:
        h = self.b(x)
        d = h.data
        d[:, 1] = self.a(x).sum(1)
        h = h * 2.0
        return h, d * 3.0


class ThroughDetach(_Base):
    """A write with gradients through `detach()`, then one into the memory itself, then both again."""

    def forward(self, x: Tensor) -> Any:
        h = torch.zeros_like(x) + self.b(x)
        d = h.detach()
        d[:, :3] = self.a(x)[:, :3]
        h[:, 2] = 0.5 * x[:, 0]
        d[:, 4:] *= self.a.weight[0, 0]
        return h.sum(1), d[:, 1:] + 1.0


class SharedInEval(_Base):
    """Dropout gives its input back in eval mode, and a copy in train mode."""

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x) + 1.0
        d = self.drop(h)
        d[:, 0] = 0.3
        out: Tensor = self.b(h + d)
        return out


class OneBranch(_Base):
    """A value that is an input in eval mode, and a new one in train mode."""

    def forward(self, x: Tensor) -> Tensor:
        h = x
        if self.training:
            h = h + self.a(x)
        h.mul_(0.8)
        out: Tensor = self.b(x) + h
        return out


class QuietRegion(_Base):
    """A write through a view under `no_grad`, of what is read behind it."""

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        with torch.no_grad():
            h[:, :2] = 0.5 * x[:, 2:4]
        out: Tensor = self.b(x) + h
        return out


class InputInEval(_Base):
    """`.data` of the caller's tensor in eval mode, of a new one in train mode."""

    def forward(self, x: Tensor) -> Tensor:
        h = x * 1.0
        if self.training:
            x = x + 0.1 * h
        x.data.clamp_(-0.5, 0.5)
        out: Tensor = self.b(h) + x
        return out


class Functional(_Base):
    """The function gives its input back in eval mode, as the layer does."""

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        d = nn.functional.dropout(h, 0.5, self.training)
        d += 1.0
        out: Tensor = self.b(torch.tanh(h) + d)
        return out


class Hidden(_Base):
    """Writes through `.data` into what autograd kept."""

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        y = torch.tanh(h)
        y.data.mul_(0.9)
        out: Tensor = self.b(y)
        return out


KINDS = [ThroughData, ThroughDetach, SharedInEval, OneBranch, QuietRegion, InputInEval, Functional]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("training", [True, False])
def test_gradients_and_values_are_the_models(kind: type[nn.Module], training: bool) -> None:
    torch.manual_seed(0)
    model = kind().double()
    lifted = lc.lift(model, (torch.randn(4, 6, dtype=torch.float64),), split=1)
    model.train(training)
    lifted.train(training)
    x = torch.randn(5, 6, dtype=torch.float64)
    found = []
    for call, owner in ((model, model), (lifted, lifted.module)):
        given = x.clone().requires_grad_()
        torch.manual_seed(1)
        passed = given.clone()
        output = call(passed)
        assert owner is model or torch.equal(passed, x)
        parts = output if isinstance(output, tuple) else (output,)
        loss = torch.stack([t.sin().sum() for t in parts]).sum()
        slopes = torch.autograd.grad(loss, [given, *owner.parameters()], allow_unused=True, materialize_grads=True)
        found.append([*parts, *slopes])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a.detach(), b.detach(), rtol=1e-10, atol=1e-10)


def test_what_autograd_is_not_told_is_refused_with_its_line() -> None:
    with pytest.raises(lc.LiftError, match=r"test_detached.py:\d+: `y.data.mul_\(0.9\)` writes through .data"):
        lc.lift(Hidden(), (torch.randn(4, 6),), split=1)
