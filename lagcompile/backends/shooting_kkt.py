"""The equality-constrained Gauss-Newton step of a multiple-shooting problem, batched over starts.

In: the stages' Jacobians, residuals and defects. Out: the step in states and parameters and the new multipliers, that
is the solution of
    min 1/2 |e + C ds + D dth|^2 + damping   subject to   r_k + A_k ds_k + B_k dth - ds_{k+1} = 0.
Invariant: the cost grows linearly with the number of stages, the number of batched calls with its logarithm.

How: adding rho G'G to the Hessian leaves the solution as it is and makes the states' part block-tridiagonal and
positive definite (no invertible stage Jacobian, no fully observed state is needed). It is factored by block cyclic
reduction, the parameters are a border, and the multipliers come from conjugate gradients on G T^-1 G', whose
eigenvalues cluster at 1/rho, so that a few iterations reach rounding error (augmented Lagrangian as a preconditioner:
Golub and Greif 2003). The growth of Jacobian products over a long horizon never enters, which a Riccati recursion
without process noise, or condensing onto the first state, could not avoid for a chaotic system.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lagcompile.backends.shooting_blocks import BlockTridiagonal
from lagcompile.dynamics.stages import StageJacobians


@dataclass(frozen=True, eq=False)
class Quadratic:
    """Hessian blocks and gradient of the objective's Gauss-Newton model.

    Attributes:
        state: (starts, trajectories, stages, n, n).
        cross: (starts, trajectories, stages, n, p).
        theta: (starts, p, p).
        state_gradient: (starts, trajectories, stages, n).
        theta_gradient: (starts, p).
    """

    state: Tensor
    cross: Tensor
    theta: Tensor
    state_gradient: Tensor
    theta_gradient: Tensor

    @property
    def scale(self) -> Tensor:
        """(starts,) mean diagonal of the states' Hessian, the unit of the defects' weight."""
        return self.state.diagonal(dim1=-2, dim2=-1).flatten(1).mean(1).clamp_min(1e-300)

    @classmethod
    def gauss_newton(cls, jacobians: StageJacobians, residual: Tensor) -> Quadratic:
        """Normal-equation blocks from residuals (starts, trajectories, stages, S, outputs)."""
        c, d = jacobians.output_state, jacobians.output_theta
        e = residual.flatten(3, 4)[..., None]
        rows = d.flatten(1, 3)
        return cls(
            state=c.mT @ c,
            cross=c.mT @ d,
            theta=rows.mT @ rows,
            state_gradient=(c.mT @ e)[..., 0],
            theta_gradient=(rows.mT @ e.flatten(1, 3))[..., 0],
        )

    def add_diagonal(self, state: Tensor | None, theta: Tensor | None) -> Quadratic:
        """The same with terms added to the diagonals of the Hessian."""
        return Quadratic(
            self.state if state is None else self.state + torch.diag_embed(state),
            self.cross,
            self.theta if theta is None else self.theta + torch.diag_embed(theta),
            self.state_gradient,
            self.theta_gradient,
        )

    def add_curvature(self, curvature: Tensor) -> Quadratic:
        """The same with second derivatives (starts, trajectories, stages, n + p, n + p) of the Lagrangian added."""
        n = self.state.shape[-1]
        return Quadratic(
            self.state + curvature[..., :n, :n],
            self.cross + curvature[..., :n, n:],
            self.theta + curvature[..., n:, n:].sum((1, 2)),
            self.state_gradient,
            self.theta_gradient,
        )

    def store(self, index: Tensor, other: Quadratic) -> None:
        """Overwrite the Hessian of some of the starts."""
        self.state[index], self.cross[index], self.theta[index] = other.state, other.cross, other.theta

    def rows(self, index: Tensor) -> Quadratic:
        """Some of the starts."""
        return Quadratic(
            self.state[index],
            self.cross[index],
            self.theta[index],
            self.state_gradient[index],
            self.theta_gradient[index],
        )

    def hold_theta(self) -> Quadratic:
        """The same with the parameters held where they are."""
        eye = torch.eye(self.theta.shape[-1], dtype=self.theta.dtype, device=self.theta.device)
        return Quadratic(
            self.state,
            torch.zeros_like(self.cross),
            eye.expand_as(self.theta),
            self.state_gradient,
            torch.zeros_like(self.theta_gradient),
        )

    def add_gradient(self, state: Tensor, theta: Tensor) -> Quadratic:
        """The same with terms added to the gradient."""
        return Quadratic(self.state, self.cross, self.theta, self.state_gradient + state, self.theta_gradient + theta)


class DefectOperator:
    """The linearised defects G (ds, dth) = A ds - next ds + B dth and their adjoint.

    Args:
        jacobians: of the stages.
        on: (trajectories, stages) True where a stage ends in a defect.
    """

    def __init__(self, jacobians: StageJacobians, on: Tensor) -> None:
        self.a, self.b, self.on = jacobians.end_state, jacobians.end_theta, on[..., None].to(jacobians.end_state.dtype)

    def apply(self, states: Tensor, theta: Tensor) -> Tensor:
        """Defect change of a step (starts, trajectories, stages, n), (starts, p)."""
        following = torch.cat([states[:, :, 1:], torch.zeros_like(states[:, :, :1])], dim=2)
        moved = (self.a @ states[..., None])[..., 0] + (self.b @ theta[:, None, None, :, None])[..., 0]
        return moved - self.on * following

    def adjoint(self, multipliers: Tensor) -> tuple[Tensor, Tensor]:
        """G' times multipliers (starts, trajectories, stages, n)."""
        held = self.on * multipliers
        back = torch.cat([torch.zeros_like(held[:, :, :1]), held[:, :, :-1]], dim=2)
        states = (self.a.mT @ held[..., None])[..., 0] - back
        theta = (self.b.mT @ held[..., None])[..., 0].sum((1, 2))
        return states, theta


