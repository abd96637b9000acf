"""The Gauss-Newton KKT step against dense linear algebra and autograd."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

from lagcompile.backends.shooting_blocks import BlockTridiagonal
from lagcompile.backends.shooting_kkt import DefectOperator, KktSystem, Quadratic
from lagcompile.backends.shooting_problem import Bounds, Point, Problem
from lagcompile.dynamics import RK4, Rollout, Trajectories, Trajectory
from lagcompile.dynamics.functional import CellFunctions
from lagcompile.dynamics.stages import StageJacobians, Stages
from lagcompile.dynamics.systems import FitzHughNagumo, Pendulum


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 8, 13])
def test_cyclic_reduction_is_a_dense_solve(count: int) -> None:
    generator = torch.Generator().manual_seed(count)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    n, lower = 3, normal(2, count - 1, 3, 3)
    diagonal = normal(2, count, n, n)
    diagonal = diagonal @ diagonal.mT + 8 * torch.eye(n, dtype=torch.float64)
    dense = torch.zeros(2, count * n, count * n, dtype=torch.float64)
    for k in range(count):
        here = slice(k * n, (k + 1) * n)
        dense[:, here, here] = diagonal[:, k]
        if k + 1 < count:
            following = slice((k + 1) * n, (k + 2) * n)
            dense[:, following, here] = lower[:, k]
            dense[:, here, following] = lower[:, k].mT
    rhs = normal(2, count, n, 2)
    factor = BlockTridiagonal.factor(diagonal, lower)
    assert bool(factor.ok.all())
    expected = torch.linalg.solve(dense, rhs.reshape(2, count * n, 2)).view_as(rhs)
    assert torch.allclose(factor.solve(rhs), expected, atol=1e-12)


@dataclass
class Case:
    problem: Problem
    point: Point
    theta_scale: Tensor
    multipliers: Tensor


def case(field: nn.Module, inputs: bool, *, fixed: bool = False) -> Case:
    """Two trajectories of unequal length, stages that divide neither, two starts, a hidden component, missing data."""
    generator = torch.Generator().manual_seed(3)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    rollout = Rollout(RK4(field), 10, state_size=2, readout=[0])
    items = [
        Trajectory(
            normal(count, 1),
            times=0.1 * torch.arange(count),
            inputs=normal(count, 1) if inputs else None,
            mask=torch.arange(count) % 5 != 3,
            name=str(count),
        )
        for count in (11, 7)
    ]
    functions, data = CellFunctions(rollout), Trajectories.stack(items)
    weights, scale = torch.tensor([2.0]).double(), torch.tensor([0.7, 1.6]).double()
    stages = Stages(functions, data, 4, weights)
    problem = Problem(functions, data, stages, weights, scale, Bounds.of(functions, {}, {}), fixed_initial=fixed)
    theta = functions.start() * torch.tensor([[1.0], [1.3]]).double()
    states = normal(2, 2, stages.count, 2)
    multipliers = normal(2, 2, stages.count, 2) * stages.defect_on[..., None]
    return Case(problem, problem.evaluate(theta, states), theta.abs() + 0.5, multipliers)


def dense_kkt(
    model: Quadratic, jacobians: StageJacobians, problem: Problem, start: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Hessian, constraint matrix and gradient of one start; variables are the states in order, then the parameters."""
    trajectories, stages, n = problem.stages.defect_on.shape[0], problem.stages.count, problem.functions.n
    p, size = problem.functions.p, trajectories * stages * n
    hessian, gradient = torch.zeros(size + p, size + p).double(), torch.zeros(size + p).double()
    rows = []
    for i in range(trajectories):
        for k in range(stages):
            at = (i * stages + k) * n
            here = slice(at, at + n)
            hessian[here, here] = model.state[start, i, k]
            hessian[here, size:] = model.cross[start, i, k]
            hessian[size:, here] = model.cross[start, i, k].mT
            gradient[here] = model.state_gradient[start, i, k]
            if problem.stages.defect_on[i, k]:
                row = torch.zeros(n, size + p).double()
                row[:, here] = jacobians.end_state[start, i, k]
                row[:, at + n : at + 2 * n] = -torch.eye(n)
                row[:, size:] = jacobians.end_theta[start, i, k]
                rows.append(row)
    hessian[size:, size:], gradient[size:] = model.theta[start], model.theta_gradient[start]
    return hessian, torch.cat(rows), gradient


