"""Metrics of the first-order shooting method: what a unit step is for each state and for the parameters.

In: a `Problem`, a point of many starts, theta's units. Out: a `Metric` that turns gradients into steps. Invariant: a
metric depends on curvature alone, never on the history of gradients, and preconditions each state by itself: no
system that couples stages is solved.

With J the Jacobian of weighted outputs and defects, a state's curvature is that of its outputs, of the defect at
the end of its stage (rho A'A) and of the one at its beginning (rho I). `Blocks` takes J from forward mode. `Diagonal`
estimates the diagonal of J'J from J'v with random signs v, whose squares have that expectation (Hutchinson 1989;
for training: Yao et al. 2021), so that it costs backward passes only.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from lagcompile.backends.shooting_problem import Problem

_RIDGE = 1e-6
_FIRST_PROBES = 4
_MEMORY = 0.8
"""Part of the diagonal's old estimate that a new measurement keeps."""


class Metric(Protocol):
    """Curvature at a point, split into that of the objective and that of the defects."""

    @property
    def unit(self) -> Tensor:
        """(starts,) mean curvature of the objective in a state, the unit of rho."""

    def set_rho(self, rho: Tensor) -> None:
        """Prepare `steps` for a weight (starts,) of the squared defects."""

    def steps(self, theta: Tensor, states: Tensor) -> tuple[Tensor, Tensor]:
        """Steps (starts, p) and (starts, trajectories, stages, n) from gradients of these shapes."""


class Blocks:
    """Full curvature of each state and of the parameters.

    Args:
        problem: what is solved.
        theta: (starts, p) parameters.
        states: (starts, trajectories, stages, n) first states of the stages.
        theta_scale: (starts, p) units of the parameters.
    """

    def __init__(self, problem: Problem, theta: Tensor, states: Tensor, theta_scale: Tensor) -> None:
        jacobians, model = problem.linearise(problem.evaluate(theta, states), theta_scale)
        rows = jacobians.end_theta.flatten(1, 3)
        self._states, self._theta = model.state, model.theta
        self._ahead, self._defect_theta = jacobians.end_state.mT @ jacobians.end_state, rows.mT @ rows
        self._on, self._unit, self._bounds = problem.stages.defect_on, model.scale, problem.bounds

    @property
    def unit(self) -> Tensor:
        """(starts,) mean curvature of the objective in a state."""
        return self._unit

    def set_rho(self, rho: Tensor) -> None:
        """Invert the blocks for a weight (starts,)."""
        n = self._states.shape[-1]
        eye = torch.eye(n, dtype=rho.dtype, device=rho.device)
        wide = rho[:, None, None, None, None]
        states = self._states + wide * self._ahead + (_RIDGE * self._unit)[:, None, None, None, None] * eye
        states[:, :, 1:] += wide * (self._on[:, :-1, None, None] * eye)
        theta = self._theta + rho[:, None, None] * self._defect_theta
        theta = theta + torch.diag_embed(1e-8 * theta.diagonal(dim1=1, dim2=2) + 1e-300)
        if self._bounds.states_bounded:
            states = _dominant(states)
        if self._bounds.theta_bounded:
            theta = _dominant(theta)
        self._by_states, self._by_theta = torch.linalg.inv_ex(states)[0], torch.linalg.inv_ex(theta)[0]

    def steps(self, theta: Tensor, states: Tensor) -> tuple[Tensor, Tensor]:
        """Gradients times the inverse blocks."""
        return (self._by_theta @ theta[..., None])[..., 0], (self._by_states @ states[..., None])[..., 0]


def _dominant(blocks: Tensor) -> Tensor:
    """Diagonal matrices that are at least the blocks: clamping to bounds is a projection in a diagonal metric only."""
    return torch.diag_embed(blocks.abs().sum(-1))


@dataclass(frozen=True, eq=False)
class Diagonals:
    """Running estimates of the diagonals, all of one start along the first axis.

    Attributes:
        states: of the objective's curvature in each state.
        theta: of the objective's curvature in each parameter.
        ahead: of A'A in each state.
        defect_theta: of B'B in each parameter.
    """

    states: Tensor
    theta: Tensor
    ahead: Tensor
    defect_theta: Tensor

    def rows(self, index: Tensor) -> Diagonals:
        """Some of the starts."""
        return Diagonals(self.states[index], self.theta[index], self.ahead[index], self.defect_theta[index])


