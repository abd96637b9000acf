"""Cells that advance an ordinary differential equation by one sampling interval.

In: a user's vector field module f(x) or f(x, u) with x (batch, n) and u (batch, m). Out: cells
x_{t+1} = cell(x_t, u_t, h). Invariant: a cell holds no state; the step length h comes from the data's time
stamps, or from `dt` if it is given.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn

from lagcompile.dynamics.forward_mode import derivative
from lagcompile.ir.base import BindError, MissingExtraError

Hold = Literal["zero", "linear"]


class OdeCell(nn.Module, ABC):
    """Base of the integrators.

    Args:
        field: vector field, called as field(x) without inputs and field(x, u) with them.
        dt: step length; None takes the difference of the time stamps.
        substeps: integration steps inside one sampling interval.
        hold: how inputs run between samples: "zero" keeps u_t, "linear" goes straight to u_{t+1}.
    """

    def __init__(self, field: nn.Module, *, dt: float | None = None, substeps: int = 1, hold: Hold = "zero") -> None:
        super().__init__()
        if substeps < 1:
            raise BindError(f"substeps is {substeps}: at least one integration step per sample is needed")
        if dt is not None and not dt > 0:
            raise BindError(f"dt is {dt}: a step length is positive")
        self.field, self.dt, self.substeps, self.hold = field, dt, substeps, hold

    def forward(self, x: Tensor, u: Tensor | None, h: Tensor | float) -> Tensor:
        """State one sampling interval later.

        Args:
            x: (batch, n) states.
            u: (batch, m) inputs; with hold "linear" (batch, 2 m), the inputs at both ends; None without inputs.
            h: length of the interval, a number or (batch, 1).
        """
        width = (self.dt if self.dt is not None else h) / self.substeps
        for i in range(self.substeps):
            x = self.advance(x, u, width, i)
        return x

    def input_at(self, u: Tensor | None, fraction: float | Tensor) -> Tensor | None:
        """Input at a fraction of the sampling interval."""
        if u is None or self.hold == "zero":
            return u
        start, end = u.chunk(2, dim=-1)
        return start + fraction * (end - start)

    def slope(self, x: Tensor, u: Tensor | None, fraction: float) -> Tensor:
        """Vector field at a fraction of the sampling interval."""
        now = self.input_at(u, fraction)
        value: Tensor = self.field(x) if now is None else self.field(x, now)
        return value

    @abstractmethod
    def advance(self, x: Tensor, u: Tensor | None, h: Tensor | float, index: int) -> Tensor:
        """State after integration step `index` of length `h` inside the interval."""


class Euler(OdeCell):
    """Explicit Euler steps, x + h f(x, u)."""

    def advance(self, x: Tensor, u: Tensor | None, h: Tensor | float, index: int) -> Tensor:
        """One explicit step."""
        return _moved(x, self.slope(x, u, index / self.substeps), h)


class RK4(OdeCell):
    """The classical Runge-Kutta steps of order four."""

    def advance(self, x: Tensor, u: Tensor | None, h: Tensor | float, index: int) -> Tensor:
        """One step with slopes at the start, twice at the middle and at the end."""
        start, middle, end = (index + c for c in (0.0, 0.5, 1.0))
        k1 = self.slope(x, u, start / self.substeps)
        k2 = self.slope(_moved(x, k1, 0.5 * h), u, middle / self.substeps)
        k3 = self.slope(_moved(x, k2, 0.5 * h), u, middle / self.substeps)
        k4 = self.slope(_moved(x, k3, h), u, end / self.substeps)
        return _moved(x, torch.add(k1 + k4, k2 + k3, alpha=2.0), h / 6.0)


class ImplicitMidpoint(OdeCell):
    """Implicit midpoint steps x' = x + h f((x + x')/2), solved by Newton's method; for stiff or conserving systems.

    Args:
        field: vector field, as in `OdeCell`.
        dt: step length; None takes the difference of the time stamps.
        substeps: integration steps inside one sampling interval.
        hold: how inputs run between samples.
        newton_steps: Newton iterations of each step, a fixed number so that steps can be batched.
    """

    def __init__(
        self,
        field: nn.Module,
        *,
        dt: float | None = None,
        substeps: int = 1,
        hold: Hold = "zero",
        newton_steps: int = 4,
    ) -> None:
        super().__init__(field, dt=dt, substeps=substeps, hold=hold)
        self.newton_steps = newton_steps

    def advance(self, x: Tensor, u: Tensor | None, h: Tensor | float, index: int) -> Tensor:
        """One step; every Newton iteration is differentiable, so derivatives are as converged as the state."""
        middle = (index + 0.5) / self.substeps
        eye = torch.eye(x.shape[-1], dtype=x.dtype, device=x.device)

        def slope(point: Tensor) -> Tensor:
            return self.slope(point, u, middle)

        directions = eye[:, None, :].expand(-1, *x.shape)
        end = x + h * slope(x)
        for _ in range(self.newton_steps):
            point = 0.5 * (x + end)
            columns = torch.func.vmap(lambda v, at=point: derivative(slope, (at,), (v,)))(directions)
            jacobian = eye - 0.5 * _column(h) * columns.movedim(0, -1)
            end = end - torch.linalg.solve(jacobian, (end - x - h * slope(point))[..., None])[..., 0]
        return end


class Adaptive(OdeCell):
    """Adaptive and stiff integration by torchdiffeq (extra `ode`); one interval is solved for the whole batch.

    Args:
        field: vector field, as in `OdeCell`.
        method: name of a torchdiffeq solver, such as "dopri5".
        rtol: relative tolerance of the integration.
        atol: absolute tolerance of the integration.
        dt: step length, which must then be the same everywhere; None takes the time stamps.
        hold: how inputs run between samples.
    """

    def __init__(
        self,
        field: nn.Module,
        *,
        method: str = "dopri5",
        rtol: float = 1e-8,
        atol: float = 1e-10,
        dt: float | None = None,
        hold: Hold = "zero",
    ) -> None:
        super().__init__(field, dt=dt, hold=hold)
        self.method, self.rtol, self.atol = method, rtol, atol

    def advance(self, x: Tensor, u: Tensor | None, h: Tensor | float, index: int) -> Tensor:
        """One interval, in normalised time so that intervals of different lengths share one batch."""

        def slope(time: Tensor, point: Tensor) -> Tensor:
            now = self.input_at(u, time)
            return h * (self.field(point) if now is None else self.field(point, now))

        return self.integrate(slope, x)

    def integrate(self, slope: Callable[[Tensor, Tensor], Tensor], start: Tensor) -> Tensor:
        """Solution at time 1 of d/dtime point = slope(time, point) from a start at time 0.

        Raises:
            MissingExtraError: torchdiffeq is not installed.
        """
        try:
            from torchdiffeq import odeint
        except ImportError as error:
            raise MissingExtraError("Adaptive needs torchdiffeq: pip install 'lagcompile[ode]'") from error
        span = torch.tensor([0.0, 1.0], dtype=start.dtype, device=start.device)
        path: Tensor = odeint(slope, start, span, method=self.method, rtol=self.rtol, atol=self.atol)
        return path[-1]


def _moved(x: Tensor, slope: Tensor, h: Tensor | float) -> Tensor:
    """Return x + h slope; a plain number h is passed as `alpha`, whose derivative in forward mode costs nothing."""
    return x + h * slope if isinstance(h, Tensor) else torch.add(x, slope, alpha=h)


def _column(h: Tensor | float) -> Tensor | float:
    return h[..., None] if isinstance(h, Tensor) and h.dim() > 0 else h
