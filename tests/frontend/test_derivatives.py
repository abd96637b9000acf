"""Models whose forward takes derivatives, or maps a function over examples: lifted, cut and certified like others."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as functional
from torch import Tensor, nn
from torch.func import functional_call, grad, hessian, jacrev, stack_module_state, vmap

import lagcompile as lc
from tests.frontend.sameness import right_or_refused

X = torch.linspace(-1.0, 1.0, 24).reshape(12, 2)


def _net(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(inputs, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, outputs))


def _slope(value: Tensor, of: Tensor, **options: Any) -> Tensor:
    return torch.autograd.grad(value, of, torch.ones_like(value), create_graph=True, **options)[0]


class Burgers(nn.Module):
    """A physics-informed network: it returns what the equation leaves over."""

    def __init__(self) -> None:
        super().__init__()
        self.net, self.viscosity = _net(2, 1), nn.Parameter(torch.tensor(0.1))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = x.requires_grad_(True)
        u = self.net(x)
        first = _slope(u, x)
        second = _slope(first[:, :1], x)[:, :1]
        return u, first[:, 1:] + u * first[:, :1] - self.viscosity * second


class Forces(nn.Module):
    """Energies of particles and their forces."""

    def __init__(self) -> None:
        super().__init__()
        self.net = _net(1, 1)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        places = x.view(-1, 2, 1) * torch.ones(1, 1, 2)
        places.requires_grad_(True)
        apart = (places[:, :, None] - places[:, None]).square().sum(-1, keepdim=True)
        energy = self.net(apart).sum((1, 2, 3))
        return {"energy": energy, "forces": -_slope(energy, places)}


class Inside(nn.Module):
    """Gradients are asked for in a block, so that the model runs without them, too."""

    def __init__(self) -> None:
        super().__init__()
        self.net, self.head = _net(2, 1), nn.Linear(3, 1)

    def forward(self, x: Tensor) -> Tensor:
        with torch.enable_grad():
            x = x.clone().requires_grad_(True)
            u = self.net(x)
            slope = _slope(u.sum(), x)
        return self.head(torch.cat([u, slope], 1))


class CutOff(Burgers):
    """What it stops must have no gradient in the graph either."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        u, rest = super().forward(x)
        with torch.no_grad():
            teacher = self.net(x).tanh()
        fixed = torch.autograd.grad(u.sum(), x, retain_graph=True)[0]
        return u * rest.detach(), rest * fixed[:, :1] + teacher


class Adapted(nn.Module):
    """One step of descent on each task, and the prediction behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.net = _net(1, 1)

    def forward(self, x: Tensor) -> Tensor:
        weights: dict[str, Tensor] = dict(self.net.named_parameters())

        def loss(w: dict[str, Tensor], a: Tensor, b: Tensor) -> Tensor:
            return functional.mse_loss(functional_call(self.net, w, (a,)), b)

        def task(row: Tensor) -> Tensor:
            steps = grad(loss)(weights, row[:1], row[1:])
            return functional_call(self.net, {n: w - 0.1 * steps[n] for n, w in weights.items()}, (row[1:],))

        return vmap(task)(x)


class Penalised(nn.Module):
    """A critic and its gradient penalty at random points."""

    def __init__(self) -> None:
        super().__init__()
        self.critic = _net(2, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        share = torch.rand(x.size(0), 1)
        between = (share * x + (1 - share) * x.flip(0)).requires_grad_(True)
        slope = _slope(self.critic(between), between)
        return self.critic(x), (slope.norm(2, 1) - 1).square()


class Laplacian(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = _net(2, 1)

    def forward(self, x: Tensor) -> Tensor:
        curvature = vmap(hessian(lambda z: self.net(z).squeeze()))(x)
        return curvature.diagonal(dim1=-2, dim2=-1).sum(-1)


class Ensemble(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.base, self.members = nn.Linear(2, 4), nn.ModuleList(nn.Linear(4, 3) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.base(x))
        weights, _ = stack_module_state(list(self.members))
        return vmap(lambda w: functional_call(self.members[0], w, (h,)))(weights).mean(0)


class Jacobian(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = _net(2, 3)

    def forward(self, x: Tensor) -> Tensor:
        return vmap(jacrev(self.net))(x).sum(-1)


class Rows(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = _net(2, 3)

    def forward(self, x: Tensor) -> Tensor:
        return vmap(self.net)(x)


KINDS = [Burgers, Forces, Inside, CutOff, Adapted, Penalised, Jacobian, Rows]


@pytest.mark.parametrize("kind", KINDS)
def test_derivatives_in_the_forward_are_the_models(kind: type[nn.Module]) -> None:
    torch.manual_seed(0)
    assert right_or_refused(kind(), X, split=3, sizes=(1, 5), tolerance=2e-3, changes=(lambda x: x, lambda x: -x)) == ""


@pytest.mark.parametrize("kind", [Burgers, Adapted])
def test_derivatives_in_the_forward_are_cut_solved_and_certified(kind: type[nn.Module]) -> None:
    def loss(output: Any, target: Tensor) -> Tensor:
        return sum(((v.flatten(1).mean(1) - target) ** 2).mean() for v in ([output] if kind is Adapted else output))

    torch.manual_seed(0)
    y = torch.linspace(0.0, 1.0, 12)
    lifted = lc.lift(kind(), X, split=3)
    assert len(lifted.stages) == 3
    assert lifted.verify(X, y, loss=loss).ok
    solution = lifted.solve((X, y), loss=loss, options=lc.RunOptions(steps=3))
    assert solution.certificate is not None
    assert solution.certificate.ok


def test_a_model_that_takes_derivatives_and_decides_by_values_is_refused_by_its_line() -> None:
    class Decides(Burgers):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            u, rest = super().forward(x)
            if rest.sum() > 0:
                u = -u
            return u, rest

    with pytest.raises(lc.LiftError, match=r"`if rest.sum\(\) > 0:` decides by the value of a tensor"):
        lc.lift(Decides(), X, split=2)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch scripts its own rules of forward derivatives
def test_what_is_captured_for_one_batch_size_says_so() -> None:
    lifted = lc.lift(model := Laplacian(), X, split=2)
    assert torch.allclose(lifted(X), model(X), atol=1e-5)
    with pytest.raises(lc.BindError, match="captured for batches of 12 only"):
        lifted(X[:5])
