"""SQP on programs: every transform and layout, refusals, named violations, warm starts, statuses."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

import lagcompile as lc
from lagcompile.backends.sqp import SQP
from lagcompile.check.kkt import certify_kkt
from tests.checks import assert_kkt
from tests.problems import ZOO, Problem, chain, normal, shares

X, Y = normal(3, 5, 3), normal(4, 5, 2)
L2 = (lc.Regulariser(kind="l2", on="weights", weight=0.2),)
EXAMPLE = lc.MultiplierOptions(layout="example")


def tanh(split: int = 2, **options: Any) -> Problem:
    loss = shares if options.get("reduction") == "sum" else F.mse_loss
    return Problem("net", chain(3, 2, 2, act=nn.Tanh), (X,), Y, loss, split, options={"regularisers": L2, **options})


def budget(h: Tensor) -> Tensor:
    """For a value constraint: the mean square of a state stays below a tenth."""
    return (h * h).mean(dim=1) - 0.1


@pytest.mark.parametrize(
    "options",
    [
        {"transform": lc.Abs()},
        {"transform": lc.Abs(), "multiplier": EXAMPLE},
        {"transform": lc.Squared()},
        {"transform": lc.Hardshrink(epsilon=0.05)},
        {"transform": lc.Softshrink(epsilon=0.0)},
        {"transform": lc.AbsTube(epsilon=0.05), "multiplier": EXAMPLE},
        {"transform": lc.AbsTube(epsilon=0.05), "multiplier": lc.MultiplierOptions(layout="scalar")},
        {"transform": lc.NormTube(epsilon=0.05, order=1), "multiplier": EXAMPLE},
        {"transform": lc.NormTube(epsilon=0.05, order=2), "multiplier": EXAMPLE},
        {"transform": lc.NormTube(epsilon=0.0, order=2), "multiplier": EXAMPLE},
        {"transform": lc.NormTube(epsilon=0.05, order=2), "multiplier": lc.MultiplierOptions(layout="scalar")},
        {"multiplier": EXAMPLE, "weight": lc.ConstantWeight(value=1.0)},
        {"multiplier": lc.MultiplierOptions(layout="scalar"), "weight": lc.ConstantWeight(value=1.0)},
        {"storage": lc.Transient()},
        {"storage": lc.Eliminated()},
        {"features": "mean"},
        {"reduction": "sum", "features": "mean"},
        {"domain": lc.OfActivation()},
        {"regularisers": (lc.Regulariser(kind="l1", on="weights", weight=0.05), *L2)},
        {"regularisers": (lc.Regulariser(kind="l1", on="states", weight=0.05), *L2)},
        {"constraints": (lc.ValueConstraint(name="box", reads=("0.weight",), lower=-0.2, upper=0.2),)},
        {"constraints": (lc.ValueConstraint(name="out", reads=("_2",), upper=0.3),)},
        {"constraints": (lc.ValueConstraint(name="energy", reads=("h1",), function=f"{__name__}:budget"),)},
    ],
    ids=str,
)
def test_every_form_reaches_its_kkt_conditions(options: dict[str, Any]) -> None:
    problem = tanh(**options)
    solution = problem.solve(SQP())
    assert solution.status is lc.Status.SOLVED, solution.details["message"]
    assert_kkt(problem, solution, tolerance=2e-8)


@pytest.mark.parametrize("hessian", ["gauss_newton", "bfgs"])
def test_other_curvatures_find_the_same_point(hessian: str) -> None:
    exact = ZOO["tanh_2"].solve(SQP())
    other = ZOO["tanh_2"].solve(SQP(hessian=hessian, tolerance=1e-7))
    assert other.status is lc.Status.SOLVED
    torch.testing.assert_close(other.multipliers["lambda1"], exact.multipliers["lambda1"], atol=1e-5, rtol=0.0)


def test_gauss_newton_needs_squares() -> None:
    with pytest.raises(lc.ProgramError, match="needs a sum of squares"):
        ZOO["tanh_3_classes"].solve(SQP(hessian="gauss_newton"))


def test_traced_and_untraced_derivatives_agree() -> None:
    plain, traced = (ZOO["tanh_2"].solve(SQP(trace=t)) for t in (False, True))
    assert plain.steps == traced.steps
    torch.testing.assert_close(plain.states["h1"], traced.states["h1"], atol=1e-12, rtol=0.0)


def test_relu_is_refused_with_its_module_path_and_accepted_with_a_fact() -> None:
    net = chain(3, 3, 2, act=nn.ReLU)
    problem = Problem("relu", net, (X,), Y, split=2, options={"regularisers": L2})
    with pytest.raises(lc.ProgramError) as caught:
        problem.solve(SQP())
    assert str(caught.value).startswith("stage f0, module 1: relu has points without a derivative")
    assert "kinks='accept'" in str(caught.value)
    solution = problem.solve(SQP(kinks="accept", max_iterations=60))
    assert any("nearest kink (relu in stage f0, module 1)" in f for f in solution.details["facts"])


def test_a_kink_in_the_loss_is_refused() -> None:
    problem = Problem("l1", chain(3, 2, act=None), (X,), Y, F.l1_loss, options={"regularisers": L2})
    with pytest.raises(lc.ProgramError, match="the loss: abs has points without a derivative"):
        problem.solve(SQP())


def test_class_gaussians_are_refused() -> None:
    options = {"storage": lc.ClassGaussian(), "classes": 3}
    classes = torch.tensor([0, 1, 2, 0, 1])
    problem = Problem("gaussian", chain(3, 2, 3, act=nn.Tanh), (X,), classes, F.cross_entropy, 2, options)
    with pytest.raises(lc.ProgramError, match=r"the state h1 \(after 1\) is kept as a Gaussian per class"):
        problem.solve(SQP())


def test_a_reduced_multiplier_of_a_signed_tube_is_refused() -> None:
    with pytest.raises(lc.ProgramError, match="'c_h1': the sum of softshrink"):
        tanh(transform=lc.Softshrink(epsilon=0.1), multiplier=EXAMPLE).solve(SQP())


def test_an_infeasible_program_names_what_contradicts() -> None:
    options: dict[str, Any] = {"frozen": ("*",), "domain": lc.Range(lower=0.5, upper=1.0)}
    solution = tanh(**options).solve(SQP())
    assert solution.status is lc.Status.INFEASIBLE
    violated = solution.details["violated"]
    assert violated[0].startswith("c_h1: stage f0, state h1, example ")
    sizes = [float(v.split("violated by ")[1].split(",")[0]) for v in violated if "violated by" in v]
    assert sizes == sorted(sizes, reverse=True)
    conflict = solution.details["conflict"]
    assert len(conflict) == 2  # one defect and one bound are enough
    assert conflict[0].startswith("c_h1: stage f0, state h1, example ")
    assert conflict[1].startswith("lower bound of state h1, example ")
    assert conflict[0].split("example ")[1] == conflict[1].split("example ")[1]
    assert not certify_kkt(tanh(**options).bind(), solution).ok


def test_statuses() -> None:
    assert tanh().solve(SQP(max_iterations=2)).status is lc.Status.STEPS_DONE
    assert tanh().solve(SQP(time_limit=1e-6)).status is lc.Status.TIME_LIMIT
    refused = tanh().solve(SQP(memory_limit=1000))
    assert refused.status is lc.Status.REFUSED
    assert "the limit is" in refused.details["message"]
    bounds = lc.ValueConstraint(name="b", reads=("0.bias",), lower=1.0, upper=-1.0)
    contradiction = tanh(constraints=(bounds,)).solve(SQP())
    assert contradiction.status is lc.Status.INFEASIBLE
    assert "weight 0.bias[0]: lower bound 1 > upper bound -1" in contradiction.details["violated"][0]


def test_warm_start_takes_everything() -> None:
    problem = tanh(transform=lc.Softshrink(epsilon=0.05))
    first = problem.solve(SQP())
    again = problem.solve(SQP(), start=first)
    assert again.status is lc.Status.SOLVED
    assert again.steps <= 1


def test_float32_models_are_solved_in_float64_and_left_alone() -> None:
    model = chain(3, 2, 2, act=nn.Tanh)().float()
    before = {n: v.clone() for n, v in model.state_dict().items()}
    lifted = lc.lift(model, X.float(), 2, lc.Formulation(regularisers=L2))
    solution = lifted.solve((X.float(), Y.float()), loss=F.mse_loss, method=SQP())
    assert solution.status is lc.Status.SOLVED
    assert solution.states["h1"].dtype == torch.float64
    weight = solution.model[0].weight
    assert weight.dtype == torch.float32
    assert all(torch.equal(v, before[n]) for n, v in model.state_dict().items())
    torch.testing.assert_close(weight.double(), solution.details["weights"]["0.weight"], atol=1e-6, rtol=0.0)


class Casting(nn.Module):
    """Hard-codes float32, as many models do."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 2), nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.first(x)).float() * torch.ones(2, dtype=torch.float32)
        return self.second(h.to(self.second.weight.dtype))


