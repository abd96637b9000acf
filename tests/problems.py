"""A zoo of small programs whose solution is known, or computed by means that share no code with the backends.

In: nothing. Out: `ZOO`, by name. Invariant: everything is float64 and full batch; every minimum that is compared has a
positive definite reduced Hessian, so that x* and lambda* are one point. References: closed form (ridge regression),
noise-free data (logistic map), L-BFGS on the un-split network with autograd's adjoints (wherever r = 0 holds), and
IPOPT (everywhere).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

import lagcompile as lc
from lagcompile.runtime.instance import Instance

Loss = Callable[[Any, Any], Tensor]
L2 = (lc.Regulariser(kind="l2", on="weights", weight=0.2),)
LIGHT = (lc.Regulariser(kind="l2", on="weights", weight=0.1),)
HEAVY = (lc.Regulariser(kind="l2", on="weights", weight=0.4),)
SOFT = lc.ConstantWeight(value=0.5)
STIFF = lc.ConstantWeight(value=2.0)


@dataclass(frozen=True)
class Problem:
    """One program, ready to be lifted.

    Attributes:
        name: its name.
        build: a fresh float64 module with seeded weights.
        inputs: the module's arguments.
        target: what the loss compares with.
        loss: (output, target) -> scalar.
        split: number of stages, or a split policy.
        options: fields of `lc.Formulation`.
        exact: r = 0 holds at the solution, so that the un-split network is an independent reference.
        known: parameters of the solution that are known in advance.
    """

    name: str
    build: Callable[[], nn.Module]
    inputs: tuple[Tensor, ...]
    target: Tensor
    loss: Loss = F.mse_loss
    split: Any = 1
    options: dict[str, Any] = field(default_factory=dict)
    exact: bool = True
    known: dict[str, Tensor] | None = None

    def lifted(self, rho: float | None = None) -> lc.Lifted:
        """The module, compiled; with an augmented Lagrangian's weight where one is given and the program has none."""
        options = dict(self.options)
        if rho is not None:
            options.setdefault("weight", lc.AugmentedWeight(value=rho))
        return lc.lift(self.build(), self.inputs, self.split, lc.Formulation(**options), name=self.name)

    @property
    def data(self) -> tuple[Any, Tensor]:
        """Inputs and target."""
        return (self.inputs[0] if len(self.inputs) == 1 else self.inputs), self.target

    def bind(self, rho: float | None = None) -> Instance:
        """The compiled module with its data."""
        return self.lifted(rho).bind(self.data, loss=self.loss)

    def solve(self, method: Any, rho: float | None = None, **more: Any) -> lc.Solution:
        """Solve with a method."""
        return self.lifted(rho).solve(self.data, loss=self.loss, method=method, **more)


@dataclass(frozen=True)
class Rates:
    """Constant step sizes for extragradient, from the spectrum of its linearised step at the solution.

    Attributes:
        weights: step of the weights.
        states: step of the states (gradients per example).
        multipliers: step of the multipliers.
        rho: quadratic weight.
        steps: number of steps, of the full batch.
        momentum: of weights and states.
    """

    weights: float
    states: float
    multipliers: float
    rho: float = 1.0
    steps: int = 500
    momentum: float = 0.0

    def solve(self, problem: Problem, start: lc.Solution) -> lc.Solution:
        """Run extragradient from a solution's weights; states by a forward pass, multipliers zero."""
        method = lc.Extragradient(
            weights=lc.SGD(lr=self.weights, momentum=self.momentum),
            states=lc.SGD(lr=self.states, momentum=self.momentum),
            multipliers=lc.SGD(lr=self.multipliers),
        )
        options = lc.RunOptions(steps=self.steps, batch_size=10_000, look_every=10_000)
        return problem.solve(method, self.rho, options=options, start=start)


def normal(seed: int, *shape: int, scale: float = 1.0) -> Tensor:
    """Seeded float64 numbers."""
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def chain(*widths: int, act: Callable[[], nn.Module] | None, seed: int = 0) -> Callable[[], nn.Module]:
    """Linear layers with an activation between them."""

    def build() -> nn.Module:
        torch.manual_seed(seed)
        layers: list[nn.Module] = []
        for i, (a, b) in enumerate(pairwise(widths)):
            layers.append(nn.Linear(a, b))
            if act is not None and i < len(widths) - 2:
                layers.append(act())
        return nn.Sequential(*layers).double()

    return build


class Skip(nn.Module):
    """Residual layers: the first state is read two stages later."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Linear(3, 2), nn.Linear(2, 2), nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.first(x))
        z = h + torch.tanh(self.second(h))
        return self.last(z + h)


class Tied(nn.Module):
    """One weight in two stages."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 2)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(self.second(torch.tanh(self.first(x)))))


class LogisticMap(nn.Module):
    """x_{t+1} = r x_t (1 - x_t), unrolled from an unknown start; each example observes with its own gain."""

    def __init__(self, steps: int = 4) -> None:
        super().__init__()
        self.rate = nn.Parameter(torch.tensor(2.6))
        self.start = nn.Parameter(torch.tensor(0.35))
        self.cells = nn.ModuleList(nn.Identity() for _ in range(steps))

    def forward(self, gain: Tensor) -> Tensor:
        x, seen = self.start * gain, []
        for cell in self.cells:
            x = cell(self.rate * x * (1.0 - x))
            seen.append(x)
        return torch.cat(seen, dim=1)