@pytest.mark.parametrize("fixed", [False, True])
@pytest.mark.parametrize(("field", "inputs"), [(Pendulum(), True), (FitzHughNagumo(), False)])
def test_the_step_is_a_dense_kkt_solve(field: nn.Module, inputs: bool, fixed: bool) -> None:
    c = case(field, inputs, fixed=fixed)
    problem, on = c.problem, c.problem.stages.defect_on
    with torch.no_grad():
        jacobians, model = problem.linearise(c.point, c.theta_scale)
        damping = torch.full_like(model.state_gradient, 0.1), torch.full_like(model.theta_gradient, 0.1)
        model = model.add_diagonal(*damping)
        defect = problem.scaled_defect(c.point.values)
        system = KktSystem(model, DefectOperator(jacobians, on), 1e3 * model.scale)
        step = system.solve(defect, c.multipliers, tolerance=1e-13, limit=60)
    for start in range(2):
        hessian, rows, gradient = dense_kkt(model, jacobians, problem, start)
        zero = torch.zeros(len(rows), len(rows)).double()
        matrix = torch.cat([torch.cat([hessian, rows.mT], 1), torch.cat([rows, zero], 1)])
        expected = torch.linalg.solve(matrix, -torch.cat([gradient, defect[start][on].reshape(-1)]))
        found = torch.cat([step.states[start].reshape(-1), step.theta[start], step.multipliers[start][on].reshape(-1)])
        assert torch.allclose(found, expected, rtol=1e-8, atol=1e-8)


def lagrangian(c: Case, start: int, variables: Tensor) -> Tensor:
    """Objective plus <multipliers, scaled defects> of one start as a function of its scaled variables."""
    problem = c.problem
    shape = c.point.states[start].shape
    states = variables[: shape.numel()].view(1, *shape) * problem.state_scale
    theta = variables[None, shape.numel() :] * c.theta_scale[start]
    values = problem.evaluate(theta, states).values
    coupling = (c.multipliers[start] * problem.scaled_defect(values)[0]).sum()
    total: Tensor = values.objective[0] + coupling
    return total


@pytest.mark.parametrize(("field", "inputs"), [(Pendulum(), True), (FitzHughNagumo(), False)])
def test_gradient_and_curvature_are_those_of_autograd(field: nn.Module, inputs: bool) -> None:
    c = case(field, inputs)
    problem = c.problem
    with torch.no_grad():
        jacobians, model = problem.linearise(c.point, c.theta_scale, c.multipliers)
        back = DefectOperator(jacobians, problem.stages.defect_on).adjoint(c.multipliers)
    for start in range(2):
        at = torch.cat(
            [(c.point.states[start] / problem.state_scale).reshape(-1), c.point.theta[start] / c.theta_scale[start]]
        )
        gradient, *_ = torch.autograd.functional.jacobian(lambda v, s=start: lagrangian(c, s, v), at)[None]
        states = (model.state_gradient + back[0])[start].reshape(-1)
        theta = (model.theta_gradient + back[1])[start]
        assert torch.allclose(torch.cat([states, theta]), gradient, rtol=1e-10, atol=1e-10)
        expected = torch.autograd.functional.hessian(lambda v, s=start: lagrangian(c, s, v), at)
        hessian, *_ = dense_kkt(model, jacobians, problem, start)
        assert torch.allclose(hessian, expected, rtol=1e-9, atol=1e-9)


def test_an_operator_and_its_adjoint_agree() -> None:
    c = case(Pendulum(), True)
    with torch.no_grad():
        jacobians, _ = c.problem.linearise(c.point, c.theta_scale)
        op = DefectOperator(jacobians, c.problem.stages.defect_on)
        ds, dt = torch.randn_like(c.point.states), torch.randn_like(c.point.theta)
        back = op.adjoint(c.multipliers)
        left = (op.apply(ds, dt) * c.multipliers).flatten(1).sum(1)
        right = (ds * back[0]).flatten(1).sum(1) + (dt * back[1]).sum(1)
    assert torch.allclose(left, right, atol=1e-11)
