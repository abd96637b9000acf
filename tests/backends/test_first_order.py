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
from lagcompile.backends.first_order import FirstOrder, FirstOrderExecutor
from lagcompile.runtime.adjoint import dual_sweep
from lagcompile.runtime.steps import ExtraRows
from tests.backends.hand import RHO, HandAdagrad, HandAdam, HandLagrangian, HandRule, HandSGD, data, lifted, net

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


def executor(method: FirstOrder, **options: Any) -> FirstOrderExecutor:
    instance = lifted(**options).bind(data(), loss=F.cross_entropy)
    return method.executor(instance)


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


# ---------------------------------------------------------------- transforms, layouts, signs
def test_lin_eps_is_softshrink_and_abs_gives_monotone_multipliers() -> None:
    from lagcompile.runtime import kkt

    r = torch.linspace(-2, 2, 41, dtype=torch.float64).reshape(1, 1, -1)
    lin_eps = r.clamp_min(0.4) - (-r).clamp_min(0.4)
    torch.testing.assert_close(kkt.transformed(r, lc.Softshrink(epsilon=0.4)), lin_eps, rtol=0, atol=1e-15)
    runs = executor(lc.DescentAscent(multipliers=lc.SGD(lr=0.5)), transform=lc.Abs())
    last = runs.values()[1]
    for t in range(12):
        runs.step(torch.arange(t, t + 20))
        now = runs.values()[1]
        assert all((now[n] >= last[n]).all() for n in now)
        last = now
    assert all(v.max() > 0 for v in last.values())


def test_norm_tube_gives_one_number_for_each_example() -> None:
    from lagcompile.runtime import kkt

    r = torch.randn(1, 4, 7, dtype=torch.float64)
    found = kkt.transformed(r, lc.NormTube(epsilon=2.0, order=1))
    expected = (r.abs().sum(-1, keepdim=True) - 2.0).clamp_min(0)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    runs = executor(
        lc.DescentAscent(multipliers=lc.SGD(lr=1.0)),
        transform=lc.NormTube(epsilon=0.5),
        multiplier=lc.MultiplierOptions(layout="example"),
    )
    for _ in range(5):
        runs.step(torch.arange(50))
    assert {n: tuple(v.shape) for n, v in runs.values()[1].items()} == {"lambda1": (50, 1), "lambda2": (50, 1)}


LAYOUTS = {"full": (50, 5), "example": (50, 1), "class": (3, 5), "scalar": (1, 1)}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_one_ascent_step_of_every_layout(layout: str) -> None:
    """From zero multipliers and moved states, one step of rate 1 is the defect reduced to the layout."""
    method = lc.DescentAscent(weights=lc.SGD(lr=0.0), states=lc.SGD(lr=0.0), multipliers=lc.SGD(lr=1.0))
    runs = executor(method, start=lc.Zeros(), multiplier={"layout": layout}, classes=3)
    x, y = data()
    rows = torch.arange(7, 29)
    runs.step(rows)
    found = runs.values()[1]["lambda1"]
    assert tuple(found.shape) == LAYOUTS[layout]
    with torch.no_grad():
        r = nn.Sequential(*list(net())[:2])(x[rows])
    if layout == "full":
        torch.testing.assert_close(found[rows], r, rtol=1e-12, atol=1e-12)
    elif layout == "example":
        torch.testing.assert_close(found[rows], r.sum(1, keepdim=True), rtol=1e-12, atol=1e-12)
    elif layout == "class":
        expected = torch.stack([r[y[rows] == c].mean(0) for c in range(3)])
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    else:
        torch.testing.assert_close(found, r.sum(1).mean().reshape(1, 1), rtol=1e-12, atol=1e-12)


