"""Mixed-integer programs of ReLU networks: global optima against a grid, refusals, what is proven and what is not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lagcompile as lc
from lagcompile.backends.mip import MixedInteger
from tests.problems import chain, normal

BOX = {"x": lc.InputFormulation(lower=-2.0, upper=2.0)}


class Change(nn.Module):
    """Passes the input on, so that the loss can see how far it has moved."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x, self.net(x)


def largest_change(output: tuple[Tensor, Tensor], target: Tensor) -> Tensor:
    return (output[0] - target).abs().amax()


def second_score(output: tuple[Tensor, Tensor], target: Tensor) -> Tensor:
    return output[1][:, 1].sum()


def lead_of_the_second_class(scores: Tensor) -> Tensor:
    return scores[:, 1] - scores[:, 0]


def _lifted(net: nn.Module, split: int = 2, **options: Any) -> lc.Lifted:
    start = torch.zeros(1, 2, dtype=torch.float64)
    formulation = lc.Formulation(**{"frozen": ("*",), "inputs": BOX, **options})
    return lc.lift(Change(net), (start,), split, formulation)


def _grid(count: int = 801) -> Tensor:
    line = torch.linspace(-2.0, 2.0, count, dtype=torch.float64)
    return torch.cartesian_prod(line, line)


ACTIVATIONS = [nn.ReLU, nn.Hardtanh, nn.ReLU6, lambda: nn.LeakyReLU(0.2)]


@pytest.mark.parametrize("act", ACTIVATIONS, ids=["relu", "hardtanh", "relu6", "leaky"])
@pytest.mark.parametrize("split", [1, 3])
def test_the_smallest_output_is_that_of_a_grid(act: Any, split: int) -> None:
    net = chain(2, 6, 6, 2, act=act, seed=3)().requires_grad_(False)
    lifted = _lifted(net, split)
    x0 = torch.zeros(1, 2, dtype=torch.float64)
    solution = lifted.solve((x0, x0), loss=second_score, method=MixedInteger())
    assert solution.status is lc.Status.SOLVED, solution.details
    assert solution.details["facts"][0].startswith("global optimum: no input within the bounds gives less than")
    best = float(net(_grid())[:, 1].min())
    found = float(net(solution.details["inputs"]["x"])[0, 1])
    assert found == pytest.approx(solution.details["objective"], abs=1e-7)
    assert found <= best + 1e-9
    assert found >= best - 0.02
    for name, value in solution.states.items():
        assert name.startswith("h")
        assert bool(torch.isfinite(value).all())


@pytest.mark.parametrize("tighten", [False, True])
def test_the_smallest_adversarial_change(tighten: bool) -> None:
    net = chain(2, 8, 8, 2, act=nn.ReLU, seed=6)().requires_grad_(False)
    x0 = torch.tensor([[0.3, -0.4]], dtype=torch.float64)
    scores = net(x0)
    assert float(scores[0, 1]) > float(scores[0, 0])
    flipped = lc.ValueConstraint(
        name="flipped", reads=("net_4",), function=f"{__name__}:lead_of_the_second_class", relation="<="
    )
    solution = _lifted(net, constraints=(flipped,)).solve(
        (x0, x0), loss=largest_change, method=MixedInteger(tighten=tighten)
    )
    grid = _grid()
    over = net(grid)
    flips = grid[over[:, 1] <= over[:, 0]]
    assert len(flips)
    best = float((flips - x0).abs().amax(1).min())
    assert solution.status is lc.Status.SOLVED
    moved = solution.details["inputs"]["x"]
    after = net(moved)
    assert float(after[0, 1]) <= float(after[0, 0]) + 1e-7
    assert float((moved - x0).abs().max()) == pytest.approx(solution.details["objective"], abs=1e-9)
    assert solution.details["objective"] <= best + 1e-7
    assert solution.details["objective"] >= best - 0.01


def test_about_a_hundred_relus() -> None:
    torch.manual_seed(0)
    net = chain(4, 48, 48, 2, act=nn.ReLU, seed=1)().requires_grad_(False)
    x0 = normal(2, 1, 4, scale=0.3)
    close = {"x": lc.InputFormulation(lower=-0.3, upper=0.3)}
    lifted = lc.lift(Change(net), (x0,), 2, lc.Formulation(frozen=("*",), inputs=close))
    solution = lifted.solve((x0, x0), loss=second_score, method=MixedInteger(time_limit=60))
    assert solution.status is lc.Status.SOLVED
    assert solution.details["relus"] == 96
    sampled = net(torch.rand(20_000, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 0.6 - 0.3)[
        :, 1
    ]
    assert solution.details["objective"] <= float(sampled.min()) + 1e-9


@pytest.mark.parametrize(
    ("options", "act", "message"),
    [
        ({"frozen": ()}, nn.ReLU, "the weight net.0.weight moves: freeze it"),
        ({"inputs": {"x": lc.InputFormulation(lower=0.0)}}, nn.ReLU, "the input x needs a lower and an upper bound"),
        ({}, nn.Tanh, "module net.1: tanh is not piecewise linear"),
        ({"transform": lc.Softshrink(epsilon=0.1)}, nn.ReLU, "'c_h1' is not an equality"),
    ],
    ids=["weights", "bounds", "tanh", "tube"],
)
def test_what_is_no_mixed_integer_program_is_refused(options: dict[str, Any], act: Any, message: str) -> None:
    lifted = _lifted(chain(2, 4, 2, act=act)(), **options)
    x0 = torch.zeros(1, 2, dtype=torch.float64)
    with pytest.raises(lc.ProgramError, match=message):
        lifted.solve((x0, x0), loss=second_score, method=MixedInteger())


def test_too_many_binaries_are_refused_with_the_number() -> None:
    lifted = _lifted(chain(2, 8, 2, act=nn.ReLU)())
    x0 = torch.zeros(1, 2, dtype=torch.float64)
    with pytest.raises(lc.ProgramError, match="ReLUs may switch within the inputs' bounds, more than 2"):
        lifted.solve((x0, x0), loss=second_score, method=MixedInteger(largest=2))
