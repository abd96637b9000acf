"""What is tried before a run starts: the forward pass, the loss, and how the loss reduces over examples."""

from __future__ import annotations

import functools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

import lagcompile as lc

X, Y = torch.randn(8, 5, generator=torch.Generator().manual_seed(0)), torch.arange(8) % 3
MEAN, SUM = F.cross_entropy, functools.partial(F.cross_entropy, reduction="sum")


def bound(loss: Callable[[Tensor, Tensor], Tensor], reduction: str, rows: int = 8) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3))
    lifted = lc.lift(model, X[:4], split=2, formulation=lc.Formulation(reduction=reduction))
    lifted.bind((X[:rows], Y[:rows]), loss=loss)


def test_a_loss_that_reduces_otherwise_than_the_formulation_is_refused() -> None:
    bound(MEAN, "mean")
    bound(SUM, "sum")
    with pytest.raises(lc.ProgramError) as caught:
        bound(MEAN, "sum")
    assert str(caught.value) == (
        "the loss is a mean over examples, but the formulation says 'reduction: sum': defects would weigh more than "
        "the loss by the batch size; write 'reduction: mean', or give a loss that is a sum"
    )
    with pytest.raises(lc.ProgramError, match=r"the loss is a sum .* says 'reduction: mean': defects would weigh less"):
        bound(SUM, "mean")


def test_where_rows_that_stand_twice_do_not_tell_nothing_is_said() -> None:
    bound(SUM, "mean", rows=1)
    bound(lambda output, target: output.square().sum().sqrt(), "mean")
    bound(lambda output, target: 0.0 * output.sum(), "sum")


def test_what_fails_or_is_no_number_is_said() -> None:
    with pytest.raises(lc.BindError, match="the model or the loss fails on the first 2 examples: "):
        bound(F.mse_loss, "mean")
    with pytest.raises(lc.BindError, match=r"one number for a batch, it gave \(2,\)"):
        bound(functools.partial(F.cross_entropy, reduction="none"), "mean")


def test_a_method_that_is_none_is_said() -> None:
    lifted = lc.lift(nn.Sequential(nn.Linear(5, 6), nn.Linear(6, 3)), X[:4], split=2)
    with pytest.raises(lc.SpecError, match=r"method takes an object such as lagcompile.Extragradient\(\), got 'sqp'"):
        lifted.solve((X, Y), loss=MEAN, method="sqp")  # type: ignore[arg-type]
