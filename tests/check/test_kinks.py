"""Certificates at kinks: named by stage and unit, proven by autograd's slope, by a global bound, or not at all."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

import lagcompile as lc
from lagcompile.check.kkt import certify_kkt
from tests.problems import L2, Loss, Problem, chain, normal

X, Y = normal(3, 6, 3), normal(4, 6, 2)


def absolute() -> Problem:
    """Least absolute errors: residuals that are exactly zero at the solution."""
    return Problem("absolute", chain(3, 2, act=None), (X,), Y, F.l1_loss, options={"regularisers": L2})


def test_slopes_between_the_one_sided_ones_prove_stationarity() -> None:
    problem = absolute()
    solution = problem.solve(lc.Convex())
    certificate = certify_kkt(problem.bind(), solution)
    assert certificate.ok
    assert not certificate.unassessed
    assert {r.kind for r in certificate.residuals} == {"weight stationarity", "global bound"}
    assert any(
        f.startswith("stationary with slopes between the one-sided ones at abs in the loss, example 0, feature 0")
        for f in certificate.facts
    )
    assert any(
        f.startswith("second-order facts were not computed: the point lies at a kink") for f in certificate.facts
    )
    assert any("was not proven again" in f for f in certificate.facts)
    bare = replace(solution, details={k: v for k, v in solution.details.items() if k != "bound"})
    assert certify_kkt(problem.bind(), bare).ok  # the bound is not needed for this


def test_a_kink_that_is_no_minimum_is_not_certified() -> None:
    """At the least of three numbers |.| has a kink, but no slope there makes the sum of distances stationary."""
    x, y = torch.zeros(3, 1, dtype=torch.float64), torch.tensor([[1.0], [2.0], [40.0]], dtype=torch.float64)
    problem = Problem("least", chain(1, 1, act=None), (x,), y, F.l1_loss, options={"frozen": ("0.weight",)})
    solution = problem.solve(lc.Convex())
    wrong = {"weights": {"0.bias": torch.tensor([1.0], dtype=torch.float64)}}
    certificate = certify_kkt(problem.bind(), replace(solution, details=wrong))
    assert not certificate.ok
    (said,) = certificate.unassessed
    assert said.startswith("weight stationarity of 0.bias, at a kink (abs in the loss, example 0, feature 0)")
    assert said.endswith("the residual is 6.7e-01, and no others were found with which it vanishes")
    assert "NOT assessed: weight stationarity of 0.bias" in str(certificate)


def test_a_point_above_the_bound_fails() -> None:
    problem = absolute()
    solution = problem.solve(lc.Convex())
    weights = {n: v + 1e-3 for n, v in solution.details["weights"].items()}
    certificate = certify_kkt(problem.bind(), replace(solution, details={**solution.details, "weights": weights}))
    assert not certificate.ok
    assert "global bound" in {r.kind for r in certificate.residuals if not r.ok}


def test_a_leaf_that_no_kink_touches_is_assessed() -> None:
    """A relu at its kink in the first stage leaves the last stage's weights alone."""
    torch.manual_seed(0)
    first = nn.Linear(3, 3).double()
    net = nn.Sequential(first, nn.ReLU(), nn.Linear(3, 2)).double()
    with torch.no_grad():
        first.bias[1] -= first(X)[4, 1]  # example 4, feature 1 lies at the kink
    problem = Problem("relu", lambda: net, (X,), Y, split=2)
    start = problem.solve(lc.Extragradient(), options=lc.RunOptions(steps=0))
    certificate = certify_kkt(problem.bind(), replace(start, states={}, multipliers={}))  # adjoints of a forward pass
    open_ = [u.split(",")[0] for u in certificate.unassessed]
    assert open_ == ["weight stationarity of 0.weight", "weight stationarity of 0.bias"]
    assert all("relu in stage f0, example 4, feature 1" in u for u in certificate.unassessed)
    assert all(u.endswith("and others were not tried, since other conditions fail") for u in certificate.unassessed)
    failing = {r.name for r in certificate.residuals if not r.ok}
    assert failing == {"2.weight", "2.bias"}


def test_autograds_slope_is_proof_enough_where_it_is_stationary() -> None:
    """At the median of three the slope of |.| at 0 that is needed is 0, the one that autograd takes."""
    x, y = torch.zeros(3, 1, dtype=torch.float64), torch.tensor([[1.0], [2.0], [40.0]], dtype=torch.float64)
    problem = Problem("median", chain(1, 1, act=None), (x,), y, F.l1_loss, options={"frozen": ("0.weight",)})
    solution = problem.solve(lc.Convex())
    exact = {"0.bias": torch.tensor([2.0], dtype=torch.float64)}
    bare = replace(solution, details={"weights": exact})
    certificate = certify_kkt(problem.bind(), bare)
    assert certificate.ok
    assert not certificate.unassessed
    assert any(f == "stationary with the slope that autograd takes at abs in the loss, example 1, feature 0"
               for f in certificate.facts)  # fmt: skip


