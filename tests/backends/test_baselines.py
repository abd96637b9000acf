"""Backprop, DFA, DTP and the augmented relatives: identities in float64, refusals, learning."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

import lagcompile as lc
from lagcompile.backends.augmented import AugmentedLagrangian
from lagcompile.backends.baselines import Backprop, DifferenceTargetPropagation, FeedbackAlignment
from lagcompile.backends.local import StageExecutor
from lagcompile.backends.method import Method
from lagcompile.workbench.data import digits
from lagcompile.workbench.models import DigitsConvNet
from tests.backends.hand import CUT, data, net
from tests.nets import Residual, deep

PASSING: dict[str, Any] = {
    "storage": {"kind": "transient"},
    "multiplier": None,
    "weight": {"kind": "constant", "value": 1.0},
}
PLAIN = lc.SGD(lr=1.0)
ROWS = torch.arange(10, 34)


def executor(method: Method, model: nn.Module | None = None, split: Any = CUT, **options: Any) -> Any:
    formulation = lc.Formulation.model_validate({**PASSING, **options})
    lifted = lc.lift(model or net(), data()[0][:4], split=split, formulation=formulation)
    return method.executor(lifted.bind(data(), loss=F.cross_entropy), seed=3)


def after(runs: Any) -> dict[str, Tensor]:
    state: dict[str, Tensor] = runs.instance.recover(net()).state_dict()
    return state


def gradients() -> dict[str, Tensor]:
    model, (x, y) = net(), data()
    names = dict(model.named_parameters())
    found = torch.autograd.grad(F.cross_entropy(model(x[ROWS]), y[ROWS]), list(names.values()))
    return dict(zip(names, found, strict=True))


@pytest.mark.parametrize("formulation", [{}, {"storage": {"kind": "table"}, "multiplier": {}}])
@pytest.mark.parametrize("split", [CUT, {"policy": "none"}])
def test_backprop_is_autograd_whatever_the_program_says_of_states(split: Any, formulation: dict[str, Any]) -> None:
    runs = executor(Backprop(weights=PLAIN), split=split, **formulation)
    runs.step(ROWS)
    for name, g in gradients().items():
        torch.testing.assert_close(after(runs)[name], net().state_dict()[name] - g, rtol=1e-12, atol=1e-12)


def test_stacked_stages_are_run_one_by_one_and_come_back() -> None:
    model = deep(4, width=4).double()
    runs = executor(Backprop(weights=PLAIN), model, {"policy": "every", "type": "Linear", "n": 1})
    assert not any(u.stacked for u in runs.instance.layout.units)
    runs.step(ROWS)
    x, y = data()
    F.cross_entropy(model(x[ROWS]), y[ROWS]).backward()
    moved = runs.instance.recover(deep(4, width=4).double()).state_dict()
    for name, p in model.named_parameters():
        assert p.grad is not None
        torch.testing.assert_close(moved[name], p.detach() - p.grad, rtol=1e-12, atol=1e-12)


# ---------------------------------------------------------------- direct feedback alignment
def test_feedback_alignment_by_hand() -> None:
    runs = executor(FeedbackAlignment(weights=PLAIN))
    feedback = {n: b.clone() for n, b in runs.feedback.items()}
    assert {n: tuple(b.shape) for n, b in feedback.items()} == {"h1": (3, 5), "h2": (3, 6)}
    runs.step(ROWS)
    model, (x, y) = net(), data()
    h1 = model[1](model[0](x[ROWS]))
    h2 = model[3](model[2](h1.detach()))
    out = model[4](h2.detach())
    loss = F.cross_entropy(out, y[ROWS])
    (error,) = torch.autograd.grad(loss, out, retain_graph=True)
    local = (h1 * (error @ feedback["h1"])).sum() + (h2 * (error @ feedback["h2"])).sum() + loss
    local.backward()
    for name, p in model.named_parameters():
        assert p.grad is not None
        torch.testing.assert_close(after(runs)[name], p.detach() - p.grad, rtol=1e-12, atol=1e-12)


def test_feedback_alignment_with_the_transposed_weight_is_backprop() -> None:
    """For the last state, feedback by the output layer's own weight gives backprop's gradient ahead of it."""
    runs = executor(FeedbackAlignment(weights=PLAIN), split={"policy": "at", "after": ["3"]})
    runs.feedback["h1"].copy_(net().state_dict()["4.weight"])
    runs.step(ROWS)
    for name, g in gradients().items():
        torch.testing.assert_close(after(runs)[name], net().state_dict()[name] - g, rtol=1e-12, atol=1e-12)


# ---------------------------------------------------------------- difference target propagation
def test_target_propagation_by_hand() -> None:
    runs = executor(DifferenceTargetPropagation(weights=PLAIN, target_step=0.4, inverse_steps=0))
    (weight, bias) = runs.inverses[0]
    weight, bias = weight.detach().clone(), bias.detach().clone()
    assert weight.shape == (5, 6)
    runs.step(ROWS)
    model, (x, y) = net(), data()
    h1 = model[1](model[0](x[ROWS]))
    h2 = model[3](model[2](h1.detach()))
    leaf = h2.detach().requires_grad_()
    loss = F.cross_entropy(model[4](leaf), y[ROWS])
    (slope,) = torch.autograd.grad(loss, leaf, retain_graph=True)
    t2 = leaf.detach() - 0.4 * len(ROWS) * slope
    t1 = h1.detach() + (t2 @ weight.T + bias) - (h2.detach() @ weight.T + bias)
    local = loss + ((h1 - t1).square().sum() + (h2 - t2).square().sum()) / len(ROWS)
    local.backward()
    for name, p in model.named_parameters():
        assert p.grad is not None
        torch.testing.assert_close(after(runs)[name], p.detach() - p.grad, rtol=1e-12, atol=1e-12)


def test_inverses_learn_to_reconstruct() -> None:
    method = DifferenceTargetPropagation(
        weights=lc.SGD(lr=0.0), inverses=lc.Adam(lr=0.02), noise=0.05, inverse_steps=40
    )
    runs = executor(method)
    batch = runs.instance.batch(torch.arange(50))

    def error() -> float:
        with torch.no_grad():
            low, high = runs._flat(runs.network.forward(batch))
            return float((runs.back(0, high) - low).square().mean())

    before = error()
    for _ in range(10):
        runs.step(torch.arange(50))
    assert error() < 0.2 * before


def test_target_propagation_refuses_what_is_no_chain() -> None:
    torch.manual_seed(0)
    x = torch.randn(8, 6)
    lifted = lc.lift(Residual(), x, split=3, formulation=lc.Formulation.model_validate(PASSING))
    instance = lifted.bind((x, torch.arange(8) % 3), loss=F.cross_entropy)
    with pytest.raises(
        lc.ProgramError, match=r"dtp needs a chain.*cut where a single tensor crosses, or use method dfa"
    ):
        DifferenceTargetPropagation().executor(instance)


class OneNumber(nn.Module):
    """States and an output of one number for each example, without an axis of features."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.middle, self.last = nn.Linear(4, 1), nn.Linear(1, 1), nn.Linear(1, 1)

    def forward(self, x: Tensor) -> Tensor:
        """One number for each row."""
        h = self.first(x).tanh().squeeze(1)
        h = self.middle(h.unsqueeze(1)).tanh().squeeze(1)
        out: Tensor = self.last(h.unsqueeze(1)).squeeze(1)
        return out


