"""DistProp: class Gaussians, z-scores, synthetic samples, against formulas by hand in float64; sizes; learning."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

import lagcompile as lc
from lagcompile.backends.first_order import FirstOrderExecutor
from lagcompile.runtime.lagrangian import Gradients, Lagrangian
from lagcompile.workbench.data import digits
from lagcompile.workbench.models import DigitsConvNet
from tests.backends.hand import CUT, data, net

M, N = 3, 4
LABELS = torch.arange(M).repeat(N)


def bound(split: Any = CUT, *, noise: str = "fixed", **options: Any) -> FirstOrderExecutor:
    formulation = lc.Formulation.model_validate(
        {
            "storage": {"kind": "class_gaussian", "samples": N, "noise": noise},
            "start": {"kind": "unit_sphere"},
            "transform": {"kind": "softshrink", "epsilon": 0.2},
            "classes": M,
            **options,
        }
    )
    lifted = lc.lift(net(), data()[0][:4], split=split, formulation=formulation)
    method = lc.Extragradient(weights=lc.Adam(lr=0.01), multipliers=lc.SGD(lr=0.1))
    return method.executor(lifted.bind(data(), loss=F.cross_entropy), seed=7)


def test_starts_are_class_means_on_the_unit_sphere_and_the_asked_deviation() -> None:
    states, duals = bound(storage={"kind": "class_gaussian", "samples": N, "sigma": 0.7}).values()
    assert {n: tuple(v.shape) for n, v in states.items()} == {
        "h1.mu": (M, 5), "h1.sigma": (M, 5), "h2.mu": (M, 6), "h2.sigma": (M, 6),
    }  # fmt: skip
    torch.testing.assert_close(states["h1.mu"].norm(dim=1), torch.ones(M, dtype=torch.float64))
    torch.testing.assert_close(states["h2.sigma"], torch.full((M, 6), 0.7, dtype=torch.float64))
    # the first state's constraint has a row for each example, the second one's for each synthetic sample
    assert {n: tuple(v.shape) for n, v in duals.items()} == {"lambda1": (50, 5), "lambda2": (N * M, 6)}


def by_hand(
    raw: list[Tensor], duals: list[Tensor], noise: list[Tensor], rows: Tensor, epsilon: float
) -> tuple[Tensor, list[Tensor], list[Tensor], nn.Sequential]:
    """Loss, z-scores, and gradients of L in the stored pairs, for the net cut twice."""
    model, (x, y) = net(), data()
    leaves = [r.clone().requires_grad_() for r in raw]
    mu = [r[0, :, 0] for r in leaves]
    sigma = [torch.log1p(torch.exp(r[0, :, 1])) for r in leaves]
    drawn = [m[LABELS] + e[0] * s[LABELS] for m, s, e in zip(mu, sigma, noise, strict=True)]
    z1 = (torch.tanh(model[0](x[rows])) - mu[0][y[rows]]) / sigma[0][y[rows]]
    z2 = (torch.tanh(model[2](drawn[0])) - mu[1][LABELS]) / sigma[1][LABELS]
    loss = F.cross_entropy(model[4](drawn[1]), LABELS)
    value = loss
    for z, dual in zip((z1, z2), duals, strict=True):
        g = z.sign() * (z.abs() - epsilon).clamp_min(0)
        value = value + (dual[0] * g).sum() / len(z)
    value.backward()
    found = []
    for leaf in leaves:
        assert leaf.grad is not None
        found.append(leaf.grad)
    return loss.detach(), [z1.detach(), z2.detach()], found, model


def test_loss_z_scores_and_gradients_are_those_by_hand() -> None:
    runs = bound()
    lagrangian = Lagrangian(runs.instance)
    generator = torch.Generator().manual_seed(5)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    rows = torch.arange(4, 31)
    raw = [random(1, M, 2, 5), random(1, M, 2, 6)]
    duals = [random(1, len(rows), 5), random(1, N * M, 6)]
    noise = [random(1, N * M, 5), random(1, N * M, 6)]
    got: Gradients = lagrangian.gradients(
        runs.instance.batch(rows), raw, list(duals), rho=[0.0, 0.0], noise=list(noise)
    )
    loss, z, states, model = by_hand(raw, duals, noise, rows, 0.2)
    torch.testing.assert_close(got.terms.loss.detach(), loss, rtol=1e-12, atol=1e-12)
    for mine, theirs in zip(got.terms.defects, z, strict=True):
        torch.testing.assert_close(mine[0].detach(), theirs, rtol=1e-12, atol=1e-12)
    for gradient, reference in zip(got.states, states, strict=True):
        torch.testing.assert_close(gradient, reference, rtol=1e-11, atol=1e-12)
    by_name = runs.instance.weights.named_gradients(got.weights)
    for name, p in model.named_parameters():
        assert p.grad is not None
        torch.testing.assert_close(by_name[name], p.grad, rtol=1e-11, atol=1e-12)
    for dual, score in zip(got.multipliers, z, strict=True):
        assert dual is not None
        torch.testing.assert_close(dual[0], F.softshrink(score, 0.2), rtol=1e-12, atol=1e-12)


def test_the_first_stage_learns_through_the_multipliers_alone() -> None:
    runs = bound()
    before = {n: v.clone() for n, v in runs.instance.module.state_dict().items()}
    runs.optimizers["multipliers"].param_groups[0]["lr"] = 0.0
    for t in range(3):
        runs.step(torch.arange(t, t + 20))
    after = runs.instance.recover(net()).state_dict()
    assert torch.equal(before["0.weight"], after["0.weight"])
    assert torch.equal(before["2.weight"], after["2.weight"])
    assert not torch.equal(before["4.weight"], after["4.weight"])


def test_a_stage_on_data_is_not_batched_with_an_equal_one_on_samples() -> None:
    """4 - 4 - 4 - 4 - 3: the first stage equals the next two, but only those run on the samples."""
    torch.manual_seed(0)
    layers = [m for _ in range(3) for m in (nn.Linear(4, 4), nn.Tanh())]
    model = nn.Sequential(*layers, nn.Linear(4, 3)).double()
    formulation = lc.Formulation(storage=lc.ClassGaussian(samples=N), start=lc.UnitSphere(), classes=M)
    split = {"policy": "at", "after": ["1", "3", "5"]}
    lifted = lc.lift(model, data()[0][:4], split=split, formulation=formulation)
    runs = lc.Extragradient().executor(lifted.bind(data(), loss=F.cross_entropy), seed=0)
    assert [[s.name for s in u.stages] for u in runs.instance.layout.units] == [["f0"], ["f1", "f2"], ["f3"]]
    runs.step(torch.arange(20))
    assert {n: tuple(v.shape) for n, v in runs.values()[1].items()} == {
        "lambda1": (50, 4), "lambda2": (N * M, 4), "lambda3": (N * M, 4),
    }  # fmt: skip


# ---------------------------------------------------------------- noise
def test_fixed_noise_makes_the_run_deterministic_and_the_program_one_program() -> None:
    first, second, other = bound(), bound(), bound()
    noise = [n.clone() for n in first.store.noise if n is not None]
    for t in range(4):
        first.step(torch.arange(t, t + 20))
        second.step(torch.arange(t, t + 20))
    a, b = first.values()[0], second.values()[0]
    assert all(torch.equal(a[n], b[n]) for n in a)
    assert all(torch.equal(x, y) for x, y in zip(noise, [n for n in first.store.noise if n is not None], strict=True))
    assert all(torch.equal(x, y) for x, y in zip(noise, [n for n in other.store.noise if n is not None], strict=True))
    assert len(noise) == 2


def test_fresh_noise_is_new_each_step_and_shared_by_both_half_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    runs = bound(noise="fresh")
    seen: list[Tensor] = []
    original = Lagrangian.terms

    def watched(self: Lagrangian, *args: Any, **kwargs: Any) -> Any:
        seen.append(kwargs["noise"][0].clone())
        return original(self, *args, **kwargs)

    monkeypatch.setattr(Lagrangian, "terms", watched)
    runs.step(torch.arange(20))
    runs.step(torch.arange(20))
    assert len(seen) == 4
    assert torch.equal(seen[0], seen[1])
    assert torch.equal(seen[2], seen[3])
    assert not torch.equal(seen[0], seen[2])


# ---------------------------------------------------------------- sizes
@pytest.mark.parametrize("layout", ["full", "example", "class", "scalar"])
def test_the_plan_counts_variables_that_do_not_grow_with_the_data(layout: str) -> None:
    model = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 1000))
    formulation = lc.Formulation.model_validate(
        {
            "storage": {"kind": "class_gaussian", "samples": 8},
            "start": {"kind": "unit_sphere"},
            "multiplier": {"layout": layout},
            "classes": 1000,
        }
    )
    lifted = lc.lift(model, torch.randn(4, 32), split={"policy": "at", "after": ["0", "2"]}, formulation=formulation)
    small, imagenet = lifted.plan(examples=10_000), lifted.plan(examples=14_000_000)
    assert small.variables == imagenet.variables
    assert imagenet.variables - imagenet.weights == 2 * 1000 * (64 + 48)
    first, second = (s.multipliers for s in imagenet.states)
    sizes = {
        "full": (14_000_000 * 64, 8000 * 48),
        "example": (14_000_000, 8000),
        "class": (1000 * 64, 1000 * 48),
        "scalar": (1, 1),
    }
    assert (first, second) == sizes[layout]
    assert small.states[1].constraints == imagenet.states[1].constraints == 8000 * 48


@pytest.mark.parametrize("layout", ["full", "example", "class", "scalar"])
def test_every_layout_of_multipliers_runs_with_two_prototype_states(layout: str) -> None:
    runs = bound(multiplier={"layout": layout}, transform={"kind": "identity"})
    for t in range(3):
        runs.step(torch.arange(t, t + 20))
    shapes = {
        "full": ((50, 5), (12, 6)),
        "example": ((50, 1), (12, 1)),
        "class": ((3, 5), (3, 6)),
        "scalar": ((1, 1), (1, 1)),
    }
    duals = runs.values()[1]
    assert (tuple(duals["lambda1"].shape), tuple(duals["lambda2"].shape)) == shapes[layout]
    assert all(v.abs().max() > 0 for v in duals.values())


def test_the_scalar_form_for_large_data_runs() -> None:
    runs = bound(multiplier={"layout": "example"}, transform={"kind": "norm_tube", "epsilon": 1.0})
    for t in range(3):
        runs.step(torch.arange(t, t + 20))
    assert (runs.values()[1]["lambda1"] >= 0).all()


# ---------------------------------------------------------------- what it refuses
def test_targets_without_classes_are_refused() -> None:
    lifted = lc.lift(
        net(),
        data()[0][:4],
        split=CUT,
        formulation=lc.Formulation(storage=lc.ClassGaussian(samples=2), start=lc.UnitSphere(), classes=3),
    )
    with pytest.raises(
        lc.BindError, match=r"h1 \(after _1, 1\), h2 .*kept per class: the target must be one class number.*kind: table"
    ):
        lifted.bind((data()[0], torch.randn(50, 3, dtype=torch.float64)), loss=F.mse_loss)
    with pytest.raises(
        lc.ProgramError, match=r"the state h1 \(1\).*the number of classes is not given: write 'classes: 10'"
    ):
        _ = lc.lift(net(), data()[0][:4], split=CUT, formulation=lc.Formulation(storage=lc.ClassGaussian())).program


def test_a_table_behind_prototypes_is_refused() -> None:
    with pytest.raises(
        lc.ProgramError, match=r"h2 \(after _3, 3\) lies behind a class_gaussian.*a table.*make it class_g"
    ):
        bound(at={"_3": {}})
    with pytest.raises(
        lc.ProgramError, match=r"h2 \(after _3, 3\) lies behind .* cannot be transient: make it class_gaus"
    ):
        bound(at={"_3": {"storage": {"kind": "transient"}}})


@pytest.mark.parametrize(
    ("target", "said"),
    [
        (torch.arange(50) % 3 - 1, "the target holds -1.*number them from 0"),
        (torch.arange(50) % 2 == 0, "must be one class number per example"),
        (torch.arange(50) % 4, "holds class 3, the program has classes 0 to 2"),
        (torch.arange(50) % 2, "no example of class 2"),
    ],
)
def test_targets_that_are_not_the_programs_classes_are_refused(target: Tensor, said: str) -> None:
    formulation = lc.Formulation(storage=lc.ClassGaussian(samples=2), start=lc.UnitSphere(), classes=M)
    lifted = lc.lift(net(), data()[0][:4], split=CUT, formulation=formulation)
    with pytest.raises(lc.BindError, match=said):
        lifted.bind((data()[0], target), loss=F.cross_entropy)


def test_classes_that_nothing_uses_ask_nothing_of_the_target() -> None:
    lifted = lc.lift(net(), data()[0][:4], split=CUT, formulation=lc.Formulation(classes=M))
    assert lifted.bind((data()[0], torch.randn(50, 3, dtype=torch.float64)), loss=F.mse_loss).labels is None


def test_nothing_that_couples_is_refused() -> None:
    with pytest.raises(lc.ProgramError, match=r"c_h1 has neither a multiplier nor a weight.*Give 'multiplier:"):
        bound(multiplier=None)


@pytest.mark.parametrize("sigma", [1e-6, 1.0, 2000.0])
def test_any_deviation_can_be_the_start(sigma: float) -> None:
    states, _ = bound(storage={"kind": "class_gaussian", "samples": N, "sigma": sigma}).values()
    torch.testing.assert_close(states["h1.sigma"], torch.full((M, 5), sigma, dtype=torch.float64), rtol=1e-9, atol=0.0)


# ---------------------------------------------------------------- learning
LEARNING: dict[str, tuple[dict[str, object], float]] = {
    "full": ({"kind": "hardshrink", "epsilon": 0.3}, 1e-4),
    "class": ({"kind": "abs_tube", "epsilon": 0.3}, 1e-3),  # a signed multiplier of a class would hold its mean only
    "scalar": ({"kind": "norm_tube", "epsilon": 19.0}, 1e-4),
}


@pytest.mark.parametrize("layout", LEARNING)
def test_it_learns_the_digits(layout: str) -> None:
    splits = digits()
    torch.manual_seed(0)
    transform, rate = LEARNING[layout]
    formulation = lc.Formulation.model_validate(
        {
            "storage": {"kind": "class_gaussian", "samples": 16, "noise": "fresh"},
            "start": {"kind": "unit_sphere"},
            "transform": transform,
            "multiplier": {"layout": layout},
            "classes": 10,
        }
    )
    split = {"policy": "at", "after": ["fc1"]}
    lifted = lc.lift(DigitsConvNet(channels=8), splits.train_x[:4], split=split, formulation=formulation)
    solution = lifted.solve(
        (splits.train_x, splits.train_y),
        loss=F.cross_entropy,
        method=lc.Extragradient(weights=lc.Adam(lr=3e-3), states=lc.Adagrad(lr=0.05), multipliers=lc.SGD(lr=rate)),
        options=lc.RunOptions(steps=200, batch_size=64),
    )
    accuracy = float((solution.model.eval()(splits.test_x).argmax(1) == splits.test_y).float().mean())
    assert accuracy > 0.9