class Pendulum(nn.Module):
    """Damped pendulum by semi-implicit Euler steps, unrolled; damping and frequency are unknown."""

    def __init__(self, steps: int = 5, dt: float = 0.3) -> None:
        super().__init__()
        self.damping, self.stiffness, self.dt = nn.Parameter(torch.tensor(0.3)), nn.Parameter(torch.tensor(1.2)), dt
        self.cells = nn.ModuleList(nn.Identity() for _ in range(steps))

    def forward(self, x: Tensor) -> Tensor:
        seen = []
        for cell in self.cells:
            speed = x[:, 1:] + self.dt * (-self.stiffness * torch.sin(x[:, :1]) - self.damping * x[:, 1:])
            x = cell(torch.cat([x[:, :1] + self.dt * speed, speed], dim=1))
            seen.append(x)
        return torch.cat(seen, dim=1)


class Filter(nn.Module):
    """A known system of two numbers, observed in one of them: only its states can move."""

    def __init__(self, steps: int = 5) -> None:
        super().__init__()
        self.turn = nn.Parameter(torch.tensor([[0.9, 0.3], [-0.3, 0.9]]))
        self.cells = nn.ModuleList(nn.Identity() for _ in range(steps))

    def forward(self, x: Tensor) -> Tensor:
        seen = []
        for cell in self.cells:
            x = cell(torch.tanh(x @ self.turn.T))
            seen.append(x[:, :1])
        return torch.cat(seen, dim=1)


def _double(make: Callable[[], nn.Module], seed: int = 0) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        torch.manual_seed(seed)
        return make().double()

    return build


def _after(prefix: str, count: int) -> lc.AtSplit:
    return lc.AtSplit(after=tuple(f"{prefix}.{i}" for i in range(count)))


X, Y = normal(3, 6, 3), normal(4, 6, 2)
A, B = normal(1, 6, 3)[:, :2], 1.5 * normal(1, 6, 3)[:, :1] + 0.3 * normal(2, 6, 2)[:, :1]
SUM = nn.MSELoss(reduction="sum")
CLASSES = torch.tensor([0, 1, 2, 0, 1, 2])


def shares(output: Tensor, target: Tensor) -> Tensor:
    """Squared errors summed over examples; on X and Y the same number as their mean."""
    return F.mse_loss(output, target, reduction="sum") / Y.numel()


def _ridge() -> Problem:
    """Mean squared error and l2 over weight and bias: (A'A + s I) v = A'y with s = weight * numbers / 2."""
    a = torch.cat([X, torch.ones(6, 1, dtype=torch.float64)], 1)
    v = torch.linalg.solve(a.T @ a + 0.2 * Y.numel() / 2 * torch.eye(4, dtype=torch.float64), a.T @ Y)
    known = {"0.weight": v[:3].T, "0.bias": v[3]}
    return Problem(
        "ridge",
        chain(3, 2, act=None),
        (X,),
        Y,
        options={"regularisers": L2},
        known=known,
    )


def _logistic_map() -> Problem:
    rate, start, gain = 2.8, 0.3, torch.linspace(0.5, 1.5, 4, dtype=torch.float64)[:, None]
    x, seen = start * gain, []
    for _ in range(4):
        x = rate * x * (1.0 - x)
        seen.append(x)
    known = {"rate": torch.tensor(rate, dtype=torch.float64), "start": torch.tensor(start, dtype=torch.float64)}
    return Problem(
        "logistic_map",
        _double(LogisticMap),
        (gain,),
        torch.cat(seen, 1),
        SUM,
        _after("cells", 3),
        {"reduction": "sum"},
        known=known,
    )


