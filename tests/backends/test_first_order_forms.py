"""What the forms of constraints, multipliers and weights do to the steps of first-order methods, in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812

import lagcompile as lc
from lagcompile.backends.first_order import FirstOrderExecutor
from lagcompile.runtime.adjoint import dual_sweep
from tests.backends.hand import data, executor, lifted, net


def test_lin_eps_is_softshrink_and_abs_gives_monotone_multipliers() -> None:
    from lagcompile.runtime.transforms import behaviour

    r = torch.linspace(-2, 2, 41, dtype=torch.float64).reshape(1, 1, -1)
    lin_eps = r.clamp_min(0.4) - (-r).clamp_min(0.4)
    torch.testing.assert_close(behaviour(lc.Softshrink(epsilon=0.4)).value(r), lin_eps, rtol=0, atol=1e-15)
    runs = executor(lc.DescentAscent(multipliers=lc.SGD(lr=0.5)), transform=lc.Abs())
    last = runs.values()[1]
    for t in range(12):
        runs.step(torch.arange(t, t + 20))
        now = runs.values()[1]
        assert all((now[n] >= last[n]).all() for n in now)
        last = now
    assert all(v.max() > 0 for v in last.values())


def test_norm_tube_gives_one_number_for_each_example() -> None:
    from lagcompile.runtime.transforms import behaviour

    r = torch.randn(1, 4, 7, dtype=torch.float64)
    found = behaviour(lc.NormTube(epsilon=2.0, order=1)).value(r)
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


DOMAINS = [lc.Free(), lc.NonNegative(by="softplus"), lc.NonNegative(by="project"), lc.Range(lower=0.25, upper=0.5)]


@pytest.mark.parametrize("start", [lc.Zeros(), lc.UnitSphere()], ids=lambda s: s.kind)
@pytest.mark.parametrize("domain", DOMAINS, ids=lambda d: d.text)
def test_a_start_is_the_value_it_says_or_the_closest_that_the_domain_has(start: Any, domain: Any) -> None:
    values, free = (
        executor(lc.Extragradient(), start=start, domain=d, weight=lc.ConstantWeight(value=1.0)).values()[0]["h1"]
        for d in (domain, lc.Free())
    )
    torch.testing.assert_close(values, free.clamp(*domain.bounds), rtol=0, atol=1e-3)


def test_zeros_are_the_same_in_tables_and_in_batches() -> None:
    starts = []
    for storage in (lc.Table(), lc.Transient()):
        runs = executor(
            lc.Extragradient(),
            storage=storage,
            start=lc.Zeros(),
            domain=lc.NonNegative(by="softplus"),
            weight=lc.ConstantWeight(value=1.0),
        )
        assert isinstance(runs, FirstOrderExecutor)
        runs.store.begin(runs.instance.batch(torch.arange(5)), 0)
        starts.append(runs.store.values()[0])
    torch.testing.assert_close(*starts)
