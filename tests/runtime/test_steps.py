"""Step rules as torch optimisers: hand-computed moves, schedulers, checkpoints, copies, half-precision tables."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from torch import Tensor

import lagcompile as lc
from lagcompile.ir.base import SpecError
from lagcompile.runtime.rules import Rule, Scheme
from lagcompile.runtime.steps import Extra, ExtraRows

RULES: list[Rule] = [lc.SGD(lr=0.1), lc.SGD(lr=0.1, momentum=0.9), lc.Adagrad(lr=0.1), lc.Adam(lr=0.1)]


def _torch_twin(rule: Rule, p: Tensor) -> torch.optim.Optimizer:
    if isinstance(rule, lc.SGD):
        return torch.optim.SGD([p], lr=rule.lr, momentum=rule.momentum)
    if isinstance(rule, lc.Adagrad):
        return torch.optim.Adagrad([p], lr=rule.lr)
    return torch.optim.Adam([p], lr=rule.lr)


@pytest.mark.parametrize("rule", RULES, ids=lambda r: f"{r.kind}{getattr(r, 'momentum', '')}")
def test_without_extrapolation_they_are_torchs_rules(rule: Rule) -> None:
    start = torch.randn(3, 4, dtype=torch.float64)
    ours, theirs = start.clone().requires_grad_(), start.clone().requires_grad_()
    table = start.clone().reshape(1, 3, 4)
    mine, twin = lc.Extra([ours], rule, "descent"), _torch_twin(rule, theirs)
    rows = ExtraRows([table], rule, "descent")
    for step in range(5):
        gradient = torch.sin(torch.arange(12, dtype=torch.float64) + step).reshape(3, 4)
        ours.grad, theirs.grad = gradient.clone(), gradient.clone()
        mine.step()
        twin.step()
        rows.take([None])
        rows.update([gradient.reshape(1, 3, 4)])
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(table[0], theirs.detach(), rtol=1e-12, atol=1e-12)


def test_weight_decay_is_decoupled_as_in_adamw() -> None:
    start = torch.randn(3, 4, dtype=torch.float64)
    ours, theirs = start.clone().requires_grad_(), start.clone().requires_grad_()
    rule = lc.Adam(lr=0.1, weight_decay=0.5)
    mine, twin = lc.Extra([ours], rule, "descent"), torch.optim.AdamW([theirs], lr=0.1, weight_decay=0.5)
    for step in range(5):
        gradient = torch.sin(torch.arange(12, dtype=torch.float64) + step).reshape(3, 4)
        ours.grad, theirs.grad = gradient.clone(), gradient.clone()
        mine.step()
        twin.step()
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("rule", RULES, ids=lambda r: f"{r.kind}{getattr(r, 'momentum', '')}")
@pytest.mark.parametrize("ascent", [False, True])
def test_weight_decay_shrinks_whichever_way_the_gradient_leads(rule: Rule, ascent: bool) -> None:
    plain, decayed = torch.ones(1, 2, 2), torch.ones(1, 2, 2)
    for table, r in ((plain, rule), (decayed, rule.model_copy(update={"weight_decay": 2.0}))):
        optimizer = ExtraRows([table], r, "descent", ascent=ascent)
        optimizer.take([None])
        optimizer.update([torch.ones(1, 2, 2)])
    torch.testing.assert_close(decayed, plain - rule.lr * 2.0)


def test_the_second_half_step_decays_from_the_remembered_values() -> None:
    x = torch.ones(1, dtype=torch.float64).requires_grad_()
    optimizer = lc.Extra([x], lc.SGD(lr=0.25, weight_decay=1.0))
    x.grad = torch.ones(1, dtype=torch.float64)
    optimizer.extrapolate()
    assert x.item() == 0.75 - 0.25
    x.grad = torch.zeros(1, dtype=torch.float64)
    optimizer.step()
    assert x.item() == 0.75


def test_a_decay_that_would_turn_signs_is_refused() -> None:
    with pytest.raises(SpecError, match=r"lr \* weight_decay = 3: a move would turn the sign .* at most 1/lr = 1"):
        lc.SGD(lr=1.0, weight_decay=3.0)
    for wrong in (-1.0, float("inf"), float("nan")):
        with pytest.raises(SpecError, match="weight_decay"):
            lc.Adam(lr=1e-3, weight_decay=wrong)


def _saddle(scheme: Scheme, steps: int, lr: float = 0.3) -> float:
    """Distance from the saddle point of x * y after some steps."""
    x, y = (torch.ones(1, dtype=torch.float64).requires_grad_() for _ in range(2))
    optimizers = [lc.Extra([x], lc.SGD(lr=lr), scheme), lc.Extra([y], lc.SGD(lr=lr), scheme)]

    def gradients() -> None:
        x.grad, y.grad = y.detach().clone(), -x.detach().clone()

    for _ in range(steps):
        gradients()
        for o in optimizers:
            o.extrapolate()
        gradients()
        for o in optimizers:
            o.step()
    return float(torch.cat([x, y]).detach().norm())


def test_extrapolation_converges_where_descent_ascent_diverges() -> None:
    start = 2**0.5
    assert _saddle("descent", 100) > 10 * start
    for scheme in ("extragradient", "past", "optimistic"):
        assert _saddle(scheme, 200) < 1e-2 * start, scheme


def test_extragradient_by_hand() -> None:
    # one step on x * y from (1, 1) with lr a: x' = 1 - a, y' = 1 + a; x1 = 1 - a y', y1 = 1 + a x'
    x, y = (torch.ones(1, dtype=torch.float64).requires_grad_() for _ in range(2))
    optimizers = [lc.Extra([x], lc.SGD(lr=0.25)), lc.Extra([y], lc.SGD(lr=0.25))]
    x.grad, y.grad = y.detach().clone(), -x.detach().clone()
    for o in optimizers:
        o.extrapolate()
    assert (x.item(), y.item()) == (0.75, 1.25)
    x.grad, y.grad = y.detach().clone(), -x.detach().clone()
    for o in optimizers:
        o.step()
    assert (x.item(), y.item()) == (1 - 0.25 * 1.25, 1 + 0.25 * 0.75)


def test_only_the_batch_rows_move() -> None:
    table = torch.randn(2, 6, 3)
    before = table.clone()
    optimizer = ExtraRows([table], lc.Adagrad(lr=0.1))
    rows = torch.tensor([4, 1])
    taken = optimizer.take([rows])
    assert torch.equal(taken[0], before[:, rows])
    ahead = optimizer.extrapolated([torch.ones(2, 2, 3)])
    assert not torch.equal(ahead[0], taken[0])
    assert torch.equal(table, before)
    optimizer.update([torch.ones(2, 2, 3)])
    others = [0, 2, 3, 5]
    assert torch.equal(table[:, others], before[:, others])
    assert bool((table[:, rows] != before[:, rows]).all())
    total = optimizer.state[table]["sum"]
    assert float(total[:, others].abs().max()) == 0
    assert float(total[:, rows].min()) == 2  # both half steps count


def test_ascent_climbs() -> None:
    down, up = torch.zeros(1, 2, 2), torch.zeros(1, 2, 2)
    for rule in RULES:
        for table, ascent in ((down, False), (up, True)):
            optimizer = ExtraRows([table], rule, "descent", ascent=ascent)
            optimizer.take([None])
            optimizer.update([torch.ones(1, 2, 2)])
        torch.testing.assert_close(up, -down)


@pytest.mark.parametrize("rule", RULES, ids=lambda r: f"{r.kind}{getattr(r, 'momentum', '')}")
def test_checkpoints_between_half_steps(rule: Rule) -> None:
    def gradient(step: int) -> Tensor:
        return torch.cos(torch.arange(4, dtype=torch.float64) + step)

    def half(optimizer: lc.Extra, p: Tensor, number: int) -> None:
        p.grad = gradient(number)
        if number % 2 == 0:
            optimizer.extrapolate()
        else:
            optimizer.step()

    p = torch.zeros(4, dtype=torch.float64).requires_grad_()
    optimizer = lc.Extra([p], rule)
    for number in range(3):
        half(optimizer, p, number)
    buffer = io.BytesIO()
    torch.save((p.detach(), optimizer.state_dict()), buffer)
    buffer.seek(0)
    value, state = torch.load(buffer)
    q = value.clone().requires_grad_()
    resumed = lc.Extra([q], rule)
    resumed.load_state_dict(state)
    for number in range(3, 6):
        half(optimizer, p, number)
        half(resumed, q, number)
    assert torch.equal(p, q)


def test_half_precision_tables_keep_exact_accumulators() -> None:
    table = torch.zeros(1, 4, 2, dtype=torch.bfloat16)
    optimizer = ExtraRows([table], lc.Adagrad(lr=0.1))
    assert optimizer.state[table]["sum"].dtype == torch.float32
    values = optimizer.take([None], [torch.float32])
    assert values[0].dtype == torch.float32
    optimizer.update([torch.full((1, 4, 2), 1e-3)])
    again = ExtraRows([table.clone()], lc.Adagrad(lr=0.1))
    again.load_state_dict(optimizer.state_dict())
    (slots,) = again.state.values()
    assert slots["sum"].dtype == torch.float32
    assert torch.equal(slots["sum"], optimizer.state[table]["sum"])


@pytest.mark.parametrize("rule", RULES, ids=lambda r: f"{r.kind}{getattr(r, 'momentum', '')}")
def test_half_precision_weights_move_as_float32_ones_do(rule: Rule) -> None:
    half = torch.linspace(-1, 1, 12).reshape(3, 4).bfloat16().requires_grad_()
    whole = half.detach().float().requires_grad_()
    optimizers = [Extra([p], rule) for p in (half, whole)]
    for _ in range(3):
        for p, optimizer in zip((half, whole), optimizers, strict=True):
            p.grad = torch.full_like(p, 0.5)
            optimizer.extrapolate()
            optimizer.step()
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.detach().float(), whole.detach(), rtol=2e-2, atol=2e-2)


def test_schedulers_pickles_and_copies() -> None:
    p = torch.zeros(2).requires_grad_()
    optimizer = lc.Extra([p], lc.Adam(lr=1.0))
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    p.grad = torch.ones(2)
    optimizer.extrapolate()
    optimizer.step()
    scheduler.step()
    assert optimizer.param_groups[0]["lr"] == 0.5
    for twin in (pickle.loads(pickle.dumps(optimizer)), copy.deepcopy(optimizer)):
        assert isinstance(twin, lc.Extra)
        assert twin.rule == optimizer.rule
        assert twin.param_groups[0]["lr"] == 0.5
        (parameter,) = twin.param_groups[0]["params"]
        parameter.grad = torch.ones(2)
        twin.step()
    rows = ExtraRows([torch.zeros(1, 3, 2)], lc.SGD(lr=1.0))
    assert isinstance(pickle.loads(pickle.dumps(rows)), ExtraRows)
    assert isinstance(copy.deepcopy(rows), ExtraRows)


def test_a_table_does_not_step_by_itself() -> None:
    with pytest.raises(lc.BindError, match="a table moves by rows: call take, extrapolated and update"):
        ExtraRows([torch.zeros(1, 3, 2)], lc.SGD(lr=1.0)).step()
