"""The mathematics of the Lagrangian, against autograd and by hand, in float64."""

from __future__ import annotations

from typing import get_args

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lagcompile.ir.base import Frozen
from lagcompile.ir.domains import Free, NonNegative, Range
from lagcompile.ir.transforms import Abs, AbsTube, Hardshrink, Identity, NormTube, Softshrink, Squared, Transform
from lagcompile.runtime import kkt
from lagcompile.runtime.domains import inside
from lagcompile.runtime.transforms import behaviour

TRANSFORMS: list[Transform] = [
    Identity(),
    Abs(),
    Squared(),
    Softshrink(epsilon=0.3),
    Hardshrink(epsilon=0.3),
    AbsTube(epsilon=0.3),
    NormTube(epsilon=0.5, order=1),
    NormTube(epsilon=0.5, order=2),
]


@pytest.mark.parametrize("transform", TRANSFORMS, ids=lambda t: f"{t.kind}{getattr(t, 'order', '')}")
@given(seed=st.integers(0, 10_000), rho=st.sampled_from([0.0, 0.7]))
def test_force_is_the_gradient_of_the_coupling(transform: Transform, seed: int, rho: float) -> None:
    torch.manual_seed(seed)
    r = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)
    g = behaviour(transform).value(r)
    multiplier = torch.randn(2, 3, 1 if isinstance(transform, NormTube) else 4, dtype=torch.float64)
    (expected,) = torch.autograd.grad(kkt.coupling(g, multiplier, r, rho), r)
    got = kkt.force(g.detach(), multiplier, r.detach(), rho, transform)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


AUGMENTED: list[Transform] = [
    Identity(),
    Softshrink(epsilon=0.3),
    Hardshrink(epsilon=0.3),
    AbsTube(epsilon=0.3),
    NormTube(epsilon=1.5, order=1),
    NormTube(epsilon=1.0, order=2),
]


def eliminated(r: Tensor, multiplier: Tensor, rho: float, transform: Transform) -> Tensor:
    """The smallest <lambda, c(r) - s> + (rho/2) |c(r) - s|^2 over the slack: a parabola over an interval, by cases."""
    epsilon = transform.half_width
    if isinstance(transform, NormTube):
        value = torch.linalg.vector_norm(r, transform.order, dim=2, keepdim=True) - epsilon
    else:
        value = r.abs() - epsilon if transform.kind == "abs_tube" else r
    signed = value is r
    low, high = (-epsilon, epsilon) if signed else (-torch.inf, 0.0)
    free = value + multiplier / rho
    ends = [torch.full_like(value, s) for s in (low, high) if s > -torch.inf]
    points = torch.stack([torch.where((free >= low) & (free <= high), free, ends[0]), *ends])
    terms = multiplier * (value - points) + 0.5 * rho * (value - points) ** 2
    return terms.amin(dim=0).sum()


