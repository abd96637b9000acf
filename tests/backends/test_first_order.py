"""First-order methods against hand-written loops, and what their executors promise, in float64."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

import lagcompile as lc
from lagcompile.backends.base import Rows
from lagcompile.backends.first_order import FirstOrder
from lagcompile.runtime.steps import ExtraRows
from tests.backends.hand import (
    RHO,
    HandAdagrad,
    HandAdam,
    HandLagrangian,
    HandRule,
    HandSGD,
    data,
    executor,
    net,
)

RULES: dict[str, tuple[Callable[[float], Any], Callable[[float], HandRule]]] = {
    "sgd": (lambda lr: lc.SGD(lr=lr), HandSGD),
    "adagrad": (lambda lr: lc.Adagrad(lr=lr), HandAdagrad),
    "adam": (lambda lr: lc.Adam(lr=lr), HandAdam),
}
METHODS: dict[str, Callable[..., FirstOrder]] = {
    "extragradient": lc.Extragradient,
    "past": lc.ExtragradientFromPast,
    "optimistic": lc.OptimisticGradient,
    "descent": lc.DescentAscent,
}
Group = dict[str, Tensor]


def by_hand(scheme: str, make: Callable[[float], HandRule], steps: list[Tensor]) -> HandLagrangian:
    """The same method on the same batches, without lagcompile."""
    L = HandLagrangian()
    rules = {"w": make(0.05), "h": make(0.04), "l": make(0.03)}
    past: dict[str, Group] = {}

    def advance(groups: dict[str, Group], gradients: dict[str, Group], rows: Tensor, use: Any) -> dict[str, Group]:
        moved: dict[str, Group] = {}
        for g, group in groups.items():
            sign = -1.0 if g == "l" else 1.0
            index = None if g == "w" else rows
            moved[g] = {n: use[g](n, v, sign * gradients[g][n], index) for n, v in group.items()}
        return moved

    def at(groups: dict[str, Group], rows: Tensor) -> dict[str, Group]:
        return dict(zip("whl", L.gradients(groups["w"], groups["h"], groups["l"], rows), strict=True))

    for rows in steps:
        here = {
            "w": L.weights,
            "h": {n: t[rows] for n, t in L.states.items()},
            "l": {n: t[rows] for n, t in L.duals.items()},
        }
        if scheme == "extragradient":
            ahead = advance(here, at(here, rows), rows, rules)
            gradients = at(ahead, rows)
        elif scheme == "past":
            before = {
                g: {n: past[g][n] if g == "w" else past[g][n][rows] for n in group} if past else _zeros(group)
                for g, group in here.items()
            }
            gradients = at(advance(here, before, rows, copy.deepcopy(rules)), rows)
            _remember(past, gradients, rows)
        elif scheme == "optimistic":
            now = at(here, rows)
            before = {
                g: {n: past[g][n] if g == "w" else past[g][n][rows] for n in group} if past else _zeros(group)
                for g, group in here.items()
            }
            gradients = {g: {n: 2 * v - before[g][n] for n, v in group.items()} for g, group in now.items()}
            _remember(past, now, rows)
        else:
            gradients = at(here, rows)
        there = advance(here, gradients, rows, rules)
        L.weights = there["w"]
        for n, t in there["h"].items():
            L.states[n][rows] = t
        for n, t in there["l"].items():
            L.duals[n][rows] = t
    return L


def _zeros(group: Group) -> Group:
    return {n: torch.zeros_like(t) for n, t in group.items()}


def _remember(past: dict[str, Group], gradients: dict[str, Group], rows: Tensor) -> None:
    for g, group in gradients.items():
        for n, t in group.items():
            if g == "w":
                past.setdefault(g, {})[n] = t
            else:
                table = past.setdefault(g, {}).setdefault(n, torch.zeros((50, *t.shape[1:]), dtype=t.dtype))
                table[rows] = t


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("scheme", METHODS)
def test_steps_equal_a_hand_written_loop(scheme: str, rule: str) -> None:
    mine, theirs = RULES[rule]
    method = METHODS[scheme](weights=mine(0.05), states=mine(0.04), multipliers=mine(0.03))
    runs = executor(method, weight={"kind": "constant", "value": RHO})
    rows = Rows(50, 16, seed=3)
    steps = [rows.at(t) for t in range(9)]
    for r in steps:
        runs.step(r)
    L = by_hand(scheme, theirs, steps)
    weights = runs.instance.recover(net()).state_dict()
    states, duals = runs.values()
    assert set(states) == set(L.states)
    assert set(duals) == set(L.duals)
    for found, expected in ((weights, L.weights), (states, L.states), (duals, L.duals)):
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, rtol=1e-12, atol=1e-12, msg=f"{scheme} {rule} {name}")


@pytest.mark.parametrize(("scheme", "evaluations"), [("extragradient", 2), ("past", 1), ("optimistic", 1)])
def test_gradient_evaluations_are_counted(scheme: str, evaluations: int) -> None:
    runs = executor(METHODS[scheme]())
    runs.step(torch.arange(8))
    assert runs.gradient_evaluations == evaluations


# ---------------------------------------------------------------- the bilinear game
def play(scheme: Any, steps: int = 400) -> float:
    """Distance from the solution of min_x max_y x y after some steps from (1, 1)."""
    x, y = (torch.ones(1, dtype=torch.float64).requires_grad_() for _ in range(2))
    players = [lc.Extra([x], lc.SGD(lr=0.3), scheme), lc.Extra([y], lc.SGD(lr=0.3), scheme)]

    def gradients() -> None:
        gx, gy = torch.autograd.grad(x * y, [x, y])
        x.grad, y.grad = gx, -gy

    for _ in range(steps):
        gradients()
        if scheme in {"extragradient", "past"}:
            for p in players:
                p.extrapolate()
            gradients()
        for p in players:
            p.step()
    return float((x * x + y * y).detach().sqrt())


def test_extragradient_solves_the_bilinear_game_on_which_descent_ascent_diverges() -> None:
    assert play("extragradient") < 1e-6
    assert play("past") < 1e-6
    assert play("optimistic") < 1e-6
    assert play("descent", 100) > 10.0


# ---------------------------------------------------------------- masks, buffers, rows
class Noisy(nn.Module):
    """Dropout and batch normalisation, and a record of what dropout let through."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 5)
        self.norm = nn.BatchNorm1d(5)
        self.drop = nn.Dropout(0.5)
        self.last = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(self.drop(self.norm(self.first(x)))))


