"""Inputs as variables in first-order methods: bounds, mini-batches, checkpoints, schemes, refusals."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812

import lagcompile as lc
from lagcompile.backends.first_order import FirstOrder, FirstOrderExecutor
from lagcompile.backends.sqp import SQP
from lagcompile.check.agreement import distance
from tests.problems import RATES, ZOO, Problem, normal

X, Y = normal(3, 6, 3), normal(4, 6, 2)
PROBLEM = ZOO["input_estimation"]
SLOW = {"weights": lc.SGD(lr=0.0), "states": lc.SGD(lr=0.5), "multipliers": lc.SGD(lr=0.1)}


def executor(method: FirstOrder, seed: int = 0) -> FirstOrderExecutor:
    return method.executor(PROBLEM.bind(0.25), seed=seed)


def test_inputs_are_moved_inside_their_bounds_and_the_data_stay() -> None:
    instance = PROBLEM.bind(0.25)
    before = instance.inputs[0].clone()
    run = lc.Extragradient(**SLOW).executor(instance)
    run.step(torch.arange(6))
    moved = run.free_inputs()["input_1"]
    assert float(before.abs().max()) > 1.0
    assert float(moved.abs().max()) <= 1.0
    assert not torch.equal(moved, before.clamp(-1.0, 1.0))
    assert torch.equal(instance.inputs[0], before)
    assert run.final_measures()["largest_defect"] > 0.0


def test_gradients_of_inputs_are_those_of_the_value() -> None:
    run = executor(lc.Extragradient(**SLOW))
    run.step(torch.arange(6))
    batch = run.instance.batch(torch.arange(6))
    run.store.begin(batch, 1)
    run.inputs.begin(batch)
    leaf = run.inputs.rows["input_1"].clone().requires_grad_()
    lagrangian, store = run.lagrangian, run.store
    given: dict[str, Any] = {"rho": store.rho, "noise": store.noise}
    terms = lagrangian.terms(lagrangian.reading(batch, {"input_1": leaf}), store.stored, store.multipliers, **given)
    (expected,) = torch.autograd.grad(lagrangian.value(terms, store.rho), leaf)
    found = lagrangian.gradients(batch, store.stored, store.multipliers, inputs=run.inputs.rows, **given).inputs
    torch.testing.assert_close(found[0], expected * 6, rtol=1e-12, atol=1e-14)


def test_only_the_batch_moves_and_a_checkpoint_goes_on_bit_for_bit() -> None:
    first = executor(lc.ExtragradientFromPast(**{**SLOW, "states": lc.Adam(lr=0.05)}))
    start = first.free_inputs()["input_1"]
    first.step(torch.tensor([1, 4]))
    moved = (first.free_inputs()["input_1"] != start).any(1)
    assert moved.tolist() == [False, True, False, False, True, False]
    kept = first.state_dict()
    second = executor(first.method)
    second.load_state_dict(kept)
    for run in (first, second):
        run.step(torch.tensor([0, 1]))
    assert torch.equal(first.free_inputs()["input_1"], second.free_inputs()["input_1"])


@pytest.mark.parametrize("scheme", [lc.ExtragradientFromPast, lc.OptimisticGradient])
def test_single_call_schemes_reach_the_exact_solution(scheme: type[FirstOrder]) -> None:
    rates = RATES["input_estimation"]
    rules = {"states": lc.SGD(lr=rates.states / 4), "multipliers": lc.SGD(lr=rates.multipliers / 4)}
    options = lc.RunOptions(steps=1500, batch_size=6, look_every=1500)
    other = PROBLEM.solve(scheme(weights=lc.SGD(lr=0.0), **rules), rates.rho, options=options)
    far = distance(PROBLEM.solve(SQP()), other)
    assert far.primal <= 1e-4, far
    assert far.multipliers <= 1e-4, far


class Scaled(nn.Module):
    """Work ahead of the first state that depends on inputs alone."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 2), nn.Linear(2, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        z = x * 2.0 - 0.5
        return self.second(torch.tanh(self.first(z)) + z[:, :2])


def test_what_follows_from_inputs_alone_is_computed_anew() -> None:
    """The gradient in x goes through z = 2 x - 1/2, which is computed ahead of the first stage."""
    torch.manual_seed(0)
    net = Scaled().double()
    options: dict[str, Any] = {"frozen": ("*",), "inputs": {"x": lc.InputFormulation()}}
    run = lc.Extragradient(**SLOW).executor(
        Problem("scaled", lambda: net, (X,), Y, split=2, options=options).bind(0.25)
    )
    assert run.instance.network.prologue.writes
    batch = run.instance.batch(torch.arange(6))
    run.store.begin(batch, 0)
    x, multiplier = normal(9, 6, 3), normal(10, 6, 2)
    leaf, h = x.clone().requires_grad_(), run.store.stored[0][0]
    z = leaf * 2.0 - 0.5
    r = torch.tanh(net.first(z)) + z[:, :2] - h
    value = F.mse_loss(net.second(h), Y) + ((multiplier * r).sum() + 0.125 * (r * r).sum()) / 6
    (expected,) = torch.autograd.grad(value, leaf)
    found = run.lagrangian.gradients(
        batch, run.store.stored, [multiplier[None]], rho=run.store.rho, noise=run.store.noise, inputs={"x": x}
    )
    torch.testing.assert_close(found.inputs[0], expected * 6, rtol=1e-12, atol=1e-14)


def test_integers_and_the_inner_loop_are_refused() -> None:
    with pytest.raises(lc.ProgramError, match="the input 'input_1' is a variable: use extragradient"):
        PROBLEM.solve(lc.AugmentedLagrangian(), 0.25)
    net = nn.Sequential(nn.Embedding(5, 3), nn.Linear(3, 2)).double()
    options = {"inputs": {"input_1": lc.InputFormulation()}}
    words = Problem("words", lambda: net, (torch.arange(5),), normal(1, 5, 2), F.mse_loss, 2, options)
    with pytest.raises(lc.ProgramError, match=r"'input_1' is a variable but holds torch\.int64 numbers"):
        words.solve(lc.Extragradient())