@pytest.mark.parametrize("transform", AUGMENTED, ids=lambda t: f"{t.kind}{getattr(t, 'order', '')}")
@given(seed=st.integers(0, 10_000), rho=st.sampled_from([0.4, 1.0, 5.0]))
def test_augmented_force_is_the_gradient_over_the_best_slack(transform: Transform, seed: int, rho: float) -> None:
    torch.manual_seed(seed)
    r = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)
    multiplier = torch.randn(2, 3, 1 if isinstance(transform, NormTube) else 4, dtype=torch.float64)
    multiplier = (multiplier if transform.signed else multiplier.abs()).requires_grad_()
    least = eliminated(r, multiplier, rho, transform)
    g = behaviour(transform).excess(r, multiplier, rho)
    torch.testing.assert_close(kkt.coupling(g, multiplier, g, rho), least, rtol=1e-12, atol=1e-12)
    in_r, in_multiplier = torch.autograd.grad(least, [r, multiplier])
    force = kkt.augmented_force(g.detach(), multiplier.detach(), r.detach(), rho, transform)
    torch.testing.assert_close(force, in_r, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(g.detach(), in_multiplier, rtol=1e-12, atol=1e-12)


def test_the_augmented_form_is_smooth_at_the_edge_where_the_papers_form_jumps() -> None:
    tube, multiplier = Softshrink(epsilon=0.3), torch.full((1, 1, 1), 2.0, dtype=torch.float64)
    inside, outside = (multiplier.new_full((1, 1, 1), r) for r in (0.3 - 1e-9, 0.3 + 1e-9))
    paper = [kkt.force(behaviour(tube).value(r), multiplier, r, 0.0, tube).item() for r in (inside, outside)]
    assert paper == [0.0, 2.0]  # any multiplier above the exact one balances the loss by chattering between the two
    smooth = [
        kkt.augmented_force(behaviour(tube).excess(r, multiplier, 1.0), multiplier, r, 1.0, tube).item()
        for r in (inside, outside)
    ]
    assert smooth == pytest.approx([2.0, 2.0], abs=1e-8)


def test_inside_a_tube_the_multiplier_dies_away_and_nothing_pulls() -> None:
    tube, r = Softshrink(epsilon=0.3), torch.full((1, 1, 1), 0.1, dtype=torch.float64)
    multiplier = torch.full((1, 1, 1), 0.05, dtype=torch.float64)
    g = behaviour(tube).excess(r, multiplier, 1.0)
    assert kkt.augmented_force(g, multiplier, r, 1.0, tube).item() == pytest.approx(0.0, abs=1e-15)
    assert g.item() == pytest.approx(-0.05)  # ascent with step rho sets it to zero


def test_lin_eps_is_softshrink_and_abs_eps_is_its_size() -> None:
    r = torch.linspace(-2, 2, 41, dtype=torch.float64).reshape(1, 1, -1)
    lin_eps = torch.relu(r - 0.5) - torch.relu(-r - 0.5)
    torch.testing.assert_close(behaviour(Softshrink(epsilon=0.5)).value(r), lin_eps)
    torch.testing.assert_close(behaviour(AbsTube(epsilon=0.5)).value(r), lin_eps.abs())


def test_every_transform_vanishes_at_zero() -> None:
    zero = torch.zeros(1, 2, 3, dtype=torch.float64)
    for transform in TRANSFORMS:
        assert float(behaviour(transform).value(zero).abs().max()) == 0.0


def test_dual_gradient_by_layout() -> None:
    g = torch.arange(12, dtype=torch.float64).reshape(1, 3, 4)
    labels = torch.tensor([0, 1, 0])
    full = kkt.dual_gradient(g, "full", None, 0, mean_features=False)
    assert torch.equal(full, g)
    assert kkt.dual_gradient(g, "example", None, 0, mean_features=False).flatten().tolist() == [6, 22, 38]
    by_class = kkt.dual_gradient(g, "class", labels, 3, mean_features=False)
    assert by_class[0].tolist() == [[4, 5, 6, 7], [4, 5, 6, 7], [0, 0, 0, 0]]  # means; class 2 is absent
    assert kkt.dual_gradient(g, "scalar", None, 0, mean_features=False).item() == 22
    assert torch.equal(kkt.dual_gradient(g, "full", None, 0, mean_features=True), g / 4)


@given(st.floats(0.01, 20))
def test_softplus_domain_round_trip(value: float) -> None:
    domain = NonNegative(by="softplus")
    x = torch.tensor([value], dtype=torch.float64)
    torch.testing.assert_close(inside(domain).value(inside(domain).stored(x)), x)


def test_domains_hold() -> None:
    x = torch.tensor([-2.0, 0.5, 3.0])
    assert inside(NonNegative()).value(x).tolist() == [0, 0.5, 3]
    assert inside(NonNegative(by="project")).project(x).tolist() == [0, 0.5, 3]
    assert inside(Range(lower=-1, upper=1)).project(x).tolist() == [-1, 0.5, 1]
    assert torch.equal(inside(Free()).project(x), x)


def test_a_record_that_no_table_knows_raises() -> None:
    class Cubic(Frozen):
        epsilon: float = 0.1

    union = set(get_args(get_args(Transform)[0]))
    assert {type(t) for t in TRANSFORMS} == union
    assert len({type(behaviour(t)) for t in TRANSFORMS}) == len(union)
    with pytest.raises(AssertionError):
        behaviour(Cubic())
