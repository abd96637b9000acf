"""Fits by multiple shooting: recovery, multipliers, invariance under the stage length, bounds, bad input."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from lagcompile.backends.shooting import Shooting, ShootingExtragradient, fit
from lagcompile.backends.shooting_problem import Gaussian
from lagcompile.dynamics import RK4, Rollout, Trajectories, Trajectory
from lagcompile.dynamics.functional import CellFunctions
from lagcompile.dynamics.starts import random_starts
from lagcompile.dynamics.systems import Example, Lorenz, Pendulum, examples
from lagcompile.ir.base import BindError, DataError
from lagcompile.ir.solution import Status

SHORT = {"logistic": 120, "lorenz": 300, "van_der_pol": 200, "pendulum": 251, "fitzhugh_nagumo": 401}


def guesses(rollout: Rollout, count: int, seed: int = 1) -> tuple[Tensor, Tensor]:
    truth = CellFunctions(rollout).start()
    return truth, random_starts(truth, count, seed=seed)


@pytest.mark.parametrize("name", list(SHORT))
def test_every_start_finds_the_parameters(name: str) -> None:
    """Starts within a factor 5 on short data: all end in one solution, near the truth for the noise there is."""
    known = examples()[name]
    example = known.model_copy(update={"samples": SHORT[name], "noise": 0.2 * known.noise})
    rollout, data = example.rollout(), example.data(seed=2)
    truth, starts = guesses(rollout, 8)
    result = fit(rollout, data, starts=starts, noise=example.noise)
    assert set(result.statuses) == {Status.SOLVED}
    assert float(((result.theta - truth) / truth).abs().max()) < 0.02
    assert result.residuals.defect < 1e-5
    deviation = (result.theta[result.best] - truth) / result.standard_errors
    assert float(deviation.abs().max()) < 5.0


def test_the_logistic_map_is_found_from_where_backprop_through_the_rollout_is_stuck() -> None:
    """100 starts in [2, 3.7]: nearly all by multiple shooting, nearly none by Adam on the simulation error."""
    example = examples()["logistic"]
    data, truth = example.data(), 3.78
    starts = 2.0 + 1.7 * torch.rand(100, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    result = fit(example.rollout(), data, starts=starts, noise=example.noise)
    found = int(((result.theta - truth).abs() < 0.05).sum())
    r = starts[:, 0].clone().requires_grad_()
    optimizer = torch.optim.Adam([r], lr=0.02)
    for _ in range(120):
        x = torch.full_like(r, example.initial[0])  # the true first state: more than multiple shooting is given
        error = torch.zeros_like(r)
        for y in data.observations[0, :, 0]:
            error = error + (x - y) ** 2
            x = r * x * (1.0 - x)
        optimizer.zero_grad()
        error.mean().backward()
        optimizer.step()
    stuck = int(((r.detach() - truth).abs() >= 0.05).sum())
    assert found >= 95
    assert stuck >= 95


def pendulum() -> tuple[Rollout, Trajectories]:
    example = Example(name="pendulum", samples=161, dt=0.02, noise=0.02, initial=(0.5, 0.0), observed=(0,))
    return example.rollout(), example.data()


def test_multipliers_are_the_adjoints_of_the_unsplit_rollout() -> None:
    """lambda_k = d objective / d h_k: perturb the simulated state at a breakpoint and let autograd differentiate."""
    rollout, data = pendulum()
    method = Shooting(stage_length=20, tolerance=1e-12)
    result = fit(rollout, data, noise=0.02, method=method)
    assert result.status is Status.SOLVED
    model = result.rollout
    kicks = torch.zeros(len(result.breakpoints), 2, dtype=torch.float64, requires_grad=True)
    place = {int(b): k for k, b in enumerate(result.breakpoints)}
    assert data.inputs is not None
    x = result.states[:, 0].clone().requires_grad_(True)
    state, outputs = x, []
    for t in range(data.samples):
        if t in place:
            state = state + kicks[place[t]]
        outputs.append(model.readout(state))
        state = model.step(state, data.inputs[:, t], 0.02)
    objective = 0.5 * ((torch.stack(outputs, 1) - data.observations) / 0.02).square().sum()
    adjoints, at_start, *by_parameter = torch.autograd.grad(objective, [kicks, x, *model.parameters()])
    scale = float(adjoints.abs().max())
    assert float((result.multipliers[0] - adjoints).abs().max()) < 1e-8 * scale
    assert float(at_start.abs().max()) < 1e-6 * scale
    assert max(float(g.abs().max()) for g in by_parameter) < 1e-6 * scale


def test_the_solution_does_not_depend_on_the_stage_length() -> None:
    """Stages of 1, 7 (not a divisor), 32 samples and one stage (single shooting) meet in one solution."""
    rollout, data = pendulum()
    found = []
    for length in (1, 7, 32, data.samples):
        result = fit(rollout, data, noise=0.02, method=Shooting(stage_length=length, tolerance=1e-10))
        assert result.status is Status.SOLVED
        found.append((result.theta[0], result.states, result.standard_errors))
    for theta, states, errors in found[1:]:
        assert torch.allclose(theta, found[0][0], rtol=1e-7)
        assert torch.allclose(states, found[0][1], atol=1e-7)
        assert torch.allclose(errors, found[0][2], rtol=1e-4)


def test_doubling_the_stages_keeps_the_solution() -> None:
    rollout, data = pendulum()
    method = Shooting(stage_length=5, tolerance=1e-9)
    short = fit(rollout, data, noise=0.02, method=method)
    long = fit(rollout, data, noise=0.02, method=method.model_copy(update={"lengthen": 3}))
    assert (short.stage_length, long.stage_length) == (5, 40)
    assert torch.allclose(short.theta, long.theta, rtol=1e-7)
    assert int(long.iterations[0]) <= int(short.iterations[0]) + 3


def test_a_batch_of_starts_is_what_each_start_does_alone() -> None:
    rollout, data = pendulum()
    _, starts = guesses(rollout, 3)
    method = Shooting(stage_length=10)
    together = fit(rollout, data, starts=starts, noise=0.02, method=method)
    for i in range(3):
        alone = fit(rollout, data, starts=starts[i : i + 1], noise=0.02, method=method)
        assert int(alone.iterations[0]) == int(together.iterations[i])
        assert torch.allclose(alone.theta[0], together.theta[i], rtol=1e-8)


def test_the_module_of_the_user_stays_as_it_is() -> None:
    rollout, data = pendulum()
    before = copy.deepcopy(rollout.state_dict())
    with torch.no_grad():
        rollout.cell.field.gain.mul_(1.5)  # type: ignore[union-attr,operator]
    kept = copy.deepcopy(rollout.state_dict())
    result = fit(rollout, data, noise=0.02)
    assert all(torch.equal(v, kept[n]) for n, v in rollout.state_dict().items())
    assert result.rollout is not rollout
    gain = "cell.field.gain"
    assert float(result.rollout.state_dict()[gain]) == pytest.approx(float(before[gain]), rel=0.1)
    assert not torch.equal(kept[gain], before[gain])
    assert gain in result.table()
    assert float(result.simulation_error(data)) == pytest.approx(0.02, rel=0.2)


def several() -> tuple[Rollout, Trajectories]:
    """Two pendulum experiments of unequal length from different initial states, with missing samples."""
    rollout = Rollout(RK4(Pendulum()), 150, state_size=2, readout=[0])
    generator = torch.Generator().manual_seed(5)
    items = []
    for count, angle in ((151, 0.5), (90, -1.0)):
        times = 0.02 * torch.arange(count, dtype=torch.float64)
        inputs = torch.sin(3.0 * times + angle)[:, None]
        model = Rollout(rollout.cell, count - 1, state_size=2, readout=[0])
        with torch.no_grad():
            clean = model(torch.tensor([angle, 0.0]).double(), inputs[None], times[None])[0]
        noisy = clean + 0.01 * torch.randn(count, 1, generator=generator, dtype=torch.float64)
        noisy[20:35] = float("nan")
        items.append(Trajectory(noisy, times, inputs, ~torch.isnan(noisy), name=f"run {count}"))
    return rollout, Trajectories.stack(items)


def test_several_trajectories_of_unequal_length_with_missing_data() -> None:
    rollout, data = several()
    truth, starts = guesses(rollout, 4)
    result = fit(rollout, data, starts=starts, noise=0.01)
    assert set(result.statuses) == {Status.SOLVED}
    assert float(((result.theta - truth) / truth).abs().max()) < 0.05
    assert result.states.shape == (2, 151, 2)
    assert torch.allclose(result.initial_states()[:, 0], torch.tensor([0.5, -1.0]).double(), atol=0.02)


def test_bounds_hold_and_pull_no_further_than_they_must() -> None:
    """An upper bound below the free solution is active, and the others adapt; a loose one changes nothing."""
    rollout, data = pendulum()
    free = fit(rollout, data, noise=0.02)
    loose = fit(rollout, data, noise=0.02, bounds={"gain": (0.1, 50.0), "damping": (0.0, None)})
    assert torch.allclose(free.theta, loose.theta, rtol=1e-3)
    tight = fit(rollout, data, noise=0.02, bounds={"gain": (None, 1.8)}, state_bounds={0: (-3.0, 3.0)})
    assert tight.status is Status.SOLVED
    value = dict(zip(tight.labels, tight.theta[0].tolist(), strict=True))["cell.field.gain"]
    assert value < 1.8
    assert value == pytest.approx(1.8, abs=1e-4)
    held = copy.deepcopy(rollout)
    with torch.no_grad():
        held.cell.field.gain.fill_(1.8)  # type: ignore[union-attr,operator]
    held.cell.field.gain.requires_grad_(False)  # type: ignore[union-attr]
    expected = fit(held, data, noise=0.02)
    assert float(tight.objective[0]) == pytest.approx(float(expected.objective[0]), rel=1e-3)


def test_known_initial_states_and_priors() -> None:
    rollout, data = pendulum()
    known = torch.tensor([0.5, 0.0], dtype=torch.float64)
    fixed = fit(rollout, data, noise=0.02, initial=known)
    assert torch.equal(fixed.states[0, 0], known)
    assert fixed.status is Status.SOLVED
    truth = CellFunctions(rollout).start()
    firm = fit(rollout, data, noise=0.02, prior=Gaussian(0.9 * truth, 1e-6 * truth))
    assert torch.allclose(firm.theta[0], 0.9 * truth, rtol=1e-5)
    soft = fit(rollout, data, noise=0.02, initial=Gaussian(known[None], torch.tensor([1e-6, 1e-6]).double()))
    assert torch.allclose(soft.states[0, 0], known, atol=1e-5)


def test_a_recurrent_cell_learns_by_reverse_mode() -> None:
    """58 parameters and 3 states: more than the forward mode takes; the error falls to the noise of a linear system."""
    torch.manual_seed(0)
    inputs = torch.randn(1, 200, 1, dtype=torch.float64)
    x, outputs = torch.zeros(1, dtype=torch.float64), []
    for t in range(200):
        outputs.append(x)
        x = 0.7 * x + 0.4 * torch.tanh(inputs[0, t])
    data = Trajectories.single(torch.stack(outputs), inputs=inputs[0])
    rollout = Rollout(nn.GRUCell(1, 3).double(), 199, readout=nn.Linear(3, 1).double())
    result = fit(rollout, data, noise=0.05, method=Shooting(stage_length=10, iterations=40))
    assert float(result.simulation_error(data)) < 0.1 * float(data.observations.std())


def test_a_chaotic_start_is_no_trouble_where_the_simulation_explodes() -> None:
    """The guess r = 18 of the logistic map leaves the unit interval at once and overflows within ten steps."""
    example = examples()["logistic"]
    rollout = example.rollout()
    result = fit(rollout, example.data(), starts=torch.tensor([[18.0], [0.8]]).double(), noise=0.02)
    assert set(result.statuses) == {Status.SOLVED}
    assert float((result.theta - 3.78).abs().max()) < 0.02 * 3.78


def test_an_exploding_simulation_is_named_by_trajectory_and_time() -> None:
    example = examples()["logistic"]
    method = Shooting(stage_length=300)
    result = fit(example.rollout(), example.data(), starts=torch.tensor([[18.0]]).double(), noise=0.02, method=method)
    x, time = float(example.data().observations[0, 0, 0]), 0
    while abs(x) < float("inf"):
        x, time = 18.0 * x * (1.0 - x), time + 1
    assert result.status is Status.DIVERGED
    assert result.message.startswith(f"the simulation is not finite in trajectory 'logistic' at time {time}:")


class Widening(nn.Module):
    """A cell that returns one number more than it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3, 2, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight.T


