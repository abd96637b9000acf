"""Whatever a forward returns can be solved for: states, inputs, constants, containers of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

import lagcompile as lc
from tests.checks import assert_descends_as_pytorch
from tests.unseen._nets import tensors_of

X = torch.randn(10, 4, generator=torch.Generator().manual_seed(1))
Y = torch.randn(10, generator=torch.Generator().manual_seed(2))
TRANSIENT = lc.Formulation(storage=lc.Transient(), multiplier=None, weight=lc.ConstantWeight(value=1.0))
PER_CLASS = lc.Formulation(storage=lc.ClassGaussian(), classes=2, multiplier=lc.MultiplierOptions(layout="class"))


class Pair(NamedTuple):
    first: Any
    second: Any


@dataclasses.dataclass
class Record:
    first: Any
    second: Any


@dataclasses.dataclass
class Values:
    """What a forward has at hand."""

    x: Tensor
    h1: Tensor
    h2: Tensor
    y: Tensor
    weight: Tensor
    buffer: Tensor


class Net(nn.Module):
    """Three smooth layers; `give` decides what is returned."""

    def __init__(self, give: Callable[[Values], Any]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.c = nn.Linear(4, 5), nn.Linear(5, 5), nn.Linear(5, 3)
        self.own = nn.Parameter(torch.randn(3))
        self.register_buffer("held", torch.rand(3))
        self.held: Tensor
        self.give = give

    def forward(self, x: Tensor) -> Any:
        h1 = torch.tanh(self.a(x))
        h2 = torch.tanh(self.b(h1))
        return self.give(Values(x, h1, h2, self.c(h2), self.own, self.held))


OUTPUTS: Mapping[str, Callable[[Values], Any]] = {
    "a state beside the output": lambda v: (v.h1, v.y),
    "all states": lambda v: (v.h1, v.h2, v.y),
    "only a state": lambda v: v.h2,
    "what follows from data": lambda v: (v.y, v.x * 2),
    "only what follows from data": lambda v: v.x * 2,
    "the input itself": lambda v: (v.y, v.x),
    "only the input": lambda v: v.x,
    "sizes": lambda v: (v.y, v.x.shape[0], v.h1.shape[1]),
    "a parameter": lambda v: (v.y, v.weight),
    "what follows from a parameter": lambda v: (v.weight * 2, v.y),
    "a buffer": lambda v: (v.y, v.buffer),
    "a constant": lambda v: (v.y, torch.ones(3)),
    "scalars and None": lambda v: (v.y, 3, None, "text", True),
    "one tensor twice": lambda v: (v.y, v.y, v.h1, v.h1),
    "containers": lambda v: {"y": v.y, "more": [v.h1, {"deep": (v.h2, v.x.sum(1))}]},
    "a named tuple": lambda v: Pair(v.y, (v.h1,)),
    "a dataclass": lambda v: Record(v.h2, v.y),
    "a view of a state": lambda v: (v.y, v.h1.flatten(), v.h2.t()),
    "whole numbers": lambda v: (v.y, v.y.argmax(1), v.h1 > 0),
    "a scalar": lambda v: (v.y.mean(), v.y),
}


def every_output(output: Any, target: Tensor) -> Tensor:
    """A loss that reads every tensor of an output, each with a weight of its own."""
    found = tensors_of(output)
    terms = [(i + 1) * (t.double() - 0.5).square().mean().float() for i, t in enumerate(found)]
    return torch.stack(terms).sum() + 0.0 * target.mean()


def weights(solution: lc.Solution) -> dict[str, Tensor]:
    return {n: p.detach() for n, p in solution.model.named_parameters()}


@pytest.mark.parametrize("stages", [1, 2, 3])
@pytest.mark.parametrize("name", OUTPUTS)
def test_exact_multipliers_give_the_gradient_of_the_network(name: str, stages: int) -> None:
    """With the dual sweep and states of a forward pass a saddle-point step is backprop's, whatever the loss reads."""
    model = Net(OUTPUTS[name])
    formulation = lc.Formulation(storage=lc.Transient())
    data_only = name.startswith("only") and "state" not in name
    lifted = lc.lift(model, (X[:3],), split=1 if data_only else stages, formulation=formulation)
    assert_descends_as_pytorch(lifted, model, (X, Y), every_output)
    assert data_only or lifted.verify(X, Y, loss=every_output).ok


