"""The KKT certificate: it must fail for each kind of wrong solution, and name the place."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import lagcompile as lc
from lagcompile.backends.sqp import SQP
from lagcompile.check.kkt import certify_kkt
from lagcompile.runtime.instance import Instance
from tests.problems import L2, ZOO, Problem


def _kinds(certificate: lc.Certificate) -> set[str]:
    return {r.kind for r in certificate.residuals if not r.ok}


def test_a_solution_is_certified_with_its_second_order_facts() -> None:
    problem = ZOO["tanh_3_sum"]
    certificate = certify_kkt(problem.bind(), problem.solve(SQP()))
    assert certificate.ok
    names = {(r.kind, r.name) for r in certificate.residuals}
    assert {("state stationarity", "h1"), ("weight stationarity", "0.weight"), ("primal feasibility", "c_h2")} <= names
    assert any("LICQ" in f for f in certificate.facts)
    assert any("strict local minimum" in f for f in certificate.facts)


def test_a_moved_state_is_named_by_stage_state_example_and_feature() -> None:
    problem = ZOO["tanh_3_sum"]
    solution = problem.solve(SQP())
    moved = {n: v.clone() for n, v in solution.states.items()}
    moved["h2"][4, 1] += 0.3
    certificate = certify_kkt(problem.bind(), replace(solution, states=moved))
    assert "primal feasibility" in _kinds(certificate)
    first = next(f for f in certificate.facts if f.startswith("violated by"))
    assert first == "violated by 3.00e-01: stage f1, state h2, example 4, feature 1"
    assert any(f.startswith("not a KKT point") for f in certificate.facts)


def test_wrong_multipliers_break_stationarity() -> None:
    problem = ZOO["tanh_2"]
    solution = problem.solve(SQP())
    scaled = {n: 1.01 * v for n, v in solution.multipliers.items()}
    assert {"state stationarity", "weight stationarity"} == _kinds(
        certify_kkt(problem.bind(), replace(solution, multipliers=scaled))
    )


def test_a_multiplier_inside_a_tube_breaks_complementarity() -> None:
    problem = ZOO["state_estimation"]
    solution = problem.solve(SQP())
    inside = {n: v.abs() < 1e-9 for n, v in solution.multipliers.items()}
    assert any(bool(v.any()) for v in inside.values())
    wrong = {n: torch.where(inside[n], 0.1, v) for n, v in solution.multipliers.items()}
    assert "complementarity" in _kinds(certify_kkt(problem.bind(), replace(solution, multipliers=wrong)))


def test_a_multiplier_that_does_not_cover_the_force_is_not_dual_feasible() -> None:
    problem = ZOO["abs_tube"]
    solution = problem.solve(SQP())
    small = {n: 0.5 * v for n, v in solution.multipliers.items()}
    assert "dual feasibility" in _kinds(certify_kkt(problem.bind(), replace(solution, multipliers=small)))


def budget(h1: Tensor) -> Tensor:
    return h1.square().sum() - 0.2


BOX = lc.ValueConstraint(name="box", reads=("0.weight",), lower=-0.2, upper=0.2)
ENERGY = lc.ValueConstraint(name="energy", reads=("h1",), function=f"{__name__}:budget")


def constrained(constraint: lc.ValueConstraint) -> Problem:
    return replace(ZOO["tanh_2"], exact=False, options={"regularisers": L2, "constraints": (constraint,)})


@pytest.mark.parametrize(
    ("problem", "multiplier"),
    [(ZOO["abs_tube"], "lambda1"), (ZOO["norm_tube"], "lambda1"), (constrained(ENERGY), "lambda(energy)")],
    ids=["abs_tube", "norm_tube", "energy"],
)
def test_a_multiplier_of_an_inequality_has_one_sign(problem: Problem, multiplier: str) -> None:
    solution = problem.solve(SQP())
    assert certify_kkt(problem.bind(), solution).ok
    assert solution.multipliers[multiplier].max() > 1e-3
    for wrong in (-solution.multipliers[multiplier], torch.full_like(solution.multipliers[multiplier], -1e-3)):
        moved = replace(solution, multipliers={**solution.multipliers, multiplier: wrong})
        assert "dual feasibility" in _kinds(certify_kkt(problem.bind(), moved))


def test_a_one_sided_defect_pushes_one_way() -> None:
    problem = ZOO["tanh_2"]
    lifted, solution = problem.lifted(), problem.solve(SQP())
    (defect,) = lifted.program.constraints
    program = lifted.program.model_copy(update={"constraints": (defect.model_copy(update={"relation": "<="}),)})
    instance = Instance(program, lifted.network, (problem.inputs, problem.target), loss=problem.loss)
    found: dict[str, Any] = {}
    for sign in (1.0, -1.0):
        moved = {"lambda1": sign * solution.multipliers["lambda1"].abs()}
        certificate = certify_kkt(instance, replace(solution, multipliers=moved))
        found |= {f"{sign:g}": r.value for r in certificate.residuals if r.kind == "dual feasibility"}
    assert found["1"] == 0.0
    assert found["-1"] > 1e-3


def test_a_state_outside_its_domain_is_not_feasible() -> None:
    problem = ZOO["bounded_states"]
    solution = problem.solve(SQP())
    moved = {n: v * 1.1 for n, v in solution.states.items()}
    certificate = certify_kkt(problem.bind(), replace(solution, states=moved))
    assert any(r.name == "bounds of h1" and not r.ok for r in certificate.residuals)


def test_states_that_a_solution_does_not_hold_come_from_a_forward_pass() -> None:
    problem = ZOO["tanh_2"]
    solution = problem.solve(SQP())
    certificate = certify_kkt(problem.bind(), replace(solution, states={}, multipliers={}), tolerance=1e-7)
    assert certificate.ok
    assert certificate.facts[0].startswith("h1: not in the solution")


def at_bounds(problem: Problem, solution: lc.Solution) -> int:
    """Entries of states and inputs that lie at a bound."""
    low, high = {"bounded_states": (-0.3, 0.3), "nonnegative_states": (0.0, torch.inf)}.get(problem.name, (0.0, 0.0))
    found = sum(int((h == low).sum() + (h == high).sum()) for h in solution.states.values())
    return found + sum(int((v.abs() == 1.0).sum()) for v in solution.details["inputs"].values())


@pytest.mark.parametrize(
    "name", ["tanh_2", "tube", "abs_tube", "penalty", "bounded_states", "nonnegative_states", "input_estimation"]
)
def test_what_is_active_takes_as_many_directions_from_the_hessian(name: str) -> None:
    problem = ZOO[name]
    solution = problem.solve(SQP())
    certificate = certify_kkt(problem.bind(), solution)
    assert certificate.ok
    moving = [*solution.states.values(), *solution.details["inputs"].values()]
    if "frozen" not in problem.options:
        moving += solution.model.parameters()
    active = sum(int((v != 0).sum()) for v in solution.multipliers.values()) + at_bounds(problem, solution)
    free = sum(v.numel() for v in moving) - active
    assert f"{free} positive, 0 zero, 0 negative eigenvalues; {active} active gradients" in certificate.facts[-1]


@pytest.mark.parametrize("relation", ["==", "<="])
def test_a_constraint_of_the_users_is_active_where_it_pushes(relation: Any) -> None:
    problem = constrained(ENERGY.model_copy(update={"relation": relation}))
    certificate = certify_kkt(problem.bind(), problem.solve(SQP()))
    assert certificate.ok
    assert certificate.facts[-1].endswith("; 13 active gradients of rank 13")
    assert ("complementarity" in {r.kind for r in certificate.residuals}) == (relation == "<=")


def test_what_has_no_hessian_is_said() -> None:
    terms = (lc.Regulariser(kind="l1", on="weights", weight=0.05), *L2)
    for problem, why in (
        (ZOO["norm_tube"], "the norm tube of c_h1 is not smooth"),
        (replace(ZOO["tanh_2"], options={"regularisers": terms}), "l1 terms have no Hessian"),
    ):
        facts = certify_kkt(problem.bind(), problem.solve(SQP())).facts
        assert facts[-1] == f"second-order facts were not computed: {why}"


def test_the_slack_of_a_tube_is_measured_from_the_edge_that_is_pushed() -> None:
    problem = ZOO["tube"]
    solution = problem.solve(SQP())
    with torch.no_grad():
        r = torch.tanh(solution.model.get_submodule("0")(problem.inputs[0])) - solution.states["h1"]
    for force in (0.1, -0.1):
        moved = replace(solution, multipliers={"lambda1": torch.full_like(r, force)})
        found = {x.kind: x.value for x in certify_kkt(problem.bind(), moved).residuals}
        expected = float((0.1 * (0.05 - r * force / 0.1)).max()) / len(r)
        assert found["complementarity"] == pytest.approx(expected, rel=1e-6)


def test_large_programs_say_that_curvature_was_not_computed() -> None:
    problem = ZOO["tanh_2"]
    certificate = certify_kkt(problem.bind(), problem.solve(SQP()), largest=5)
    assert certificate.ok
    assert any(f.startswith("second-order facts were not computed: 26 variables") for f in certificate.facts)


def test_sums_are_taken_class_by_class() -> None:
    torch.manual_seed(0)
    x, y = torch.randn(6, 3, dtype=torch.float64), torch.tensor([0, 0, 0, 1, 1, 1])
    model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.Tanh(), torch.nn.Linear(2, 2)).double()
    options = lc.Formulation(
        multiplier=lc.MultiplierOptions(layout="class"),
        weight=lc.ConstantWeight(value=1.0),
        regularisers=L2,
        classes=2,
    )
    lifted = lc.lift(model, (x,), split=2, formulation=options)
    solution = lifted.solve((x, y), loss=torch.nn.functional.cross_entropy, method=SQP())
    instance = lifted.bind((x, y), loss=torch.nn.functional.cross_entropy)
    right = certify_kkt(instance, solution)
    assert "primal feasibility" not in _kinds(right)
    moved = solution.states["h1"].clone()
    moved[0] += 0.1  # up in one class, down in the other: the sum over all rows stays zero
    moved[3] -= 0.1
    wrong = certify_kkt(instance, replace(solution, states={**solution.states, "h1": moved}))
    assert "primal feasibility" in _kinds(wrong)
