"""The zoo: SQP to its KKT conditions, against references, IPOPT and extragradient, in primal and multipliers."""

from __future__ import annotations

from functools import cache

import pytest
import torch

import lagcompile as lc
from lagcompile.backends.sqp import SQP
from lagcompile.backends.sqp_oracle import Ipopt
from lagcompile.backends.sqp_program import ExactProgram
from lagcompile.backends.sqp_result import start_values
from lagcompile.check.agreement import distance
from tests.checks import assert_adjoints, assert_kkt, backprop_optimum, nearby, needs_casadi
from tests.problems import RATES, ZOO

UNBOUNDED = [n for n, p in ZOO.items() if p.exact]


@cache
def solved(name: str) -> lc.Solution:
    return ZOO[name].solve(SQP())


@pytest.mark.parametrize("name", ZOO)
def test_sqp_reaches_the_kkt_conditions(name: str) -> None:
    solution = solved(name)
    assert solution.status is lc.Status.SOLVED
    assert max(solution.details["kkt"].values()) <= 1e-8
    certificate = assert_kkt(ZOO[name], solution, tolerance=1e-8)
    if name != "norm_tube":  # not smooth: its curvature is not described
        assert any("strict local minimum" in f and "not a local" not in f for f in certificate.facts)


@pytest.mark.parametrize("name", [n for n, p in ZOO.items() if p.known])
def test_known_solutions(name: str) -> None:
    known = ZOO[name].known
    assert known is not None
    for parameter, value in known.items():
        torch.testing.assert_close(solved(name).details["weights"][parameter], value, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("name", UNBOUNDED)
def test_against_backprop_of_the_unsplit_network(name: str) -> None:
    """x* by L-BFGS through the whole network, lambda* by autograd's adjoints."""
    solution = solved(name)
    model = backprop_optimum(ZOO[name], nearby(solution).model)
    for parameter, value in dict(model.named_parameters()).items():
        torch.testing.assert_close(solution.details["weights"][parameter], value.detach(), rtol=0.0, atol=1e-6)
    if ZOO[name].lifted().program.states:
        assert_adjoints(ZOO[name], solution)


@needs_casadi
@pytest.mark.parametrize("name", ZOO)
def test_against_ipopt(name: str) -> None:
    solution = solved(name)
    other = ZOO[name].solve(Ipopt(), start=nearby(solution, states=True))
    assert other.status is lc.Status.SOLVED
    far = distance(solution, other)
    assert far.primal <= 1e-6, far
    assert not solution.multipliers or far.multipliers <= 1e-6, far


def test_every_program_is_compared_with_extragradient() -> None:
    assert RATES.keys() == ZOO.keys()


@pytest.mark.parametrize("name", RATES)
def test_against_extragradient(name: str) -> None:
    """From weights nearby, multipliers zero, constant steps and rho > 0: the same point, certified by autograd."""
    solution, rates = solved(name), RATES[name]
    other = rates.solve(ZOO[name], nearby(solution))
    far = distance(solution, other)
    assert far.primal <= 1e-4, far
    assert not solution.multipliers or far.multipliers <= 1e-4, far
    assert_kkt(ZOO[name], other, tolerance=1e-3, rho=rates.rho)


def test_the_one_signed_multiplier_of_a_tube_is_the_difference_of_the_exact_two() -> None:
    """SQP has mu+ and mu- for r - epsilon <= 0 and -r - epsilon <= 0, one of them zero; extragradient has lambda."""
    problem = ZOO["tube"]
    exact = ExactProgram(problem.bind())
    with exact.default_double():
        z = exact.variables.pack(start_values(exact, solved("tube")))
        result = SQP().minimized(exact, SQP().compiled(exact, z), z)
    above, below = result.multipliers_ineq.reshape(2, 6, 2) * 6  # the mean over six examples
    assert float(torch.minimum(above, below).abs().max()) <= 1e-7
    assert float(above.max()) > 0.1
    assert float(below.max()) > 0.1
    other = RATES["tube"].solve(problem, nearby(solved("tube")))
    torch.testing.assert_close(other.multipliers["lambda1"], above - below, rtol=0.0, atol=1e-6)


def test_polishing_a_first_order_solution() -> None:
    """SQP from what extragradient reached takes a step or two, with its multipliers."""
    problem = ZOO["tanh_3_sum"]
    rough = RATES["tanh_3_sum"].solve(problem, nearby(solved("tanh_3_sum")))
    polished = problem.solve(SQP(), start=rough)
    assert polished.status is lc.Status.SOLVED
    assert polished.steps <= 2
    assert distance(polished, solved("tanh_3_sum")).primal <= 1e-7
