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
    first, *problems, head, place, last = caught.value.problems
    assert first == "Depends cannot be captured; every front end failed:"
    assert len(problems) == 2
    assert all(re.search(r"test_errors\.py:\d+: if h\.sum\(\) > 0:", p) for p in problems)
    assert [p.split(":")[0] for p in problems] == ["torch.fx", "torch.export"]
    assert head == "What its forward does that a graph cannot hold:"
    assert re.fullmatch(
        r".*test_errors\.py:\d+: `if h\.sum\(\) > 0:` decides by the value of a tensor: use torch\.where, or a mask",
        place,
    )
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
            "separate operations",
            p,
        )
        for p in caught.value.problems
    )


class Container:
    """What no compiler can take apart."""

    __slots__ = ("value",)

    def __init__(self, value: Tensor) -> None:
        self.value = value


class Many(nn.Module):
    """Everything at once."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.b = Depends(), nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Container:
        h = self.inner(x)
        while h.norm() > 1:
            h = h / 2
        h = h * float(h.max())
        h = torch.stack([self.b(row) for row in h])
        h = torch.from_numpy(h.detach().numpy())
        return Container(h[: int(h.argmax()) + 1])


def test_every_problem_is_in_one_report() -> None:
    """Tracing stops at the first line, the report names all."""
    model = Many()
    before = torch.get_rng_state()
    with pytest.raises(lc.LiftError) as caught:
        lc.lift(model, (X,))
    assert torch.equal(before, torch.get_rng_state())
    problems = caught.value.problems
    met = [re.sub(r"^.*test_errors\.py:\d+: ", "", p) for p in problems[problems.index(_HEAD) + 1 : -1]]
    assert met == [
        "`if h.sum() > 0:` decides by the value of a tensor: use torch.where, or a mask",
        "`while h.norm() > 1:` decides by the value of a tensor: use torch.where, or a mask",
        "`h = h * float(h.max())` makes a Python number of a tensor: keep the tensor",
        "`h = torch.stack([self.b(row) for row in h])` loops over a tensor: call the function on all of it, or unbind "
        "an axis of fixed size",
        "`h = torch.from_numpy(h.detach().numpy())` leaves PyTorch for NumPy: use the torch function",
        "`return Container(h[: int(h.argmax()) + 1])` makes a Python number of a tensor: keep the tensor",
        "the model returns an object of class Container, which cannot be taken apart: return tensors, tuples, "
        "dictionaries or dataclasses",
    ]


_HEAD = "What its forward does that a graph cannot hold:"


def test_sparse_inputs() -> None:
    with pytest.raises(lc.LiftError) as caught:
        lc.lift(nn.Linear(5, 2), (X.to_sparse(),))
    assert caught.value.problems == ("the input 'input' is sparse, and states are dense: give input.to_dense()",)


def test_a_split_that_is_none() -> None:
    with pytest.raises(lc.SpecError) as caught:
        lc.lift(nn.Linear(5, 2), (X,), split={"policy": "balanced", "stage": 3})
    assert caught.value.problems == (
        "split: required key 'stages' is missing (expected a positive integer)",
        "split.stage: unknown key, did you mean 'stages'? Allowed here: policy, stages",
    )
    with pytest.raises(lc.SplitError, match=r"a number of stages, a mapping, a path or a policy, got 2\.5"):
        lc.lift(nn.Linear(5, 2), (X,), split=2.5)  # type: ignore[arg-type]


def test_names_and_cuts_are_reported_together() -> None:
    model = nn.Sequential(nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, 3))
    with pytest.raises(lc.SplitError) as caught:
        lc.lift(model, (X,), split=lc.AtSplit(after=("9", "1", "2"), before=("0",)))
    assert caught.value.problems == (
        "the model has no module and no graph node named '9' that a cut could use: it has 0, 1, 2",
        "the breakpoint before 0 separates nothing: no stage would be left on one side of it",
        "the breakpoint after 2 separates nothing: no stage would be left on one side of it",
    )
