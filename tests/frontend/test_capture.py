"""What a graph could lose of a model: writes, custom gradients, blocks without gradients, parameters read elsewhere."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as functional
from torch import Tensor, nn

import lagcompile as lc

X = torch.linspace(-1.0, 1.0, 24).reshape(4, 6)


class PartlyFilled(nn.Module):
    """A value made of data, of which a part is overwritten with what parameters made."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        a = self.a(x)
        h = torch.zeros_like(x)
        h[:, :2] = a[:, :2]
        return self.b(h)


class FilledInALoop(nn.Module):
    """A recurrent network that writes its states into an output."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(1, 4), nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.zeros(x.shape[0], 4)
        out = torch.empty(x.shape[0], 6, 4)
        for i in range(6):
            h = torch.tanh(self.a(x[:, i : i + 1]) + self.b(h))
            out[:, i] = h
        return self.c(out.mean(1))


class Straight(torch.autograd.Function):
    """Rounds; the gradient passes as it is."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return torch.round(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return gradients[0]


class Quantised(nn.Module):
    """A straight-through estimator between two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = Straight.apply(3.0 * self.a(x))
        if self.training:  # two graphs, of which this is the same part
            h = h + 0.0 * x
        return self.b(h)


class Taught(nn.Module):
    """A frozen teacher, in a block and in a decorated method."""

    def __init__(self) -> None:
        super().__init__()
        self.teacher, self.other, self.student = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6)
        self.last = nn.Linear(6, 3)

    @torch.no_grad()
    def second(self, x: Tensor) -> Tensor:
        return torch.tanh(self.other(x))

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            t = torch.tanh(self.teacher(x))
        return self.last(torch.tanh(self.student(x)) * t + self.second(x))


class Called(nn.Module):
    """Layers called with other weights than their own."""

    def __init__(self) -> None:
        super().__init__()
        self.net, self.last = nn.Sequential(nn.Linear(6, 6), nn.Tanh()), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        own = dict(self.net.named_parameters())
        doubled = {n: 2.0 * p for n, p in own.items()}
        return self.last(torch.func.functional_call(self.net, doubled, (x,)) + functional.linear(x, own["0.weight"]))


class ByOtherNames(nn.Module):
    """Parameters read through lists, dictionaries and `.data`."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 3)
        self.kept = [self.a.weight, self.a.bias]

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(x @ (self.kept[0] * 1.5).t() + self.__dict__["kept"][1])
        h = h + x @ next(iter(self.parameters())).abs()
        return self.b(h) + self.b.weight.data.sum()


MODELS: dict[str, Callable[[], nn.Module]] = {
    m.__name__: m for m in (PartlyFilled, FilledInALoop, Quantised, Taught, Called, ByOtherNames)
}


def gradients(output: Tensor, wanted: list[Tensor]) -> list[Tensor]:
    found = torch.autograd.grad(output.square().sum(), wanted, allow_unused=True)
    pairs: zip[tuple[Tensor, Tensor | None]] = zip(wanted, found, strict=True)
    return [torch.zeros_like(w) if g is None else g for w, g in pairs]


@pytest.mark.parametrize("split", [1, 2, 3, 4])
@pytest.mark.parametrize("name", MODELS)
def test_values_and_gradients_are_the_models(name: str, split: int) -> None:
    torch.manual_seed(0)
    model = MODELS[name]()
    lifted = lc.lift(model, (X,), split=split)
    assert len(lifted.stages) == split
    own = dict(lifted.module.named_parameters())
    for step in range(3):
        with torch.no_grad():
            for n, p in model.named_parameters():
                p.add_(0.1 * step * torch.randn_like(p))
                own[n].copy_(p)
        x = X[: 4 - step].clone().requires_grad_()
        expected, got = model(x), lifted(x)
        assert torch.allclose(got, expected, atol=1e-6)
        names = [n for n, _ in model.named_parameters()]
        a = gradients(expected, [x, *model.parameters()])
        b = gradients(got, [x, *(own[n] for n in names)])
        for n, one, other in zip(["x", *names], a, b, strict=True):
            assert torch.allclose(one, other, atol=1e-5), n
    certificate = lifted.verify(X, torch.zeros(4, 3), loss=functional.mse_loss)
    assert "FAILS" not in str(certificate)  # where gradients are not derivatives, some identities are not assessed


def test_a_straight_through_estimator_learns_and_a_frozen_teacher_does_not() -> None:
    torch.manual_seed(0)
    data = (torch.randn(32, 6), torch.randn(32, 3))
    options = lc.RunOptions(steps=20, batch_size=16)
    quantised, taught = Quantised(), Taught()
    solved = lc.lift(quantised, data[0], split=2).solve(data, loss=functional.mse_loss, options=options).model
    assert not torch.equal(solved.get_submodule("a").weight, quantised.a.weight)
    for split in (1, 3):
        solved = lc.lift(taught, data[0], split=split).solve(data, loss=functional.mse_loss, options=options).model
        assert torch.equal(solved.get_submodule("teacher").weight, taught.teacher.weight)
        assert torch.equal(solved.get_submodule("other").weight, taught.other.weight)
        assert not torch.equal(solved.get_submodule("student").weight, taught.student.weight)


