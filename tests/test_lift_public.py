"""Everything public can be pickled and copied, and is the same thing afterwards."""

from __future__ import annotations

import copy
import inspect
import pickle
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lagcompile as lc
from lagcompile.ir.base import Frozen
from tests.nets import deep

FUNCTIONS = {"drive", "lift", "load", "load_solution"}
ABSTRACT = {"Executor", "Method", "LagcompileError"}
OPTIONS: Mapping[str, dict[str, Any]] = {
    "AtSplit": {"after": ("1", ("2", "3"))},
    "BalancedSplit": {"stages": 2},
    "EverySplit": {"type": "Linear"},
    "MemorySplit": {"budget": "1 GiB", "examples": 3},
    "Regulariser": {"kind": "l2", "on": "weights", "weight": 0.1},
    "ValueConstraint": {"name": "c", "reads": ("h1",)},
    "Adagrad": {"lr": 0.1},
    "Adam": {"lr": 0.1},
    "SGD": {"lr": 0.1},
    "AugmentedWeight": {"value": 1.0},
    "AbsTube": {"epsilon": 0.1},
    "NormTube": {"epsilon": 0.1},
    "Softshrink": {"epsilon": 0.1},
    "Hardshrink": {"epsilon": 0.1},
    "Range": {"lower": 0.0, "upper": 1.0},
    "ConstantWeight": {"value": 1.0},
    "LinearWeight": {"start": 0.0, "increment": 1.0},
    "GeometricWeight": {"start": 1.0, "factor": 2.0, "every": 3},
}
X, Y = torch.randn(12, 5, generator=torch.Generator().manual_seed(0)), torch.zeros(12, 5)


@pytest.fixture(scope="module")
def lifted() -> lc.Lifted:
    return lc.lift(deep(3), (X,), split=2)


@pytest.fixture(scope="module")
def solution(lifted: lc.Lifted) -> lc.Solution:
    return lifted.solve((X, Y), loss=nn.functional.mse_loss, options=lc.RunOptions(steps=3, batch_size=4))


def twins(value: Any) -> tuple[Any, Any]:
    return pickle.loads(pickle.dumps(value)), copy.deepcopy(value)


NAMES = sorted(
    set(lc.__all__) - FUNCTIONS - ABSTRACT - {"Lifted", "Program", "Solution", "Certificate", "History", "Extra"}
)


@pytest.mark.parametrize("name", NAMES)
def test_options_errors_and_statuses(name: str) -> None:
    kind = getattr(lc, name)
    assert inspect.isclass(kind), f"{name} is no class: name it among FUNCTIONS"
    if issubclass(kind, Exception):
        error = kind(["one thing", "another"])
        for twin in twins(error):
            assert type(twin) is kind
            assert str(twin) == str(error)
            assert vars(twin) == vars(error)
        return
    made = list(kind) if issubclass(kind, lc.Status) else [kind(**OPTIONS.get(name, {}))]
    for value in made:
        for twin in twins(value):
            assert type(twin) is kind
            assert twin == value


def test_an_optimiser_goes_on_as_before() -> None:
    weight = nn.Parameter(torch.ones(3))
    optimiser = lc.Extra([weight], lc.Adam(lr=0.1))
    weight.grad = torch.arange(3.0)
    optimiser.extrapolate()
    weight.grad = torch.ones(3)
    optimiser.step()
    for twin in twins(optimiser):
        (mine,), (theirs,) = optimiser.param_groups[0]["params"], twin.param_groups[0]["params"]
        assert torch.equal(mine, theirs)
        theirs.grad = torch.arange(3.0)
        twin.extrapolate()
        twin.step()
    weight.grad = torch.arange(3.0)
    optimiser.extrapolate()
    optimiser.step()
    assert torch.equal(theirs, weight)


def test_lifted_program_and_certificate(lifted: lc.Lifted) -> None:
    certificate = lifted.verify(X, Y, loss=nn.functional.mse_loss)
    for value in (lifted.program, lifted.receipt, lifted.policy, lifted.split, lifted.plan(10), certificate):
        assert isinstance(value, Frozen)
        for twin in twins(value):
            assert twin == value
            assert str(twin) == str(value)
    for again in twins(lifted):
        assert torch.equal(again(X), lifted(X))
        assert again.program == lifted.program
        assert again.partition.stage_of == lifted.partition.stage_of


def test_an_instance_goes_on_as_before(lifted: lc.Lifted) -> None:
    instance = lifted.bind((X, Y), loss=nn.functional.mse_loss)
    rows = torch.arange(4)

    def output(bound: Any) -> Tensor:
        value = bound.output(bound.forward(bound.batch(rows))[1])
        assert isinstance(value, Tensor)
        return value

    for twin in twins(instance):
        assert twin.program == instance.program
        assert torch.equal(output(twin), output(instance))


def test_a_solution_is_what_was_reached(lifted: lc.Lifted, solution: lc.Solution) -> None:
    for twin in twins(solution):
        assert twin.status == solution.status
        assert str(twin) == str(solution)
        assert [dict(r) for r in twin.history.rows] == [dict(r) for r in solution.history.rows]
        assert type(twin.model) is type(solution.model) is nn.Sequential
        for key, value in solution.model.state_dict().items():
            assert torch.equal(twin.model.state_dict()[key], value)
        for kind in ("states", "multipliers"):
            mine, theirs = getattr(solution, kind), getattr(twin, kind)
            assert mine.keys() == theirs.keys()
            assert all(torch.equal(torch.as_tensor(mine[k]), torch.as_tensor(theirs[k])) for k in mine)
    again = lifted.solve((X, Y), loss=nn.functional.mse_loss, start=pickle.loads(pickle.dumps(solution)))
    assert again.status is not None
