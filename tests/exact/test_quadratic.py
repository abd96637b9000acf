"""Quadratic subproblems: the compiled data against cvxpy itself, the active-set guess, and random convex programs."""

from __future__ import annotations

import warnings

import cvxpy as cp
import numpy as np
import pytest
import scipy.sparse as sp
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lagcompile.exact import Status, minimize, model
from lagcompile.exact.activeset import solve_with_active_set
from lagcompile.exact.quadratic import Outcome, QuadraticData
from lagcompile.exact.subproblem import Subproblem, SubproblemCache


def random_data(seed: int, n: int, m: int, k: int, *, sparse: bool = False, elastic: bool = False) -> QuadraticData:
    """Strictly convex, feasible at a random point within the bounds; one variable fixed, one free on each side."""
    rng = np.random.default_rng(seed)
    B = rng.normal(size=(n, n))
    H, E, I = B @ B.T + np.eye(n), rng.normal(size=(m, n)), rng.normal(size=(k, n))  # noqa: E741
    inside = rng.uniform(-0.5, 0.5, n)
    lower, upper = inside - rng.uniform(0, 1, n), inside + rng.uniform(0, 1, n)
    lower[0] = -np.inf
    upper[-1] = np.inf
    if n > 3:
        lower[1] = upper[1] = inside[1]
    slack = rng.uniform(0, 1, k) * (rng.uniform(size=k) > 0.4)
    if sparse:
        H = sp.csc_array(
            sp.diags_array([np.full(n, 4.0), np.full(n - 1, 0.3), np.full(n - 1, 0.3)], offsets=[0, 1, -1])
        )
        E = sp.csc_array(np.where(rng.uniform(size=(m, n)) < 0.5, E, 0.0) + np.eye(m, n))
        I = sp.csc_array(np.where(rng.uniform(size=(k, n)) < 0.5, I, 0.0) + np.eye(k, n))  # noqa: E741
    weights = np.full(m + k, 3.0) if elastic else None
    return QuadraticData(H, rng.normal(size=n) * 3, E, -(E @ inside), I, -(I @ inside) - slack, lower, upper, weights)


@pytest.mark.parametrize("elastic", [False, True], ids=["hard", "elastic"])
@pytest.mark.parametrize("sparse", [False, True], ids=["dense", "sparse"])
@pytest.mark.parametrize("solver", ["clarabel", "osqp"])
def test_compiled_data_solve_the_modelled_problem(solver: str, sparse: bool, elastic: bool) -> None:
    data = random_data(3, 8, 3, 4, sparse=sparse, elastic=elastic)
    direct = Subproblem(data, solver=solver)
    modelled = Subproblem(data, solver=solver, direct=False)
    assert direct.direct
    assert not modelled.direct
    for seed in (3, 4, 5):
        new = random_data(seed, 8, 3, 4, sparse=False, elastic=elastic)
        if sparse:  # other values in the same pattern
            new = QuadraticData(
                data.H * (1 + 0.1 * seed),
                new.g,
                data.E * 1.5,
                data.e * 1.5,
                data.I,
                data.i,
                data.lower,
                data.upper,
                data.weights,
            )
        source = direct.source(new)
        assert source is not None
        ours = direct.solve(source, time_limit=10.0)
        theirs = modelled.solve(source, time_limit=10.0)
        assert ours.outcome is theirs.outcome is Outcome.OPTIMAL
        for name in ("d", "eq", "ineq", "bounds"):
            np.testing.assert_allclose(getattr(ours, name), getattr(theirs, name), atol=1e-6)
        pull = new.H @ ours.d + new.g + new.E.T @ ours.eq + new.I.T @ ours.ineq + ours.bounds
        np.testing.assert_allclose(pull, 0.0, atol=1e-6)


def test_problem_follows_disciplined_parametrised_programming() -> None:
    problem = Subproblem(random_data(0, 5, 2, 2), solver="clarabel").problem
    assert all(constraint.is_dpp() for constraint in problem.constraints)


@pytest.mark.parametrize("solver", ["clarabel", "osqp"])
def test_infeasible_and_unbounded_are_told_apart(solver: str) -> None:
    one, free = np.eye(1), np.array([np.inf])
    empty, none = np.zeros((0, 1)), np.zeros(0)
    # d = -5 against d >= -1
    infeasible = QuadraticData(one, np.zeros(1), np.ones((1, 1)), np.array([5.0]), empty, none, np.array([-1.0]), free)
    unbounded = QuadraticData(np.zeros((1, 1)), np.ones(1), empty, none, empty, none, -free, free)
    for data, outcome in ((infeasible, Outcome.INFEASIBLE), (unbounded, Outcome.UNBOUNDED)):
        for direct in (True, False):
            cache = SubproblemCache(solver=solver, direct=direct)
            assert cache.solve(data, time_limit=10.0).outcome is outcome


