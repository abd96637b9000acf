"""Small dynamical systems with known parameters, for examples, specs and benchmarks.

In: parameters. Out: cells and vector fields as modules, and `Example`s that simulate noisy data from them. Invariant:
data depend on the seed alone; the parameters of the returned rollout are the true ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from lagcompile.dynamics.integrators import RK4
from lagcompile.dynamics.rollout import Rollout
from lagcompile.dynamics.trajectories import Trajectories
from lagcompile.ir.base import Frozen

Name = Literal["logistic", "lorenz", "van_der_pol", "pendulum", "fitzhugh_nagumo"]


def _number(value: float) -> nn.Parameter:
    return nn.Parameter(torch.tensor(float(value), dtype=torch.float64))


class Logistic(nn.Module):
    """The map x' = r x (1 - x)."""

    def __init__(self, r: float = 3.78) -> None:
        super().__init__()
        self.r = _number(r)

    def forward(self, x: Tensor) -> Tensor:
        """Next state."""
        return self.r * x * (1.0 - x)


class Lorenz(nn.Module):
    """Lorenz' (1963) vector field."""

    def __init__(self, sigma: float = 10.0, rho: float = 28.0, beta: float = 8.0 / 3.0) -> None:
        super().__init__()
        self.sigma, self.rho, self.beta = _number(sigma), _number(rho), _number(beta)

    def forward(self, state: Tensor) -> Tensor:
        """Derivative."""
        x, y, z = state.unbind(-1)
        return torch.stack([self.sigma * (y - x), x * (self.rho - z) - y, x * y - self.beta * z], -1)


class VanDerPol(nn.Module):
    """Van der Pol's oscillator x'' = mu (1 - x^2) x' - omega x."""

    def __init__(self, mu: float = 2.0, omega: float = 1.0) -> None:
        super().__init__()
        self.mu, self.omega = _number(mu), _number(omega)

    def forward(self, state: Tensor) -> Tensor:
        """Derivative."""
        x, v = state.unbind(-1)
        return torch.stack([v, self.mu * (1.0 - x * x) * v - self.omega * x], -1)


class Pendulum(nn.Module):
    """Damped pendulum with an unknown input gain: a'' = -stiffness sin(a) - damping a' + gain u."""

    def __init__(self, stiffness: float = 9.81, damping: float = 0.3, gain: float = 2.0) -> None:
        super().__init__()
        self.stiffness, self.damping, self.gain = _number(stiffness), _number(damping), _number(gain)

    def forward(self, state: Tensor, u: Tensor) -> Tensor:
        """Derivative."""
        angle, speed = state.unbind(-1)
        return torch.stack(
            [speed, -self.stiffness * torch.sin(angle) - self.damping * speed + self.gain * u[..., 0]], -1
        )


class FitzHughNagumo(nn.Module):
    """FitzHugh's (1961) neuron v' = v - v^3/3 - w + current, w' = eps (v + a - b w)."""

    def __init__(self, a: float = 0.7, b: float = 0.8, eps: float = 0.08, current: float = 0.5) -> None:
        super().__init__()
        self.a, self.b, self.eps, self.current = _number(a), _number(b), _number(eps), current

    def forward(self, state: Tensor) -> Tensor:
        """Derivative."""
        v, w = state.unbind(-1)
        return torch.stack([v - v**3 / 3.0 - w + self.current, self.eps * (v + self.a - self.b * w)], -1)


class Duffing(nn.Module):
    """Oscillator with a cubic spring: x'' = -stiffness x - cubic x^3 - damping x' + gain u."""

    def __init__(self, stiffness: float, damping: float, cubic: float, gain: float) -> None:
        super().__init__()
        self.stiffness, self.damping = _number(stiffness), _number(damping)
        self.cubic, self.gain = _number(cubic), _number(gain)

    def forward(self, state: Tensor, u: Tensor) -> Tensor:
        """Derivative."""
        x, v = state.unbind(-1)
        pull = self.stiffness * x + self.cubic * x**3 + self.damping * v
        return torch.stack([v, self.gain * u[..., 0] - pull], -1)


class Example(Frozen):
    """A system, how it is sampled and how noisy the measurements are."""

    name: Name
    samples: int = Field(ge=2)
    dt: float = Field(gt=0)
    """Time between two samples."""
    noise: float = Field(gt=0)
    """Standard deviation of the measurement noise."""
    initial: tuple[float, ...]
    observed: tuple[int, ...] = Field(min_length=1)
    """Measured components of the state."""

    @model_validator(mode="after")
    def _check(self) -> Example:
        size = {"logistic": 1, "lorenz": 3}.get(self.name, 2)
        if len(self.initial) != size:
            raise ValueError(f"{self.name} has {size} states, initial has {len(self.initial)} numbers")
        if not all(0 <= c < size for c in self.observed):
            raise ValueError(f"observed names components {self.observed}; {self.name} has 0 to {size - 1}")
        return self

    def rollout(self) -> Rollout:
        """The system with its true parameters."""
        cell: nn.Module
        if self.name == "logistic":
            cell = Logistic()
        else:
            fields: dict[str, nn.Module] = {
                "lorenz": Lorenz(),
                "van_der_pol": VanDerPol(),
                "pendulum": Pendulum(),
                "fitzhugh_nagumo": FitzHughNagumo(),
            }
            cell = RK4(fields[self.name])
        return Rollout(cell, self.samples - 1, state_size=len(self.initial), readout=self.observed, dt=self.dt)

    def data(self, seed: int = 0) -> Trajectories:
        """Noisy measurements of one trajectory."""
        generator = torch.Generator().manual_seed(seed)
        times = torch.arange(self.samples, dtype=torch.float64) * self.dt
        inputs = None
        if self.name == "pendulum":
            inputs = (torch.sin(1.3 * times) + torch.sign(torch.sin(0.7 * times)))[:, None]
        start = torch.tensor(self.initial, dtype=torch.float64)
        with torch.no_grad():
            clean = self.rollout()(start, None if inputs is None else inputs[None])[0]
        noise = self.noise * torch.randn(clean.shape, generator=generator, dtype=torch.float64)
        return Trajectories.single(clean + noise, times=times, inputs=inputs, name=self.name)


def examples(names: Sequence[Name] | None = None) -> dict[str, Example]:
    """The benchmark problems by name."""
    known = (
        Example(name="logistic", samples=300, dt=1.0, noise=0.02, initial=(0.3,), observed=(0,)),
        Example(name="lorenz", samples=1001, dt=0.01, noise=0.5, initial=(-8.0, 7.0, 27.0), observed=(0, 1, 2)),
        Example(name="van_der_pol", samples=401, dt=0.05, noise=0.05, initial=(1.0, 0.0), observed=(0, 1)),
        Example(name="pendulum", samples=501, dt=0.02, noise=0.02, initial=(0.5, 0.0), observed=(0,)),
        Example(name="fitzhugh_nagumo", samples=801, dt=0.25, noise=0.05, initial=(-1.0, 1.0), observed=(0,)),
    )
    return {e.name: e for e in known if names is None or e.name in names}
