"""Which examples a run sees, told from the weights: each visit of an example moves a weight that no other reads."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import lagcompile as lc

EXAMPLES, BATCH = 23, 5
STEPS = 5
"""Of one epoch: four full batches and one of three."""


def visits(steps: int, seed: int = 0) -> Tensor:
    """How often each example was seen."""
    model = nn.Embedding(EXAMPLES, 1, dtype=torch.float64)
    nn.init.zeros_(model.weight)
    x = torch.arange(EXAMPLES)
    solution = lc.lift(model, x[:4], split=1).solve(
        (x, torch.zeros(EXAMPLES, 1)),
        loss=lambda output, target: (output - target.to(output) * 0).sum(),
        method=lc.Backprop(weights=lc.SGD(lr=1.0)),
        options=lc.RunOptions(steps=steps, batch_size=BATCH, seed=seed, look_every=1000),
    )
    return -solution.model.weight.detach()[:, 0]


def test_an_epoch_sees_each_example_once() -> None:
    for epochs in (1, 2, 3):
        assert visits(epochs * STEPS).tolist() == [epochs] * EXAMPLES
    assert visits(1).sum() == BATCH
    assert visits(STEPS - 1).sum() == (STEPS - 1) * BATCH  # the short batch is the last


def test_each_epoch_has_an_order_of_its_own() -> None:
    first = visits(1)
    second = visits(STEPS + 1) - visits(STEPS)
    third = visits(2 * STEPS + 1) - visits(2 * STEPS)
    assert first.sum() == second.sum() == third.sum() == BATCH
    assert not torch.equal(first, second)
    assert not torch.equal(second, third)


def test_the_order_depends_on_the_seed_alone() -> None:
    torch.manual_seed(1)
    first = visits(2)
    torch.manual_seed(2)
    assert torch.equal(visits(2), first)
    assert not torch.equal(visits(2, seed=1), first)


@pytest.mark.parametrize("method", [lc.Backprop(), lc.Extragradient()], ids=["backprop", "extragradient"])
def test_random_numbers_of_a_run_depend_on_its_seed_alone(method: lc.Method) -> None:
    x, y = torch.randn(12, 4), torch.randn(12, 2)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.Tanh(), nn.Linear(8, 2))

    def weights(before: int, seed: int) -> Tensor:
        torch.manual_seed(before)
        state = torch.get_rng_state()
        solution = lc.lift(model, x[:4], split=2).solve(
            (x, y), loss=nn.functional.mse_loss, method=method, options=lc.RunOptions(steps=7, batch_size=4, seed=seed)
        )
        assert torch.equal(torch.get_rng_state(), state)
        return torch.cat([p.detach().flatten() for p in solution.model.parameters()])

    assert torch.equal(weights(1, seed=0), weights(2, seed=0))
    assert not torch.equal(weights(1, seed=0), weights(1, seed=3))