@pytest.mark.parametrize("inner_steps", [0, 2])
@pytest.mark.parametrize("method", [lc.Extragradient, lc.ExtragradientFromPast, lc.DescentAscent])
def test_statistics_move_once_a_step(method: Callable[..., FirstOrder], inner_steps: int) -> None:
    torch.manual_seed(0)
    model = Noisy().double()
    x, y = data()
    instance = lc.lift(model, x[:8], split={"policy": "at", "after": ["norm"]}).bind((x, y), loss=F.cross_entropy)
    frozen = lc.SGD(lr=0.0)
    runs = method(weights=frozen, states=frozen, multipliers=frozen, inner_steps=inner_steps).executor(instance)
    runs.step(torch.arange(16))
    moved = runs.instance.module.state_dict()
    assert int(moved["norm.num_batches_tracked"]) == 1
    z = F.linear(x[:16], model.first.weight, model.first.bias).detach()
    torch.testing.assert_close(moved["norm.running_mean"], 0.1 * z.mean(0), rtol=1e-12, atol=1e-12)


def test_both_half_steps_share_the_dropout_mask() -> None:
    torch.manual_seed(0)
    x, y = data()
    instance = lc.lift(Noisy().double(), x[:8], split={"policy": "at", "after": ["norm"]}).bind(
        (x, y), loss=F.cross_entropy
    )
    runs = lc.Extragradient().executor(instance)
    masks: list[Tensor] = []
    drops = [m for m in instance.network.capture.original.modules() if isinstance(m, nn.Dropout)]
    assert len(drops) == 1
    drops[0].register_forward_hook(lambda _m, _i, out: masks.append(out.detach() == 0))
    runs.step(torch.arange(16))
    runs.step(torch.arange(16))
    assert len(masks) == 4
    assert torch.equal(masks[0], masks[1])
    assert torch.equal(masks[2], masks[3])
    assert not torch.equal(masks[0], masks[2])


