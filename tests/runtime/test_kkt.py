"""The mathematics of the Lagrangian, against autograd and by hand, in float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lagcompile.ir.axes import (
    Abs,
    AbsTube,
    Free,
    Hardshrink,
    Identity,
    NonNegative,
    NormTube,
    Range,
    Softshrink,
    Squared,
    Transform,
)
from lagcompile.runtime import kkt

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
    g = kkt.transformed(r, transform)
    multiplier = torch.randn(2, 3, 1 if isinstance(transform, NormTube) else 4, dtype=torch.float64)
    (expected,) = torch.autograd.grad(kkt.coupling(g, multiplier, r, rho), r)
    got = kkt.force(g.detach(), multiplier, r.detach(), rho, transform)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


def test_lin_eps_is_softshrink_and_abs_eps_is_its_size() -> None:
    r = torch.linspace(-2, 2, 41, dtype=torch.float64).reshape(1, 1, -1)
    lin_eps = torch.relu(r - 0.5) - torch.relu(-r - 0.5)
    torch.testing.assert_close(kkt.transformed(r, Softshrink(epsilon=0.5)), lin_eps)
    torch.testing.assert_close(kkt.transformed(r, AbsTube(epsilon=0.5)), lin_eps.abs())


def test_every_transform_vanishes_at_zero() -> None:
    zero = torch.zeros(1, 2, 3, dtype=torch.float64)
    for transform in TRANSFORMS:
        assert float(kkt.transformed(zero, transform).abs().max()) == 0.0


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
    torch.testing.assert_close(kkt.to_domain(kkt.from_domain(x, domain), domain), x)


def test_domains_hold() -> None:
    x = torch.tensor([-2.0, 0.5, 3.0])
    assert kkt.to_domain(x, NonNegative()).tolist() == [0, 0.5, 3]
    assert kkt.project(x, NonNegative(by="project")).tolist() == [0, 0.5, 3]
    assert kkt.project(x, Range(lower=-1, upper=1)).tolist() == [-1, 0.5, 1]
    assert torch.equal(kkt.project(x, Free()), x)