def _problems() -> list[Problem]:
    l2, light, heavy = ({"regularisers": terms} for terms in (L2, LIGHT, HEAVY))
    tanh2 = chain(3, 2, 2, act=nn.Tanh)
    example = lc.MultiplierOptions(layout="example")
    pendulum = normal(5, 3, 10, scale=0.4)
    return [
        _ridge(),
        Problem("linear_2", chain(3, 1, 2, act=None), (X,), Y, split=2, options=l2),
        Problem("tanh_2", tanh2, (X,), Y, split=2, options=l2),
        Problem(
            "tanh_3_sum", chain(3, 2, 2, 2, act=nn.Tanh), (X,), Y, shares, 3, options=l2 | {"reduction": "sum"}
        ),
        Problem("softplus_2", chain(3, 2, 2, act=nn.Softplus), (X,), Y, split=2, options=l2),
        Problem("sigmoid_3", chain(3, 3, 3, 2, act=nn.Sigmoid), (X,), 2.0 * Y, split=3, options=l2),
        Problem("tanh_6", chain(2, 2, 2, 2, 2, 2, 1, act=nn.Tanh), (A,), B, split=6, options=light),
        Problem("logistic_regression", chain(3, 3, act=None), (X,), CLASSES, F.cross_entropy, options=light),
        Problem("tanh_3_classes", chain(3, 2, 2, 3, act=nn.Tanh), (normal(1, 6, 3),), CLASSES, F.cross_entropy, 3, l2),
        Problem("residual", _double(Skip), (normal(7, 6, 3),), normal(8, 6, 2), split=3, options=heavy),
        Problem("tied", _double(Tied), (X,), Y, split=3, options=l2),
        Problem("features_mean", tanh2, (X,), Y, split=2, options=l2 | {"features": "mean"}),
        _logistic_map(),
        Problem(
            "pendulum", _double(Pendulum), (normal(4, 3, 2),), pendulum, SUM, _after("cells", 4),
            {"reduction": "sum"},
        ),
        Problem(
            "tube", tanh2, (X,), Y, split=2, exact=False,
            options=l2 | {"transform": lc.Softshrink(epsilon=0.05)},
        ),
        Problem(
            "abs_tube", tanh2, (X,), Y, split=2, exact=False,
            options=l2 | {"transform": lc.AbsTube(epsilon=0.05)},
        ),
        Problem(
            "norm_tube", tanh2, (X,), Y, split=2, exact=False,
            options=l2 | {"transform": lc.NormTube(epsilon=0.2, order=2), "multiplier": example},
        ),
        Problem(
            "penalty", tanh2, (X,), Y, split=2, exact=False, options=l2 | {"multiplier": None, "weight": STIFF},
        ),
        Problem(
            "bounded_states", tanh2, (X,), Y, split=2, exact=False,
            options=l2 | {"domain": lc.Range(lower=-0.3, upper=0.3)},
        ),
        Problem(
            "nonnegative_states", chain(3, 3, 2, act=nn.Tanh, seed=2), (X,), Y, split=2, exact=False,
            options=l2 | {"domain": lc.NonNegative(by="project"), "multiplier": None, "weight": SOFT},
        ),
        Problem(
            "state_estimation", _double(Filter), (normal(6, 2, 2),), normal(7, 2, 5, scale=0.5), SUM,
            _after("cells", 4), {"reduction": "sum", "frozen": ("*",), "transform": lc.Softshrink(epsilon=0.1),
            "regularisers": (lc.Regulariser(kind="l2", on="states", weight=0.1),)}, exact=False,
        ),
        Problem(
            "input_estimation", tanh2, (X,), Y, split=2, exact=False,
            options={"frozen": ("*",), "inputs": {"input_1": lc.InputFormulation(lower=-1.0, upper=1.0)},
            "regularisers": (lc.Regulariser(kind="l2", on="states", weight=0.1),)},
        ),
    ]  # fmt: skip


ZOO: dict[str, Problem] = {p.name: p for p in _problems()}

RATES: dict[str, Rates] = {
    "ridge": Rates(0.5, 0.1, 0.1, steps=100),
    "linear_2": Rates(0.31, 0.41, 2.3, steps=220),
    "tanh_2": Rates(0.48, 0.19, 0.28, steps=220),
    "tanh_3_sum": Rates(0.55, 0.97, 0.22, rho=0.25, steps=320),
    "softplus_2": Rates(0.23, 0.11, 0.25, rho=1.4, steps=450),
    "sigmoid_3": Rates(0.4, 0.12, 10.0, rho=4.0, steps=230),
    "tanh_6": Rates(0.21, 0.05, 0.84, steps=1200),
    "logistic_regression": Rates(1.5, 0.1, 0.1, steps=150),
    "tanh_3_classes": Rates(0.7, 0.3, 0.5, steps=320),
    "residual": Rates(0.2, 0.2, 0.5, steps=700),
    "tied": Rates(0.46, 0.23, 0.48, rho=0.5, steps=400),
    "features_mean": Rates(0.49, 0.22, 2.2, steps=240),
    "logistic_map": Rates(0.16, 0.21, 1.6, steps=100),
    "pendulum": Rates(0.21, 0.1, 2.3, rho=2.0, steps=120),
    "penalty": Rates(0.15, 0.05, 0.1, steps=500, momentum=0.8),
    "bounded_states": Rates(0.52, 0.23, 1.2, rho=0.5, steps=200),
    "nonnegative_states": Rates(0.31, 0.25, 0.1, steps=600),
    "tube": Rates(0.53, 0.18, 1.0, rho=0.5, steps=400),
    "abs_tube": Rates(0.53, 0.18, 1.0, rho=0.5, steps=400),
    "norm_tube": Rates(0.34, 0.1, 4.5, rho=1.0, steps=800),
    "state_estimation": Rates(0.1, 0.13, 3.2, rho=4.0, steps=150),
    "input_estimation": Rates(0.1, 4.0, 0.28, rho=0.25, steps=500),
}
"""Step sizes by problem: every program of the zoo has one.

In tubes rho is an `AugmentedWeight`. With the papers' form lambda G(r) + (rho/2) |r|^2 no method could agree in
multipliers: at the edge of a tube G'(r) jumps from 0 to 1, so that every multiplier beyond the exact one gives a saddle
point as well (an exact penalty), and constant steps chatter across the edge.
"""