@pytest.mark.parametrize("method", [FeedbackAlignment(), DifferenceTargetPropagation()], ids=["dfa", "dtp"])
def test_states_and_outputs_of_one_number(method: Method) -> None:
    x = data()[0]
    split = {"policy": "at", "after": ["squeeze", "squeeze_1"]}
    lifted = lc.lift(OneNumber().double(), x[:4], split=split, formulation=lc.Formulation.model_validate(PASSING))
    runs = method.executor(lifted.bind((x, x[:, 0]), loss=F.mse_loss))
    runs.step(ROWS)
    assert all(torch.isfinite(torch.tensor(v)) for v in runs.measures().values())


class Normalised(nn.Module):
    """Batch normalisation, and a stage that the loss sees while it writes a state."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.second = nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Linear(5, 6)
        self.last, self.aside = nn.Linear(6, 3), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        """Logits."""
        h = self.norm(self.first(x)).relu()
        out: Tensor = self.last(self.second(h).relu()) + self.aside(h)
        return out


@pytest.mark.parametrize(
    "method",
    [lc.AltMin(weight_steps=3), FeedbackAlignment(), lc.ProxProp(explicit=("*",)), Backprop()],
    ids=lambda m: type(m).__name__,
)
def test_statistics_move_once_a_step(method: Method) -> None:
    split = {"policy": "at", "after": ["relu", "relu_1"]}
    runs = executor(method, Normalised().double(), split)
    for _ in range(2):
        runs.step(ROWS)
    assert int(runs.instance.module.norm.num_batches_tracked) == 2


# ---------------------------------------------------------------- what no method on transient states would do
IGNORED: dict[str, tuple[dict[str, Any], str]] = {
    "start": ({"start": {"kind": "zeros"}}, r"h1 \(after _1, 1\) by zeros: leave out 'start'"),
    "transform": ({"transform": {"kind": "abs"}}, r"c_h1 has the transform abs: leave out 'transform', or use method"),
    "regularisers": (
        {"regularisers": [{"kind": "l1", "on": "states", "weight": 0.1}]},
        r"regularisers on states would do nothing: leave them out, or use method altmin",
    ),
}


@pytest.mark.parametrize("option", IGNORED)
@pytest.mark.parametrize(
    "method",
    [FeedbackAlignment(), DifferenceTargetPropagation(), lc.ProxProp(), lc.AltMin()],
    ids=lambda m: type(m).__name__,
)
def test_options_that_would_do_nothing_are_refused(method: Method, option: str) -> None:
    given, said = IGNORED[option]
    if option == "regularisers" and isinstance(method, lc.AltMin):
        executor(method, **given).step(ROWS)
        return
    with pytest.raises(lc.ProgramError, match=said):
        executor(method, **given)


# ---------------------------------------------------------------- augmented relatives
def linear() -> nn.Sequential:
    torch.manual_seed(4)
    return nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 4), nn.Linear(4, 3)).double()


def test_pc_alm_gives_backprops_gradient_on_a_linear_net() -> None:
    """With transient states, enough rounds of the inner loop bring defects to 0 and multipliers to the adjoints."""
    method = AugmentedLagrangian(weights=PLAIN, states=lc.SGD(lr=0.3), rounds=400, state_steps=4)
    runs = executor(method, linear(), {"policy": "at", "after": ["0", "1"]}, multiplier={})
    runs.step(ROWS)
    assert runs.measures()["defect"] < 1e-9
    model, (x, y) = linear(), data()
    F.cross_entropy(model(x[ROWS]), y[ROWS]).backward()
    moved = runs.instance.recover(linear()).state_dict()
    for name, p in model.named_parameters():
        assert p.grad is not None
        torch.testing.assert_close(moved[name], p.detach() - p.grad, rtol=1e-10, atol=1e-10)
    assert runs.gradient_evaluations == 400 * 5 + 1


def test_bytes_are_those_of_the_table_of_systems() -> None:
    """States of 5 and 6 numbers in float64, batches of 24 rows of 50 examples."""
    sgd = AugmentedLagrangian(states=lc.SGD(lr=0.1))
    found = {}
    for name, method, options in (
        ("pc_alm", sgd, {"multiplier": {}}),
        ("augmented_lagrangian", sgd, {"multiplier": {}, "storage": {"kind": "table"}}),
        ("auxiliary_coordinates", AugmentedLagrangian(), {"storage": {"kind": "table"}}),
        ("local_propagation", lc.DescentAscent(), {"storage": {"kind": "table"}, "multiplier": {"layout": "example"}}),
        ("altmin", lc.AltMin(), {}),
        ("proxprop", lc.ProxProp(), {}),
        ("backprop", Backprop(), {}),
    ):
        runs = executor(method, **options)
        runs.step(ROWS)
        found[name] = runs.bytes() // 8
    assert found == {
        "pc_alm": 2 * 24 * 11,
        "augmented_lagrangian": 50 * 2 * 11,
        "auxiliary_coordinates": 50 * (11 + 11),  # Adagrad's sums
        "local_propagation": 50 * (11 + 2 + 11),  # a multiplier for each state
        "altmin": 24 * 11,
        "proxprop": 24 * 11,
        "backprop": 0,
    }


def test_one_dual_ascent_moves_the_multiplier_by_rho_times_the_defect() -> None:
    method = AugmentedLagrangian(weights=lc.SGD(lr=0.0), states=lc.SGD(lr=0.0), state_steps=1)
    runs = executor(
        method,
        storage={"kind": "table"},
        start={"kind": "zeros"},
        multiplier={},
        weight={"kind": "constant", "value": 0.7},
    )
    runs.step(ROWS)
    with torch.no_grad():
        first = net()[0](data()[0][ROWS]).tanh()
    torch.testing.assert_close(runs.values()[1]["lambda1"][ROWS], 0.7 * first, rtol=1e-12, atol=1e-12)
    assert not runs.values()[1]["lambda1"][:10].any()


def test_a_multiplier_that_would_never_move_is_refused() -> None:
    with pytest.raises(lc.ProgramError, match=r"c_h1 has no quadratic weight, so its multiplier would never move"):
        executor(AugmentedLagrangian(), weight=None, multiplier={})
    with pytest.raises(lc.ProgramError, match="needs at least one state: split the model, or use method backprop"):
        executor(AugmentedLagrangian(), split={"policy": "none"})


# ---------------------------------------------------------------- checkpoints and learning
@pytest.mark.parametrize(
    ("method", "options"),
    [
        (Backprop(), {}),
        (FeedbackAlignment(), {}),
        (DifferenceTargetPropagation(), {}),
        (AugmentedLagrangian(), {"multiplier": {}}),
        (AugmentedLagrangian(), {"multiplier": {}, "storage": {"kind": "table"}}),
    ],
)
def test_a_resumed_run_is_the_unbroken_run(method: Method, options: dict[str, Any]) -> None:
    unbroken, first, second = (executor(method, **options) for _ in range(3))
    for t in range(5):
        unbroken.step(torch.arange(t, t + 20))
    for t in range(2):
        first.step(torch.arange(t, t + 20))
    second.load_state_dict(first.state_dict())
    for t in range(2, 5):
        second.step(torch.arange(t, t + 20))
    a, b = unbroken.instance.module.state_dict(), second.instance.module.state_dict()
    assert all(torch.equal(a[n], b[n]) for n in a)
    assert unbroken.gradient_evaluations == second.gradient_evaluations
    if isinstance(unbroken, StageExecutor):
        assert unbroken.final_measures() == {}


LAST, BEHIND = ["relu3"], ["relu1", "pool", "relu3"]
TABLE: dict[str, Any] = {"storage": {"kind": "table"}, "domain": {"kind": "nonnegative", "by": "project"}}
GROWING = {"kind": "geometric", "start": 0.05, "factor": 2.0, "every": 50}
INNER = {"weights": lc.Adam(lr=3e-3), "states": lc.Adagrad(lr=0.05), "state_steps": 2}
LEARNERS: dict[str, tuple[Method, list[str], dict[str, Any]]] = {
    "dfa": (FeedbackAlignment(weights=lc.Adam(lr=3e-3)), BEHIND, {}),
    "dtp": (DifferenceTargetPropagation(weights=lc.Adam(lr=3e-3)), BEHIND, {}),
    "auxiliary_coordinates": (AugmentedLagrangian(**INNER), LAST, {**TABLE, "weight": GROWING}),
    "augmented_lagrangian": (AugmentedLagrangian(**INNER), LAST, {**TABLE, "multiplier": {}}),
}


@pytest.mark.parametrize("name", LEARNERS)
def test_they_learn_the_digits(name: str) -> None:
    method, split, options = LEARNERS[name]
    splits = digits()
    torch.manual_seed(0)
    cut = {"policy": "at", "after": split}
    formulation = lc.Formulation.model_validate({**PASSING, **options})
    lifted = lc.lift(DigitsConvNet(channels=8), splits.train_x[:4], split=cut, formulation=formulation)
    solution = lifted.solve(
        (splits.train_x, splits.train_y),
        loss=F.cross_entropy,
        method=method,
        options=lc.RunOptions(steps=200, batch_size=64),
    )
    accuracy = float((solution.model.eval()(splits.test_x).argmax(1) == splits.test_y).float().mean())
    assert accuracy > 0.9


class Folds(nn.Module):
    """Folds time into the batch axis and back."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        folded = torch.tanh(self.first(x.unsqueeze(1).expand(-1, 5, -1).reshape(-1, 4)))
        return self.second(folded).reshape(-1, 5, 3).mean(1)


