"""What a front end loses is noticed: a model is lifted as it is, or refused by name, never changed without a word."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

import lagcompile as lc
from tests.frontend.sameness import right_or_refused

X = torch.randn(8, 4, generator=torch.Generator().manual_seed(1))


class Two(nn.Module):
    """Two layers with something in between."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 3)

    def between(self, h: Tensor, x: Tensor) -> Tensor:
        """What the cases differ in."""
        return h

    def forward(self, x: Tensor) -> Any:
        return self.b(self.between(torch.tanh(self.a(x)), x))


class _Round(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return torch.round(4 * x) / 4

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return grads[0]


class StraightThrough(Two):
    """Rounding has no gradient of its own."""

    def between(self, h: Tensor, x: Tensor) -> Tensor:
        return _Round.apply(h)


class Teacher(Two):
    """A frozen part under no_grad, whose parameters ask for gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.teacher = nn.Linear(4, 4)

    def between(self, h: Tensor, x: Tensor) -> Tensor:
        with torch.no_grad():
            t = self.teacher(h)
        return h + t


class FunctionalCall(Two):
    """Parameters that a front end may take for constants."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4)

    def between(self, h: Tensor, x: Tensor) -> Tensor:
        weights = {n: 2 * p for n, p in self.inner.named_parameters()}
        return functional_call(self.inner, weights, (h,))


class BakedInNoGrad(FunctionalCall):
    """The same where gradients do not tell."""

    def between(self, h: Tensor, x: Tensor) -> Tensor:
        with torch.no_grad():
            return h.detach() + super().between(h, x)


class ByNumber(Two):
    """A parameter as a Python number."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(1.5))

    def between(self, h: Tensor, x: Tensor) -> Tensor:
        return h * float(self.scale)


class BranchOnWeight(ByNumber):
    """Control flow on a parameter."""

    def between(self, h: Tensor, x: Tensor) -> Tensor:
        return h if self.scale > 1.6 else -h


class BranchOnSize(Two):
    def between(self, h: Tensor, x: Tensor) -> Tensor:
        return -h if x.shape[0] > 4 else h


class BranchOnLength(Two):
    def between(self, h: Tensor, x: Tensor) -> Tensor:
        return -h if len(x) > 4 else h


class BranchOnOne(Two):
    def between(self, h: Tensor, x: Tensor) -> Tensor:
        return -h if x.size(0) == 1 else h


class SizeInEval(Two):
    """A branch on a size in one mode only."""

    def between(self, h: Tensor, x: Tensor) -> Tensor:
        if not self.training and x.shape[0] > 4:
            return -h
        return h


class ByLength(Two):
    """A size as a number."""

    def between(self, h: Tensor, x: Tensor) -> Tensor:
        return h / len(x)


class EvenOnly(Two):
    def between(self, h: Tensor, x: Tensor) -> Tensor:
        return -h if x.shape[0] % 2 == 0 else h


class ValueInEval(Two):
    """A branch on values in one mode only, not taken on the example."""

    def between(self, h: Tensor, x: Tensor) -> Tensor:
        if not self.training and x.sum() > 1000:
            h = 5 * h
        return h


class ValueInTrain(Two):
    def between(self, h: Tensor, x: Tensor) -> Tensor:
        if self.training and x.max() > 2:
            h = 5 * h
        return h


class Counter(Two):
    """State outside of buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def between(self, h: Tensor, x: Tensor) -> Tensor:
        self.calls += 1
        return h * self.calls


class Cached(Two):
    """State outside of buffers that changes nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.mask: Tensor | None = None
        self.seen: list[int] = []

    def between(self, h: Tensor, x: Tensor) -> Tensor:
        if self.mask is None:
            self.mask = torch.arange(4) > 1
            self.seen.append(1)
        return h * self.mask


class PythonRandom(Two):
    def between(self, h: Tensor, x: Tensor) -> Tensor:
        return h * random.random()


class FrozenTraining(Two):
    """A sub-module that stays in eval mode whatever it is told."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = _EvalOnly(4)

    def between(self, h: Tensor, x: Tensor) -> Tensor:
        return self.norm(h)


class _EvalOnly(nn.BatchNorm1d):
    def train(self, mode: bool = True) -> _EvalOnly:
        return super().train(False)


class Parent(Two):
    """The same, decided by the parent."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(4)

    def train(self, mode: bool = True) -> Parent:
        super().train(mode)
        self.norm.eval()
        return self

    def between(self, h: Tensor, x: Tensor) -> Tensor:
        return self.norm(h)


class NotANumber(Two):
    """NaN on some rows."""

    def between(self, h: Tensor, x: Tensor) -> Tensor:
        return h + torch.log(x[:, :1] * 0) * 0


class Statistic(Two):
    """A number of the data beside the output."""

    def forward(self, x: Tensor) -> Any:
        h = torch.tanh(self.a(x))
        return self.b(h), float(x.sum())


class FrozenWeight(Two):
    def __init__(self) -> None:
        super().__init__()
        self.a.requires_grad_(False)

    def between(self, h: Tensor, x: Tensor) -> Tensor:
        return torch.round(h) + h.argmax(1, keepdim=True)


CASES: tuple[Callable[[], nn.Module], ...] = (
    StraightThrough,
    Teacher,
    FunctionalCall,
    BakedInNoGrad,
    ByNumber,
    BranchOnWeight,
    BranchOnSize,
    BranchOnLength,
    BranchOnOne,
    SizeInEval,
    ByLength,
    EvenOnly,
    ValueInEval,
    ValueInTrain,
    Counter,
    Cached,
    PythonRandom,
    FrozenTraining,
    Parent,
    NotANumber,
    Statistic,
    FrozenWeight,
)
LIFTED = {Teacher, Cached, FrozenTraining, Parent, NotANumber, FrozenWeight, SizeInEval}
"""Those that must be captured: nothing in them hangs on values or sizes in a way that a graph cannot hold."""


@pytest.mark.parametrize("kind", CASES, ids=lambda k: k.__name__)
@pytest.mark.parametrize("rows", [8, 3, 1])
def test_right_or_refused(kind: Callable[[], nn.Module], rows: int) -> None:
    torch.manual_seed(0)
    said = right_or_refused(kind(), X[:rows])
    assert kind not in LIFTED or "cannot be captured" not in said, said


@pytest.mark.parametrize("kind", CASES, ids=lambda k: k.__name__)
def test_right_or_refused_in_a_sub_module_and_cut(kind: Callable[[], nn.Module]) -> None:
    torch.manual_seed(0)
    inner = kind()
    if isinstance(inner, Statistic):
        return
    right_or_refused(nn.Sequential(nn.Linear(4, 4), nn.Tanh(), inner, nn.Linear(3, 2)), X, split=2)


class _Fixed(Two):
    """A size that is written into the model."""

    def between(self, h: Tensor, x: Tensor) -> Tensor:
        return h.view(2, 4, 4).flip(0).reshape(8, 4)


@pytest.mark.parametrize("kind", [BranchOnSize, _Fixed])
def test_a_run_keeps_to_the_sizes_that_were_captured(kind: Callable[[], nn.Module]) -> None:
    torch.manual_seed(0)
    lifted = lc.lift(kind(), X, split=2)
    x, y = torch.randn(32, 4), torch.randn(32, 3)
    loss = nn.functional.mse_loss
    solution = lifted.solve((x, y), loss=loss, options=lc.RunOptions(steps=3, batch_size=8))
    assert solution.certificate is not None
    assert solution.certificate.ok, str(solution.certificate)
    with pytest.raises(lc.BindError, match="batch") as caught:
        lifted.solve((x, y), loss=loss, options=lc.RunOptions(steps=9, batch_size=10))
    assert kind is _Fixed or "test_receipt.py:" in str(caught.value)
    with pytest.raises(lc.BindError, match="was captured for"):
        lifted(x[:3])


class NaNOnNegative(Two):
    """What the example inputs did not show."""

    def forward(self, x: Tensor) -> Any:
        return super().forward(x.log() - x.log() + x)

    def between(self, h: Tensor, x: Tensor) -> Tensor:
        return h


def test_nan_equals_nan_at_the_same_places() -> None:
    torch.manual_seed(0)
    lifted = lc.lift(NaNOnNegative(), X.abs(), split=2)
    assert torch.isnan(lifted(X)).any()
    assert torch.equal(lifted(X).isnan(), lifted.module(X).isnan())


def test_a_fault_behind_the_receipt_is_noticed_when_data_are_bound() -> None:
    torch.manual_seed(0)
    lifted = lc.lift(nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 3)), X, split=2)
    graph = lifted.network.stages[1].module.graph
    last = next(n for n in graph.nodes if n.op == "output")
    with graph.inserting_before(last):
        wrong = graph.call_function(torch.add, (last.args[0][0], 1e-3))
    last.args = ((wrong, *last.args[0][1:]),)
    with pytest.raises(lc.BindError, match="on these data the lifted network is not the model"):
        lifted.bind((X, torch.zeros(8, 3)), loss=nn.functional.mse_loss)


def test_everything_is_left_as_it_was() -> None:
    torch.manual_seed(0)
    model: Any = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(0.3), Cached(), nn.Linear(3, 2))
    model[0].requires_grad_(False)
    model[4](torch.randn(2, 3)).sum().backward()
    model[1].eval()
    x = X.clone().requires_grad_()
    state = copy.deepcopy(model.state_dict())
    gradient = model[4].weight.grad.clone()
    modes = [m.training for m in model.modules()]
    generators = torch.get_rng_state(), random.getstate()
    lc.lift(model, x, split=2).bind((x.detach(), torch.zeros(8, 2)), loss=nn.functional.mse_loss)
    assert torch.equal(generators[0], torch.get_rng_state())
    assert generators[1] == random.getstate()
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert torch.equal(model[4].weight.grad, gradient)
    assert model[0].weight.grad is None
    assert x.grad is None
    assert modes == [m.training for m in model.modules()]
    assert [p.requires_grad for p in model.parameters()] == [False, False, *[True] * 8]
    assert model[3].mask is None
    assert model[3].seen == []
    assert not any(m._forward_hooks or m._forward_pre_hooks or m._backward_hooks for m in model.modules())


def test_what_no_seed_repeats_is_named() -> None:
    noise = iter(range(1, 10_000))

    class Restless(Two):
        def between(self, h: Tensor, x: Tensor) -> Tensor:
            return h * (1 + next(noise))

    with pytest.raises(lc.LiftError, match="Restless gives two results for the same inputs, weights and random seed"):
        lc.lift(Restless(), X)


def test_the_receipt_says_on_what_it_was_compared() -> None:
    torch.manual_seed(0)
    receipt = lc.lift(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 3)), X, split=2).receipt
    assert receipt is not None
    assert {m.mode: sorted(set(m.batches)) for m in receipt.modes} == {"eval": [1, 2, 8], "train": [3, 8]}
    assert all(m.slopes == 0 for m in receipt.modes)
    assert "6 runs with batches of 1, 2, 8: outputs bit-equal; gradients bit-equal" in str(receipt)


class Warming(Two):
    """Does something else after a while, which a counter tells."""

    def __init__(self) -> None:
        super().__init__()
        self.steps = 0

    def between(self, h: Tensor, x: Tensor) -> Tensor:
        self.steps += 1
        return h if self.steps <= 100 else 0.5 * h


class Wrapping(Warming):
    """A counter that may not run on: it is an index."""

    def between(self, h: Tensor, x: Tensor) -> Tensor:
        scale = (1.0, 1.0, 1.0)[self.steps]
        self.steps = (self.steps + 1) % 3
        return scale * h


def test_a_counter_that_matters_only_after_many_calls_is_refused_by_name() -> None:
    with pytest.raises(lc.LiftError, match=r"attribute steps, and its result depends on it"):
        lc.lift(Warming(), X, split=2)


def test_a_counter_that_wraps_and_does_not_matter_is_lifted() -> None:
    model = Wrapping()
    lifted = lc.lift(model, X, split=2)
    assert model.steps == 0
    torch.testing.assert_close(lifted(X), model(X))


class Sized(nn.Module):
    """Layers whose work hangs on the mode, and Python that decides by a feature size, which torch.fx cannot trace."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(5, 5), nn.BatchNorm1d(5), nn.Dropout(0.3), nn.Linear(5, 5)).to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        h: Tensor = self.layers(x)
        return h - h.mean(1, keepdim=True) if h.shape[1] > 1 else h


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_modes_that_torch_export_tells_apart_do_not_fix_the_batch_size(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    lifted = lc.lift(Sized(dtype), torch.randn(6, 5, dtype=dtype), split=2)
    assert lifted.receipt is not None
    assert lifted.receipt.ok
    assert lifted.receipt.batch == "dynamic"
    assert lifted(torch.randn(9, 5, dtype=dtype)).shape == (9, 5)
