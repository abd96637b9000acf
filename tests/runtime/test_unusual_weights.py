"""Tied, frozen, complex, narrow and hidden weights, and none at all."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import lagcompile as lc
from tests.checks import assert_descends_as_pytorch

X = torch.randn(8, 4, generator=torch.Generator().manual_seed(0))
Y = torch.randn(8, 3, generator=torch.Generator().manual_seed(1))
TRANSIENT = lc.Formulation(storage=lc.Transient())
STEPS = lc.RunOptions(steps=3, batch_size=4)
mse = nn.functional.mse_loss


class Block(nn.Module):
    """Two layers, whose weights may be one."""

    def __init__(self, *, tied: bool) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)
        if tied:
            self.b.weight = self.a.weight

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.b(torch.tanh(self.a(x))))


class Deep(nn.Module):
    """Four equal blocks and a head."""

    def __init__(self, *, tied: bool, tie: Callable[[nn.ModuleList], None] | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList([Block(tied=tied) for _ in range(4)])
        self.head = nn.Linear(4, 3)
        if tie is not None:
            tie(self.blocks)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.head(x)


class Unrolled(nn.Module):
    """One cell, called several times, on a state and the input."""

    def __init__(self, norm: nn.Module | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.cell, self.read, self.head = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3)
        self.gain = nn.Parameter(torch.rand(4))
        self.norm = norm or nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        h = torch.zeros_like(x)
        for _ in range(4):
            h = torch.tanh(self.norm(self.cell(h) * self.gain + self.read(x)))
        return self.head(h)


def first_layers(blocks: nn.ModuleList) -> None:
    for block in blocks[1:]:
        block.a = blocks[0].a


def first_weights(blocks: nn.ModuleList) -> None:
    for block in blocks[1:]:
        block.get_submodule("a").weight = blocks[0].get_submodule("a").weight


def across(blocks: nn.ModuleList) -> None:
    for ahead, block in itertools.pairwise(list(blocks)):
        block.get_submodule("a").weight = ahead.get_submodule("b").weight


def pairs(blocks: nn.ModuleList) -> None:
    blocks[2], blocks[3] = blocks[0], blocks[1]


def all_blocks(blocks: nn.ModuleList) -> None:
    for k in (1, 2, 3):
        blocks[k] = blocks[0]


TIES: Mapping[str, Callable[[nn.ModuleList], None] | None] = {
    "none": None,
    "first layers": first_layers,
    "first weights": first_weights,
    "across blocks": across,
    "pairs of blocks": pairs,
    "all blocks": all_blocks,
}


@pytest.mark.parametrize("split", [2, 5, lc.IsomorphicSplit()], ids=str)
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("ties", TIES)
def test_tied_weights_are_one_variable(ties: str, tied: bool, split: int | lc.IsomorphicSplit) -> None:
    model = Deep(tied=tied, tie=TIES[ties])
    lifted = lc.lift(model, (X[:3],), split=split, formulation=TRANSIENT)
    assert_descends_as_pytorch(lifted, model, (X, Y), mse)
    assert {w.name for w in lifted.program.weights} == {n for n, _ in model.named_parameters()}
    assert lifted.verify(X, Y, loss=mse).ok
    kept = lc.lift(model, (X[:3],), split=split).solve((X, Y), loss=mse, options=STEPS)
    assert kept.status is lc.Status.STEPS_DONE


@pytest.mark.parametrize("split", [3, 5, lc.IsomorphicSplit()], ids=str)
@pytest.mark.parametrize("norm", [None, nn.LayerNorm(4), nn.BatchNorm1d(4), nn.GroupNorm(2, 4)], ids=str)
def test_a_cell_that_is_called_several_times(norm: nn.Module | None, split: int | lc.IsomorphicSplit) -> None:
    model = Unrolled(norm)
    lifted = lc.lift(model, (X[:3],), split=split, formulation=TRANSIENT)
    assert_descends_as_pytorch(lifted, model, (X, Y), mse)
    assert lifted.verify(X, Y, loss=mse).ok


class Complex(nn.Module):
    """A complex layer between real ones."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Linear(4, 4), nn.Linear(4, 3)
        self.turn = nn.Linear(4, 4, dtype=torch.complex64)

    def forward(self, x: Tensor) -> Tensor:
        z = self.turn(torch.tanh(self.first(x)).to(torch.complex64))
        return self.last(torch.tanh(z.real + z.imag * 2))