def casting_loss(output: Tensor, target: Tensor) -> Tensor:
    return ((output.float() - target.float()) ** 2).mean()


@pytest.mark.parametrize("trace", [False, True])
def test_hard_coded_casts_do_not_lower_the_precision(trace: bool) -> None:
    def build() -> nn.Module:
        torch.manual_seed(0)
        return Casting().double()

    problem = Problem("casts", build, (X,), Y, casting_loss, 2, {"regularisers": L2})
    solution = problem.solve(SQP(trace=trace))
    assert solution.status is lc.Status.SOLVED, solution.details["message"]
    assert_kkt(problem, solution)


def test_the_iteration_table_is_the_history() -> None:
    solution = tanh().solve(SQP())
    columns = {"objective", "primal_infeasibility", "dual_infeasibility", "step_length", "regularisation", "kind"}
    assert columns <= set(solution.history.rows[0])
    assert solution.history.last["primal_infeasibility"] <= 1e-8
    seconds = [row["seconds"] for row in solution.history.rows]
    assert seconds == sorted(seconds)
    assert len(solution.history.rows) == solution.steps + 1


def test_nothing_to_solve_for_is_said() -> None:
    with pytest.raises(lc.ProgramError, match="no variables: all weights are frozen"):
        tanh(split=1, frozen=("*",), regularisers=()).solve(SQP())


