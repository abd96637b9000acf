"""Online AltMin: one batch by hand with a detached proximity target, the memory variant, signs, and what it refuses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

import lagcompile as lc
from lagcompile.backends.alternating import AltMin, AltMinExecutor
from lagcompile.ir.program import Regulariser
from lagcompile.runtime.lagrangian import Lagrangian
from lagcompile.workbench.data import digits
from lagcompile.workbench.models import MLP, DigitsConvNet, SignNet

MU = 0.2


def net() -> nn.Sequential:
    torch.manual_seed(1)
    layers = [nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 3)]
    return nn.Sequential(*layers).double()


def data() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    return torch.randn(30, 4, generator=generator, dtype=torch.float64), torch.arange(30) % 3


CUT = {"policy": "at", "after": ["0", "2"]}


def executor(method: AltMin, model: nn.Module | None = None, split: Any = CUT, **options: Any) -> AltMinExecutor:
    formulation = lc.Formulation.model_validate(
        {
            "storage": {"kind": "transient"},
            "multiplier": None,
            "weight": {"kind": "constant", "value": 2 * MU},
            **options,
        }
    )
    lifted = lc.lift(model or net(), data()[0][:4], split=split, formulation=formulation)
    return method.executor(lifted.bind(data(), loss=F.cross_entropy))


@pytest.mark.parametrize("features", ["sum", "mean"])
def test_one_batch_by_hand(features: str) -> None:
    rows = torch.arange(5, 21)
    lr, steps, rate = 0.02, 3, 0.1
    runs = executor(
        AltMin(codes=lc.SGD(lr=lr), code_steps=steps, weights=lc.SGD(lr=rate), output=lc.SGD(lr=0.3)), features=features
    )
    runs.step(rows)
    model, (x, y) = net(), data()
    x, y = x[rows], y[rows]
    share = {5: 1 / 5, 6: 1 / 6} if features == "mean" else {5: 1.0, 6: 1.0}
    with torch.no_grad():
        c1 = model[0](x)
        c2 = model[2](c1.relu())
    old1, old2 = c1.clone(), c2.clone()  # the proximity targets: constants
    for _ in range(steps):
        c2 = c2.detach().requires_grad_()
        value = F.cross_entropy(model[4](c2.relu()), y, reduction="sum") / MU + share[6] * (c2 - old2).square().sum()
        c2 = c2.detach() - lr * torch.autograd.grad(value, c2)[0]
    for _ in range(steps):
        c1 = c1.detach().requires_grad_()
        value = share[6] * (model[2](c1.relu()) - c2).square().sum() + share[5] * (c1 - old1).square().sum()
        c1 = c1.detach() - lr * torch.autograd.grad(value, c1)[0]
    assert (c1 - old1).abs().max() > 1e-4
    local = share[5] * (model[0](x) - c1).square().sum() + share[6] * (model[2](c1.relu()) - c2).square().sum()
    hidden = [*model[0].parameters(), *model[2].parameters()]
    found = runs.instance.recover(net()).state_dict()
    for name, p, g in zip(
        ("0.weight", "0.bias", "2.weight", "2.bias"), hidden, torch.autograd.grad(local / 16, hidden), strict=True
    ):
        torch.testing.assert_close(found[name], p.detach() - rate * g, rtol=1e-12, atol=1e-12)
    last = list(model[4].parameters())
    for name, p, g in zip(
        ("4.weight", "4.bias"), last, torch.autograd.grad(F.cross_entropy(model[4](c2.relu()), y), last), strict=True
    ):
        torch.testing.assert_close(found[name], p.detach() - 0.3 * g, rtol=1e-12, atol=1e-12)


def test_the_sweep_goes_down_the_programs_energy() -> None:
    rows = torch.arange(30)
    runs = executor(AltMin(codes=lc.SGD(lr=0.01), code_steps=4))
    lagrangian = Lagrangian(runs.instance)
    batch = runs.instance.batch(rows)
    with torch.no_grad():
        values = runs.network.forward(batch)

    def energy(codes: list[Tensor]) -> float:
        stored = [c.unsqueeze(0) for c in codes]
        rho, none = [2 * MU] * 2, [None, None]
        terms = lagrangian.terms(batch, stored, none, rho=rho, noise=none)
        return float(lagrangian.value(terms, rho).detach())

    names = [c.state.node for c in runs.network.codes]
    before = energy([values[n] for n in names])
    moved = runs.sweep(batch, values)
    after = energy([moved[n] for n in names])
    assert after < before - 1e-4
    # with nothing downstream moved, a code's local objective is the program's energy over mu
    code = runs.network.codes[-1]
    h = values[code.state.node] + 0.1
    local = float(runs.local(batch, values | {code.state.node: h}, code, values[code.state.node]).detach())
    assert local * MU == pytest.approx(energy([values[names[0]], h]), rel=1e-12)


def test_the_schedule_of_mu_scales_the_loss_against_the_coupling() -> None:
    runs = executor(AltMin(), weight={"kind": "linear", "start": 0.1, "increment": 0.2, "maximum": 0.4})
    seen = []
    for _ in range(3):
        seen.append(round(runs._mu(runs.network.codes[0]), 12))
        runs.step(torch.arange(30))
    assert seen == [0.05, 0.15, 0.2]


def test_sparse_codes_shrink() -> None:
    free, sparse = (
        executor(
            AltMin(codes=lc.SGD(lr=0.02), code_steps=20),
            regularisers=tuple(Regulariser(kind="l1", on="states", weight=w) for w in weights),
        )
        for weights in ((), (0.5,))
    )
    sizes = []
    for runs in (free, sparse):
        batch = runs.instance.batch(torch.arange(30))
        with torch.no_grad():
            values = runs.network.forward(batch)
        sizes.append(sum(float(v.abs().sum()) for v in runs.sweep(batch, values).values()))
    assert sizes[1] < 0.8 * sizes[0]


# ---------------------------------------------------------------- memory
def test_the_memory_variant_reaches_the_least_squares_weights() -> None:
    runs = executor(AltMin(memory=True, memory_sweeps=400, memory_damping=0.0, codes=lc.SGD(lr=0.05)))
    rows = torch.arange(30)
    batch = runs.instance.batch(rows)
    with torch.no_grad():
        codes = runs.sweep(batch, runs.network.forward(batch))
    runs.step(rows)
    x = torch.cat([data()[0], torch.ones(30, 1, dtype=torch.float64)], dim=1)
    first = codes[runs.network.codes[0].state.node]
    expected = torch.linalg.lstsq(x, first).solution.T
    found = runs.instance.recover(net()).state_dict()
    torch.testing.assert_close(found["0.weight"], expected[:, :4], rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(found["0.bias"], expected[:, 4], rtol=1e-8, atol=1e-8)


def test_the_memory_accumulates_or_forgets() -> None:
    for rate in (0.0, 0.25):
        runs = executor(AltMin(memory=True, memory_rate=rate, code_steps=0))
        parts = [torch.arange(10), torch.arange(10, 30)]
        expected = torch.zeros(5, 5, dtype=torch.float64)
        for rows in parts:
            runs.step(rows)
            s = torch.cat([data()[0][rows], torch.ones(len(rows), 1, dtype=torch.float64)], dim=1)
            fresh = s.T @ s / len(rows)
            expected = expected + fresh if rate == 0 else (1 - rate) * expected + rate * fresh
        torch.testing.assert_close(runs.memories["f0"].a, expected, rtol=1e-12, atol=1e-12)


def test_the_memory_variant_on_a_convolution_is_refused_by_path() -> None:
    formulation = lc.Formulation(storage=lc.Transient(), multiplier=None, weight=lc.ConstantWeight(value=0.1))
    x, y = torch.randn(4, 1, 8, 8), torch.arange(4)
    lifted = lc.lift(DigitsConvNet(), x, split={"policy": "at", "after": ["conv1", "fc1"]}, formulation=formulation)
    with pytest.raises(lc.ProgramError, match=r"conv1 is a Conv2d: set 'memory: false'"):
        AltMin(memory=True).executor(lifted.bind((x, y), loss=F.cross_entropy))
    cut = {"policy": "at", "after": ["1"]}
    with pytest.raises(lc.ProgramError, match=r"f0 holds 0: cut after each linear layer, before its activation"):
        executor(AltMin(memory=True), split=cut)


def test_states_that_are_not_codes_are_refused() -> None:
    with pytest.raises(lc.ProgramError, match=r"c_h1 has no weight: give 'weight"):
        executor(AltMin(), weight=None)
    with pytest.raises(lc.ProgramError, match=r"weight 2\*mu of c_h1 starts at 0: give a value above 0"):
        executor(AltMin(), weight={"kind": "linear", "start": 0.0, "increment": 0.1})
    with pytest.raises(lc.ProgramError, match=r"h1 \(after _0, 0\) is kept as table: write 'storage"):
        executor(AltMin(), storage={"kind": "table"})
    with pytest.raises(lc.ProgramError, match=r"h1 \(after _0, 0\) is mapped by relu: write 'domain"):
        executor(AltMin(), domain={"kind": "nonnegative"})
    with pytest.raises(lc.ProgramError, match="needs at least one state"):
        executor(AltMin(), split={"policy": "none"})


@pytest.mark.parametrize("features", ["sum", "mean"])
def test_the_memorys_weights_minimise_the_programs_energy_with_its_regularisers(features: str) -> None:
    l1, l2 = 0.04, 0.3
    runs = executor(
        AltMin(memory=True, memory_sweeps=400, memory_damping=0.0, codes=lc.SGD(lr=0.05)),
        features=features,
        regularisers=(
            Regulariser(kind="l1", on="weights", weight=l1),
            Regulariser(kind="l2", on="weights", weight=l2),
        ),
    )
    rows = torch.arange(30)
    batch = runs.instance.batch(rows)
    with torch.no_grad():
        codes = runs.sweep(batch, runs.network.forward(batch))
    for _ in range(3):  # the memory of the same batch three times has the same minimiser
        runs.memories["f0"].learn(
            batch.values, codes["_0"], runs.instance, unit=runs._unit(runs.network.codes[0], batch, codes)
        )
    layer = runs.memories["f0"].layer
    error = (layer(data()[0]) - codes["_0"]).square().sum() / 30 / (5 if features == "mean" else 1)
    slopes = torch.autograd.grad(MU * error, [layer.weight, layer.bias])
    zero = 0
    for p, g in zip((layer.weight.detach(), layer.bias.detach()), slopes, strict=True):
        on = p != 0
        torch.testing.assert_close((g + l2 * p)[on], -l1 * p.sign()[on], rtol=1e-8, atol=1e-10)
        assert (g[~on].abs() <= l1 * (1 + 1e-8)).all()
        zero += int((~on).sum())
    assert zero > 0


def test_regularisers_of_hidden_weights_are_divided_by_mu_as_the_energy_is() -> None:
    rate, weight, rows = 0.1, 0.3, torch.arange(20)
    plain, kept = (
        executor(AltMin(weights=lc.SGD(lr=rate)), regularisers=terms)
        for terms in ((), (Regulariser(kind="l2", on="weights", weight=weight),))
    )
    plain.step(rows)
    kept.step(rows)
    a, b = (r.instance.recover(net()).state_dict() for r in (plain, kept))
    for name, start in net().state_dict().items():
        share = weight if name.startswith("4") else weight / MU
        torch.testing.assert_close(b[name], a[name] - rate * share * start, rtol=1e-12, atol=1e-12)


def test_the_memory_leaves_frozen_layers_alone_and_refuses_shared_ones() -> None:
    model = net()
    for p in model[0].parameters():
        p.requires_grad_(False)
    runs = executor(AltMin(memory=True), model)
    runs.step(torch.arange(20))
    moved = runs.instance.recover(net()).state_dict()
    assert torch.equal(moved["0.weight"], net().state_dict()["0.weight"])
    assert not torch.equal(moved["2.weight"], net().state_dict()["2.weight"])
    with pytest.raises(lc.ProgramError, match="memory holds squared errors: write 'hidden: squared'"):
        executor(AltMin(memory=True, hidden="sign_hinge"))
    with pytest.raises(lc.ProgramError, match="weight and bias of 0 must both be solved for, or both frozen"):
        executor(AltMin(memory=True), frozen=["0.bias"])
    torch.manual_seed(0)
    shared = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 3)).double()
    shared[2].weight = shared[0].weight
    with pytest.raises(lc.ProgramError, match=r"weights of 0 are used in several places: set 'memory: false'"):
        executor(AltMin(memory=True), shared)


# ---------------------------------------------------------------- checkpoints and learning
def test_a_resumed_run_is_the_unbroken_run() -> None:
    method = AltMin(memory=True)
    unbroken, first, second = (executor(method) for _ in range(3))
    for t in range(4):
        unbroken.step(torch.arange(t, t + 20))
    for t in range(2):
        first.step(torch.arange(t, t + 20))
    second.load_state_dict(first.state_dict())
    for t in range(2, 4):
        second.step(torch.arange(t, t + 20))
    a, b = unbroken.instance.module.state_dict(), second.instance.module.state_dict()
    assert all(torch.equal(a[n], b[n]) for n in a)


def learn(model: nn.Module, split: list[str], method: AltMin, steps: int = 150) -> float:
    splits = digits()
    formulation = lc.Formulation(
        storage=lc.Transient(), multiplier=None, weight=lc.ConstantWeight(value=0.006), features="mean"
    )
    cut = {"policy": "at", "after": split}
    lifted = lc.lift(model, splits.train_x[:4], split=cut, formulation=formulation)
    solution = lifted.solve(
        (splits.train_x, splits.train_y),
        loss=F.cross_entropy,
        method=method,
        options=lc.RunOptions(steps=steps, batch_size=64),
    )
    return float((solution.model.eval()(splits.test_x).argmax(1) == splits.test_y).float().mean())


def test_it_learns_the_digits_by_adam_and_by_memory() -> None:
    torch.manual_seed(0)
    model = MLP((64, 40, 40, 10))
    assert learn(model, ["layers.1", "layers.3"], AltMin(weights=lc.Adam(lr=3e-3))) > 0.9
    assert learn(model, ["layers.1", "layers.3"], AltMin(memory=True)) > 0.85


@pytest.mark.parametrize("hidden", ["squared", "sign_hinge"])
def test_it_trains_a_network_of_signs(hidden: Any) -> None:
    torch.manual_seed(0)
    method = AltMin(
        weights=lc.Adam(lr=3e-3), codes=lc.SGD(lr=5e-3, momentum=0.9, nesterov=True), code_steps=10, hidden=hidden
    )
    assert learn(SignNet(64, inputs=64), ["fc1", "fc2"], method, steps=200) > 0.85