@dataclass(frozen=True, eq=False)
class Step:
    """A solved step.

    Attributes:
        states: (starts, trajectories, stages, n).
        theta: (starts, p).
        multipliers: (starts, trajectories, stages, n), entry k belongs to the defect at the end of stage k.
        ok: (starts,) False where the system was singular or not finite.
        iterations: conjugate-gradient iterations of the slowest start.
    """

    states: Tensor
    theta: Tensor
    multipliers: Tensor
    ok: Tensor
    iterations: int


class KktSystem:
    """Factor of one Gauss-Newton KKT matrix; several right-hand sides may follow.

    Args:
        quadratic: Gauss-Newton model, damping included.
        defects: linearised defects.
        rho: (starts,) weight of the defects in the augmented Lagrangian; `Quadratic.scale` gives its unit.
    """

    def __init__(self, quadratic: Quadratic, defects: DefectOperator, rho: Tensor) -> None:
        self.quadratic, self.defects = quadratic, defects
        a, b, on = defects.a, defects.b, defects.on[..., None]
        n = a.shape[-1]
        self.rho = rho
        rho = rho[:, None, None, None, None]
        diagonal = quadratic.state + rho * (a.mT @ a)
        border = quadratic.cross + rho * (a.mT @ b)
        eye = torch.eye(n, dtype=a.dtype, device=a.device)
        diagonal[:, :, 1:] += rho * (on[:, :-1] * eye)
        border[:, :, 1:] -= rho * b[:, :, :-1]
        # A stage without any data or neighbour (padding of a shorter trajectory) still needs an invertible block.
        idle = (1.0 - defects.on) * (diagonal.diagonal(dim1=-2, dim2=-1) == 0)
        diagonal = diagonal + torch.diag_embed(idle)
        self.blocks = BlockTridiagonal.factor(diagonal, -(rho * a * on)[:, :, :-1])
        self.border = border
        self.response = self.blocks.solve(border)
        rows = b.flatten(1, 3)
        schur = quadratic.theta + self.rho[:, None, None] * (rows.mT @ rows)
        schur = schur - (border.mT @ self.response).sum((1, 2))
        self.schur = 0.5 * (schur + schur.mT)
        self.cholesky, info = torch.linalg.cholesky_ex(self.schur)
        self.ok = (info == 0) & self.blocks.ok.all(1)

    def apply_inverse(self, states: Tensor, theta: Tensor) -> tuple[Tensor, Tensor]:
        """T^-1 times (states, theta), T the Hessian with rho G'G added."""
        v = self.blocks.solve(states[..., None])[..., 0]
        reduced = theta - (self.border.mT @ v[..., None])[..., 0].sum((1, 2))
        dtheta = torch.cholesky_solve(reduced[..., None], self.cholesky)[..., 0]
        return v - (self.response @ dtheta[:, None, None, :, None])[..., 0], dtheta

    def solve(
        self,
        defect: Tensor,
        multipliers: Tensor,
        *,
        exact: Tensor | None = None,
        tolerance: float = 1e-10,
        limit: int = 30,
    ) -> Step:
        """Solve the KKT system.

        Args:
            defect: (starts, trajectories, stages, n) right-hand side r of the linearised defects.
            multipliers: first guess, of the same shape.
            exact: (starts,) False where the minimiser of the augmented Lagrangian is wanted, with the multipliers as
                they are; None: True everywhere.
            tolerance: accepted |r + G step| relative to its value before the iteration.
            limit: most conjugate-gradient iterations.
        """
        model, op = self.quadratic, self.defects
        back_s, back_t = op.adjoint(self.rho[:, None, None, None] * defect + multipliers)
        ds, dt = self.apply_inverse(-(model.state_gradient + back_s), -(model.theta_gradient + back_t))
        residual = defect + op.apply(ds, dt)
        multipliers = multipliers.clone()
        squared = residual.square().flatten(1).sum(1)
        target = tolerance**2 * (defect.square().flatten(1).sum(1) + squared) + 1e-300
        if exact is not None:
            target = torch.where(exact, target, float("inf"))
        direction, used = residual, 0
        active = squared > target
        while used < limit and bool(active.any()):
            back_s, back_t = op.adjoint(direction)
            vs, vt = self.apply_inverse(back_s, back_t)
            image = op.apply(vs, vt)
            curvature = (direction * image).flatten(1).sum(1)
            active = active & (curvature > 0)
            alpha = torch.where(active, squared / curvature, 0.0)
            wide = alpha[:, None, None, None]
            multipliers = multipliers + wide * direction
            ds, dt = ds - wide * vs, dt - alpha[:, None] * vt
            residual = residual - wide * image
            fresh = residual.square().flatten(1).sum(1)
            direction = residual + torch.where(active, fresh / squared, 0.0)[:, None, None, None] * direction
            squared, used = fresh, used + 1
            active = active & (squared > target)
        finite = torch.isfinite(ds).flatten(1).all(1) & torch.isfinite(dt).all(1)
        return Step(ds, dt, op.on * multipliers, self.ok & finite, used)