def test_canonicalisation_happens_once_for_each_pattern() -> None:
    cache = SubproblemCache(solver="clarabel", direct=True)
    for seed in range(5):
        cache.solve(random_data(seed, 6, 2, 3), time_limit=10.0)
    assert cache.compilations == 1
    sparse = random_data(0, 6, 2, 3, sparse=True)
    cache.solve(sparse, time_limit=10.0)
    assert cache.compilations == 1  # the dense pattern holds the sparse one
    cache.solve(random_data(0, 6, 2, 3, elastic=True), time_limit=10.0)
    assert cache.compilations == 2


def test_constants_replace_parameters_where_their_table_would_be_too_large(monkeypatch: pytest.MonkeyPatch) -> None:
    data = [random_data(seed, 8, 3, 4) for seed in (3, 4)]
    usual = SubproblemCache(solver="clarabel", direct=True)
    expected = [usual.solve(each, time_limit=10.0) for each in data]
    monkeypatch.setattr(model, "LARGEST_TABLE", 0.0)
    for direct in (True, False):
        cache = SubproblemCache(solver="clarabel", direct=direct)
        for each, answer in zip(data, expected, strict=True):
            found = cache.solve(each, time_limit=10.0)
            for name in ("d", "eq", "ineq", "bounds"):
                np.testing.assert_allclose(getattr(found, name), getattr(answer, name), atol=1e-7)
        assert cache.compilations == 1


def test_growing_pattern_recompiles_and_stays_right() -> None:
    cache = SubproblemCache(solver="clarabel", direct=True)
    first, second = random_data(1, 6, 2, 3, sparse=True), random_data(2, 6, 2, 3, sparse=True)
    for data in (first, second, first):
        answer = cache.solve(data, time_limit=10.0)
        pull = data.H @ answer.d + data.g + data.E.T @ answer.eq + data.I.T @ answer.ineq + answer.bounds
        np.testing.assert_allclose(pull, 0.0, atol=1e-7)
    assert cache.compilations == 2


@pytest.mark.parametrize("sparse", [False, True])
def test_active_set_guess_is_verified(sparse: bool) -> None:
    data = random_data(11, 8, 3, 4, sparse=sparse)
    problem = Subproblem(data, solver="clarabel")
    source = problem.source(data)
    assert source is not None
    right = problem.solve(source, time_limit=10.0)
    ineq, sides = right.ineq > 1e-6, np.sign(np.where(np.abs(right.bounds) > 1e-6, right.bounds, 0.0))
    sides[data.lower == data.upper] = 0.0
    guess = solve_with_active_set(data, ineq, sides, tolerance=1e-9)
    assert guess is not None
    np.testing.assert_allclose(guess.d, right.d, atol=1e-7)
    np.testing.assert_allclose(guess.ineq, right.ineq, atol=1e-6)
    assert ineq.any() or sides.any()
    assert solve_with_active_set(data, ~ineq, sides, tolerance=1e-9) is None


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), n=st.integers(2, 8), data=st.data())
def test_random_convex_programs_agree_with_cvxpy(seed: int, n: int, data: st.DataObject) -> None:
    """Primal and multipliers of `minimize` against cvxpy's own solution of the same program."""
    m, k = data.draw(st.integers(0, n // 3)), data.draw(st.integers(0, n))
    program = random_data(seed, n, m, k)
    H, g, E, e = (torch.from_numpy(part) for part in (program.H, program.g, program.E, program.e))
    A, b = torch.from_numpy(program.I), torch.from_numpy(program.i)
    bounds = (torch.from_numpy(program.lower), torch.from_numpy(program.upper))
    result = minimize(
        lambda x: 0.5 * x @ H @ x + g @ x,
        torch.zeros(n, dtype=torch.float64),
        eq=(lambda x: E @ x + e) if m else None,
        ineq=(lambda x: A @ x + b) if k else None,
        bounds=bounds,
    )
    assert result.status is Status.OPTIMAL

    x = cp.Variable(n)
    constraints = [program.E @ x + program.e == 0] * bool(m) + [program.I @ x + program.i <= 0] * bool(k)
    low, high = np.isfinite(program.lower), np.isfinite(program.upper)
    constraints += [x[low] >= program.lower[low], x[high] <= program.upper[high]]
    problem = cp.Problem(cp.Minimize(0.5 * cp.quad_form(x, cp.psd_wrap(program.H)) + program.g @ x), constraints)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        problem.solve(solver=cp.CLARABEL, tol_gap_abs=1e-10, tol_gap_rel=1e-10, tol_feas=1e-10)
    np.testing.assert_allclose(result.x.numpy(), x.value, atol=1e-5)
    if result.facts.licq:
        duals = [np.atleast_1d(c.dual_value) for c in constraints]
        if m:
            np.testing.assert_allclose(result.multipliers_eq.numpy(), duals.pop(0), atol=1e-4)
        if k:
            np.testing.assert_allclose(result.multipliers_ineq.numpy(), duals.pop(0), atol=1e-4)
        signed = np.zeros(n)
        signed[low] -= duals[0]
        signed[high] += duals[1]
        np.testing.assert_allclose(result.multipliers_bounds.numpy(), signed, atol=1e-4)