METHODS: Mapping[str, tuple[lc.Formulation, Any]] = {
    "extragradient": (lc.Formulation(), lc.Extragradient()),
    "from past": (lc.Formulation(), lc.ExtragradientFromPast()),
    "optimistic": (lc.Formulation(), lc.OptimisticGradient()),
    "inner steps": (lc.Formulation(), lc.Extragradient(inner_steps=2)),
    "augmented": (lc.Formulation(weight=lc.AugmentedWeight(value=1.0)), lc.AugmentedLagrangian()),
    "altmin": (TRANSIENT, lc.AltMin()),
    "proxprop": (TRANSIENT, lc.ProxProp(explicit=("*",))),
    "eliminated": (lc.Formulation(storage=lc.Eliminated()), lc.Extragradient()),
    "adjoints": (lc.Formulation(multiplier=lc.MultiplierOptions(start="adjoint")), lc.Extragradient()),
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ["all states", "what follows from data", "containers", "sizes"])
def test_every_method_takes_every_output(name: str, method: str) -> None:
    formulation, solver = METHODS[method]
    model = Net(OUTPUTS[name])
    lifted = lc.lift(model, (X[:3],), split=3, formulation=formulation)
    solution = lifted.solve((X, Y), loss=every_output, method=solver, options=lc.RunOptions(steps=3, batch_size=4))
    assert solution.status is lc.Status.STEPS_DONE
    assert type(solution.model) is Net
    assert all(torch.isfinite(p).all() for p in weights(solution).values())
    kept = {s.name for s in solution.program.states if s.storage.kind == "table"}
    assert set(solution.states) == kept
    assert all(len(v) == len(X) and torch.isfinite(v).all() for v in solution.states.values())


def test_the_exact_method_reads_states_that_are_outputs() -> None:
    """SQP ends where the gradient of the un-split network vanishes."""
    model = Net(OUTPUTS["all states"]).double()
    x, y = X[:4].double(), Y[:4].double()

    def loss(output: Any, target: Tensor) -> Tensor:
        return torch.stack([(t - 0.5).square().mean() for t in output]).sum() + 0.0 * target.sum()

    regularised = lc.Formulation(regularisers=(lc.Regulariser(kind="l2", on="weights", weight=0.1),))
    lifted = lc.lift(model, (x,), split=3, formulation=regularised)
    solution = lifted.solve((x, y), loss=loss, method=lc.SQP())
    assert solution.status is lc.Status.SOLVED, solution.status
    used = [p for n, p in solution.model.named_parameters() if n != "own"]  # what no stage reads is no variable
    value = loss(solution.model.eval()(x), y) + 0.05 * torch.stack([p.square().sum() for p in used]).sum()
    for gradient in torch.autograd.grad(value, used):
        assert float(gradient.abs().max()) < 1e-6


def test_target_propagation_refuses_a_loss_that_reads_earlier_states() -> None:
    lifted = lc.lift(Net(OUTPUTS["a state beside the output"]), (X[:3],), split=3, formulation=TRANSIENT)
    with pytest.raises(lc.ProgramError, match=r"dtp.*h1 \(after .*\)"):
        lifted.solve((X, Y), loss=every_output, method=lc.DifferenceTargetPropagation())


def test_samples_and_real_examples_do_not_meet_in_the_loss() -> None:
    labels = torch.arange(10) % 2
    formulation = lc.Formulation(at={"tanh": PER_CLASS}, classes=2, storage=lc.Eliminated())
    lifted = lc.lift(Net(lambda v: (v.y, v.x)), (X[:3],), split=3, formulation=formulation)
    with pytest.raises(lc.ProgramError, match="of samples of a class_gaussian state, and x, of real examples"):
        lifted.solve((X, labels), loss=lambda out, target: out[0].square().mean() + out[1].square().mean())


def test_a_class_gaussian_state_may_be_an_output() -> None:
    labels = torch.arange(10) % 2
    formulation = lc.Formulation(at={"tanh": PER_CLASS}, classes=2, storage=lc.Eliminated())
    lifted = lc.lift(Net(lambda v: (v.h1, v.y)), (X[:3],), split=3, formulation=formulation)

    def loss(output: Any, target: Tensor) -> Tensor:
        assert len(output[0]) == len(output[1]) == len(target)
        return output[0].square().mean() + nn.functional.cross_entropy(output[1], target)

    solution = lifted.solve((X, labels), loss=loss, options=lc.RunOptions(steps=3, batch_size=4))
    assert solution.status is lc.Status.STEPS_DONE
