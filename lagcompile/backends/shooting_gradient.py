"""Augmented-Lagrangian extragradient by multiple shooting, for cells with too many parameters for second order.

In: a `Problem`, first parameters and states of many starts. Out: parameters, states, multipliers. Invariant: memory
is linear in parameters and states; one step costs two batched forward and backward passes of the stages and nothing
else.

    L = objective / c + <lambda, r> + rho/2 |r|^2,   states and parameters descend, multipliers ascend,
both halves of a step (extrapolation, update) share one diagonal preconditioner (Adam's second moment).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from pydantic import Field
from torch import Tensor

from lagcompile.backends.shooting_problem import Point, Problem
from lagcompile.dynamics.starts import parameter_scale
from lagcompile.ir.base import Frozen


class ShootingExtragradient(Frozen):
    """Options of the first-order method."""

    steps: int = Field(default=2000, ge=0)
    """Most steps."""
    lr: float = Field(default=0.02, gt=0)
    """Step of parameters and states in their units, before preconditioning; falls to a tenth along a cosine."""
    rho: float = Field(default=1.0, gt=0)
    """Weight of the squared defects, relative to the mean curvature of the output errors."""
    dual_lr: float = Field(default=0.1, gt=0)
    """Step of the multipliers in units of rho."""
    momentum: float = Field(default=0.9, ge=0, lt=1)
    """Decay of the gradient's mean in the update; the extrapolation uses the plain gradient."""
    decay: float = Field(default=0.99, gt=0, lt=1)
    """Decay of the second moment."""
    time_limit: float | None = Field(default=None, gt=0)
    """Seconds."""


@dataclass(frozen=True, eq=False)
class FirstOrderResult:
    """Where an extragradient run ended.

    Attributes:
        point: parameters, states and their simulation, for all starts.
        multipliers: (starts, trajectories, stages, n) d objective / d state.
        steps: steps made.
        seconds: wall time.
    """

    point: Point
    multipliers: Tensor
    steps: int
    seconds: float


class _Adam:
    """Diagonal preconditioner; a start whose gradient is not finite stands still."""

    def __init__(self, like: Tensor, method: ShootingExtragradient) -> None:
        self.mean, self.square = torch.zeros_like(like), torch.zeros_like(like)
        self.method, self.count = method, 0

    def direction(self, gradient: Tensor, *, update: bool) -> Tensor:
        gradient = torch.nan_to_num(gradient, 0.0, 0.0, 0.0)
        b1, b2 = self.method.momentum, self.method.decay
        if not update:
            seen = self.count + 1
            square = (b2 * self.square + (1 - b2) * gradient.square()) / (1 - b2**seen)
            return gradient / (square.sqrt() + 1e-12)
        self.count += 1
        self.mean = b1 * self.mean + (1 - b1) * gradient
        self.square = b2 * self.square + (1 - b2) * gradient.square()
        mean, square = self.mean / (1 - b1**self.count), self.square / (1 - b2**self.count)
        return mean / (square.sqrt() + 1e-12)


def extragradient(
    problem: Problem,
    method: ShootingExtragradient,
    theta: Tensor,
    states: Tensor,
    *,
    clock: Callable[[], float] = time.perf_counter,
) -> FirstOrderResult:
    """Run the method.

    Args:
        problem: what is solved.
        method: the options.
        theta: (starts, p) first parameters.
        states: (starts, trajectories, stages, n) first states.
        clock: seconds, for the time limit.
    """
    begin = clock()
    theta_scale, scale = parameter_scale(problem.functions, theta), problem.state_scale
    unit = problem.weights.square().mean() * scale.square().mean() * problem.stages.length
    z, s = theta / theta_scale, states / scale
    multipliers = torch.zeros_like(s)
    on_theta, on_states = _Adam(z, method), _Adam(s, method)
    done = 0

    def gradients(z: Tensor, s: Tensor, dual: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        z, s = z.detach().requires_grad_(True), s.detach().requires_grad_(True)
        values = problem.evaluate(z * theta_scale, s * scale).values
        defect = problem.scaled_defect(values)
        coupling = (dual * defect + 0.5 * method.rho * defect.square()).flatten(1).sum(1)
        total = (values.objective / unit + coupling).sum()
        by_z, by_s = torch.autograd.grad(total, (z, s))
        return by_z, by_s, defect.detach()

    for step in range(method.steps):
        if method.time_limit is not None and clock() - begin > method.time_limit:
            break
        lr = method.lr * (0.1 + 0.45 * (1 + float(torch.cos(torch.tensor(torch.pi * step / method.steps)))))
        by_z, by_s, defect = gradients(z, s, multipliers)
        ahead_z = z - lr * on_theta.direction(by_z, update=False)
        ahead_s = s - lr * on_states.direction(by_s, update=False)
        ahead = multipliers + method.dual_lr * method.rho * torch.nan_to_num(defect, 0.0, 0.0, 0.0)
        by_z, by_s, defect = gradients(ahead_z, ahead_s, ahead)
        z = z - lr * on_theta.direction(by_z, update=True)
        s = s - lr * on_states.direction(by_s, update=True)
        multipliers = multipliers + method.dual_lr * method.rho * torch.nan_to_num(defect, 0.0, 0.0, 0.0)
        done = step + 1
    with torch.no_grad():
        point = problem.evaluate((z * theta_scale).detach(), (s * scale).detach())
    return FirstOrderResult(point, multipliers * unit / scale, done, clock() - begin)
