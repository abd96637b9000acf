"""A multiple-shooting estimation problem: stages, scales, priors and bounds, evaluated for many starts at once.

In: `CellFunctions`, `Trajectories`, noise levels, priors, bounds. Out: `Problem`, which evaluates objective, defects
and their Gauss-Newton model. Invariant: objective and defects are in the user's units; only the model is in scaled
variables.

    minimise 1/2 sum ((y - readout(x)) / noise)^2 + priors   over parameters and the states at breakpoints
    subject to   r_k = f_{k-1}(h_{k-1}) - h_k = 0
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lagcompile.backends.shooting_kkt import Quadratic
from lagcompile.dynamics.functional import CellFunctions
from lagcompile.dynamics.stages import StageJacobians, Stages, StageValues, Sweep
from lagcompile.dynamics.trajectories import Trajectories
from lagcompile.ir.base import BindError


@dataclass(frozen=True, eq=False)
class Gaussian:
    """Prior knowledge: 1/2 sum ((value - mean) / deviation)^2 is added to the objective.

    Attributes:
        mean: expected value, of the value's shape.
        deviation: its standard deviation, of a shape that broadcasts; infinity for no knowledge.
    """

    mean: Tensor
    deviation: Tensor


@dataclass(frozen=True, eq=False)
class Bounds:
    """Simple bounds on parameters (p,) and states (n,); infinite where there are none."""

    theta_lower: Tensor
    theta_upper: Tensor
    state_lower: Tensor
    state_upper: Tensor

    @property
    def any(self) -> bool:
        """Whether anything is bounded."""
        return self.theta_bounded or self.states_bounded

    @property
    def theta_bounded(self) -> bool:
        """Whether a parameter is bounded."""
        return bool(torch.isfinite(self.theta_lower).any() or torch.isfinite(self.theta_upper).any())

    @property
    def states_bounded(self) -> bool:
        """Whether a state component is bounded."""
        return bool(torch.isfinite(self.state_lower).any() or torch.isfinite(self.state_upper).any())

    @classmethod
    def of(
        cls,
        functions: CellFunctions,
        theta: Mapping[str, tuple[float | None, float | None]],
        states: Mapping[int, tuple[float | None, float | None]],
    ) -> Bounds:
        """Bounds from names of parameters and indices of state components.

        Raises:
            BindError: a name or index that is not there, or a lower bound that is not below the upper.
        """
        inf = float("inf")
        layout = functions.layout
        low_t, high_t = torch.full((layout.size,), -inf), torch.full((layout.size,), inf)
        low_x, high_x = torch.full((functions.n,), -inf), torch.full((functions.n,), inf)
        problems = []
        places = dict(zip(layout.names, torch.arange(layout.size).split(layout.sizes), strict=True))
        short = {n.rsplit(".", 1)[-1]: n for n in layout.names}
        for name, (low, high) in theta.items():
            full = name if name in places else short.get(name)
            if full is None:
                problems.append(f"bounds name the parameter {name!r}; the rollout has {', '.join(layout.names)}")
                continue
            low_t[places[full]] = -inf if low is None else low
            high_t[places[full]] = inf if high is None else high
        for component, (low, high) in states.items():
            if not 0 <= component < functions.n:
                problems.append(f"bounds name state component {component}; the state has size {functions.n}")
                continue
            low_x[component] = -inf if low is None else low
            high_x[component] = inf if high is None else high
        if bool((low_t >= high_t).any()) or bool((low_x >= high_x).any()):
            problems.append("a lower bound is not below its upper bound")
        if problems:
            raise BindError(problems)
        move = {"dtype": functions.dtype, "device": functions.device}
        return cls(low_t.to(**move), high_t.to(**move), low_x.to(**move), high_x.to(**move))  # type: ignore[call-overload]


@dataclass(frozen=True, eq=False)
class Point:
    """Where the starts are: parameters (starts, p), states (starts, trajectories, stages, n), and their simulation."""

    theta: Tensor
    states: Tensor
    values: StageValues

    def rows(self, index: Tensor) -> Point:
        """Some of the starts."""
        return Point(self.theta[index], self.states[index], self.values.rows(index))

    def store(self, index: Tensor, other: Point) -> None:
        """Overwrite some of the starts."""
        self.theta[index], self.states[index] = other.theta, other.states
        self.values.replace(index, other.values)


@dataclass(frozen=True, eq=False)
class Problem:
    """An estimation problem at one stage length.

    Attributes:
        functions: the rollout as batched functions.
        data: the measurements.
        stages: the cut trajectories.
        weights: (outputs,) one over the noise's standard deviation.
        state_scale: (n,) units of the states.
        theta_prior: prior of the parameters, None for none.
        initial_prior: prior of the initial states (trajectories, n), None for none.
        fixed_initial: True where the initial states are known and stay as they are.
        bounds: bounds on parameters and states.
    """

    functions: CellFunctions
    data: Trajectories
    stages: Stages
    weights: Tensor
    state_scale: Tensor
    bounds: Bounds
    theta_prior: Gaussian | None = None
    initial_prior: Gaussian | None = None
    fixed_initial: bool = False

    def with_length(self, length: int) -> Problem:
        """The same problem with another stage length."""
        return replace(self, stages=Stages(self.functions, self.data, length, self.weights))

    def evaluate(self, theta: Tensor, states: Tensor) -> Point:
        """Simulate all stages; the priors are part of the objective."""
        values = self.stages.simulate(theta, states)
        return Point(theta, states, replace(values, objective=values.objective + self._priors(theta, states)))

    def _priors(self, theta: Tensor, states: Tensor) -> Tensor:
        total = theta.new_zeros(theta.shape[0])
        if self.theta_prior is not None:
            total = total + 0.5 * self._theta_error(theta, self.theta_prior).square().sum(1)
        if self.initial_prior is not None:
            total = total + 0.5 * self._initial_error(states, self.initial_prior).square().flatten(1).sum(1)
        return total

    def taped(self, theta: Tensor, states: Tensor) -> tuple[Point, Sweep]:
        """`evaluate`, and the transposed Jacobian of all stages; priors are not part of it."""
        values, sweep = self.stages.taped(theta, states)
        return Point(theta, states, replace(values, objective=values.objective + self._priors(theta, states))), sweep

    def prior_gradient(self, theta: Tensor, states: Tensor) -> tuple[Tensor, Tensor]:
        """Derivatives (starts, p) and (starts, trajectories, n) of the priors by parameters and initial states."""
        by_theta, by_initial = torch.zeros_like(theta), torch.zeros_like(states[:, :, 0])
        if self.theta_prior is not None:
            by_theta = self._theta_error(theta, self.theta_prior) / self.theta_prior.deviation
        if self.initial_prior is not None:
            by_initial = self._initial_error(states, self.initial_prior) / self.initial_prior.deviation
        return by_theta, by_initial

    def linearise(
        self, point: Point, theta_scale: Tensor, multipliers: Tensor | None = None
    ) -> tuple[StageJacobians, Quadratic]:
        """Stage Jacobians and Gauss-Newton model in scaled variables; the Lagrangian's Hessian with multipliers."""
        jacobians = self.stages.linearise(
            point.theta,
            point.values.path,
            self.state_scale,
            theta_scale,
            multipliers=multipliers,
            residual=point.values.residual,
        )
        if self.fixed_initial:
            jacobians.output_state[:, :, 0] = 0.0
            jacobians.end_state[:, :, 0] = 0.0
            if jacobians.curvature is not None:
                jacobians.curvature[:, :, 0, : self.functions.n] = 0.0
                jacobians.curvature[:, :, 0, :, : self.functions.n] = 0.0
        model = Quadratic.gauss_newton(jacobians, point.values.residual)
        if jacobians.curvature is not None:
            model = model.add_curvature(jacobians.curvature)
        states, theta = torch.zeros_like(model.state_gradient), torch.zeros_like(model.theta_gradient)
        state_curvature, theta_curvature = torch.zeros_like(states), torch.zeros_like(theta)
        if self.fixed_initial:
            state_curvature[:, :, 0] = 1.0
        if self.theta_prior is not None:
            unit = theta_scale / self.theta_prior.deviation
            theta_curvature = unit.square()
            theta = unit * self._theta_error(point.theta, self.theta_prior)
        if self.initial_prior is not None:
            first = (self.state_scale / self.initial_prior.deviation).expand_as(states[:, :, 0])
            state_curvature[:, :, 0] += first.square()
            states[:, :, 0] = first * self._initial_error(point.states, self.initial_prior)
        return jacobians, model.add_diagonal(state_curvature, theta_curvature).add_gradient(states, theta)

    def scaled_defect(self, values: StageValues) -> Tensor:
        """Defects in units of the states."""
        return values.defect / self.state_scale

    def _theta_error(self, theta: Tensor, prior: Gaussian) -> Tensor:
        return (theta - prior.mean) / prior.deviation

    def _initial_error(self, states: Tensor, prior: Gaussian) -> Tensor:
        return (states[:, :, 0] - prior.mean) / prior.deviation
