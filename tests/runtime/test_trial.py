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
    bound(lambda output, target: 1e-14 * output.sum(), "sum")


def test_what_fails_or_is_no_number_is_said() -> None:
    with pytest.raises(lc.BindError, match="the model or the loss fails on the first 2 examples: "):
        bound(F.mse_loss, "mean")
    with pytest.raises(lc.BindError, match=r"one number for a batch, it gave \(2,\)"):
        bound(functools.partial(F.cross_entropy, reduction="none"), "mean")


@pytest.mark.parametrize(
    "loss",
    [
        lambda output, target: output.sum() * 0.0,
        lambda output, target: torch.ones(()),
        lambda output, target: MEAN(output.detach(), target),
        lambda output, target: (output.argmax(1) != target).float().mean(),
    ],
    ids=["times zero", "a number", "detached", "wrong answers"],
)
@pytest.mark.parametrize("method", [None, lc.SQP(), lc.Backprop()], ids=["extragradient", "sqp", "backprop"])
def test_a_loss_that_nothing_could_lower_is_refused_before_it_starts(
    loss: Callable[[Tensor, Tensor], Tensor], method: lc.Method | None
) -> None:
    lifted = lc.lift(nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3)), X[:4], split=2)
    with pytest.raises(lc.BindError, match="the loss takes no gradient from the model's output: it is constant, or"):
        lifted.solve((X, Y), loss=loss, method=method)


def test_a_start_that_cannot_be_better_is_no_loss_without_a_gradient() -> None:
    model = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3))
    with torch.no_grad():
        target = model(X)
    solution = lc.lift(model, X[:4], split=2).solve((X, target), loss=F.mse_loss, options=lc.RunOptions(steps=2))
    assert solution.status is not lc.Status.DIVERGED


def test_a_loss_that_is_nan_on_every_row_is_refused_and_one_that_leaves_rows_out_is_not() -> None:
    lifted = lc.lift(nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3)), X[:4], split=2)
    options = lc.RunOptions(steps=2)
    with pytest.raises(lc.BindError, match=r"NaN\) on each of the 8 examples looked at: each target is -100, which"):
        lifted.solve((X, torch.full((8,), -100)), loss=MEAN, options=options)
    with pytest.raises(lc.BindError, match=r"NaN\) on each of the 8 examples looked at: look for a logarithm"):
        lifted.solve((X, Y), loss=lambda out, y: MEAN(out, y) + (-out.square().sum()).log(), options=options)
    padded = torch.where(torch.arange(8) < 6, -100, Y)
    assert lifted.solve((X, padded), loss=MEAN, options=options).status is lc.Status.STEPS_DONE


def test_a_loss_of_another_shape_or_type_is_named_and_one_that_writes_into_the_output_runs() -> None:
    for wrong, said in [
        (lambda out, y: MEAN(out, y).reshape(1, 1), r"it gave \(1, 1\)"),
        (lambda out, y: MEAN(out, y).to(torch.complex64), "it gave a number of type torch.complex64"),
    ]:
        with pytest.raises(lc.BindError, match=f"one number for a batch, {said}"):
            bound(wrong, "mean")
    bound(lambda out, y: MEAN(out.mul_(2.0), y), "mean")


@pytest.mark.parametrize("seed", [-5, 2**62, 1 - 2**63, 2**63 - 1])
def test_any_seed_of_64_bits_is_one(seed: int) -> None:
    lifted = lc.lift(nn.Sequential(nn.Linear(5, 6), nn.Dropout(0.1), nn.Linear(6, 3)), X[:4], split=2)
    options = lc.RunOptions(steps=3, batch_size=4, seed=seed)
    assert lifted.solve((X, Y), loss=MEAN, options=options).steps == 3


def test_a_method_that_is_none_is_said() -> None:
    lifted = lc.lift(nn.Sequential(nn.Linear(5, 6), nn.Linear(6, 3)), X[:4], split=2)
    with pytest.raises(lc.SpecError, match=r"method takes an object such as lagcompile.Extragradient\(\), got 'sqp'"):
        lifted.solve((X, Y), loss=MEAN, method="sqp")  # type: ignore[arg-type]


def normalised() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 3))


