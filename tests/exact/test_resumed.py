"""Runs of `minimize` that go on from a state between two iterations: bit for bit what the unbroken run does."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from lagcompile.exact import Result, Status, minimize
from lagcompile.ir.keeper import Unkept
from lagcompile.store.pack import pack, unpack
from tests.exact.hock_schittkowski import PROBLEMS, Problem


class Recorder(Unkept):
    """Keeps every state as the bytes of a file; may stop the run at one, or hold one to go on from."""

    def __init__(self, state: bytes | None = None, stop: int | None = None) -> None:
        super().__init__()
        self.state: Any = None if state is None else unpack(state, "state")
        self.stop, self.stopped, self.states = stop, False, list[bytes]()

    def between(self, moment: int, state: Callable[[], Mapping[str, Any]]) -> None:
        self.states.append(b"".join(map(bytes, pack(state()))))
        self.stopped = len(self.states) - 1 == self.stop


def solved(problem: Problem, keeper: Unkept, **options: Any) -> Result:
    given = (problem.objective, problem.start(), problem.eq, problem.ineq, problem.bounds())
    return minimize(*given, keeper=keeper, **options)


def assert_same(a: Result, b: Result) -> None:
    for name in ("x", "multipliers_eq", "multipliers_ineq", "multipliers_bounds"):
        assert torch.equal(getattr(a, name), getattr(b, name)), name
    assert (a.status, a.message, a.kkt, a.facts, a.conflict) == (b.status, b.message, b.kkt, b.facts, b.conflict)
    assert a.iterations.rows == b.iterations.rows


@pytest.mark.parametrize("problem", PROBLEMS, ids=lambda p: p.name)
def test_a_run_goes_on_from_any_iteration(problem: Problem) -> None:
    generator = random.Random(problem.number)
    options: dict[str, Any] = {"hessian": generator.choice(("exact", "exact", "bfgs"))}
    options |= {"dense_limit": 0} if generator.random() < 0.3 else {}
    whole = Recorder()
    wanted = solved(problem, whole, **options)
    for at in {0, len(whole.states) - 1, *generator.sample(range(len(whole.states)), min(2, len(whole.states)))}:
        assert_same(solved(problem, Recorder(whole.states[at]), **options), wanted)


def banana(x: Tensor) -> Tensor:
    return (1 - x[0]) ** 2 + 100 * (x[1] - x[0] ** 2) ** 2


def crossed(x: Tensor) -> Tensor:
    """Feasible far away only: the way leads through elastic subproblems and restoration."""
    return torch.stack([x[0] ** 2 + x[1] ** 2 - 1e-3 + (x[0] - 3) ** 2, x[0] * x[1] - 1.0])


@pytest.mark.parametrize("solver", ["clarabel", "osqp"])
def test_through_elastic_steps_restoration_and_conflicts(solver: str) -> None:
    start = torch.tensor([-1.2, 1.0], dtype=torch.float64)
    whole = Recorder()
    wanted = minimize(banana, start, crossed, keeper=whole, solver=solver)
    assert {r.mode for r in wanted.iterations} & {"elastic", "restoration"}
    for state in whole.states:
        assert_same(minimize(banana, start, crossed, keeper=Recorder(state), solver=solver), wanted)


def test_a_stop_ends_the_run_and_the_last_state_goes_on() -> None:
    problem = next(p for p in PROBLEMS if p.number == 26)
    whole = Recorder()
    wanted = solved(problem, whole)
    half = Recorder(stop=4)
    stopped = solved(problem, half)
    assert stopped.status is Status.INTERRUPTED
    assert len(half.states) == 5
    assert_same(solved(problem, Recorder(half.states[-1])), wanted)


def test_more_iterations_go_on_where_fewer_ended() -> None:
    problem = next(p for p in PROBLEMS if p.number == 26)
    whole, half = Recorder(), Recorder()
    wanted = solved(problem, whole)
    assert solved(problem, half, max_iterations=5).status is Status.ITERATION_LIMIT
    assert_same(solved(problem, Recorder(half.states[-1])), wanted)
