"""Trajectories cut into stages, and the stages' simulation and linearisation.

In: `CellFunctions`, `Trajectories` and a stage length S. Out: `Stages`, which simulates all stages of all starts at
once and assembles the Gauss-Newton matrices of outputs and defects. Invariant: stage k covers samples kS .. kS+S-1
and predicts the state at sample (k+1)S; samples beyond the end of a trajectory weigh nothing and leave the state as
it is, so that a horizon that S does not divide, and trajectories of unequal lengths, need no special case.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from lagcompile.dynamics.functional import CellFunctions
from lagcompile.dynamics.trajectories import Trajectories
from lagcompile.ir.base import BindError


@dataclass(frozen=True, eq=False)
class StageValues:
    """What a simulation of all stages gives.

    Attributes:
        path: (starts, trajectories, stages, S, n) states at the samples of each stage.
        residual: (starts, trajectories, stages, S, outputs) weighted output errors, 0 where nothing was measured.
        defect: (starts, trajectories, stages, n) prediction minus next state; 0 after the last stage.
        objective: (starts,) half the sum of squared residuals.
    """

    path: Tensor
    residual: Tensor
    defect: Tensor
    objective: Tensor

    @property
    def finite(self) -> Tensor:
        """(starts,) True where the whole simulation is finite."""
        return torch.isfinite(self.objective) & torch.isfinite(self.defect).flatten(1).all(1)

    def rows(self, index: Tensor) -> StageValues:
        """The values of some starts."""
        return StageValues(self.path[index], self.residual[index], self.defect[index], self.objective[index])

    def replace(self, index: Tensor, other: StageValues) -> None:
        """Overwrite the values of some starts by those of another simulation."""
        for mine, new in (
            (self.path, other.path),
            (self.residual, other.residual),
            (self.defect, other.defect),
            (self.objective, other.objective),
        ):
            mine[index] = new


@dataclass(frozen=True, eq=False)
class StageJacobians:
    """Derivatives of every stage with respect to its first state and the parameters, in the caller's scales.

    Attributes:
        output_state: (starts, trajectories, stages, S * outputs, n).
        output_theta: (starts, trajectories, stages, S * outputs, p).
        end_state: (starts, trajectories, stages, n, n); 0 after the last stage.
        end_theta: (starts, trajectories, stages, n, p); 0 after the last stage.
        curvature: (starts, trajectories, stages, n + p, n + p) second derivatives of the Lagrangian beyond the
            Gauss-Newton model, None where they were not asked for.
    """

    output_state: Tensor
    output_theta: Tensor
    end_state: Tensor
    end_theta: Tensor
    curvature: Tensor | None = None

    def rows(self, index: Tensor) -> StageJacobians:
        """Some of the starts."""
        return StageJacobians(
            self.output_state[index], self.output_theta[index], self.end_state[index], self.end_theta[index]
        )

    def hold_theta(self) -> StageJacobians:
        """The same with the parameters held where they are."""
        return StageJacobians(
            self.output_state, torch.zeros_like(self.output_theta), self.end_state, torch.zeros_like(self.end_theta)
        )


Sweep = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""From factors of the stages' ends (starts, trajectories, stages, n) and of the outputs (starts, trajectories, stages,
S, outputs) to derivatives by first states (starts, trajectories, stages, n) and parameters (starts, p)."""


