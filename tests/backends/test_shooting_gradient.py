"""First-order multiple shooting: exact gradients, honest metrics, recovery, polish, bounds, many parameters."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lagcompile.backends.shooting import Shooting, ShootingExtragradient, fit
from lagcompile.backends.shooting_lagrangian import Place, slope
from lagcompile.backends.shooting_metric import Blocks, Diagonal
from lagcompile.dynamics import Euler, Rollout, Trajectories
from lagcompile.dynamics.functional import FORWARD_DIRECTIONS, CellFunctions
from lagcompile.dynamics.starts import random_starts
from lagcompile.dynamics.systems import Example, FitzHughNagumo, Pendulum, examples
from lagcompile.ir.solution import Status
from tests.backends.test_shooting_kkt import case, lagrangian

PENDULUM = Example(name="pendulum", samples=161, dt=0.02, noise=0.02, initial=(0.5, 0.0), observed=(0,))


def swing() -> tuple[Rollout, Trajectories]:
    """Data of a pendulum and a model of it in one evaluation of its field a step."""
    return Rollout(Euler(Pendulum()), 160, state_size=2, readout=[0]), PENDULUM.data()


MAP = examples()["logistic"].model_copy(update={"samples": 120})


@pytest.mark.parametrize(("field", "inputs"), [(Pendulum(), True), (FitzHughNagumo(), False)])
def test_the_gradient_is_that_of_autograd(field: nn.Module, inputs: bool) -> None:
    """Two trajectories of unequal length, stages that divide neither, missing data: all entries of the gradient."""
    c = case(field, inputs)
    problem, rho = c.problem, torch.tensor([0.0, 3.0]).double()
    place = Place(c.point.theta / c.theta_scale, c.point.states / problem.state_scale, c.multipliers)
    found = slope(problem, place, c.theta_scale, rho)
    for start in range(2):
        at = torch.cat([place.states[start].reshape(-1), place.theta[start]]).requires_grad_(True)
        shape = c.point.states[start].shape
        states = at[: shape.numel()].view(1, *shape) * problem.state_scale
        values = problem.evaluate(at[None, shape.numel() :] * c.theta_scale[start], states).values
        penalty = 0.5 * rho[start] * problem.scaled_defect(values).square().sum()
        (expected,) = torch.autograd.grad(lagrangian(c, start, at) + penalty, at)
        ours = torch.cat([found.states[start].reshape(-1), found.theta[start]])
        assert torch.allclose(ours, expected, rtol=1e-11, atol=1e-11)


def test_compiled_and_plain_gradients_agree() -> None:
    """The traced pullback, padding of starts included, gives what autograd gives."""
    c = case(Pendulum(), True)
    traced = CellFunctions(c.problem.functions.rollout, compile="eager")
    x = torch.randn(3, 5, 2, dtype=torch.float64)
    theta = traced.start().expand(3, -1) * torch.tensor([[1.0], [1.1], [0.9]]).double()
    u, factors = torch.randn(5, 1, dtype=torch.float64), torch.randn(3, 5, 2, dtype=torch.float64)
    results = []
    for functions in (traced, c.problem.functions):
        value, pull = functions.taped_step(theta, x, u, 0.1)
        results.append((value, *pull(factors)))
    for a, b in zip(*results, strict=True):
        assert a is not None
        assert b is not None
        assert torch.allclose(a, b, atol=1e-13)


def test_random_signs_estimate_the_diagonal_of_the_curvature() -> None:
    """The mean of 200 measurements is the diagonal of the Gauss-Newton blocks to a few standard errors."""
    c = case(Pendulum(), True)
    problem, generator = c.problem, torch.Generator().manual_seed(0)
    blocks = Blocks(problem, c.point.theta, c.point.states, c.theta_scale)
    total_states, total_theta = torch.zeros_like(c.point.states), torch.zeros_like(c.point.theta)
    for _ in range(50):
        drawn = Diagonal(problem, c.point.theta, c.point.states, c.theta_scale, generator=generator).estimate
        total_states += drawn.states / 50
        total_theta += drawn.theta / 50
    with torch.no_grad():
        _, model = problem.linearise(c.point, c.theta_scale)
    expected = model.state.diagonal(dim1=-2, dim2=-1)
    error = (total_states - expected).abs() / expected.amax()
    assert float(error.max()) < 0.25
    assert torch.allclose(total_theta, model.theta.diagonal(dim1=-2, dim2=-1), rtol=0.35)
    assert float(blocks.unit[0]) == pytest.approx(float(model.scale[0]))


@pytest.mark.parametrize("metric", ["blocks", "diagonal"])
def test_every_start_finds_the_parameters(metric: str) -> None:
    rollout, data = MAP.rollout(), MAP.data(seed=2)
    truth = CellFunctions(rollout).start()
    method = ShootingExtragradient.model_validate({"metric": metric, "iterations": 400})
    result = fit(rollout, data, starts=random_starts(truth, 8, seed=3), noise=MAP.noise, method=method)
    assert float(((result.theta - truth) / truth).abs().max()) < 0.02
    assert result.residuals.defect < 1e-2


def test_it_converges_to_the_solution_of_second_order_with_its_multipliers() -> None:
    rollout, data = swing()
    second = fit(rollout, data, noise=0.02, method=Shooting(stage_length=32, tolerance=1e-10))
    method = ShootingExtragradient(stage_length=32, iterations=500, tolerance=1e-6)
    first = fit(rollout, data, noise=0.02, method=method)
    assert first.status is Status.SOLVED
    assert torch.allclose(first.theta, second.theta, rtol=1e-5)
    assert torch.allclose(first.states, second.states, atol=1e-5)
    scale = float(second.multipliers.abs().max())
    assert float((first.multipliers - second.multipliers).abs().max()) < 1e-4 * scale
    assert torch.allclose(first.standard_errors, second.standard_errors, rtol=1e-3)
    assert first.history.column("defect")[-1] < 1e-3 * first.history.column("defect")[0]


def test_a_polish_ends_where_second_order_ends() -> None:
    rollout, data = swing()
    truth = CellFunctions(rollout).start()
    starts = random_starts(truth, 3, factor=2.0, seed=4)
    second = fit(rollout, data, starts=starts, noise=0.02, method=Shooting(stage_length=32))
    short = ShootingExtragradient(stage_length=32, iterations=60)
    rough = fit(rollout, data, starts=starts, noise=0.02, method=short)
    then = short.model_copy(update={"polish": Shooting(iterations=15)})
    polished = fit(rollout, data, starts=starts, noise=0.02, method=then)
    assert set(polished.statuses) == {Status.SOLVED}
    assert torch.allclose(polished.theta, second.theta, rtol=1e-5)
    assert not torch.allclose(rough.theta, second.theta, rtol=1e-5)
    assert int((polished.iterations - rough.iterations).max()) <= 15


def test_bounds_hold() -> None:
    rollout, data = MAP.rollout(), MAP.data(seed=2)
    method = ShootingExtragradient(iterations=300)
    tight = fit(rollout, data, noise=0.02, method=method, bounds={"r": (None, 3.7)}, state_bounds={0: (0.0, 1.0)})
    assert float(tight.theta[0, 0]) == pytest.approx(3.7)
    assert float(tight.states[:, 0].min()) >= 0.0
    free = fit(rollout, data, noise=0.02, method=method, bounds={"r": (0.0, 20.0)})
    assert float(free.theta[0, 0]) == pytest.approx(3.78, rel=0.02)


def test_a_cell_with_more_parameters_than_second_order_takes() -> None:
    """A GRU with 8 units: hidden states that nothing observes, 276 parameters, no Jacobian by the parameters."""
    torch.manual_seed(0)
    inputs = torch.randn(1, 100, 1, dtype=torch.float64)
    x, outputs = torch.zeros(1, dtype=torch.float64), []
    for t in range(100):
        outputs.append(x)
        x = 0.7 * x + 0.4 * torch.tanh(inputs[0, t])
    data = Trajectories.single(torch.stack(outputs), inputs=inputs[0])
    rollout = Rollout(nn.GRUCell(1, 8).double(), 99, readout=nn.Linear(8, 1).double())
    assert rollout.state_size + CellFunctions(rollout).p > FORWARD_DIRECTIONS
    before = fit(rollout, data, noise=0.05, method=ShootingExtragradient(iterations=1, stage_length=10))
    after = fit(rollout, data, noise=0.05, method=ShootingExtragradient(iterations=150, stage_length=10))
    assert float(after.simulation_error(data)) < 0.3 * float(data.observations.std())
    assert float(after.simulation_error(data)) < 0.5 * float(before.simulation_error(data))


def test_limits_end_a_run_with_what_was_reached() -> None:
    rollout, data = MAP.rollout(), MAP.data()
    ticks = iter(range(1000))
    method = ShootingExtragradient(time_limit=40.0, stage_length=1)
    result = fit(rollout, data, noise=0.02, method=method, now=lambda: float(next(ticks)))
    assert result.status is Status.TIME_LIMIT
    assert 0 < int(result.iterations[0]) <= 40
    few = fit(rollout, data, noise=0.02, method=ShootingExtragradient(iterations=15))
    assert (few.status, int(few.iterations[0])) == (Status.STEPS_DONE, 15)
