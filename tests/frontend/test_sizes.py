"""Sizes in a forward: what hangs on the number of examples holds for every number."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lagcompile as lc

X = torch.linspace(-1.0, 1.0, 24).reshape(4, 6)


class Sized(nn.Module):
    """Gives numbers that hang on the batch beside a tensor made by its length; counts, where it `counts`."""

    calls: Tensor

    def __init__(self, counts: bool) -> None:
        super().__init__()
        self.a, self.counts = nn.Linear(6, 6), counts
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> dict[str, Any]:
        """An output for each way to ask."""
        if self.counts and self.training:  # torch.fx cannot trace this
            self.calls += 1
        h = torch.tanh(self.a(x))
        out = torch.zeros(len(h), 6)
        out[:, :3] = self.a(h)[:, :3]
        return {
            "out": out / len(x),
            "rows": len(h),
            "twice": 2 * x.shape[0],
            "half": x.shape[0] / 2,
            "width": len(h[0]),
        }


@pytest.mark.parametrize("counts", [False, True])
def test_lengths_and_sizes_are_of_the_batch_that_is_given(counts: bool) -> None:
    torch.manual_seed(0)
    model = Sized(counts)
    lifted = lc.lift(model, (X,), split=2)
    assert lifted.receipt is not None
    assert lifted.receipt.batch == "dynamic"
    for size in (1, 4, 7):
        x = torch.randn(size, 6)
        expected, got = model(x), lifted(x)
        assert torch.allclose(got.pop("out"), expected.pop("out"), atol=1e-6)
        assert got == expected
    target = torch.zeros(4)

    def loss(output: dict[str, Any], target: Tensor) -> Tensor:
        value: Tensor = (output["out"] - target[:, None]).square().mean()
        return value

    assert lifted.verify(X, target, loss=loss).ok
    assert lifted.solve((X, target), loss=loss, options=lc.RunOptions(steps=2)).status is lc.Status.STEPS_DONE


class Selects(nn.Module):
    """Rows that a mask picks: how many depends on the values."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        mask = x > 0.5
        picked = torch.tanh(self.a(x)[mask])
        output: Tensor = self.b(torch.masked_scatter(self.a(x), mask, picked))
        return output


@pytest.mark.parametrize("seed", range(4))
def test_a_value_with_as_many_rows_as_a_mask_picks_is_no_state(seed: int) -> None:
    torch.manual_seed(seed)
    x = torch.randn(4, 4)
    with pytest.raises(
        lc.SplitError, match=r"float32\[\?\] and cannot be a state: how many rows it has depends on values"
    ):
        lc.lift(Selects(), x, split=lc.AtSplit(after=("node:tanh",)))
    lifted = lc.lift(Selects(), x, split=2)
    x, y = torch.randn(6, 4), torch.randn(6, 2)
    assert lifted.verify(x, y, loss=nn.functional.mse_loss).ok
    solution = lifted.solve((x, y), loss=nn.functional.mse_loss, options=lc.RunOptions(steps=2))
    assert solution.status in (lc.Status.STEPS_DONE, lc.Status.WORSE)