def test_the_distance_from_kinks_is_measured_at_the_solution() -> None:
    """Not at the weights of the start: here three units die on the way, and the check finds the same."""
    net = chain(3, 3, 2, act=nn.ReLU)
    problem = Problem("relu", net, (normal(3, 6, 3),), normal(4, 6, 2), split=2, options={"regularisers": L2})
    solution = problem.solve(SQP(kinks="accept", max_iterations=60))
    (said,) = [f for f in solution.details["facts"] if f.startswith("the nearest kink")]
    with torch.no_grad():
        weights = solution.details["weights"]
        inner = normal(3, 6, 3) @ weights["0.weight"].T + weights["0.bias"]
    nearest = float(inner.abs().min())
    assert f"is {nearest:.1e} away" in said
    assert nearest <= 1e-7
    certificate = certify_kkt(problem.bind(), solution)
    assert not certificate.ok
    assert any("relu in stage f0, example 0, feature" in u for u in certificate.unassessed)


@pytest.mark.parametrize("scale", [1e-9, 1e-12])
def test_a_start_that_meets_the_tolerance_by_scale_alone_is_not_called_solved(scale: float) -> None:
    l2 = (lc.Regulariser(kind="l2", on="weights", weight=0.2 * scale),)
    small = dataclasses.replace(
        ZOO["tanh_2"], loss=lambda out, y: scale * (out - y).square().mean(), options={"regularisers": l2}
    )
    solution = small.solve(SQP())
    assert solution.steps == 0
    assert solution.status is lc.Status.STALLED
    assert "scale the loss" in solution.details["message"]
    right = ZOO["tanh_2"].solve(SQP())
    again = ZOO["tanh_2"].solve(SQP(), start=right)
    assert again.status is lc.Status.SOLVED
