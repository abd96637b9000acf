"""Every status is reached by a program that deserves it, and wrong input raises before anything is solved."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch
from torch import Tensor

from lagcompile.exact import Multipliers, Result, Status, minimize
from lagcompile.ir.base import LagcompileError, ProgramError

INF = float("inf")


def vector(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def squares(x: Tensor) -> Tensor:
    return (x**2).sum()


def test_a_small_gradient_far_out_is_not_taken_for_a_minimum() -> None:
    """-log x falls for ever, and its gradient falls below any tolerance."""
    result = minimize(lambda x: 1.0 / x[0] - torch.log(x[0]), vector(0.5))
    assert float(result.x) > 1e6
    assert any("may have no minimum at all" in f for f in result.facts.implications)
    assert not any("strict local minimum" in f for f in result.facts.implications)
    near = minimize(lambda x: 1.0 / x[0] + torch.log(x[0]), vector(0.5))
    assert float(near.x) == pytest.approx(1.0)
    assert not any("far out" in f for f in near.facts.implications)


def test_every_status_carries_advice() -> None:
    assert len({status.label for status in Status}) == len(Status)
    for status in Status:
        assert status.label == status.name.lower()
        assert len(status.advice) > 40
    assert {status for status in Status if status.solved} == {Status.OPTIMAL, Status.ACCEPTABLE}


def test_optimal() -> None:
    result = minimize(squares, vector(3, 2), eq=lambda x: x[:1] - 1)
    assert result.status is Status.OPTIMAL
    assert result.x.tolist() == pytest.approx([1.0, 0.0])
    assert result.multipliers_eq.tolist() == pytest.approx([-2.0])


def test_acceptable_when_rounding_allows_no_more() -> None:
    """Next to 1e12 the objective cannot show a decrease below 1e-4, long before the gradient is 1e-30."""
    result = minimize(lambda x: 1e7 * (x[0] - 1.1) ** 4 + 1e12, vector(3), tolerance=1e-30, acceptable_tolerance=1e-3)
    assert result.status is Status.ACCEPTABLE
    assert 1e-30 < result.kkt.worst <= 1e-3


@pytest.mark.parametrize(
    ("objective", "start"),
    [
        (lambda x: -x.sum(), vector(0, 0)),
        (lambda x: (x**3).sum(), vector(-1, 1)),
        (lambda x: x[0] - x[1] ** 2, vector(1, 1)),
    ],
    ids=["linear", "cubic", "concave"],
)
def test_unbounded(objective: Any, start: Tensor) -> None:
    result = minimize(objective, start, ineq=lambda x: x[:1] - 5)
    assert result.status is Status.UNBOUNDED
    assert result.objective < -1e15
    assert result.kkt.primal <= 1e-6
    assert result.facts.implications == ()


def test_infeasible_inequalities_name_the_pair_in_conflict() -> None:
    result = minimize(
        squares,
        vector(0, 0),
        ineq=lambda x: torch.stack([x[0] - 5, x.sum() - 1, -x[1] - 9, 3 - x.sum()]),
    )
    assert result.status is Status.INFEASIBLE
    assert result.conflict is not None
    assert result.conflict.ineq == (1, 3)
    assert result.conflict.eq == ()
    assert result.conflict.irreducible
    assert result.conflict.violation == pytest.approx(2.0)
    assert result.kkt.primal > 0.9


def test_infeasible_equality_against_a_bound() -> None:
    result = minimize(squares, vector(0, 0), eq=lambda x: x[:1] - 3, bounds=(vector(-1, -1), vector(1, 1)))
    assert result.status is Status.INFEASIBLE
    assert result.conflict is not None
    assert (result.conflict.eq, result.conflict.upper, result.conflict.lower) == ((0,), (0,), ())


def test_infeasible_nonlinear_equalities() -> None:
    """A line that misses a circle; the third equality has nothing to do with it."""
    result = minimize(
        lambda x: x[0],
        vector(2, 2, 0),
        eq=lambda x: torch.stack([x[2] - 1, x[0] ** 2 + x[1] ** 2 - 1, x[0] + x[1] - 4]),
    )
    assert result.status is Status.INFEASIBLE
    assert result.conflict is not None
    assert result.conflict.eq == (1, 2)
    assert result.conflict.violation == pytest.approx(4 - 2**0.5, abs=1e-4)


def test_deletion_filter_shrinks_the_support() -> None:
    """Four rows contradict each other pairwise: any two are a smallest conflict, all four are not."""
    rows = torch.tensor([1.0, -2.0, 4.0, 6.0], dtype=torch.float64)
    whole = minimize(squares, vector(0.3), eq=lambda x: x - rows, deletion_filter=False)
    small = minimize(squares, vector(0.3), eq=lambda x: x - rows)
    assert whole.conflict is not None
    assert small.conflict is not None
    assert not whole.conflict.irreducible
    assert small.conflict.irreducible
    assert len(small.conflict.eq) == 2 < len(whole.conflict.eq)


def test_iteration_limit() -> None:
    result = minimize(lambda x: 100 * (x[1] - x[0] ** 2) ** 2 + (1 - x[0]) ** 2, vector(-2, 1), max_iterations=3)
    assert result.status is Status.ITERATION_LIMIT
    assert result.iterations.count == 3
    assert len(result.iterations) == 4


def test_no_iterations_at_all() -> None:
    result = minimize(squares, vector(1, 1), max_iterations=0)
    assert result.status is Status.ITERATION_LIMIT
    assert result.x.tolist() == [1.0, 1.0]


def test_time_limit() -> None:
    def slow(x: Tensor) -> Tensor:
        time.sleep(0.03)
        return (x**4).sum()

    begin = time.perf_counter()
    result = minimize(slow, vector(3, 2), time_limit=0.3)
    assert result.status is Status.TIME_LIMIT
    assert time.perf_counter() - begin < 3.0


def test_time_limit_while_sparsity_is_detected() -> None:
    def slow(x: Tensor) -> Tensor:
        time.sleep(0.02)
        return (x**4).sum()

    result = minimize(slow, torch.ones(600, dtype=torch.float64), time_limit=0.05)
    assert result.status is Status.TIME_LIMIT
    assert "sparsity" in result.message


@pytest.mark.parametrize(
    ("objective", "start"),
    [
        (lambda x: torch.log(x).sum(), vector(-1, 2)),
        (squares, vector(float("nan"), 0)),
        (lambda x: torch.sqrt(x).sum(), vector(0, 1)),
    ],
    ids=["value", "start", "derivative"],
)
def test_non_finite(objective: Any, start: Tensor) -> None:
    result = minimize(objective, start)
    assert result.status is Status.NON_FINITE
    assert "start" in result.message or "x0" in result.message
    assert result.kkt.worst != result.kkt.worst  # NaN: nothing was shown


def test_non_finite_trial_points_only_shorten_the_step() -> None:
    result = minimize(lambda x: x[0] - torch.log(x[0]), vector(1e-3))
    assert result.status is Status.OPTIMAL
    assert result.x.tolist() == pytest.approx([1.0])


def test_inconsistent_bounds() -> None:
    result = minimize(squares, vector(1, 2), bounds=(vector(0, 5), vector(1, 1)))
    assert result.status is Status.INCONSISTENT_BOUNDS
    assert "1: 5 > 1" in result.message


def test_rank_deficient_without_multipliers() -> None:
    """Minimising x subject to x^2 <= y <= -x^2 only admits 0, where no multipliers exist."""
    result = minimize(lambda x: x[0], vector(1, 1), ineq=lambda x: torch.stack([x[0] ** 2 - x[1], x[0] ** 2 + x[1]]))
    assert result.status is Status.RANK_DEFICIENT
    assert result.x.abs().max() < 1e-2
    assert result.facts.licq is not True
    assert result.multipliers_ineq.max() > 1e6


def test_dependent_equalities_with_multipliers_are_optimal_and_said_not_to_be_unique() -> None:
    result = minimize(squares, vector(3, 2), eq=lambda x: torch.stack([x.sum() - 1, 2 * x.sum() - 2]))
    assert result.status is Status.OPTIMAL
    assert result.facts.rank == 1
    assert result.facts.multipliers_unique is False


def test_stalled_at_a_kink() -> None:
    """|x - sqrt 2| has no stationary point that floating point could hit."""
    result = minimize(lambda x: (x[0] ** 2 - 2).abs(), vector(3))
    assert result.status is Status.STALLED
    assert result.x.tolist() == pytest.approx([2**0.5], abs=1e-3)


@pytest.mark.parametrize("options", [{"memory_limit": 10_000}, {"memory_limit": 10**7, "hessian": "bfgs"}])
def test_too_large_is_refused_early_with_the_numbers(options: dict[str, Any]) -> None:
    called = []

    def objective(x: Tensor) -> Tensor:
        called.append(1)
        return (x**2).sum()

    result = minimize(objective, torch.zeros(3000, dtype=torch.float64), **options)
    assert result.status is Status.TOO_LARGE
    assert "3000 variables" in result.message
    assert "MiB" in result.message
    assert len(called) == 1  # the shape check only


def test_too_large_after_detection() -> None:
    """A dense Hessian of 400 x 400 does not fit in 4 MiB with its copies and its factor."""
    result = minimize(lambda x: x.sum() ** 4, torch.ones(400, dtype=torch.float64), memory_limit=4 * 2**20)
    assert result.status is Status.TOO_LARGE
    assert "160000 Hessian" in result.message


# wrong input


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({"x0": torch.zeros(2)}, "x0 must be a flat, non-empty float64 tensor, it is float32"),
        ({"x0": torch.zeros(2, 2, dtype=torch.float64)}, "of shape (2, 2)"),
        ({"bounds": (vector(0), vector(1, 1))}, "lower bounds must be float64 of shape (2,)"),
        ({"bounds": (vector(0, float("nan")), vector(1, 1))}, "lower bounds hold NaN"),
        ({"eq": lambda x: x.float()}, "eq(x) must be float64, it is float32"),
        ({"ineq": lambda x: 3.0}, "ineq(x) must return a tensor, it returned float"),
        ({"eq": lambda x: x[None]}, "eq(x) must be flat"),
        ({"objective": lambda x: x}, "objective(x) must be one number"),
        ({"hessian": "gauss_newton"}, "belong together"),
        ({"residuals": lambda x: x}, "belong together"),
        ({"hessian": "newton"}, "option hessian: expected"),
        ({"max_iter": 3}, "option max_iter: unknown key"),
        ({"multipliers": Multipliers(eq=vector(1, 2, 3))}, "multipliers.eq must be float64 of shape (0,)"),
        ({"hessian": "gauss_newton", "residuals": lambda x: 3 * x}, "the same function"),
    ],
)
def test_wrong_input_raises(arguments: dict[str, Any], expected: str) -> None:
    with pytest.raises(ProgramError) as caught:
        minimize(**{"objective": squares, "x0": vector(1, 1), **arguments})
    assert expected in str(caught.value)
    assert isinstance(caught.value, LagcompileError)


def test_all_problems_are_reported_at_once() -> None:
    with pytest.raises(ProgramError) as caught:
        minimize(squares, torch.zeros(2), bounds=(vector(0), vector(0)), hessian="gauss_newton")
    assert len(caught.value.problems) == 4


def test_verbose_shows_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    result: Result = minimize(squares, vector(3, 2), verbose=True)
    shown = capsys.readouterr().out
    assert "objective" in shown
    assert len(shown.strip().splitlines()) == len(result.iterations) + 1
    assert minimize(squares, vector(3, 2)).status is Status.OPTIMAL
    assert capsys.readouterr().out == ""
