"""What a step-wise run returns: finite, consistent, and not worse than the start unless the status says so."""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

import lagcompile as lc

X = torch.randn(48, 5, generator=torch.Generator().manual_seed(3))
Y = torch.randint(0, 3, (48,), generator=torch.Generator().manual_seed(4))
TRANSIENT = {"storage": lc.Transient(), "multiplier": None}
METHODS: dict[str, tuple[Any, dict[str, Any]]] = {
    "extragradient": (lambda lr: lc.Extragradient(weights=lc.SGD(lr=lr)), {}),
    "states": (lambda lr: lc.Extragradient(states=lc.SGD(lr=lr)), {}),
    "multipliers": (lambda lr: lc.Extragradient(multipliers=lc.SGD(lr=lr)), {}),
    "descent_ascent": (lambda lr: lc.DescentAscent(weights=lc.Adam(lr=lr)), {}),
    "augmented": (
        lambda lr: lc.AugmentedLagrangian(weights=lc.SGD(lr=lr)),
        {"weight": lc.AugmentedWeight(value=1.0)},
    ),
    "backprop": (lambda lr: lc.Backprop(weights=lc.SGD(lr=lr)), {}),
    "dfa": (lambda lr: lc.FeedbackAlignment(weights=lc.SGD(lr=lr)), TRANSIENT),
    "altmin": (lambda lr: lc.AltMin(weights=lc.SGD(lr=lr)), {**TRANSIENT, "weight": lc.ConstantWeight(value=0.1)}),
}


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 3))


def solved(method: Any, options: Mapping[str, Any], **run: Any) -> tuple[nn.Module, lc.Solution]:
    model = net()
    lifted = lc.lift(model, X[:4], split=2, formulation=lc.Formulation(**options))
    given = lc.RunOptions(**{"steps": 30, "batch_size": 16, "look_every": 10, **run})
    return model, lifted.solve((X, Y), loss=F.cross_entropy, method=method, options=given)


def loss_of(model: nn.Module) -> float:
    model = copy.deepcopy(model).eval()
    with torch.no_grad():
        return float(F.cross_entropy(model(X), Y))


def tensors(solution: lc.Solution) -> list[Tensor]:
    return [*solution.model.state_dict().values(), *solution.states.values(), *solution.multipliers.values()]


def promised(model: nn.Module, solution: lc.Solution) -> None:
    assert all(bool(torch.isfinite(t).all()) for t in tensors(solution) if t.is_floating_point())
    worse = loss_of(solution.model) > loss_of(model) * (1 + 2e-6)
    assert worse == (solution.status is lc.Status.WORSE), solution.status


@pytest.mark.parametrize("lr", [1e-3, 1e5, 1e20])
@pytest.mark.parametrize("name", METHODS)
def test_what_is_returned_is_finite_and_no_worse_than_the_start(name: str, lr: float) -> None:
    method, options = METHODS[name]
    model, solution = solved(method(lr), options)
    promised(model, solution)
    if solution.status is lc.Status.DIVERGED:
        assert solution.details["returned_step"] < solution.steps
    if lr < 1 and name != "dfa":
        assert solution.status in (lc.Status.STEPS_DONE, lc.Status.WORSE)


def test_divergence_returns_the_best_iterate_and_not_the_start_where_there_was_a_better_one() -> None:
    model = net()
    lifted = lc.lift(model, X[:4], split=2)
    good = lc.Backprop(weights=lc.Adam(lr=3e-2))
    seen: list[Mapping[str, float]] = []

    def watch(row: Mapping[str, float]) -> None:
        seen.append(row)
        if len(seen) == 10:  # the data break in the middle of the run
            broken.fill_(float("inf"))

    broken = X.clone()
    options = lc.RunOptions(steps=200, batch_size=48, look_every=10)
    solution = lifted.solve((broken, Y), loss=F.cross_entropy, method=good, options=options, watch=watch)
    assert solution.status is lc.Status.DIVERGED
    assert loss_of(solution.model) < 0.9 * loss_of(model)
    assert 0 < solution.details["returned_step"] <= 100
    assert all(bool(torch.isfinite(t).all()) for t in solution.model.state_dict().values())


def test_states_and_multipliers_of_a_run_that_diverged_are_those_of_the_weights_returned() -> None:
    method, options = METHODS["extragradient"]
    _, solution = solved(method(1e20), options)
    assert solution.status is lc.Status.DIVERGED
    again = lc.lift(solution.model, X[:4], split=2).bind((X, Y), loss=F.cross_entropy)
    states, _ = again.forward(again.batch(torch.arange(48)))
    assert torch.allclose(solution.states["h1"], states[0][0], atol=1e-5)


def test_a_run_that_only_makes_it_worse_says_so() -> None:
    model, solution = solved(lc.Backprop(weights=lc.SGD(lr=1e3)), {}, steps=40)
    assert solution.status is lc.Status.WORSE
    assert "worse than at the start" in solution.status.advice
    promised(model, solution)


def test_a_run_that_learns_returns_its_last_iterate() -> None:
    model, solution = solved(lc.Backprop(weights=lc.Adam(lr=1e-2)), {}, steps=40)
    assert solution.status is lc.Status.STEPS_DONE
    assert solution.details["returned_step"] == 40
    assert loss_of(solution.model) < loss_of(model)