class Change(nn.Module):
    """Passes the input on, so that the loss can see how far it has moved."""

    def __init__(self) -> None:
        super().__init__()
        self.net = chain(2, 8, 8, 2, act=nn.ReLU, seed=6)().requires_grad_(False)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x, self.net(x)


def largest_change(output: tuple[Tensor, Tensor], target: Tensor) -> Tensor:
    return (output[0] - target).abs().amax()


def second_score(scores: Tensor, target: Tensor) -> Tensor:
    return scores[:, 1].sum()


def lead(scores: Tensor) -> Tensor:
    return scores[:, 1] - scores[:, 0]


def as_maximum(output: tuple[Tensor, Tensor], target: Tensor) -> Tensor:
    """The same, in operations whose slopes are not chosen here."""
    change = output[0] - target
    return torch.maximum(change, -change).amax(dim=(0, 1))


@pytest.mark.parametrize(("split", "loss"), [(1, largest_change), (4, largest_change), (1, as_maximum)])
def test_the_smallest_adversarial_change_is_certified(split: int, loss: Loss) -> None:
    """With slopes at its kinks where these can be chosen, else by the bound alone."""
    x0 = torch.tensor([[0.3, -0.4]], dtype=torch.float64)
    flipped = lc.ValueConstraint(name="flipped", reads=("net_4",), function=f"{__name__}:lead", relation="<=")
    box = {"x": lc.InputFormulation(lower=-2.0, upper=2.0)}
    formulation = lc.Formulation(frozen=("*",), inputs=box, constraints=(flipped,))
    lifted = lc.lift(Change(), (x0,), split, formulation)
    solution = lifted.solve((x0, x0), loss=loss, method=lc.MixedInteger())
    instance = lifted.bind((x0, x0), loss=loss)
    certificate = certify_kkt(instance, solution)
    assert certificate.ok, str(certificate)
    open_ = [u for u in certificate.unassessed if u.startswith("state stationarity of x, at a kink (amax in the loss")]
    assert len(open_) == (loss is as_maximum)
    without = replace(solution, details={k: v for k, v in solution.details.items() if k != "bound"})
    assert certify_kkt(instance, without).ok is not (loss is as_maximum)
    assert {r.name for r in certificate.residuals} >= {"flipped", "objective above the proven bound"}
    closer = {"x": x0 + 0.99 * (solution.details["inputs"]["x"] - x0)}
    moved = replace(solution, states={}, details={**solution.details, "inputs": closer})
    assert not certify_kkt(instance, moved).ok


@pytest.mark.parametrize("seed", [0, 2, 7])
def test_multipliers_of_states_behind_a_kink_go_with_the_slopes_taken_there(seed: int) -> None:
    """The smallest score lies at a kink of a later stage: autograd's slope there would give other multipliers."""
    net = chain(2, 8, 8, 2, act=nn.ReLU, seed=seed)().requires_grad_(False)
    x0 = torch.zeros(1, 2, dtype=torch.float64)
    formulation = lc.Formulation(frozen=("*",), inputs={"input_1": lc.InputFormulation(lower=-2.0, upper=2.0)})
    lifted = lc.lift(net, (x0,), 4, formulation)
    solution = lifted.solve((x0, x0), loss=second_score, method=lc.MixedInteger())
    certificate = certify_kkt(lifted.bind((x0, x0), loss=second_score), solution)
    assert certificate.ok, str(certificate)
    assert not certificate.unassessed
    assert max(r.value for r in certificate.residuals) <= 1e-8
    assert any(
        f.startswith("stationary with slopes between the one-sided ones at relu in s") for f in certificate.facts
    )


def test_many_kinks_are_not_told_apart() -> None:
    """Inputs of zeros and no bias: every unit lies at its kink."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 40, bias=False), nn.ReLU(), nn.Linear(40, 2)).double()
    x = torch.zeros(30, 3, dtype=torch.float64)
    problem = Problem("dead", lambda: net, (x,), normal(4, 30, 2), split=2)
    start = problem.solve(lc.Extragradient(), options=lc.RunOptions(steps=0))
    certificate = certify_kkt(problem.bind(), start, largest=5000)
    assert not certificate.ok
    assert any("relu in stage f0, example 0, feature 2; and many more)" in f for f in certificate.facts)
