"""Local Propagation and ExtraProp: what their formulations say, in steps by hand, and that they learn."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

import lagcompile as lc
from lagcompile.backends.first_order import FirstOrder, FirstOrderExecutor
from lagcompile.workbench.data import digits
from lagcompile.workbench.models import DigitsConvNet
from tests.backends.hand import CUT, data, net

TRANSFORMS: dict[str, Any] = {
    "lin": {"kind": "identity"},
    "abs": {"kind": "abs"},
    "squared": {"kind": "squared"},
    "lin_eps": {"kind": "softshrink", "epsilon": 0.05},
    "abs_eps": {"kind": "abs_tube", "epsilon": 0.05},
}


def by_formula(kind: str, a: Tensor) -> Tensor:
    """G as Local Propagation's code writes it."""
    if kind == "lin":
        return a
    if kind == "abs":
        return a.abs()
    if kind == "squared":
        return a**2
    if kind == "lin_eps":
        return torch.relu(a - 0.05) - torch.relu(-a - 0.05)
    return torch.relu(a.abs() - 0.05)


def executor(method: FirstOrder, **options: Any) -> FirstOrderExecutor:
    loss = partial(F.cross_entropy, reduction=options.get("reduction", "mean"))
    formulation = lc.Formulation.model_validate(options)
    lifted = lc.lift(net(), data()[0][:4], split=CUT, formulation=formulation)
    return method.executor(lifted.bind(data(), loss=loss))


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("features", ["mean", "sum"])
@pytest.mark.parametrize("layout", ["full", "example"])
@pytest.mark.parametrize("kind", TRANSFORMS)
def test_two_simultaneous_steps_by_hand(kind: str, layout: str, features: str, reduction: str) -> None:
    rates = {"weights": 0.05, "states": 0.4, "multipliers": 0.3}
    method = lc.DescentAscent(**{n: lc.SGD(lr=lr) for n, lr in rates.items()})
    runs = executor(
        method,
        start={"kind": "zeros"},
        domain={"kind": "activation"},
        transform=TRANSFORMS[kind],
        multiplier={"layout": layout},
        features=features,
        reduction=reduction,
    )
    rows = torch.arange(6, 22)
    model, (x, y) = net(), data()
    x, y = x[rows], y[rows]
    h = [torch.zeros(16, 5, dtype=torch.float64), torch.zeros(16, 6, dtype=torch.float64)]
    duals = [torch.zeros_like(t if layout == "full" else t[:, :1]) for t in h]
    parameters = list(model.parameters())
    c = 1 / 16 if reduction == "mean" else 1.0
    for _ in range(2):
        runs.step(rows)
        leaves = [t.clone().requires_grad_() for t in h]
        r = [torch.tanh(model[0](x)) - leaves[0], torch.tanh(model[2](leaves[0])) - leaves[1]]
        shares = [1 / 5, 1 / 6] if features == "mean" else [1.0, 1.0]
        g = [by_formula(kind, e) * s for e, s in zip(r, shares, strict=True)]
        value = F.cross_entropy(model[4](leaves[1]), y, reduction=reduction)
        value = value + c * sum((d * e).sum() for d, e in zip(duals, g, strict=True))
        found = torch.autograd.grad(value, [*leaves, *parameters])
        # states stay in the range of tanh; their gradients, and those of multipliers, are of one example
        h = [(t - 0.4 * d / c).clamp(-1, 1) for t, d in zip(h, found[:2], strict=True)]
        rise = [e.detach() if layout == "full" else e.detach().sum(1, keepdim=True) for e in g]
        duals = [d + 0.3 * e for d, e in zip(duals, rise, strict=True)]
        with torch.no_grad():
            for p, d in zip(parameters, found[2:], strict=True):
                p.sub_(0.05 * d)
    states, multipliers = runs.values()
    for k in (1, 2):
        torch.testing.assert_close(states[f"h{k}"][rows], h[k - 1], rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(multipliers[f"lambda{k}"][rows], duals[k - 1], rtol=1e-12, atol=1e-12)
    for name, value in runs.instance.recover(net()).state_dict().items():
        torch.testing.assert_close(value, model.state_dict()[name], rtol=1e-12, atol=1e-12)


def test_states_stay_in_the_range_of_their_activation() -> None:
    runs = executor(lc.DescentAscent(states=lc.SGD(lr=50.0)), start={"kind": "zeros"}, domain={"kind": "activation"})
    for t in range(5):
        runs.step(torch.arange(t, t + 20))
    for value in runs.values()[0].values():
        assert value.abs().max() == 1.0


def test_one_value_for_all_examples_is_refused_where_there_are_examples() -> None:
    with pytest.raises(lc.ProgramError, match=r"after _1 \(1\) has a batch axis.*write 'storage: \{kind: table\}'"):
        executor(lc.DescentAscent(), storage={"kind": "shared"})


def test_a_pattern_of_frozen_weights_that_names_none_is_said() -> None:
    with pytest.raises(
        lc.ProgramError, match=r"frozen: no weight is called 'fc\*' \(weights: 0.weight, 0.bias, 2.weight"
    ):
        executor(lc.DescentAscent(), frozen=["0.*", "fc*"])


def test_a_tied_weight_is_frozen_by_each_of_its_names() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    for name in ("0.weight", "1.weight"):
        program = lc.lift(model, torch.randn(3, 4), split=2, formulation=lc.Formulation(frozen=(name,))).program
        assert {w.name: w.trainable for w in program.weights} == {"0.weight": False, "0.bias": True, "1.bias": True}


@pytest.mark.parametrize("build", [lc.Range, lc.InputFormulation])
def test_bounds_that_hold_nothing_are_refused(build: Any) -> None:
    assert build(lower=1.0, upper=1.0).lower == 1.0
    with pytest.raises(lc.SpecError, match=r"lower \(1\) must not be above upper \(-1\)"):
        build(lower=1.0, upper=-1.0)


def test_inside_the_tube_nothing_is_coupled() -> None:
    """G' = 0 inside: the hidden weights, and the multipliers, stay where they are."""
    wide = {"kind": "softshrink", "epsilon": 50.0}
    runs = executor(lc.DescentAscent(multipliers=lc.SGD(lr=1.0)), transform=wide)
    for _ in range(3):
        runs.step(torch.arange(20))
    moved = runs.instance.recover(net()).state_dict()
    assert torch.equal(moved["0.weight"], net().state_dict()["0.weight"])
    assert not torch.equal(moved["4.weight"], net().state_dict()["4.weight"])
    assert not any(v.any() for v in runs.values()[1].values())


# ---------------------------------------------------------------- learning
PROJECTED = {"kind": "nonnegative", "by": "project"}
LEARNERS: dict[str, tuple[FirstOrder, dict[str, Any]]] = {
    "local_propagation": (
        lc.DescentAscent(weights=lc.Adam(lr=3e-3), states=lc.Adagrad(lr=0.1), multipliers=lc.SGD(lr=1e-2)),
        {
            "domain": PROJECTED,
            "start": {"kind": "zeros"},
            "transform": {"kind": "abs_tube", "epsilon": 1e-2},
            "multiplier": {"layout": "example"},
        },
    ),
    "extraprop": (
        lc.Extragradient(weights=lc.Adagrad(lr=3e-3), states=lc.Adagrad(lr=0.1), multipliers=lc.SGD(lr=1e-4)),
        {"domain": {"kind": "nonnegative"}, "transform": {"kind": "softshrink", "epsilon": 0.05}},
    ),
    "extraprop_scalar": (
        lc.Extragradient(weights=lc.Adam(lr=3e-3), states=lc.Adagrad(lr=0.1), multipliers=lc.SGD(lr=1e-4)),
        {
            "domain": {"kind": "nonnegative"},
            "transform": {"kind": "norm_tube", "epsilon": 1.0},
            "multiplier": {"layout": "example"},
        },
    ),
}


@pytest.mark.parametrize("name", LEARNERS)
def test_they_learn_the_digits(name: str) -> None:
    method, options = LEARNERS[name]
    splits = digits()
    torch.manual_seed(0)
    formulation = lc.Formulation.model_validate(options)
    cut = {"policy": "at", "after": ["relu3"]}
    lifted = lc.lift(DigitsConvNet(channels=8), splits.train_x[:4], split=cut, formulation=formulation)
    solution = lifted.solve(
        (splits.train_x, splits.train_y),
        loss=F.cross_entropy,
        method=method,
        options=lc.RunOptions(steps=300, batch_size=64),
    )
    accuracy = float((solution.model.eval()(splits.test_x).argmax(1) == splits.test_y).float().mean())
    assert accuracy > 0.9
