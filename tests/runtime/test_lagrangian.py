"""Gradients of the Lagrangian against autograd of its value, and stacked against plain evaluation, in float64."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

import lagcompile as lc
from lagcompile.backends.first_order import FirstOrderExecutor
from lagcompile.runtime.instance import Instance
from lagcompile.runtime.lagrangian import Lagrangian
from tests.nets import Residual, classes, deep


def _bound(model: nn.Module, split: int, formulation: lc.Formulation, *, stack: bool = True) -> Instance:
    model = model.double()
    x, y = classes(12, next(model.parameters()).shape[1], 3)
    lifted = lc.lift(model, x.double(), split=split, formulation=formulation)
    loss = functools.partial(F.cross_entropy, reduction=formulation.reduction)
    return lifted.bind((x.double(), y), loss=loss, stack=stack)


def _point(instance: Instance, seed: int = 0) -> tuple[list[Tensor], list[Tensor | None]]:
    torch.manual_seed(seed)
    batch = instance.batch(torch.arange(8))
    with torch.no_grad():
        values, _ = instance.forward(batch)
    stored = [v + 0.1 * torch.randn_like(v) for v in values]
    return stored, [torch.randn_like(v) for v in values]


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("features", ["mean", "sum"])
@pytest.mark.parametrize(
    ("transform", "augmented"),
    [
        (lc.Identity(), False),
        (lc.Softshrink(epsilon=0.05), False),
        (lc.Abs(), False),
        (lc.Identity(), True),
        (lc.Softshrink(epsilon=0.05), True),
        (lc.AbsTube(epsilon=0.05), True),
    ],
)
def test_gradients_are_those_of_the_value(
    reduction: str, features: str, transform: lc.Identity, augmented: bool
) -> None:
    formulation = lc.Formulation(
        transform=transform,
        reduction=reduction,
        features=features,
        weight=lc.AugmentedWeight(value=0.3) if augmented else lc.ConstantWeight(value=0.3),
    )
    instance = _bound(Residual(), 3, formulation)
    lagrangian = Lagrangian(instance)
    batch = instance.batch(torch.arange(8))
    stored, multipliers = _point(instance)
    rho, noise = [0.3 for _ in stored], [None for _ in stored]
    got = lagrangian.gradients(batch, stored, multipliers, rho=rho, noise=noise)
    leaves = [s.clone().requires_grad_() for s in stored]
    value = lagrangian.value(lagrangian.terms(batch, leaves, multipliers, rho=rho, noise=noise), rho)
    weights = instance.weights.trainable
    expected = torch.autograd.grad(value, [*leaves, *weights], allow_unused=True)
    scale = 8 if reduction == "mean" else 1
    for mine, theirs in zip(got.states, expected, strict=False):
        assert theirs is not None
        torch.testing.assert_close(mine, theirs * scale, rtol=1e-10, atol=1e-12)
    for gradient, reference in zip(got.weights, expected[len(leaves) :], strict=True):
        assert gradient is not None
        assert reference is not None
        torch.testing.assert_close(gradient, reference, rtol=1e-10, atol=1e-12)


def test_stacked_stages_compute_what_single_stages_compute() -> None:
    model = deep(9)
    plain = _bound(model, 9, lc.Formulation(), stack=False)
    stacked = _bound(model, 9, lc.Formulation())
    assert len(plain.layout.units) == 9
    assert len(stacked.layout.units) == 1
    assert [len(b.states) for b in stacked.layout.banks] == [8]
    assert len(stacked.weights.leaves) == 2
    runs = []
    for instance in (plain, stacked):
        # not Adagrad: it scales differences of rounding up to full steps where gradients start at zero
        rules = {"weights": lc.Adam(lr=1e-2, epsilon=1e-3), "states": lc.SGD(lr=0.1), "multipliers": lc.SGD(lr=0.1)}
        executor = lc.Extragradient(**rules).executor(instance)
        for step in range(5):
            executor.step(torch.arange(step, step + 6))
        instance.weights.publish()
        runs.append((executor, instance.module.state_dict(), *executor.values()))
    for a, b in zip(runs[0][1:], runs[1][1:], strict=True):
        assert a.keys() == b.keys()
        for name in a:
            torch.testing.assert_close(a[name], b[name], rtol=1e-9, atol=1e-11)


def test_tied_stages_stack_with_one_weight() -> None:
    class Repeated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            for _ in range(5):
                x = torch.tanh(self.layer(x))
            return x

    x, y = torch.randn(6, 4).double(), torch.randn(6, 4).double()
    lifted = lc.lift(Repeated().double(), x, split=5)
    assert [w.name for w in lifted.program.weights] == ["layer.weight", "layer.bias"]
    stacked = lifted.bind((x, y), loss=F.mse_loss)
    assert len(stacked.layout.units) == 1
    assert [leaf.stacked for leaf in stacked.weights.leaves] == [False, False]
    plain = lifted.bind((x, y), loss=F.mse_loss, stack=False)
    got = [_weight_gradients(i) for i in (stacked, plain)]
    for a, b in zip(*got, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def _weight_gradients(instance: Instance) -> list[Tensor]:
    stored, multipliers = _forward(instance), None
    lagrangian = Lagrangian(instance)
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(4, 6, 4, generator=generator, dtype=torch.float64)
    split = [len(b.states) for b in instance.layout.banks]
    multipliers = list(values.split(split))
    batch = instance.batch(torch.arange(6))
    zero, none = [0.0 for _ in stored], [None for _ in stored]
    found = lagrangian.gradients(batch, stored, multipliers, rho=zero, noise=none).weights
    return [g for g in found if g is not None]


def _forward(instance: Instance) -> list[Tensor]:
    with torch.no_grad():
        return instance.forward(instance.batch(torch.arange(6)))[0]


class Recurrent(nn.Module):
    """Two equal recurrent layers, for which torch.func has no batching rule."""

    def __init__(self, layer: type[nn.GRU | nn.LSTM | nn.RNN]) -> None:
        super().__init__()
        self.first, self.second = (layer(3, 3, batch_first=True) for _ in range(2))
        self.last = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        """Two numbers for each sequence."""
        out: Tensor = self.last(self.second(self.first(x)[0])[0][:, -1])
        return out


@pytest.mark.parametrize("layer", [nn.GRU, nn.LSTM, nn.RNN])
def test_recurrent_layers_run_one_by_one(layer: type[nn.GRU | nn.LSTM | nn.RNN]) -> None:
    torch.manual_seed(0)
    x, y = torch.randn(6, 5, 3), torch.arange(6) % 2
    lifted = lc.lift(Recurrent(layer), (x,), split={"policy": "at", "after": ["first", "second"]})
    runs = lc.Extragradient().executor(lifted.bind((x, y), loss=F.cross_entropy))
    assert not any(u.stacked for u in runs.instance.layout.units)
    runs.step(torch.arange(6))
    assert lifted.verify(x, y, loss=F.cross_entropy).ok


def test_transient_states_at_the_adjoint_give_the_backprop_gradient() -> None:
    formulation = lc.Formulation(storage=lc.Transient(), multiplier=lc.MultiplierOptions(start="adjoint"))
    instance = _bound(Residual(), 3, formulation)
    executor = lc.DescentAscent(weights=lc.SGD(lr=0.0)).executor(instance)
    assert isinstance(executor, FirstOrderExecutor)
    executor.step(torch.arange(8))
    batch = instance.batch(torch.arange(8))
    parameters = dict(instance.module.named_parameters())
    loss = F.cross_entropy(instance.module(batch.values["x"]), batch.target)
    expected = torch.autograd.grad(loss, list(parameters.values()))
    for (name, p), gradient in zip(parameters.items(), expected, strict=True):
        assert p.grad is not None, name
        torch.testing.assert_close(p.grad, gradient, rtol=1e-9, atol=1e-12)
