"""Lifting works on a copy of the model, whatever the model keeps, or names what cannot be copied."""

from __future__ import annotations

import io
import threading
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lagcompile as lc
from tests.checks import assert_descends_as_pytorch

X = torch.randn(8, 4, generator=torch.Generator().manual_seed(0))
Y = torch.randn(8, 3, generator=torch.Generator().manual_seed(1))
mse = nn.functional.mse_loss
STEPS = lc.RunOptions(steps=3, batch_size=4)


class Caching(nn.Module):
    """An attention bias that is looked up once in eval mode and kept (as EfficientFormer and LeViT do)."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Linear(4, 4), nn.Linear(4, 3)
        self.biases = nn.Parameter(torch.randn(4))
        self.register_buffer("index", torch.tensor([3, 1, 0, 2]))
        self.index: Tensor
        self.kept: dict[str, Tensor] = {}

    def train(self, mode: bool = True) -> Caching:
        super().train(mode)
        if mode:
            self.kept = {}
        return self

    def bias(self) -> Tensor:
        if self.training:
            return self.biases[self.index]
        if "cpu" not in self.kept:
            self.kept["cpu"] = self.biases[self.index]
        return self.kept["cpu"]

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(torch.tanh(self.first(x)) + self.bias()))


def test_a_cache_of_an_earlier_forward_is_left_behind() -> None:
    model = Caching().eval()
    model(X)
    kept = model.kept["cpu"]
    assert not kept.is_leaf
    lifted = lc.lift(model, (X[:3],), split=2, formulation=lc.Formulation(storage=lc.Transient()))
    assert model.kept["cpu"] is kept
    assert_descends_as_pytorch(lifted, Caching(), (X, Y), mse)
    solution = lifted.solve((X, Y), loss=mse, options=STEPS)
    fresh = Caching()
    fresh.load_state_dict(solution.model.state_dict())
    torch.testing.assert_close(solution.model.eval()(X), fresh.eval()(X))


class Holding(nn.Module):
    """Something in an attribute of a sub-module."""

    def __init__(self, held: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4), nn.Tanh())
        self.body[2].held = held
        self.last = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.body(x))


REFUSED: Mapping[str, Callable[[], Any]] = {
    "lock": threading.Lock,
    "generator": lambda: (i for i in range(3)),
    "file": lambda: open(__file__),  # noqa: SIM115 - closed with the test
    "lock in a list": lambda: [{"a": threading.RLock()}],
}


@pytest.mark.parametrize("kind", REFUSED)
@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_what_cannot_be_copied_is_named(kind: str) -> None:
    with pytest.raises(lc.LiftError, match=r"the attribute 'body\.2\.held' \(\w+\) cannot be copied"):
        lc.lift(Holding(REFUSED[kind]()), (X[:3],), split=2)


COPIED: Mapping[str, Callable[[], Any]] = {
    "lambda": lambda: lambda x: x,
    "text": lambda: io.StringIO("text"),
    "computed tensor": lambda: torch.ones(2, requires_grad=True) * 2,
    "in a list": lambda: [{"a": torch.ones(2, requires_grad=True) * 2}],
    "module": lambda: [nn.Linear(3, 3)],
    "torch.Generator": torch.Generator,
    "itself": lambda: None,
}


@pytest.mark.parametrize("kind", COPIED)
def test_what_can_be_copied_is_no_hindrance(kind: str) -> None:
    model = Holding(COPIED[kind]())
    if kind == "itself":
        vars(model.body[2])["held"] = [model]
    lifted = lc.lift(model, (X[:3],), split=2)
    assert lifted.solve((X, Y), loss=mse, options=STEPS).status is lc.Status.STEPS_DONE
    assert lifted.verify(X, Y, loss=mse).ok


def test_lazy_layers_are_named() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.Tanh(), nn.LazyLinear(3)))
    with pytest.raises(lc.LiftError, match=r"'1\.1' has no weights yet.*run the model once"):
        lc.lift(model, (X[:3],), split=2)
    model(X)
    assert lc.lift(model, (X[:3],), split=2).verify(X, Y, loss=mse).ok


def test_hooks_run_in_the_copy() -> None:
    model = Holding(None)
    model.body[0].register_forward_hook(lambda _, __, output: output * 2)
    lifted = lc.lift(model, (X[:3],), split=2)
    torch.testing.assert_close(lifted(X), model(X))
    assert lifted.verify(X, Y, loss=mse).ok


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
def test_layers_that_compute_their_weights_ahead_of_the_forward() -> None:
    model = Holding(None)
    nn.utils.weight_norm(model.body[0])  # keeps a computed tensor as an attribute
    lifted = lc.lift(model, (X[:3],), split=2)
    assert {"body.0.weight_g", "body.0.weight_v"} <= {w.name for w in lifted.program.weights}
    assert lifted.verify(X, Y, loss=mse).ok


class _Closed(nn.Module):
    """Reads its own parts through functions that close over it."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 4), nn.Linear(4, 2)
        self.scale = nn.Parameter(torch.ones(4))
        self.kept: dict[str, Tensor] = {}
        self.act = lambda x, *, own=self: torch.tanh(x * own.scale)
        self.first.register_forward_hook(lambda module, args, output: output + self.second.bias.sum())
        self.second.register_forward_hook(lambda module, args, output: self.kept.update(last=output))

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.act(self.first(x))) + self.kept["last"]


def test_functions_that_close_over_the_model_read_the_copy() -> None:
    torch.manual_seed(0)
    model, x = _Closed(), torch.randn(4, 3)
    lifted = lc.lift(model, x, split=2)
    assert model.kept == {}
    with torch.no_grad():
        for p, q in zip(model.parameters(), lifted.module.parameters(), strict=True):
            q.add_(0.5)
            assert not torch.equal(p, q)
        for p, q in zip(model.parameters(), lifted.module.parameters(), strict=True):
            p.copy_(q)
    torch.testing.assert_close(lifted(x), model(x))
    pairs = ((lifted, lifted.module), (model, model))
    ours, theirs = (torch.autograd.grad(f(x).sin().sum(), list(m.parameters())) for f, m in pairs)
    torch.testing.assert_close(ours, theirs)


_NET = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))


class _Global(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = _NET

    def forward(self, x: Tensor) -> Tensor:
        return _NET(x)


def test_a_part_that_is_read_as_a_global_variable_is_refused_by_name() -> None:
    with pytest.raises(lc.LiftError, match=r"_Global\.forward .*test_copies\.py.* global variable '_NET'"):
        lc.lift(_Global(), torch.randn(4, 3))


def test_a_hook_on_a_weights_gradient_is_refused_by_name() -> None:
    first = nn.Linear(3, 4)
    model = nn.Sequential(first, nn.Tanh(), nn.Linear(4, 2))
    first.weight.register_hook(lambda g: 0.5 * g)
    with pytest.raises(lc.LiftError, match=r"'0\.weight' has a hook on its gradient"):
        lc.lift(model, torch.randn(4, 3))
