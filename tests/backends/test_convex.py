"""The convex fast path: global optima where operations prove convexity, refusals with the reason elsewhere."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

import lagcompile as lc
from lagcompile.backends.convex import Convex
from lagcompile.backends.sqp import SQP
from lagcompile.check.agreement import distance
from tests.checks import assert_adjoints, assert_kkt
from tests.problems import LIGHT, ZOO, Problem, chain, normal

X, Y = normal(3, 6, 3), normal(4, 6, 2)
GLOBAL = "global optimum: all stages are affine in the variables and "


@pytest.mark.parametrize("name", ["ridge", "logistic_regression"])
def test_one_affine_stage_and_a_convex_loss(name: str) -> None:
    problem = ZOO[name]
    solution = problem.solve(Convex())
    assert solution.status is lc.Status.SOLVED
    certificate = assert_kkt(problem, solution)
    assert any(f.startswith(GLOBAL) for f in certificate.facts)
    assert distance(solution, problem.solve(SQP())).primal <= 1e-7


def frozen(**options: Any) -> Problem:
    """States are the only variables, stages are affine."""
    return Problem("states", chain(3, 4, 4, 2, act=None), (X,), Y, split=3, options={"frozen": ("*",), **options})


@pytest.mark.parametrize(
    "options",
    [
        {"transform": lc.Softshrink(epsilon=0.1)},
        {"transform": lc.NormTube(epsilon=0.1, order=2), "multiplier": lc.MultiplierOptions(layout="example")},
        {"multiplier": None, "weight": lc.ConstantWeight(value=3.0)},
        {"transform": lc.Softshrink(epsilon=0.1), "domain": lc.Range(lower=-0.6, upper=0.6), "at": {}},
    ],
    ids=str,
)
def test_states_alone_with_affine_stages(options: dict[str, Any]) -> None:
    problem = frozen(**options, regularisers=(lc.Regulariser(kind="l2", on="states", weight=0.01),))
    convex, local = problem.solve(Convex()), problem.solve(SQP())
    if local.status is lc.Status.INFEASIBLE:
        assert convex.status is lc.Status.INFEASIBLE
        return
    assert convex.status is lc.Status.SOLVED
    assert_kkt(problem, convex, tolerance=2e-8)
    far = distance(convex, local)
    assert far.primal <= 1e-5
    assert convex.details["objective"] == pytest.approx(local.details["objective"], abs=1e-8)


def test_the_last_stage_behind_a_frozen_network_is_convex_and_its_states_have_adjoints() -> None:
    options = {"frozen": ("0.*",), "regularisers": LIGHT}
    problem = Problem("last", chain(3, 4, 2, act=nn.Tanh), (X,), Y, split=2, options=options)
    solution = problem.solve(Convex())
    assert solution.status is lc.Status.SOLVED
    assert any(f.startswith(GLOBAL) for f in assert_kkt(problem, solution).facts)
    assert_adjoints(problem, solution)


def test_least_absolute_values_are_solved_without_smoothing() -> None:
    x = torch.tensor([[0.0], [0.0], [0.0]], dtype=torch.float64)
    y = torch.tensor([[1.0], [2.0], [40.0]], dtype=torch.float64)
    problem = Problem("median", chain(1, 1, act=None), (x,), y, F.l1_loss, options={"frozen": ("0.weight",)})
    solution = problem.solve(Convex())
    assert solution.status is lc.Status.SOLVED
    assert float(solution.details["weights"]["0.bias"]) == pytest.approx(2.0, abs=1e-7)
    assert solution.details["facts"][0] == GLOBAL + "l1_loss is convex"


def fourth_power(output: Tensor, target: Tensor) -> Tensor:
    return ((output - target) ** 4).mean()


@pytest.mark.parametrize(
    ("problem", "message"),
    [
        (ZOO["tanh_2"], "stage f0, module 1: tanh is not affine in the variables"),
        (ZOO["linear_2"], "stage f1, module 1: addmm is not affine in the variables"),
        (
            Problem("own", chain(3, 2, act=None), (X,), Y, lambda o, t: ((o - t) ** 4).mean()),
            "is not known to be convex",
        ),
    ],
    ids=["tanh", "product", "loss"],
)
def test_what_is_not_proven_convex_is_refused(problem: Problem, message: str) -> None:
    with pytest.raises(lc.ProgramError, match=message):
        problem.solve(Convex())
