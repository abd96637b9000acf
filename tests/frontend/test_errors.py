"""What cannot be captured is said at once: the module, the user's line, and what to change."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lagcompile as lc

X = torch.randn(4, 5)


class Depends(nn.Module):
    """Control flow on values, in the model's own forward."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(5, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.a(x))
        if h.sum() > 0:
            h = -h
        return self.b(h)


def test_data_dependent_control_flow() -> None:
    with pytest.raises(lc.LiftError) as caught:
        lc.lift(Depends(), (X,))
    first, *problems, last = caught.value.problems
    assert first == "Depends cannot be captured; every front end failed:"
    assert len(problems) == 2
    assert all(re.search(r"test_errors\.py:\d+: if h\.sum\(\) > 0:", p) for p in problems)
    assert [p.split(":")[0] for p in problems] == ["torch.fx", "torch.export"]
    assert last == (
        "Change the lines named above to tensor operations, or move them into a sub-module that is kept whole"
    )


def test_control_flow_in_a_sub_module_is_kept_whole() -> None:
    model = nn.Sequential(nn.Linear(5, 5), Depends(), nn.Linear(3, 2))
    lifted = lc.lift(model, (X,), split=lc.AtSplit(after=("0", "1")))
    assert lifted.receipt is not None
    assert [path for path, _ in lifted.receipt.whole] == ["1"]
    assert lifted.verify(X, torch.zeros(4, 2), loss=nn.functional.mse_loss).ok


def test_a_model_that_does_not_run() -> None:
    with pytest.raises(lc.LiftError, match="the model does not run on the example inputs: mat1 and mat2 shapes"):
        lc.lift(nn.Linear(4, 2), (X,))


def test_inputs_that_do_not_fit() -> None:
    with pytest.raises(lc.LiftError, match="the example inputs do not fit the model's forward: too many positional"):
        lc.lift(nn.Linear(5, 2), (X, X, X))
    with pytest.raises(lc.LiftError, match=r"lift takes a torch\.nn\.Module, got function"):
        lc.lift(torch.nn.functional.relu)  # type: ignore[arg-type]


def test_without_inputs_export_cannot_help() -> None:
    with pytest.raises(
        lc.LiftError, match=r"cannot be traced by torch\.fx.*Give example_inputs, so that torch\.export"
    ):
        lc.lift(Depends())


class Replaced(nn.Module):
    """Other outputs in train mode than in eval mode, by operations that replace each other."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(5, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Any:
        h = torch.tanh(self.a(x))
        return (torch.sigmoid(h), self.b(h)) if self.training else torch.cos(h)


def test_outputs_that_one_mode_replaces() -> None:
    with pytest.raises(lc.LiftError) as caught:
        lc.lift(Replaced(), (X,))
    assert any(
        re.search(
            r"returns 2 tensors in train mode and 1 in eval mode, and computes them by different operations "
            r"\(.*test_errors\.py:\d+\): return the same structure in both modes, or compute the additional outputs in "
            "operations of their own",
            p,
        )
        for p in caught.value.problems
    )