class Diagonal:
    """Diagonal curvature of each state and of the parameters.

    Args:
        problem: what is solved.
        theta: (starts, p) parameters.
        states: (starts, trajectories, stages, n) first states of the stages.
        theta_scale: (starts, p) units of the parameters.
        generator: of the random signs.
        before: the last estimates, None at the beginning.
    """

    def __init__(
        self,
        problem: Problem,
        theta: Tensor,
        states: Tensor,
        theta_scale: Tensor,
        *,
        generator: torch.Generator,
        before: Diagonals | None = None,
    ) -> None:
        self._problem, self._scale, self._generator = problem, theta_scale, generator
        values, sweep = problem.stages.taped(theta, states)
        found: list[Diagonals] = []
        for _ in range(1 if before is not None else _FIRST_PROBES):
            of_objective = sweep(torch.zeros_like(values.defect), self._signs(values.residual) * problem.stages.weight)
            ends = self._signs(values.defect) * problem.stages.defect_on[..., None] / problem.state_scale
            of_defects = sweep(ends, torch.zeros_like(values.residual))
            found.append(self._squares(of_objective, of_defects))
        mean = Diagonals(
            *(
                torch.stack(parts).mean(0).nan_to_num(0.0, 0.0, 0.0)
                for parts in zip(*((d.states, d.theta, d.ahead, d.defect_theta) for d in found), strict=True)
            )
        )
        self.estimate = mean if before is None else _mixed(before, mean)
        counted = problem.stages.stage_on[..., None].expand_as(values.defect[0])
        per_start = self.estimate.states * counted
        self._unit = (per_start.flatten(1).sum(1) / counted.sum()).clamp_min(1e-300)

    def _signs(self, like: Tensor) -> Tensor:
        drawn = torch.rand(like.shape, generator=self._generator, dtype=like.dtype, device=like.device)
        return torch.where(drawn < 0.5, -torch.ones_like(drawn), torch.ones_like(drawn))

    def _squares(self, of_objective: tuple[Tensor, Tensor], of_defects: tuple[Tensor, Tensor]) -> Diagonals:
        problem = self._problem
        by_state, by_theta = of_objective
        ahead, defect_theta = of_defects
        states, theta = (by_state * problem.state_scale).square(), (by_theta * self._scale).square()
        if problem.theta_prior is not None:
            theta = theta + (self._scale / problem.theta_prior.deviation).square()
        if problem.initial_prior is not None:
            states[:, :, 0] += (problem.state_scale / problem.initial_prior.deviation).square()
        return Diagonals(states, theta, (ahead * problem.state_scale).square(), (defect_theta * self._scale).square())

    @property
    def unit(self) -> Tensor:
        """(starts,) mean curvature of the objective in a state."""
        return self._unit

    def keep(self, stay: Tensor) -> None:
        """Forget the estimates of the other starts; nothing else is kept until the next measurement."""
        self.estimate = self.estimate.rows(stay)

    def set_rho(self, rho: Tensor) -> None:
        """Divisors for a weight (starts,). A tensor of parameters shares one mean with each of its numbers."""
        wide = rho[:, None, None, None]
        states = self.estimate.states.mean((1, 2), keepdim=True) + self.estimate.states
        states = 0.5 * states + wide * 0.5 * (self.estimate.ahead.mean((1, 2), keepdim=True) + self.estimate.ahead)
        states[:, :, 1:] += wide * self._problem.stages.defect_on[:, :-1, None]
        self._by_states = 1.0 / (states + _RIDGE * self._unit[:, None, None, None])
        theta = self.estimate.theta + rho[:, None] * self.estimate.defect_theta
        sizes = self._problem.functions.layout.sizes
        mean = torch.cat([part.mean(1, keepdim=True).expand_as(part) for part in theta.split(sizes, dim=1)], dim=1)
        self._by_theta = 1.0 / (0.5 * (theta + mean) + 1e-300)

    def steps(self, theta: Tensor, states: Tensor) -> tuple[Tensor, Tensor]:
        """Gradients over the diagonals."""
        return theta * self._by_theta, states * self._by_states


def _mixed(old: Diagonals, new: Diagonals) -> Diagonals:
    return Diagonals(
        *(
            _MEMORY * a + (1.0 - _MEMORY) * b
            for a, b in (
                (old.states, new.states),
                (old.theta, new.theta),
                (old.ahead, new.ahead),
                (old.defect_theta, new.defect_theta),
            )
        )
    )