@pytest.mark.parametrize("method", [lc.Extragradient(), lc.Backprop()], ids=lambda m: m.kind)
def test_a_short_last_batch_on_which_the_model_fails_is_named(method: lc.Method) -> None:
    x, y = torch.randn(9, 4), torch.randn(9, 3)
    lifted = lc.lift(normalised(), (x[:3],), split=2)
    mse = nn.functional.mse_loss
    with pytest.raises(lc.BindError, match=r"a batch of 1 of the 9 examples: Expected more than 1.*batch_size"):
        lifted.solve((x, y), loss=mse, method=method, options=lc.RunOptions(steps=3, batch_size=4))
    ahead = lc.RunOptions(steps=2, batch_size=4)  # ends before the short one
    assert lifted.solve((x, y), loss=mse, method=method, options=ahead).status is lc.Status.STEPS_DONE
    larger = lc.RunOptions(steps=3, batch_size=64)
    assert lifted.solve((x, y), loss=mse, method=method, options=larger).status is lc.Status.STEPS_DONE


def test_one_example_that_normalisation_cannot_take_is_named() -> None:
    lifted = lc.lift(normalised(), (torch.randn(3, 4),), split=2)
    with pytest.raises(lc.BindError, match="the first 1 examples: Expected more than 1 value"):
        lifted.solve((torch.randn(1, 4), torch.randn(1, 3)), loss=nn.functional.mse_loss)


def test_tables_start_although_one_row_is_left_over() -> None:
    x, y = torch.randn(513, 4), torch.randn(513, 3)
    lifted = lc.lift(normalised(), (x[:3],), split=2)
    solution = lifted.solve((x, y), loss=nn.functional.mse_loss, options=lc.RunOptions(steps=2, batch_size=27))
    assert solution.states["h1"].shape == (513, 4)


@pytest.mark.parametrize("wrong", [7, -1])
def test_classes_that_the_model_does_not_have_are_named(wrong: int) -> None:
    x, y = torch.randn(30, 4), torch.zeros(30, dtype=torch.int64)
    y[17] = wrong
    lifted = lc.lift(normalised(), (x[:3],), split=2)
    with pytest.raises(lc.BindError, match=f"example 17, whose target holds {wrong}"):
        lifted.solve((x, y), loss=nn.functional.cross_entropy)


def test_classes_that_the_loss_ignores_are_none_of_ours() -> None:
    x, y = torch.randn(30, 4), torch.zeros(30, dtype=torch.int64)
    y[17] = -100
    lifted = lc.lift(normalised(), (x[:3],), split=2)
    solution = lifted.solve((x, y), loss=nn.functional.cross_entropy, options=lc.RunOptions(steps=2, batch_size=15))
    assert solution.status is lc.Status.STEPS_DONE


def test_words_that_an_embedding_does_not_have_are_named() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(10, 4), nn.Flatten(), nn.Linear(20, 4), nn.Tanh(), nn.Linear(4, 3))
    x, y = torch.randint(0, 10, (30, 5)), torch.randn(30, 3)
    lifted = lc.lift(model, (x[:3],), split=2)
    assert lifted.solve((x, y), loss=nn.functional.mse_loss, options=lc.RunOptions(steps=2)).states
    x[11, 3] = 10
    with pytest.raises(lc.BindError, match=r"example 11, whose input.* holds 10: index out of range"):
        lifted.solve((x, y), loss=nn.functional.mse_loss)


def test_inputs_of_another_shape_or_type_are_named() -> None:
    model = normalised()
    lifted = lc.lift(model, (torch.randn(3, 4),), split=2)
    mse = nn.functional.mse_loss
    for x, what in ((torch.randn(8, 5), r"has the shape \[8, 5\]"), (torch.ones(8, 4).int(), "holds int32 numbers")):
        with pytest.raises(lc.BindError, match=f"the input 'input_1' {what}, but the model was lifted with"):
            lifted.solve((x, torch.randn(8, 3)), loss=mse)


def test_a_loss_that_fails_is_named_by_verify() -> None:
    lifted = lc.lift(normalised(), (torch.randn(3, 4),), split=2)
    x = torch.randn(8, 4)
    with pytest.raises(lc.BindError, match="the loss fails on the model's output"):
        lifted.verify(x, torch.randn(7, 3, 3), loss=nn.functional.mse_loss)
    with pytest.raises(lc.BindError, match="one number for a batch"):
        lifted.verify(x, None, loss=lambda out, _: out)
    with pytest.raises(lc.BindError, match="the model fails on the inputs"):
        lifted.verify(torch.randn(8, 9), None, loss=lambda out, _: out.mean())
