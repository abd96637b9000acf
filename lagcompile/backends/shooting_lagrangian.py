"""The augmented Lagrangian of a multiple-shooting problem and its gradient, batched over starts.

In: a `Problem` and a `Place` in scaled variables. Out: a `Slope`. Invariant: one forward and one backward pass of all
stages, whatever the number of parameters; no Jacobian is formed.

    L = objective + <lambda, r> + rho/2 |r|^2
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lagcompile.backends.shooting_problem import Problem


def pick(keep: Tensor, first: Tensor, second: Tensor) -> Tensor:
    """Rows of the first tensor where `keep` (starts,) holds, of the second elsewhere."""
    return torch.where(keep.view(-1, *[1] * (first.dim() - 1)), first, second)


@dataclass(frozen=True, eq=False)
class Place:
    """Scaled variables.

    Attributes:
        theta: (starts, p) parameters in their units.
        states: (starts, trajectories, stages, n) first states of the stages in their units.
        dual: (starts, trajectories, stages, n) multipliers of the scaled defects.
    """

    theta: Tensor
    states: Tensor
    dual: Tensor

    def where(self, keep: Tensor, other: Place) -> Place:
        """This place in the starts to keep, another elsewhere."""
        return Place(
            pick(keep, self.theta, other.theta),
            pick(keep, self.states, other.states),
            pick(keep, self.dual, other.dual),
        )

    def rows(self, index: Tensor) -> Place:
        """Some of the starts."""
        return Place(self.theta[index], self.states[index], self.dual[index])


@dataclass(frozen=True, eq=False)
class Slope:
    """Value and gradient at a place, in scaled variables.

    Attributes:
        objective: (starts,).
        defect: (starts, trajectories, stages, n).
        theta: (starts, p) gradient.
        states: (starts, trajectories, stages, n) gradient.
    """

    objective: Tensor
    defect: Tensor
    theta: Tensor
    states: Tensor

    @classmethod
    def beyond(cls, place: Place) -> Slope:
        """Placeholder before the first slope: infinite value, no gradient."""
        objective = torch.full_like(place.theta[:, 0], float("inf"))
        zero = torch.zeros_like(place.states)
        return cls(objective, zero, torch.zeros_like(place.theta), zero)

    @property
    def finite(self) -> Tensor:
        """(starts,) True where value and gradient are."""
        return torch.isfinite(self.objective + self.theta.sum(1) + self.states.flatten(1).sum(1))

    def merit(self, rho: Tensor) -> Tensor:
        """(starts,) objective + rho/2 |r|^2."""
        return self.objective + 0.5 * rho * self.defect.square().flatten(1).sum(1)

    def where(self, keep: Tensor, other: Slope) -> Slope:
        """This slope in the starts to keep, another elsewhere."""
        return Slope(
            pick(keep, self.objective, other.objective),
            pick(keep, self.defect, other.defect),
            pick(keep, self.theta, other.theta),
            pick(keep, self.states, other.states),
        )

    def rows(self, index: Tensor) -> Slope:
        """Some of the starts."""
        return Slope(self.objective[index], self.defect[index], self.theta[index], self.states[index])


def slope(problem: Problem, place: Place, theta_scale: Tensor, rho: Tensor) -> Slope:
    """Value and gradient of the augmented Lagrangian.

    Args:
        problem: what is solved.
        place: where.
        theta_scale: (starts, p) units of the parameters.
        rho: (starts,) weight of the squared scaled defects.
    """
    theta, states = place.theta * theta_scale, place.states * problem.state_scale
    point, sweep = problem.taped(theta, states)
    defect = problem.scaled_defect(point.values)
    force = (place.dual + rho[:, None, None, None] * defect) * problem.stages.defect_on[..., None]
    by_states, by_theta = sweep(force / problem.state_scale, point.values.residual * problem.stages.weight)
    prior_theta, prior_initial = problem.prior_gradient(theta, states)
    first = (by_states[:, :, :1] + prior_initial[:, :, None]) * problem.state_scale
    if problem.fixed_initial:
        first = torch.zeros_like(first)
    later = by_states[:, :, 1:] * problem.state_scale - force[:, :, :-1]
    gradient = torch.cat([first, later], dim=2)
    return Slope(point.values.objective, defect, (by_theta + prior_theta) * theta_scale, gradient)
