"""Signs, derivatives, curvature options, facts, sparsity: what a caller of `minimize` relies on."""

from __future__ import annotations

import subprocess
import sys
from functools import partial
from typing import Any

import numpy as np
import pytest
import scipy.sparse as sp
import torch
from torch import Tensor

from lagcompile.exact import Derivatives, FirstOrder, Multipliers, Status, minimize
from lagcompile.exact.derivatives import HessianOf, JacobianOf
from lagcompile.ir.base import ProgramError
from tests.benchmarks.exact_size import Recurrence, solve
from tests.exact.reference import independent_kkt


def vector(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def rosenbrock(x: Tensor) -> Tensor:
    return 100 * (x[1] - x[0] ** 2) ** 2 + (1 - x[0]) ** 2


def _distance(target: Tensor, x: Tensor) -> Tensor:
    return ((x - target) ** 2).sum()


# signs


def test_signs_of_multipliers() -> None:
    """Minimise |x|^2 / 2 with x0 = 1 (equality), x1 >= 2 (inequality), x2 >= 3 and x3 <= -4 (bounds)."""
    inf = torch.inf
    result = minimize(
        lambda x: 0.5 * (x**2).sum(),
        vector(0, 0, 5, -5),
        eq=lambda x: x[:1] - 1,
        ineq=lambda x: 2 - x[1:2],
        bounds=(vector(-inf, -inf, 3, -inf), vector(inf, inf, inf, -4)),
    )
    assert result.x.tolist() == pytest.approx([1, 2, 3, -4])
    assert result.multipliers_eq.tolist() == pytest.approx([-1])
    assert result.multipliers_ineq.tolist() == pytest.approx([2])
    assert result.multipliers_bounds.tolist() == pytest.approx([0, 0, -3, 4])


def test_multipliers_of_fixed_variables_take_either_sign() -> None:
    for target, sign in ((5.0, 1.0), (-5.0, -1.0)):
        objective = partial(_distance, vector(target, target))
        result = minimize(objective, vector(0, 0), bounds=(vector(1, -9), vector(1, 9)))
        assert result.status is Status.OPTIMAL
        assert result.x.tolist() == pytest.approx([1, target])
        assert float(result.multipliers_bounds[0]) * sign > 0


def test_multiplier_is_the_sensitivity_of_the_optimum() -> None:
    def value(shift: float) -> float:
        return minimize(lambda x: (x**4).sum() + x[0], vector(1, 1), eq=lambda x: x.sum()[None] - 2 - shift).objective

    result = minimize(lambda x: (x**4).sum() + x[0], vector(1, 1), eq=lambda x: x.sum()[None] - 2)
    slope = (value(1e-4) - value(-1e-4)) / 2e-4
    assert float(result.multipliers_eq[0]) == pytest.approx(-slope, rel=1e-6)


# derivatives


def nonlinear(x: Tensor) -> Tensor:
    return torch.stack([x[0] * x[1], torch.sin(x[2]) * x[0], x[3] ** 3, x[1] * x[4], x.sum()])


@pytest.mark.parametrize("dense_limit", [0, 1000], ids=["compressed", "dense"])
def test_jacobian_and_hessian_are_exact(dense_limit: int) -> None:
    generator = torch.Generator().manual_seed(0)
    jacobian = JacobianOf(nonlinear, 5, 5, dense_limit=dense_limit)
    hessian = HessianOf(nonlinear, 5, 5, dense_limit=dense_limit)
    for _ in range(3):
        x = torch.randn(5, dtype=torch.float64, generator=generator)
        w = torch.randn(5, dtype=torch.float64, generator=generator)
        J, H = jacobian(x), hessian(x, w)
        assert sp.issparse(J) == sp.issparse(H) == (dense_limit == 0)
        J, H = (A.toarray() if sp.issparse(A) else A for A in (J, H))
        np.testing.assert_allclose(J, torch.func.jacrev(nonlinear)(x).numpy(), atol=1e-12)
        np.testing.assert_allclose(
            H, torch.func.jacrev(torch.func.jacrev(lambda v, w=w: w @ nonlinear(v)))(x).numpy(), atol=1e-12
        )


def test_an_entry_that_appears_later_is_noticed() -> None:
    """relu(x - 50) x has no derivative anywhere near the start; the pattern must grow when it does."""

    def function(x: Tensor) -> Tensor:
        return torch.stack([x[0] + torch.relu(x[1] - 50) * x[2], x[1] * x[2], x[2]])

    jacobian = JacobianOf(function, 3, 3, dense_limit=0)
    start, far = vector(1, 1, 1), vector(1, 60, 2)
    before = jacobian(start)
    np.testing.assert_allclose(before.toarray(), torch.func.jacrev(function)(start).numpy())
    np.testing.assert_allclose(jacobian(far).toarray(), torch.func.jacrev(function)(far).numpy())
    assert jacobian(start).nnz > before.nnz


def test_derivatives_of_the_caller_are_used() -> None:
    """Sparse matrices handed over; their number of calls is what the table says."""

    class Own(Derivatives):
        calls = 0

        def first_order(self, x: Tensor) -> FirstOrder:
            Own.calls += 1
            v = x.numpy()
            return FirstOrder(2 * v, sp.csc_array(np.ones((1, 3))), sp.csc_array(np.array([[0.0, -2 * v[1], 0.0]])))

        def hessian(self, x: Tensor, weight: float, multipliers_eq: Tensor, multipliers_ineq: Tensor) -> sp.csc_array:
            diagonal = np.full(3, 2.0 * weight)
            diagonal[1] -= 2.0 * float(multipliers_ineq[0])
            return sp.csc_array(sp.diags_array(diagonal))

    arguments: dict[str, Any] = {
        "objective": lambda x: (x**2).sum(),
        "x0": vector(2, 3, 0),
        "eq": lambda x: x.sum()[None] - 1,
        "ineq": lambda x: 4 - x[1:2] ** 2,
    }
    own = minimize(**arguments, derivatives=Own())
    auto = minimize(**arguments)
    assert own.status is auto.status is Status.OPTIMAL
    assert own.x.tolist() == pytest.approx(auto.x.tolist(), abs=1e-8)
    assert own.multipliers_ineq.tolist() == pytest.approx(auto.multipliers_ineq.tolist(), abs=1e-7)
    assert Own.calls == own.iterations.count + 1


def test_traced_derivatives_change_nothing() -> None:
    recurrence = Recurrence(steps=4, states=4, inputs=2, seed=1)
    plain, quick = solve(recurrence), solve(recurrence, trace=True)
    assert plain.status is quick.status is Status.OPTIMAL
    assert quick.x.tolist() == pytest.approx(plain.x.tolist(), abs=1e-10)
    assert quick.iterations.count == plain.iterations.count


def test_functions_that_branch_on_values_are_not_traced() -> None:
    def objective(x: Tensor) -> Tensor:
        return (x**2).sum() if x[0] > 1 else (x**4).sum()

    with pytest.raises(ProgramError, match=r"cannot be traced \(.*data-dependent"):
        minimize(objective, vector(3, 2), trace=True)


# curvature


def test_gauss_newton_and_bfgs_reach_the_exact_solution() -> None:
    times = torch.linspace(0, 2, 12, dtype=torch.float64)
    data = 2.0 * torch.exp(-1.3 * times) + 0.05 * torch.cos(7 * times)

    def residuals(x: Tensor) -> Tensor:
        return x[0] * torch.exp(-x[1] * times) - data

    def objective(x: Tensor) -> Tensor:
        return 0.5 * residuals(x).square().sum()

    arguments: dict[str, Any] = {"x0": vector(1, 1), "ineq": lambda x: x[:1] - 1.9}
    exact = minimize(objective, **arguments)
    gauss = minimize(objective, **arguments, hessian="gauss_newton", residuals=residuals)
    quasi = minimize(objective, **arguments, hessian="bfgs")
    for result in (exact, gauss, quasi):
        assert result.status is Status.OPTIMAL
        assert result.x.tolist() == pytest.approx(exact.x.tolist(), abs=1e-7)
        assert result.multipliers_ineq.tolist() == pytest.approx(exact.multipliers_ineq.tolist(), abs=1e-6)


def test_exact_hessian_converges_quadratically() -> None:
    result = minimize(
        lambda x: torch.exp(x[0]) + x[1] ** 2 + x[0] * x[1], vector(1, 1), eq=lambda x: (x**2).sum()[None] - 3
    )
    errors = [row.primal + row.dual for row in result.iterations][-3:]
    assert errors[-1] <= 10 * errors[-2] ** 2 + 1e-12


def test_indefinite_hessian_is_convexified_without_slowing_down() -> None:
    """A concave objective on a circle: the full Hessian is indefinite, the reduced one at the solution is not."""
    result = minimize(
        lambda x: -(x[0] ** 2) - 3 * x[1] ** 2 + x[0], vector(0.5, 1), eq=lambda x: (x**2).sum()[None] - 1
    )
    assert result.status is Status.OPTIMAL
    assert result.objective == pytest.approx(-3.125)
    assert result.facts.strict_local_minimum is True
    assert result.iterations.count <= 12


def test_saddle_is_left() -> None:
    result = minimize(lambda x: x[0] ** 2 - x[1] ** 2 + x[1] ** 4, vector(0, 0))
    assert result.objective == pytest.approx(-0.25)
    assert any(row.mode == "escape" for row in result.iterations)
    kept = minimize(lambda x: x[0] ** 2 - x[1] ** 2 + x[1] ** 4, vector(0, 0), escape_saddles=False)
    assert kept.status is Status.OPTIMAL
    assert kept.facts.strict_local_minimum is False
    assert any("not a local minimum" in sentence for sentence in kept.facts.implications)


# facts


def test_facts_of_a_regular_minimum() -> None:
    result = minimize(lambda x: (x**2).sum(), vector(3, 2, 1), eq=lambda x: x.sum()[None] - 3)
    facts = result.facts
    assert (facts.active, facts.rank, facts.licq) == (1, 1, True)
    assert facts.reduced_inertia == (2, 0, 0)
    assert facts.smallest_curvature == pytest.approx(2.0)
    assert facts.strict_complementarity is True
    assert facts.strict_local_minimum is True
    assert facts.multipliers_unique is True


def test_facts_of_a_minimum_that_is_not_strict() -> None:
    result = minimize(lambda x: (x[0] - 1) ** 2, vector(3, 2))
    assert result.facts.reduced_inertia == (1, 1, 0)
    assert result.facts.strict_local_minimum is None


def test_facts_of_a_weakly_active_constraint() -> None:
    """The unconstrained minimum lies on the boundary: the constraint is active without a multiplier."""
    result = minimize(lambda x: (x**2).sum(), vector(3, 2), ineq=lambda x: x[:1])
    assert result.facts.weakly_active == 1
    assert result.facts.strict_complementarity is False
    assert result.facts.strict_local_minimum is True


def test_facts_do_not_claim_what_a_vanishing_gradient_hides() -> None:
    """(x - 1)^2 = 0 has no multiplier for the objective x; at the tolerance, only near-dependence can be seen."""
    result = minimize(lambda x: x[0] + x[1] ** 2, vector(3, 2), eq=lambda x: (x[:1] - 1) ** 2)
    assert result.facts.licq is not True
    assert result.facts.multipliers_unique is not True
    assert result.facts.strict_local_minimum is not True


def test_facts_can_be_left_out() -> None:
    facts = minimize(lambda x: (x**2).sum(), vector(3, 2), second_order=False).facts
    assert facts.licq is None
    assert facts.implications == ()


# degenerate constraints


def test_least_squares_multipliers_of_dependent_constraints() -> None:
    """The same equality three times: the multipliers share the load, which is the minimum-norm choice."""
    result = minimize(lambda x: ((x - 2) ** 2).sum(), vector(0, 0), eq=lambda x: torch.stack([x.sum() - 1] * 3))
    assert result.status is Status.OPTIMAL
    assert result.multipliers_eq.sum().item() == pytest.approx(3.0)
    assert result.multipliers_eq.norm().item() == pytest.approx(3.0**0.5, rel=1e-3)


def test_elastic_mode_gets_past_an_infeasible_linearisation() -> None:
    """At the start the linearised inequality pair is contradictory, the program is not."""
    result = minimize(
        lambda x: x[0] + x[1],
        vector(0.1, 0.0),
        ineq=lambda x: torch.stack([4 - x[0] ** 2 - x[1] ** 2, x[0] - 3, -x[0] - 3, x[1] ** 2 - 1]),
    )
    assert result.status is Status.OPTIMAL
    assert {row.mode for row in result.iterations} & {"elastic", "restoration"}


def test_multipliers_may_be_given_in_part() -> None:
    result = minimize(
        rosenbrock, vector(-1, 1), eq=lambda x: x.sum()[None] - 1.5, multipliers=Multipliers(eq=vector(0.5))
    )
    assert result.status is Status.OPTIMAL


# size


def test_structured_program_is_solved_sparsely() -> None:
    recurrence = Recurrence(steps=12, states=10, inputs=4, seed=2)
    result = solve(recurrence)
    objective, eq, _ = recurrence.functions()
    assert result.status is Status.OPTIMAL
    limit = torch.ones(12, 14, dtype=torch.float64)
    limit[:, 10:] = 0.25
    box = limit.reshape(-1)
    found = independent_kkt(objective, result, eq, bounds=(-box, box))
    assert max(found.values()) <= 1.001e-8
    dense = solve(recurrence, dense_limit=10**9)
    assert dense.objective == pytest.approx(result.objective, rel=1e-6)
    assert result.timings.model > 0
    assert result.timings.subproblem > 0


def test_a_dense_row_and_a_dense_column_are_compressed_well() -> None:
    """Rows or columns are coloured, whichever needs fewer products: an arrow matrix needs few either way round."""
    n = 60

    def column(x: Tensor) -> Tensor:
        return x * x[0] + x

    def row(x: Tensor) -> Tensor:
        return torch.cat([x[1:] ** 2, x.sum()[None] ** 2])

    for function in (column, row):
        jacobian = JacobianOf(function, n, n, dense_limit=0)
        x = torch.linspace(0.5, 2, n, dtype=torch.float64)
        np.testing.assert_allclose(jacobian(x).toarray(), torch.func.jacrev(function)(x).numpy(), atol=1e-12)
        assert jacobian.products <= 4


def test_importing_does_not_load_cvxpy() -> None:
    code = "import sys, lagcompile.exact; print('cvxpy' in sys.modules)"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert shown.strip() == "False"