RULES = (lc.SGD(lr=0.1, momentum=0.5), lc.Adagrad(lr=0.1), lc.Adam(lr=0.1))


@pytest.mark.parametrize("rule", RULES, ids=lambda r: r.kind)
def test_complex_weights_move_as_in_pytorch(rule: lc.SGD | lc.Adagrad | lc.Adam) -> None:
    model = Complex()
    lifted = lc.lift(model, (X[:3],), split=3, formulation=TRANSIENT)
    assert_descends_as_pytorch(lifted, model, (X, Y), mse)
    assert lifted.verify(X, Y, loss=mse).ok
    method = lc.Backprop(weights=rule)
    solution = lifted.solve((X, Y), loss=mse, method=method, options=lc.RunOptions(steps=4, batch_size=8))
    makers: Mapping[str, Callable[[list[nn.Parameter]], torch.optim.Optimizer]] = {
        "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.5),
        "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.1),
        "adam": lambda p: torch.optim.Adam(p, lr=0.1),
    }
    optimizer = makers[rule.kind](list(model.parameters()))
    for _ in range(4):
        optimizer.zero_grad()
        mse(model(X), Y).backward()
        optimizer.step()
    for name, p in model.named_parameters():
        torch.testing.assert_close(dict(solution.model.named_parameters())[name], p, rtol=1e-4, atol=1e-5)


def test_a_penalty_on_complex_weights_is_real() -> None:
    penalty = lc.Regulariser(kind="l2", on="weights", weight=0.1)
    model = Complex()
    lifted = lc.lift(
        model, (X[:3],), split=3, formulation=lc.Formulation(storage=lc.Transient(), regularisers=(penalty,))
    )
    solution = lifted.solve(
        (X, Y),
        loss=lambda out, _: out.mean() * 0.0,
        method=lc.Backprop(weights=lc.SGD(lr=1.0)),
        options=lc.RunOptions(steps=1, batch_size=8),
    )
    for name, p in model.named_parameters():
        torch.testing.assert_close(dict(solution.model.named_parameters())[name], 0.9 * p)


@pytest.mark.parametrize("method", [lc.SQP(), lc.Convex()], ids=lambda m: m.kind)
def test_exact_methods_name_complex_weights(method: lc.SQP | lc.Convex) -> None:
    with pytest.raises(lc.ProgramError, match=r"complex: the weight turn\.weight, the weight turn\.bias"):
        lc.lift(Complex(), (X[:3],), split=3).solve((X, Y), loss=mse, method=method)