@pytest.mark.parametrize("method", [FeedbackAlignment(), DifferenceTargetPropagation()])
def test_a_state_with_several_rows_for_each_example(method: Method) -> None:
    formulation = lc.Formulation.model_validate(PASSING)
    x, y = torch.randn(12, 4), torch.arange(12) % 3
    lifted = lc.lift(Folds(), x[:4], split=2, formulation=formulation)
    assert [s.type.count for s in lifted.program.states] == [30]
    solution = lifted.solve((x, y), loss=F.cross_entropy, method=method, options=lc.RunOptions(steps=2, batch_size=5))
    assert solution.status in (lc.Status.STEPS_DONE, lc.Status.WORSE)


def test_more_states_than_stages_are_no_chain() -> None:
    class Three(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.ways = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))
            self.head = nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            a, b, c = (torch.tanh(way(x)) for way in self.ways)
            return self.head(a * b + c)

    split = lc.AtSplit(after=(("node:tanh", "node:tanh_1", "node:tanh_2"),))
    lifted = lc.lift(Three(), torch.randn(3, 4), split, lc.Formulation(storage=lc.Transient(), multiplier=None))
    assert len(lifted.program.states) == 3
    with pytest.raises(lc.ProgramError, match="dtp needs a chain"):
        lifted.solve(
            (torch.randn(6, 4), torch.randn(6, 2)),
            loss=nn.functional.mse_loss,
            method=lc.DifferenceTargetPropagation(),
            options=lc.RunOptions(steps=1),
        )