@pytest.mark.parametrize("end", ["time", "interrupt"])
def test_runs_that_are_cut_short_keep_the_promise(end: str) -> None:
    def watch(row: Mapping[str, float]) -> None:
        if end == "interrupt" and row["step"] >= 20:
            raise KeyboardInterrupt

    model = net()
    limit = {"time_limit": 1e-9} if end == "time" else {}
    solution = lc.lift(model, X[:4], split=2).solve(
        (X, Y),
        loss=F.cross_entropy,
        method=lc.Extragradient(weights=lc.SGD(lr=1e3)),
        options=lc.RunOptions(steps=30, batch_size=16, look_every=10, **limit),
        watch=watch,
    )
    assert solution.status is (lc.Status.WORSE if end == "time" else lc.Status.INTERRUPTED)
    promised(model, solution)
    best = net()
    best.load_state_dict(solution.details["best_weights"])
    assert loss_of(best) <= loss_of(model)


def test_weights_that_are_not_finite_are_refused() -> None:
    model = net()
    with torch.no_grad():
        model.get_parameter("0.bias")[2] = torch.nan
    with pytest.raises(lc.LagcompileError, match=r"'0\.bias' holds numbers that are not finite"):
        lc.lift(model, X[:4], split=2).solve((X, Y), loss=F.cross_entropy)


def test_judging_changes_no_run() -> None:
    """Looking at each step or at none gives the same weights, bit for bit, with dropout and batch normalisation."""
    found = []
    for look in (1, 12):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Dropout(0.3), nn.Linear(8, 3))
        torch.manual_seed(1)
        options = lc.RunOptions(steps=12, batch_size=16, look_every=look)
        found.append(lc.lift(model, X[:4], split=2).solve((X, Y), loss=F.cross_entropy, options=options))
    a, b = (s.model.state_dict() for s in found)
    assert all(torch.equal(a[n], b[n]) for n in a)


def test_an_evaluation_changes_no_run_and_what_it_writes_into_weights_is_put_back() -> None:
    def meddling(module: nn.Module) -> Mapping[str, float]:
        module.train()
        module(torch.randn(16, 5))  # running means, random numbers
        return {"number": 1.0}

    def writing(module: nn.Module) -> Mapping[str, float]:
        with torch.no_grad():
            module.get_parameter("0.weight").zero_()
        return meddling(module)

    found = []
    for evaluate in (None, meddling, writing):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Dropout(0.3), nn.Linear(8, 3))
        lifted = lc.lift(model, X[:4], split=2)
        options = lc.RunOptions(steps=6, batch_size=16, evaluate_every=2)
        said = pytest.warns(UserWarning, match=r"evaluate changed the weight '0\.weight' \(1 of 6 weights\)")
        with said if evaluate is writing else contextlib.nullcontext():
            solution = lifted.solve((X, Y), loss=F.cross_entropy, options=options, evaluate=evaluate)
        found.append(solution.model.state_dict())
    assert all(torch.equal(found[0][n], other[n]) for other in found for n in found[0])


@pytest.mark.parametrize("batch_size", [2, 4])
def test_batches_on_which_the_loss_is_undefined_are_named_before_the_run(batch_size: int) -> None:
    padded = torch.where(torch.arange(48) < 40, -100, Y)
    options = lc.RunOptions(steps=6, batch_size=batch_size)
    with pytest.raises(lc.ProgramError, match=r"NaN\) at the start on .* looked at, such as that of the examples 0"):
        lc.lift(net(), X[:4], split=2).solve((X, padded), loss=F.cross_entropy, options=options)


def test_sorted_rows_are_judged_in_batches_that_are_spread_over_them() -> None:
    padded = torch.where(torch.arange(48) < 24, -100, Y)
    options = lc.RunOptions(steps=6, batch_size=16, look_every=2)
    solution = lc.lift(net(), X[:4], split=2).solve((X, padded), loss=F.cross_entropy, options=options)
    assert all(math.isfinite(v) for v in solution.details["probe"].values())


@pytest.mark.parametrize("found", [None, [1.0], {"a": "x"}, {"a": torch.ones(2)}, {"a": None}])
def test_an_evaluation_that_gives_no_numbers_is_named(found: Any) -> None:
    with pytest.raises(lc.SpecError, match="evaluate must return"):
        lc.lift(net(), X[:4], split=2).solve(
            (X, Y), loss=F.cross_entropy, options=lc.RunOptions(steps=1, batch_size=16), evaluate=lambda module: found
        )


def test_a_start_of_another_network_is_refused_by_name() -> None:
    _, other = solved(lc.Backprop(), {}, steps=1)
    lifted = lc.lift(nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)), X[:4], split=2)
    for method in (lc.Extragradient(), lc.SQP()):
        with pytest.raises(lc.ProgramError, match=r"another network: '0.weight' is \[8, 5\] there, \[7, 5\] here"):
            lifted.solve((X[:3], Y[:3]), loss=F.cross_entropy, method=method, start=other)


def test_numbers_of_an_evaluation_are_numbers() -> None:
    lifted = lc.lift(net(), X[:4], split=2)

    def numbers(found: Any) -> Any:
        return lambda model: found

    run: dict[str, Any] = {"loss": F.cross_entropy, "options": lc.RunOptions(steps=1)}
    found = lifted.solve((X, Y), evaluate=numbers({"accuracy": torch.tensor(0.5)}), **run)
    assert type(found.history.rows[-1]["accuracy"]) is float
    with pytest.raises(lc.SpecError, match="evaluate must return a mapping"):
        lifted.solve((X, Y), evaluate=numbers(3.0), **run)