def test_tables_move_in_the_rows_of_the_batch_only() -> None:
    runs = executor(lc.Extragradient(multipliers=lc.Adam(lr=0.1)))
    before = [{n: t.clone() for n, t in group.items()} for group in runs.values()]
    rows = torch.tensor([3, 11, 40])
    for _ in range(3):
        runs.step(rows)
    others = torch.tensor([i for i in range(50) if i not in rows.tolist()])
    for group, old in zip(runs.values(), before, strict=True):
        for name, value in group.items():
            assert torch.equal(value[others], old[name][others])
            assert not torch.equal(value[rows], old[name][rows])
    for name in ("states", "multipliers"):
        optimizer = runs.optimizers[name]
        assert isinstance(optimizer, ExtraRows)
        for slots in optimizer.state.values():
            for slot in slots.values():
                assert not slot[:, others].any()


# ---------------------------------------------------------------- checkpoints
@pytest.mark.parametrize("scheme", METHODS)
@pytest.mark.parametrize("storage", [lc.Table(), lc.Table(dtype="bfloat16"), lc.Transient()])
def test_a_resumed_run_is_the_unbroken_run_bit_for_bit(scheme: str, storage: Any) -> None:
    method = METHODS[scheme](weights=lc.Adam(lr=0.01), states=lc.Adagrad(lr=0.05), multipliers=lc.Adam(lr=0.01))
    rows = Rows(50, 16, seed=3)
    unbroken, first, second = (executor(method, storage=storage) for _ in range(3))
    for t in range(11):
        unbroken.step(rows.at(t))
    for t in range(5):
        first.step(rows.at(t))
    second.load_state_dict(first.state_dict())
    assert second.steps == 5
    for t in range(5, 11):
        second.step(rows.at(t))
    for a, b in zip(unbroken.values(), second.values(), strict=True):
        assert all(torch.equal(a[n], b[n]) for n in a)
    a, b = unbroken.instance.module.state_dict(), second.instance.module.state_dict()
    assert all(torch.equal(a[n], b[n]) for n in a)
    assert unbroken.gradient_evaluations == second.gradient_evaluations


def test_looking_at_the_end_does_not_change_the_run() -> None:
    options = {"storage": lc.ClassGaussian(samples=3, noise="fresh"), "classes": 3}
    looked, blind = (executor(lc.Extragradient(), **options) for _ in range(2))
    for runs in (looked, blind):
        for t in range(3):
            runs.step(torch.arange(t, t + 16))
    looked.final_measures()
    for runs in (looked, blind):
        runs.step(torch.arange(20))
    a, b = looked.values()[0], blind.values()[0]
    assert all(torch.equal(a[n], b[n]) for n in a)


def test_half_precision_tables_keep_float32_accumulators_over_a_checkpoint() -> None:
    runs = executor(lc.Extragradient(states=lc.Adagrad(lr=0.05)), storage=lc.Table(dtype="bfloat16"))
    runs.step(torch.arange(20))
    other = executor(lc.Extragradient(states=lc.Adagrad(lr=0.05)), storage=lc.Table(dtype="bfloat16"))
    other.load_state_dict(runs.state_dict())
    optimizer = other.optimizers["states"]
    assert isinstance(optimizer, ExtraRows)
    assert optimizer.tables[0].dtype == torch.bfloat16
    assert all(s["sum"].dtype == torch.float32 for s in optimizer.state.values())
