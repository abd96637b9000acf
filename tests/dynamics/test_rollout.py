"""Rollouts and integrators: the loop, the shapes, the orders of accuracy."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from lagcompile.dynamics import RK4, Adaptive, Euler, ImplicitMidpoint, OdeCell, Rollout
from lagcompile.dynamics.functional import CellFunctions
from lagcompile.dynamics.systems import Lorenz, Pendulum
from lagcompile.ir.base import BindError


class Decay(nn.Module):
    """x' = -rate x, with a known solution."""

    def __init__(self) -> None:
        super().__init__()
        self.rate = nn.Parameter(torch.tensor(1.5, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return -self.rate * x


def test_a_rollout_is_the_loop() -> None:
    cell = nn.Linear(2, 2, bias=False).double()
    rollout = Rollout(cell, 4, state_size=2, readout=[1])
    x = torch.randn(3, 2, dtype=torch.float64)
    expected = [x]
    for _ in range(4):
        expected.append(cell(expected[-1]))
    assert torch.equal(rollout.simulate(x), torch.stack(expected, 1))
    assert torch.equal(rollout(x), torch.stack(expected, 1)[..., [1]])


@pytest.mark.parametrize("kind", [nn.RNNCell, nn.GRUCell, nn.LSTMCell])
def test_recurrent_cells(kind: Callable[[int, int], nn.RNNCellBase]) -> None:
    cell = kind(2, 3).double()
    readout = nn.Linear(6 if kind is nn.LSTMCell else 3, 1).double()
    rollout = Rollout(cell, 5, readout=readout)
    x0 = torch.zeros(4, rollout.state_size, dtype=torch.float64)
    inputs = torch.randn(4, 5, 2, dtype=torch.float64)
    state: Tensor | tuple[Tensor, Tensor] = (x0[:, :3], x0[:, 3:]) if kind is nn.LSTMCell else x0
    for t in range(5):
        state = cell(inputs[:, t], state)
    last = torch.cat(state, -1) if isinstance(state, tuple) else state
    assert torch.allclose(rollout(x0, inputs)[:, -1], readout(last), atol=1e-14)


def test_a_cell_of_the_wrong_shape_is_named() -> None:
    rollout = Rollout(nn.Linear(2, 3), 2, state_size=2)
    with pytest.raises(BindError, match=r"cell Linear returned \(1, 3\) for states of shape \(1, 2\)"):
        rollout(torch.zeros(2))


def test_short_inputs_are_refused() -> None:
    rollout = Rollout(RK4(Pendulum()), 9, state_size=2)
    with pytest.raises(BindError, match="inputs have 8 rows, a rollout of 9 steps needs as many"):
        rollout(torch.zeros(2, dtype=torch.float64), torch.zeros(1, 8, 1, dtype=torch.float64))


@pytest.mark.parametrize(("kind", "order"), [(Euler, 1), (ImplicitMidpoint, 2), (RK4, 4)])
def test_order_of_accuracy(kind: type[OdeCell], order: int) -> None:
    errors = []
    for steps in (8, 16):
        rollout = Rollout(kind(Decay()), steps, state_size=1, dt=1.0 / steps)
        end = rollout(torch.ones(1, dtype=torch.float64))[0, -1, 0]
        errors.append(abs(float(end.detach()) - math.exp(-1.5)))
    assert math.log2(errors[0] / errors[1]) == pytest.approx(order, abs=0.35)


def test_implicit_midpoint_conserves_energy() -> None:
    class Spring(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.stack([x[..., 1], -x[..., 0]], -1)

    path = Rollout(ImplicitMidpoint(Spring()), 200, state_size=2, dt=0.5)(torch.tensor([1.0, 0.0]).double())[0]
    assert torch.allclose(path.square().sum(-1), torch.ones(201, dtype=torch.float64), atol=1e-12)


def test_substeps_and_linear_hold() -> None:
    fine = Rollout(RK4(Decay(), substeps=4), 5, state_size=1, dt=0.2)
    coarse = Rollout(RK4(Decay()), 20, state_size=1, dt=0.05)
    x = torch.ones(1, dtype=torch.float64)
    assert torch.allclose(fine(x)[:, -1], coarse(x)[:, -1], atol=1e-14)

    class Integral(nn.Module):
        def forward(self, x: Tensor, u: Tensor) -> Tensor:
            return u

    ramp = torch.arange(6, dtype=torch.float64)[None, :, None]
    held = Rollout(RK4(Integral(), hold="linear"), 5, state_size=1, dt=1.0)(torch.zeros(1).double(), ramp)
    assert held[0, -1, 0] == pytest.approx(12.5)


def test_adaptive_integration_and_its_jacobian() -> None:
    pytest.importorskip("torchdiffeq", reason="torchdiffeq is missing: pip install 'lagcompile[ode]'")
    adaptive = Rollout(Adaptive(Lorenz()), 3, state_size=3, dt=0.05)
    fixed = Rollout(RK4(Lorenz(), substeps=50), 3, state_size=3, dt=0.05)
    x = torch.tensor([1.0, 2.0, 20.0], dtype=torch.float64)
    assert torch.allclose(adaptive(x), fixed(x), rtol=1e-7)
    lanes, lengths = x.expand(1, 2, 3), torch.full((2, 1), 0.05, dtype=torch.float64)
    for rollout in (adaptive, fixed):
        functions = CellFunctions(rollout)
        found = functions.step_jacobian(functions.start()[None], lanes, None, lengths)
        if rollout is adaptive:
            expected = found
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("width", [2, 40])
def test_jacobians_are_those_of_autograd(width: int) -> None:
    """Both the forward mode (few parameters) and the reverse mode (many) agree with torch.autograd."""
    torch.manual_seed(0)
    cell = nn.GRUCell(1, width).double()
    functions = CellFunctions(Rollout(cell, 3, readout=nn.Linear(width, 1).double()))
    theta = functions.start().expand(2, -1) * torch.tensor([[1.0], [0.9]]).double()
    x, u = torch.randn(2, 3, width, dtype=torch.float64), torch.randn(3, 1, dtype=torch.float64)
    h = torch.ones(3, 1, dtype=torch.float64)
    by_state, by_theta = functions.step_jacobian(theta, x, u, h)
    read_state, read_theta = functions.output_jacobian(theta, x)
    assert read_theta is not None
    for start in range(2):
        for lane in range(3):
            row = slice(lane, lane + 1)

            def step(t: Tensor, s: Tensor, row: slice = row) -> Tensor:
                return functions.step(t[None], s[None, None], u[row], h[row])[0, 0]

            def read(t: Tensor, s: Tensor) -> Tensor:
                return functions.output(t[None], s[None, None])[0, 0]

            point = (theta[start], x[start, lane])
            jt, js = torch.autograd.functional.jacobian(step, point)
            rt, rs = torch.autograd.functional.jacobian(read, point)
            assert torch.allclose(by_theta[start, lane], jt, atol=1e-12)
            assert torch.allclose(by_state[start, lane], js, atol=1e-12)
            assert torch.allclose(read_theta[start, lane], rt, atol=1e-12)
            assert torch.allclose(read_state[start, lane], rs, atol=1e-12)


def test_compiled_functions_are_the_functions() -> None:
    """For a number of starts that chunks do not divide; the second call reuses the first one's kernel."""
    rollout = Rollout(Euler(Pendulum()), 5, state_size=2, readout=[0])
    plain, fused = CellFunctions(rollout), CellFunctions(rollout, compile="eager")
    u = torch.randn(6, 1, dtype=torch.float64)
    theta = plain.start() * torch.linspace(0.5, 2.0, 19).double()[:, None]
    x = torch.randn(19, 6, 2, dtype=torch.float64)
    with torch.no_grad():
        expected = plain.step_jacobian(theta, x, u, 0.02)
        for _ in range(2):
            for ours, theirs in zip(fused.step_jacobian(theta, x, u, 0.02), expected, strict=True):
                assert torch.allclose(ours, theirs, rtol=1e-13, atol=1e-13)