class Scaled(nn.Module):
    """A parameter of any type that is not solved for."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Linear(4, 4), nn.Linear(4, 3)
        self.held = nn.Parameter(torch.ones(4).to(dtype), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(torch.tanh(self.first(x)) * self.held))


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.uint8, torch.float16, torch.float64], ids=str)
def test_weights_of_other_types_are_constants(dtype: torch.dtype) -> None:
    model = Scaled(dtype)
    if dtype is torch.float64:
        model.last.double()
    target = Y.to(model.last.weight.dtype)
    lifted = lc.lift(model, (X[:3],), split=3, formulation=TRANSIENT)
    assert_descends_as_pytorch(lifted, model, (X, target), mse)
    assert lifted.verify(X, target, loss=mse).ok
    for method in (None, lc.FeedbackAlignment(), lc.DifferenceTargetPropagation()):
        chosen = TRANSIENT if method is None else lc.Formulation(storage=lc.Transient(), multiplier=None)
        solved = lc.lift(model, (X[:3],), split=3, formulation=chosen).solve(
            (X, target), loss=mse, method=method, options=STEPS
        )
        assert torch.equal(dict(solved.model.named_parameters())["held"], model.held)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_throughout(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, 3)).to(dtype)
    x, y = X.to(dtype), Y.to(dtype)
    lifted = lc.lift(model, (x[:3],), split=3)
    solution = lifted.solve((x, y), loss=mse, options=STEPS)
    assert all(p.dtype is dtype and torch.isfinite(p).all() for p in solution.model.parameters())
    assert lifted.verify(x, y, loss=mse).ok


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_data_of_another_precision_are_named(dtype: torch.dtype) -> None:
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).to(dtype)
    with pytest.raises(lc.LiftError, match="the model does not run on the example inputs"):
        lc.lift(model, (X[:3],), split=2)
    lifted = lc.lift(model, (X[:3].to(dtype),), split=2)
    with pytest.raises(lc.BindError, match=f"float32.*{str(dtype).removeprefix('torch.')}"):
        lifted.solve((X, Y), loss=mse)
    with pytest.raises(lc.BindError, match=f"float32.*{str(dtype).removeprefix('torch.')}"):
        lifted.verify(X, Y, loss=mse)


def small() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, 3))


def test_states_alone_are_solved_for() -> None:
    model = small().requires_grad_(False)
    lifted = lc.lift(model, (X[:3],), split=3)
    solution = lifted.solve((X, Y), loss=mse, options=STEPS)
    assert set(solution.states) == {"h1", "h2"}
    for name, value in model.state_dict().items():
        assert torch.equal(solution.model.state_dict()[name], value)
    assert lifted.verify(X, Y, loss=mse).ok


def test_equal_stages_of_which_some_are_frozen() -> None:
    model = Deep(tied=False)
    for p in model.blocks[1].parameters():
        p.requires_grad_(False)
    lifted = lc.lift(model, (X[:3],), split=lc.EverySplit(type="Block"), formulation=TRANSIENT)
    assert_descends_as_pytorch(lifted, model, (X, Y), mse)
    frozen = lc.Formulation(frozen=("blocks.2.*",), storage=lc.Transient())
    solution = lc.lift(model, (X[:3],), split=lc.EverySplit(type="Block"), formulation=frozen).solve(
        (X, Y), loss=mse, options=STEPS
    )
    moved = {n for n, p in solution.model.named_parameters() if not torch.equal(p, model.get_parameter(n))}
    assert "blocks.3.a.weight" in moved
    assert not [n for n in moved if n.startswith("blocks.2.")]


class NoWeights(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x)[:, :3] * 2


@pytest.mark.parametrize("method", [None, lc.Backprop(), lc.OptimisticGradient()], ids=str)
@pytest.mark.parametrize("model", [NoWeights(), small().requires_grad_(False)], ids=["none", "frozen"])
def test_nothing_to_solve_for_is_said(model: nn.Module, method: lc.Backprop | None) -> None:
    lifted = lc.lift(model, (X[:3],), split=1)
    with pytest.raises(lc.ProgramError, match=r"no weight moves.*nothing to solve for"):
        lifted.solve((X, Y), loss=mse, method=method)
    assert lifted.verify(X, Y, loss=mse).ok


class Hidden(nn.Module):
    """Layers and tensors that `named_parameters` does not show."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        layers = [nn.Linear(4, 4) for _ in range(2)]
        self.first, self.last = nn.Linear(4, 4), nn.Linear(4, 3)
        self.held: object = {
            "list": layers,
            "dict": {"a": layers[0], "b": (layers[1],)},
            "tensors": [torch.randn(4, 4, requires_grad=True), torch.randn(4, 4)],
        }[kind]

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.first(x))
        found = self.held
        parts = [found["a"], *found["b"]] if isinstance(found, dict) else list(found)  # type: ignore[call-overload]
        for part in parts:
            h = torch.tanh(h @ part if isinstance(part, Tensor) else part(h))
        return self.last(h)


@pytest.mark.parametrize("kind", ["list", "dict", "tensors"])
def test_what_named_parameters_does_not_show_is_constant(kind: str) -> None:
    model = Hidden(kind)
    lifted = lc.lift(model, (X[:3],), split=4, formulation=TRANSIENT)
    assert {w.name for w in lifted.program.weights} == {"first.weight", "first.bias", "last.weight", "last.bias"}
    assert_descends_as_pytorch(lifted, model, (X, Y), mse)
    assert lifted.verify(X, Y, loss=mse).ok


@pytest.mark.parametrize(
    "kind",
    [
        parametrizations.weight_norm,
        parametrizations.spectral_norm,
        parametrizations.orthogonal,
    ],
    ids=lambda f: f"{f.__module__}.{f.__name__}",
)
def test_parametrized_layers(kind: Callable[[nn.Module], nn.Module]) -> None:
    model = small()
    assert isinstance(model, nn.Sequential)
    kind(model[0])
    kind(model[2])
    lifted = lc.lift(model, (X[:3],), split=3, formulation=TRANSIENT)
    certificate = lifted.verify(X, Y, loss=mse)  # some have a gradient that is not the derivative, which it says
    assert all(r.ok for r in certificate.residuals)
    solution = lifted.solve((X, Y), loss=mse, options=STEPS)
    assert torch.isfinite(solution.model(X)).all()