class Written(nn.Module):
    """A forward that writes into its own parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        self.a.weight.data.clamp_(-0.1, 0.1)
        return self.a(x)


def test_a_write_into_a_parameter_is_refused_by_name() -> None:
    with pytest.raises(lc.LiftError, match=r"clamp_.*test_capture.py.*writes into the parameter 'a.weight'"):
        lc.lift(Written(), (X,))


class Aliased(nn.Module):
    """A tensor beside the parameters that shares the memory of one: no copy of the model would follow."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(6, 3)
        self.kept = self.a.weight.data

    def forward(self, x: Tensor) -> Tensor:
        return self.a(x) + x @ self.kept.t()


def test_memory_of_a_parameter_under_another_name_is_refused_by_name() -> None:
    with pytest.raises(lc.LiftError, match=r"'kept' shares the memory of the parameter 'a.weight'"):
        lc.lift(Aliased(), (X,))


def test_two_outputs_one_of_them_without_parameters() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 3))

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return self.net(x), x * 2

    def first(output: tuple[Tensor, Tensor], target: Tensor) -> Tensor:
        return functional.mse_loss(output[0], target)

    options = lc.RunOptions(steps=2)
    solution = lc.lift(Two(), (X,), split=2).solve((X, torch.zeros(4, 3)), loss=first, options=options)
    assert torch.equal(solution.model(X)[1], X * 2)


def test_models_that_run_in_other_threads_while_one_is_lifted() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 3))
    expected, stop = model(X), threading.Event()
    models = [[build() for build in MODELS.values()] for _ in range(3)]
    wrong: list[Any] = []

    def run() -> None:
        while not stop.is_set():
            try:
                if not torch.equal(model(X), expected) or not torch.equal(Straight.apply(X), torch.round(X)):
                    wrong.append("another value")
            except Exception as error:
                wrong.append(error)

    def lift(own: list[nn.Module]) -> None:
        try:
            for one in own:
                assert lc.lift(one, (X,), split=2).receipt is not None
        except Exception as error:
            wrong.append(error)

    running = threading.Thread(target=run)
    running.start()
    lifting = [threading.Thread(target=lift, args=(own,)) for own in models]
    for thread in lifting:
        thread.start()
    for thread in lifting:
        thread.join()
    stop.set()
    running.join()
    assert not wrong


def test_torch_export_keeps_the_layers_of_torch() -> None:
    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True) for _ in range(2))
            self.wider = nn.TransformerEncoderLayer(8, 2, 24, batch_first=True)
            self.head = nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            for layer in self.layers:
                x = layer(x)
            return self.head(self.wider(x))

    lifted = lc.lift(Pair().eval(), (torch.randn(4, 5, 8),), split=2)
    assert lifted.receipt is not None
    assert lifted.receipt.front_end == "torch.export"
    called = {n.target for n in lifted.graph.nodes if n.op == "call_module"}
    assert {"layers.0.self_attn", "layers.1.linear1", "wider.linear2", "wider.norm1", "head"} <= called


class _Exported(nn.Module):
    """A model that torch.fx cannot trace, with a layer that is more than its class says."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 6, bias=False), nn.Linear(6, 3)
        self.other = nn.Parameter(torch.linspace(-1.0, 1.0, 36).reshape(6, 6))

    def layer(self, x: Tensor) -> Tensor:
        return self.a(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.tanh(self.layer(x if x.shape[1] < 100 else x[:, :100])))


class _OtherWeight(_Exported):
    def layer(self, x: Tensor) -> Tensor:
        return torch.func.functional_call(self.a, {"weight": 2 * self.other}, (x,))


class _NoWeight(_Exported):
    def layer(self, x: Tensor) -> Tensor:
        held = self.a._parameters.pop("weight")
        vars(self.a)["weight"] = 2 * self.other
        result = self.a(x)
        del vars(self.a)["weight"]
        self.a._parameters["weight"] = held
        return result


class _Hooked(_Exported):
    def __init__(self) -> None:
        super().__init__()
        self.a.register_forward_pre_hook(lambda _, args: (2 * args[0],))
        self.a.register_forward_hook(lambda _, args, output: output + args[0])


@pytest.mark.parametrize("kind", [_Exported, _OtherWeight, _NoWeight, _Hooked])
def test_layers_with_other_weights_or_hooks_under_torch_export(kind: type[_Exported]) -> None:
    model = kind()
    lifted = lc.lift(model, X, split=2)
    assert lifted.receipt is not None
    assert lifted.receipt.front_end == "torch.export"
    torch.testing.assert_close(lifted(X), model(X))
    found, wanted = (
        torch.autograd.grad(f(X).sin().sum(), list(m.parameters()), allow_unused=True)
        for f, m in ((lifted, lifted.module), (model, model))
    )
    torch.testing.assert_close(found, wanted)