class Stages:
    """Trajectories in stages of S samples.

    Args:
        functions: the rollout as batched functions.
        data: the measured trajectories, already in the functions' dtype and on their device.
        length: S, samples in a stage.
        weights: (outputs,) factors of the output errors, one over the standard deviation of the noise.
    """

    def __init__(self, functions: CellFunctions, data: Trajectories, length: int, weights: Tensor) -> None:
        if not length >= 1:
            raise BindError(f"a stage has at least one sample, got a stage length of {length}")
        self.functions, self.data = functions, data
        self.length = min(length, data.samples)
        self.count = -(-data.samples // self.length)
        counts = torch.tensor(data.lengths, device=functions.device)
        total = self.count * self.length
        sample = torch.arange(total, device=functions.device)
        self.sample_on = self._cut((sample < counts[:, None])[..., None])[..., 0]
        stage_start = torch.arange(self.count, device=functions.device) * self.length
        self.stage_on = stage_start < counts[:, None]
        self.defect_on = torch.zeros_like(self.stage_on)
        self.defect_on[:, :-1] = self.stage_on[:, 1:]
        self.ragged = not bool(self.sample_on.all())
        self.observed = self._cut(data.observations)
        self.weight = self._cut(data.mask.to(functions.dtype)) * weights
        inputs = functions.rollout.step_inputs(data.inputs)
        self.inputs = None if inputs is None else self._cut(inputs)
        gaps = data.times[:, 1:] - data.times[:, :-1]
        self.lengths = self._cut(torch.cat([gaps, gaps[:, -1:]], dim=1)[..., None])
        step = float(gaps[0, 0])
        self.uniform = step if bool((gaps - step).abs().max() <= 1e-9 * abs(step)) else None

    def _cut(self, value: Tensor) -> Tensor:
        """(trajectories, samples, c) to (trajectories, stages, S, c), filled up with zeros."""
        missing = self.count * self.length - value.shape[1]
        if missing > 0:
            value = torch.cat([value, torch.zeros_like(value[:, -1:]).expand(-1, missing, -1)], dim=1)
        return value.unflatten(1, (self.count, self.length))

    def lane_data(self, step: int | None) -> tuple[Tensor | None, Tensor | float]:
        """Inputs and step lengths of one step of every stage, or of all steps, as lanes; one number where all agree."""
        pick = slice(None) if step is None else step
        inputs = None if self.inputs is None else self.inputs[:, :, pick].flatten(0, -2)
        return inputs, self.uniform or self.lengths[:, :, pick].flatten(0, -2)

    def simulate(self, theta: Tensor, states: Tensor) -> StageValues:
        """Simulate every stage from its first state.

        Args:
            theta: (starts, p) parameters.
            states: (starts, trajectories, stages, n) first states.
        """
        shape = states.shape
        x, path = states, []
        for j in range(self.length):
            path.append(x)
            inputs, lengths = self.lane_data(j)
            following = self.functions.step(theta, x.flatten(1, 2), inputs, lengths).view(shape)
            x = torch.where(self.sample_on[:, :, j, None], following, x) if self.ragged else following
        samples = torch.stack(path, dim=3)
        outputs = self.functions.output(theta, samples.flatten(1, 3))
        return self._values(samples, outputs, x)

    def taped(self, theta: Tensor, states: Tensor) -> tuple[StageValues, Sweep]:
        """`simulate`, and the transposed Jacobian of all stages as a function: one batched backward pass."""
        shape = states.shape
        x, path, pulls = states, [], []
        for j in range(self.length):
            path.append(x)
            inputs, lengths = self.lane_data(j)
            following, pull = self.functions.taped_step(theta, x.flatten(1, 2), inputs, lengths)
            pulls.append(pull)
            following = following.view(shape)
            x = torch.where(self.sample_on[:, :, j, None], following, x) if self.ragged else following
        samples = torch.stack(path, dim=3)
        outputs, pull_output = self.functions.taped_output(theta, samples.flatten(1, 3))

        def sweep(end: Tensor, error: Tensor) -> tuple[Tensor, Tensor]:
            read_x, read_t = pull_output(error.flatten(1, 3))
            read_x = read_x.view(samples.shape)
            total = torch.zeros_like(theta) if read_t is None else read_t
            now = end
            for j in reversed(range(self.length)):
                on = self.sample_on[:, :, j, None]
                back, by_theta = pulls[j]((torch.where(on, now, 0.0) if self.ragged else now).flatten(1, 2))
                back = back.view(shape)
                now = (torch.where(on, back, now) if self.ragged else back) + read_x[:, :, :, j]
                total = total if by_theta is None else total + by_theta
            return now, total

        return self._values(samples, outputs, x), sweep

    def _values(self, samples: Tensor, outputs: Tensor, end: Tensor) -> StageValues:
        if outputs.shape[-1] != self.data.outputs:
            raise BindError(
                f"the readout gives {outputs.shape[-1]} outputs, the data have {self.data.outputs}: "
                "pass readout=[indices of the observed components] or a readout module"
            )
        outputs = outputs.unflatten(1, samples.shape[1:4])
        residual = torch.where(self.weight > 0, self.weight * (outputs - self.observed), 0.0)
        states = samples[:, :, :, 0]
        following = torch.cat([states[:, :, 1:], states[:, :, -1:]], dim=2)
        defect = torch.where(self.defect_on[..., None], end - following, 0.0)
        return StageValues(samples, residual, defect, 0.5 * residual.square().flatten(1).sum(1))

    def linearise(
        self,
        theta: Tensor,
        path: Tensor,
        state_scale: Tensor,
        theta_scale: Tensor,
        *,
        multipliers: Tensor | None = None,
        residual: Tensor | None = None,
    ) -> StageJacobians:
        """Derivatives along a simulated path.

        Args:
            theta: (starts, p) parameters.
            path: (starts, trajectories, stages, S, n) states at the samples.
            state_scale: (n,) units of the states: column j of a Jacobian is multiplied by it, a defect row divided.
            theta_scale: (starts, p) units of the parameters.
            multipliers: (starts, trajectories, stages, n) of the scaled defects; with them, and the weighted output
                errors, the curvature of the Lagrangian is added.
            residual: (starts, trajectories, stages, S, outputs) weighted output errors.
        """
        starts, n, p = theta.shape[0], self.functions.n, self.functions.p
        lanes = path.flatten(1, 3)
        inputs, lengths = self.lane_data(None)
        cell_x, cell_t = self.functions.step_jacobian(theta, lanes, inputs, lengths)
        read_x, read_t = self.functions.output_jacobian(theta, lanes)
        shape = path.shape[1:4]
        cell_x = (cell_x * (state_scale / state_scale[:, None])).unflatten(1, shape)
        cell_t = (cell_t * (theta_scale[:, None, None, :] / state_scale[:, None])).unflatten(1, shape)
        read_x = (read_x * state_scale).unflatten(1, shape)
        if self.ragged:
            eye = torch.eye(n, dtype=path.dtype, device=path.device)
            cell_x = torch.where(self.sample_on[..., None, None], cell_x, eye)
            cell_t = torch.where(self.sample_on[..., None, None], cell_t, 0.0)
        tangent = torch.eye(n, n + p, dtype=path.dtype, device=path.device).expand(starts, *shape[:2], n, n + p)
        tangents = []
        for j in range(self.length):
            tangents.append(tangent)
            following = cell_x[:, :, :, j] @ tangent
            following[..., n:] += cell_t[:, :, :, j]
            tangent = following
        along = torch.stack(tangents, dim=3)
        curvature = None
        if multipliers is not None and residual is not None:
            error = residual * self.weight
            adjoint = self._adjoint(cell_x, read_x, multipliers, error, state_scale)
            curvature = self._curvature(theta, path, along, adjoint, error, state_scale, theta_scale)
        outputs = read_x @ along
        if read_t is not None:
            outputs[..., n:] += (read_t * theta_scale[:, None, None, :]).unflatten(1, shape)
        outputs = (outputs * self.weight[..., None]).flatten(3, 4)
        end = torch.where(self.defect_on[..., None, None], tangent, 0.0)
        return StageJacobians(outputs[..., :n], outputs[..., n:], end[..., :n], end[..., n:], curvature)

    def _adjoint(
        self, cell_x: Tensor, read_x: Tensor, multipliers: Tensor, error: Tensor, state_scale: Tensor
    ) -> Tensor:
        """Factors (..., S, n), in the user's units, of the next state of each step in the Lagrangian."""
        now, found = multipliers, []
        for j in reversed(range(self.length)):
            on = self.sample_on[:, :, j, None]
            found.append(torch.where(on, now, 0.0))
            now = (cell_x[:, :, :, j].mT @ now[..., None])[..., 0]
            now = now + (read_x[:, :, :, j].mT @ error[:, :, :, j, :, None])[..., 0]
        return torch.stack(found[::-1], dim=3) / state_scale

    def _curvature(
        self,
        theta: Tensor,
        path: Tensor,
        along: Tensor,
        adjoint: Tensor,
        error: Tensor,
        state_scale: Tensor,
        theta_scale: Tensor,
    ) -> Tensor:
        """Second derivatives of each stage's part of the Lagrangian by first state and parameters, scaled."""
        n, p = self.functions.n, self.functions.p
        inputs, lengths = self.lane_data(None)
        second = self.functions.curvature(
            theta, path.flatten(1, 3), inputs, lengths, adjoint=adjoint.flatten(1, 3), error=error.flatten(1, 3)
        )
        scale = torch.cat([state_scale.expand(theta.shape[0], n), theta_scale], dim=1)[:, None]
        second = (second * scale[..., None] * scale[:, :, None, :]).unflatten(1, path.shape[1:4])
        below = torch.eye(p, n + p, dtype=path.dtype, device=path.device).roll(n, 1)
        full = torch.cat([along, below.expand(*along.shape[:4], p, n + p)], dim=-2)
        return (full.mT @ second @ full).sum(3)