def test_multipliers_of_inequalities_stay_nonnegative() -> None:
    whole = lifted(start=lc.Zeros())
    constraints = tuple(c.model_copy(update={"relation": "<="}) for c in whole.program.defects)
    program = whole.program.model_copy(update={"constraints": constraints})
    from lagcompile.runtime.instance import Instance

    x, y = data()
    instance = Instance(program, whole.network, ([x], y), loss=F.cross_entropy)
    still = lc.SGD(lr=0.0)
    runs = lc.Extragradient(weights=still, states=still, multipliers=lc.SGD(lr=1.0)).executor(instance)
    for _ in range(3):
        runs.step(torch.arange(50))
    duals = runs.values()[1]["lambda1"]
    with torch.no_grad():
        negative = nn.Sequential(*list(net())[:2])(x) < 0
    assert (duals >= 0).all()
    assert (duals > 0).any()
    assert (duals[negative] == 0).all()


def test_transient_states_with_adjoint_multipliers_give_backprops_weight_gradient() -> None:
    model, (x, y) = net(), data()
    rows = torch.arange(10, 34)
    method = lc.DescentAscent(weights=lc.SGD(lr=1.0))
    runs = executor(method, storage=lc.Transient(), multiplier={"start": "adjoint"})
    runs.step(rows)
    F.cross_entropy(model(x[rows]), y[rows]).backward()
    moved = runs.instance.recover(net()).state_dict()
    for name, p in model.named_parameters():
        assert p.grad is not None
        torch.testing.assert_close(moved[name], p.detach() - p.grad, rtol=1e-12, atol=1e-12)


def test_the_exact_sweep_sets_multipliers_to_backprops_adjoints() -> None:
    runs = executor(lc.DescentAscent(dual_sweep=True, weights=lc.SGD(lr=0.0), states=lc.SGD(lr=0.0)))
    batch = runs.instance.batch(torch.arange(50))
    values, _ = runs.instance.forward(batch)
    runs.step(torch.arange(50))
    for found, expected in zip(runs.store.multipliers, dual_sweep(runs.instance, batch, values), strict=True):
        assert found is not None
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_the_quadratic_weight_follows_its_schedule() -> None:
    runs = executor(lc.DescentAscent(), weight=lc.GeometricWeight(start=0.5, factor=2.0, every=2, maximum=3.0))
    seen = []
    for _ in range(8):
        runs.step(torch.arange(10))
        seen.append(runs.store.rho[0])
    assert seen == [0.5, 0.5, 1.0, 1.0, 2.0, 2.0, 3.0, 3.0]
    linear = executor(lc.DescentAscent(), weight=lc.LinearWeight(start=0.1, increment=0.2, maximum=0.4))
    seen = []
    for _ in range(3):
        linear.step(torch.arange(10))
        seen.append(round(linear.store.rho[0], 12))
    assert seen == [0.1, 0.3, 0.4]


def test_states_that_could_never_move_are_refused() -> None:
    with pytest.raises(lc.ProgramError, match=r"h1 starts from zeros, where relu has no slope.*by: project"):
        executor(lc.Extragradient(), start=lc.Zeros(), domain=lc.NonNegative(by="relu"))


@pytest.mark.parametrize("forget", [False, True])
def test_inner_steps_run_stages_that_read_data_alone_once(forget: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(forget: bool) -> tuple[FirstOrderExecutor, int]:
        calls: list[int] = []
        found = executor(lc.Extragradient(inner_steps=3))
        first = found.instance._calls[0]

        def counted(*inputs: Any) -> Any:
            calls.append(1)
            return first(*inputs)

        found.instance._calls[0] = counted
        if forget:
            monkeypatch.setattr("lagcompile.runtime.instance._reads_only", lambda unit, values: False)
        found.step(torch.arange(6))
        return found, len(calls)

    found, calls = run(forget)
    assert calls == (2 * (3 + 1) if forget else 1 + 2)
    plain, _ = run(True)
    for mine, other in zip(found.values(), plain.values(), strict=True):
        assert mine.keys() == other.keys()
        for name, value in other.items():
            torch.testing.assert_close(mine[name], value, rtol=0, atol=0)