@pytest.mark.parametrize("method", [Shooting(), ShootingExtragradient()])
def test_a_cell_of_another_shape_is_refused(method: Shooting | ShootingExtragradient) -> None:
    data = Trajectories.single(torch.randn(20, 2, dtype=torch.float64))
    with pytest.raises(BindError) as error:
        fit(Rollout(Widening(), 19, state_size=2), data, starts=3, method=method)
    assert error.value.problems == (
        "cell Widening returned (20, 3) for states of shape (20, 2): a cell returns the next state in the shape of the "
        "state",
    )


def test_wrong_input_is_refused_in_the_words_of_the_user() -> None:
    rollout, data = pendulum()
    with pytest.raises(BindError, match=r"bounds name the parameter 'mass'; the rollout has cell.field.stiffness"):
        fit(rollout, data, bounds={"mass": (0.0, 1.0)})
    with pytest.raises(BindError, match=r"the data have 1 outputs, but the model observes 2 components"):
        fit(Rollout(RK4(Pendulum()), 10, state_size=2), data)
    with pytest.raises(BindError, match=r"starts have shape \(2, 2\); the rollout has 3 parameters"):
        fit(rollout, data, starts=torch.ones(2, 2))
    with pytest.raises(BindError, match="noise must be positive"):
        fit(rollout, data, noise=-1.0)
    with pytest.raises(DataError, match="output 0 does not vary"):
        fit(Rollout(RK4(Lorenz()), 10, state_size=3, readout=[0]), Trajectories.single(torch.zeros(20, 1)))
    frozen = copy.deepcopy(rollout).requires_grad_(False)
    with pytest.raises(BindError, match="no parameter with requires_grad=True"):
        fit(frozen, data)


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_guesses_that_are_not_finite_are_refused(number: float) -> None:
    example = examples()["logistic"]
    starts = torch.tensor([[6.0], [number]], dtype=torch.float64)
    for method in (Shooting(), ShootingExtragradient()):
        with pytest.raises(BindError, match="guess 1 holds numbers that are not finite"):
            fit(example.rollout(), example.data(), starts=starts, noise=example.noise, method=method)
