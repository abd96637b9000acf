"""Nothing that is not so passes as ok: certificates that were changed, of other things, or of nothing."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

import lagcompile as lc
from lagcompile.check.certificate import Certificate
from lagcompile.check.kkt import certify_kkt
from tests.problems import ZOO

X = torch.randn(10, 5, generator=torch.Generator().manual_seed(1))
Y = torch.randint(0, 3, (10,), generator=torch.Generator().manual_seed(2))
SPLIT = 2


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(5, 6)
        self.norm = nn.BatchNorm1d(6)
        self.second = nn.Linear(6, 6)
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.norm(self.first(x)))
        output: Tensor = self.head(torch.tanh(self.second(h)))
        return output


def lifted(model: nn.Module | None = None, split: Any = SPLIT) -> lc.Lifted:
    return lc.lift(model or Net(), X, split=split)


@cache
def genuine() -> lc.Certificate:
    return lifted().verify(X, Y, loss=F.cross_entropy)


def said(certificate: lc.Certificate) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(certificate.model_dump_json())
    return found


def sealed(data: dict[str, Any]) -> lc.Certificate:
    """A forger's certificate: any content, with the digest that belongs to it."""
    made = Certificate.model_validate_json(json.dumps(data))
    return made.model_copy(update={"digest": made.own_digest()})


def test_the_genuine_one_holds(tmp_path: Path) -> None:
    certificate = genuine()
    assert certificate.verdict == "ok", str(certificate)
    assert certificate.check(lifted()) == []
    assert certificate.check(lifted(), X, Y, loss=F.cross_entropy) == []
    assert lc.Certificate.load(certificate.save(tmp_path / "c.json")) == certificate


# ------------------------------------------------------------------ changed text
def _changed(data: dict[str, Any], key: str) -> None:
    value = data[key]
    if isinstance(value, str):
        data[key] = "network" if value == "solution" else "solution" if key == "claim" else value[:-1] + "0"[:1] + "x"
    elif isinstance(value, int):
        data[key] = value + 1
    elif isinstance(value, list):
        data[key] = value[:-1] if value else ["a fact"]
    else:
        data[key] = {}


FIELDS = [k for k in Certificate.model_fields if k not in ("format", "dtype")]


@pytest.mark.parametrize("key", FIELDS)
def test_changed_text_is_refused(key: str, tmp_path: Path) -> None:
    data = said(genuine())
    _changed(data, key)
    path = tmp_path / "c.json"
    path.write_text(json.dumps(data))
    with pytest.raises(lc.DataError, match="was changed after it was made"):
        lc.Certificate.load(path)
    assert Certificate.model_validate_json(json.dumps(data)).verdict != "ok"


@pytest.mark.parametrize("key", ["value", "tolerance", "scale", "name", "mode", "kind"])
def test_a_changed_residual_is_refused(key: str, tmp_path: Path) -> None:
    data = said(genuine())
    new = {"name": "else", "mode": "eval", "kind": "complementarity"}.get(key, 0.5)
    data["residuals"][0][key] = new
    path = tmp_path / "c.json"
    path.write_text(json.dumps(data))
    with pytest.raises(lc.DataError, match="was changed after it was made"):
        lc.Certificate.load(path)


# ------------------------------------------------------------------ content that says nothing, with a fitting digest
def _each(key: str, value: Any) -> Callable[[dict[str, Any]], None]:
    def change(data: dict[str, Any]) -> None:
        for residual in data["residuals"]:
            residual[key] = value

    return change


def _set(key: str, value: Any) -> Callable[[dict[str, Any]], None]:
    def change(data: dict[str, Any]) -> None:
        data[key] = value

    return change


def _one(key: str, value: Any) -> Callable[[dict[str, Any]], None]:
    def change(data: dict[str, Any]) -> None:
        data["residuals"][-1][key] = value

    return change


def _only(word: str) -> Callable[[dict[str, Any]], None]:
    def change(data: dict[str, Any]) -> None:
        data["residuals"] = [r for r in data["residuals"] if word not in (r["mode"], r["kind"])]

    return change


VACUOUS: dict[str, Callable[[dict[str, Any]], None]] = {
    "no residuals": _set("residuals", []),
    "no train mode": _only("train"),
    "no eval mode": _only("eval"),
    "no rows": _set("rows", 0),
    "fewer than no rows": _set("rows", -1),
    "modes emptied": _set("modes", []),
    "one mode": _set("modes", ["eval"]),
    "of a solution": _set("claim", "solution"),
    "NaN": _one("value", math.nan),
    "all NaN": _each("value", math.nan),
    "infinite": _one("value", math.inf),
    "negative": _one("value", -1.0),
    "minus infinity": _each("value", -math.inf),
    "above": _one("value", 1e-9),
    "scale of zero": _each("scale", 0.0),
    "one scale of zero": _one("scale", 0.0),
    "scale of NaN": _one("scale", math.nan),
    "infinite scale": _each("scale", math.inf),
    "tolerance of one": _each("tolerance", 1.0),
    "infinite tolerance": _one("tolerance", math.inf),
    "NaN as tolerance": _one("tolerance", math.nan),
    "negative tolerance": _each("tolerance", -1.0),
    "another mode": _each("mode", "test"),
    "something is open": _set("unassessed", ["adjoint of h1"]),
}


@pytest.mark.parametrize("name", VACUOUS)
def test_content_that_says_nothing_is_not_ok(name: str, tmp_path: Path) -> None:
    data = said(genuine())
    VACUOUS[name](data)
    forged = sealed(data)
    assert forged.verdict in ("failed", "not assessed")
    assert not lc.Certificate.load(forged.save(tmp_path / "c.json")).ok
    assert "ok (" not in str(forged).splitlines()[0].replace("NOT ok", "")
    assert forged.check(lifted())


@pytest.mark.parametrize("kind", ["forward", "defect", "adjoint", "state stationarity", "weight gradient"])
def test_a_kind_that_was_left_out_is_noticed_by_the_program(kind: str) -> None:
    data = said(genuine())
    _only(kind)(data)
    assert sealed(data).check(lifted(), X, Y, loss=F.cross_entropy)
    data["residuals"].append({**data["residuals"][0], "name": "no such name"})
    assert sealed(data).check(lifted(), X, Y, loss=F.cross_entropy)


@pytest.mark.parametrize("tolerance", [1e-2, 1e-6, 2e-10])
def test_the_tolerance_is_the_checkers_and_not_the_files(tolerance: float) -> None:
    data = said(genuine())
    for residual in data["residuals"]:
        residual["tolerance"] = tolerance
    data["residuals"][-1]["value"] = 0.9 * tolerance
    forged = sealed(data)
    first = str(forged).splitlines()[0]
    assert f"ok to {tolerance:.0e} only, 1e-10 is usual" in first, first
    (told,) = forged.check(lifted())
    assert told.endswith(f"{0.9 * tolerance:.1e} is above the tolerance 1e-10")
    assert forged.check(lifted(), tolerance=tolerance) == []
    assert forged.check(lifted(), X, Y, loss=F.cross_entropy) == [told]


def test_a_looser_certificate_of_small_residuals_holds_by_the_usual_tolerance() -> None:
    loose = lifted().verify(X, Y, loss=F.cross_entropy, tolerance=1e-3)
    assert loose.check(lifted(), X, Y, loss=F.cross_entropy) == []
    assert "only" in str(loose).splitlines()[0]
    assert "only" not in str(genuine()).splitlines()[0]


def test_a_certificate_of_an_earlier_edition_is_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "c.json"
    path.write_text(json.dumps({**said(genuine()), "format": 2}))
    with pytest.raises(lc.DataError, match=r"c.json:1: format: the certificate is of format 2, .* measure"):
        lc.Certificate.load(path)


# ------------------------------------------------------------------ genuine, but of something else
def _weights(model: Net) -> None:
    with torch.no_grad():
        model.second.weight[1, 2] += 1e-6


def _bias(model: Net) -> None:
    with torch.no_grad():
        model.head.bias.neg_()


def _buffer(model: Net) -> None:
    model.norm.get_buffer("running_mean")[0] += 1e-3


def _counter(model: Net) -> None:
    model.norm.get_buffer("num_batches_tracked").add_(1)


def _swapped(model: Net) -> None:
    model.second.weight, model.head.weight = model.head.weight, nn.Parameter(model.second.weight[:3])


@pytest.mark.parametrize("change", [_weights, _bias, _buffer, _counter], ids=lambda f: f.__name__)
def test_another_state_of_the_model_is_not_certified(change: Callable[[Net], None]) -> None:
    model = Net()
    change(model)
    found = genuine().check(lifted(model))
    word = "the buffers" if change in (_buffer, _counter) else "the weights"
    assert [f.split(":")[0] for f in found] == [word]
    assert genuine().check(lifted(model), X, Y, loss=F.cross_entropy)


def _sum(output: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(output, target, reduction="sum")


@pytest.mark.parametrize(
    ("inputs", "target", "loss", "word"),
    [
        (X[:9], Y[:9], F.cross_entropy, "the number of rows"),
        (X.flip(0), Y.flip(0), F.cross_entropy, "the inputs"),
        (X, (Y + 1) % 3, F.cross_entropy, "the inputs"),
        (X + 1e-7, Y, F.cross_entropy, "the inputs"),
        (X, Y, _sum, "the loss"),
    ],
)
def test_another_batch_or_loss_is_not_certified(inputs: Tensor, target: Tensor, loss: Any, word: str) -> None:
    found = genuine().check(lifted(), inputs, target, loss=loss)
    assert any(f.startswith(word) for f in found)


@pytest.mark.parametrize("split", [1, 3, {"policy": "at", "after": ["second"]}])
def test_another_split_is_not_certified(split: Any) -> None:
    found = genuine().check(lifted(split=split))
    assert {"the program", "what the stages compute"} <= {f.split(":")[0] for f in found}


def test_another_program_is_not_certified() -> None:
    formulation = lc.Formulation(weight=lc.ConstantWeight(value=1.0))
    found = genuine().check(lc.lift(Net(), X, split=SPLIT, formulation=formulation))
    assert [f.split(":")[0] for f in found] == ["the program"]


class Other(Net):
    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.head(torch.tanh(self.second(torch.sin(self.norm(self.first(x))))))
        return output


def test_another_network_of_the_same_weights_is_not_certified() -> None:
    found = genuine().check(lifted(Other()))
    assert "what the stages compute" in {f.split(":")[0] for f in found}


def _hooked(hook: Callable[..., Any] | None, on: str = "second") -> Net:
    model = Net()
    if hook is not None:
        model.get_submodule(on).register_forward_hook(hook)
    return model


def _times(factor: float) -> Callable[..., Any]:
    return lambda module, inputs, output: output * factor


def test_hooks_belong_to_what_the_stages_compute() -> None:
    hooks = [None, _times(2.0), _times(3.0), lambda m, i, o: o * 2.0, lambda m, i, o: o + 2.0, _times(2.0)]
    certificates = [lifted(_hooked(hook)).verify(X, Y, loss=F.cross_entropy) for hook in hooks]
    assert all(c.ok for c in certificates)
    for i, certificate in enumerate(certificates):
        for j, hook in enumerate(hooks):
            same = i == j or {i, j} == {1, 5}
            assert (certificate.check(lifted(_hooked(hook))) == []) == same, (i, j)
    assert certificates[1].check(lifted(_hooked(_times(2.0), on="head")))


# ------------------------------------------------------------------ measured, but on nothing that could have failed
def _constant(output: Tensor, target: Tensor) -> Tensor:
    return output.sum() * 0.0


def _unconnected(output: Tensor, target: Tensor) -> Tensor:
    return torch.ones((), dtype=output.dtype, requires_grad=True) * 1.0


def _stopped(output: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(output.detach() + 0.0 * output, target)


def _partly(output: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(output, target) + 0.1 * output.detach().square().sum()


@pytest.mark.parametrize("loss", [_constant, _unconnected, _stopped, _partly], ids=lambda f: f.__name__)
def test_a_loss_without_a_gradient_of_its_own_is_not_assessed(loss: Any) -> None:
    certificate = lifted().verify(X, Y, loss=loss)
    assert certificate.verdict == "not assessed", str(certificate)
    assert certificate.exit_code == 3
    assert certificate.reasons


class Detached(Net):
    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.norm(self.first(x))).detach()
        output: Tensor = self.head(torch.tanh(self.second(h)))
        return output


def test_a_network_that_stops_gradients_is_not_assessed_and_the_place_is_named() -> None:
    certificate = lifted(Detached(), split={"policy": "at", "after": ["second"]}).verify(X, Y, loss=F.cross_entropy)
    assert certificate.verdict == "not assessed"
    assert "the gradient is not the derivative of the loss" in certificate.reasons[0]
    assert "a stopped gradient in" in certificate.reasons[0]
    assert "first." in certificate.reasons[0]


class Leak(Net):
    """A share of the gradient is stopped, or the gradient of one small tensor."""

    def __init__(self, share: float, activation: Callable[[Tensor], Tensor], *, small: bool = False) -> None:
        super().__init__()
        self.share, self.activation, self.small = share, activation, small
        self.gain = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        h = self.activation(self.second(self.activation(self.first(x))))
        stopped = self.gain.detach() * h.square() if self.small else self.gain * h.detach()
        output: Tensor = self.head(h) + self.share * (stopped[:, :3] + self.gain * torch.sin(h[:, 1:4]))
        return output


@pytest.mark.parametrize("activation", [torch.tanh, torch.relu], ids=["tanh", "relu"])
@pytest.mark.parametrize(("share", "small"), [(1e-2, False), (1e-5, False), (1e-2, True), (1e-6, True)])
def test_a_small_part_of_a_gradient_that_is_stopped_is_seen(share: float, activation: Any, *, small: bool) -> None:
    certificate = lifted(Leak(share, activation, small=small)).verify(X, Y, loss=F.cross_entropy)
    assert certificate.verdict == "not assessed", str(certificate)
    assert "the gradient is not the derivative of the loss" in certificate.reasons[0]
    assert not small or "(in gain)" in certificate.reasons[0]


@pytest.mark.parametrize("scale", [1.0, 1e3, 6e6, 1e9])
def test_a_saturated_attention_has_the_gradient_of_its_own_softmax(scale: float) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True), nn.Flatten(), nn.Linear(40, 3)
    )
    x = scale * torch.randn(8, 5, 8)
    certificate = lc.lift(model, x, split=2).verify(x, torch.arange(8) % 3, loss=F.cross_entropy)
    assert certificate.verdict == "ok", str(certificate)


def test_rows_at_many_kinks_say_nothing_against_a_gradient() -> None:
    """A row of zeros, no biases but zeros: all units of that row stand at the kink of their relu."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 40), nn.ReLU(), nn.Linear(40, 40), nn.ReLU(), nn.Linear(40, 3))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.zero_()
    x = X * (torch.arange(10) % 2)[:, None]
    assert lc.lift(model, x, split=2).verify(x, Y, loss=F.cross_entropy).verdict == "ok"


@pytest.mark.parametrize(
    "loss",
    [
        lambda output, target: F.mse_loss(output, target.mul_(0.5)),
        lambda output, target: F.mse_loss(output.mul_(2.0), target),
    ],
    ids=["target", "output"],
)
def test_a_loss_that_writes_into_what_it_is_given_is_checked_on_copies(loss: Any) -> None:
    target = torch.ones(10, 3)
    assert lifted().verify(X, target, loss=loss).verdict == "ok"
    assert bool((target == 1.0).all())


def test_no_rows_are_not_assessed() -> None:
    certificate = lifted().verify(X[:0], Y[:0], loss=F.cross_entropy)
    assert certificate.verdict == "not assessed"
    assert any("no rows" in r for r in certificate.reasons)


class Two(Net):
    def forward(self, x: Tensor) -> Any:
        output = super().forward(x)
        return output, output * torch.nan


def test_a_second_output_that_is_not_a_number_fails() -> None:
    certificate = lifted(Two()).verify(X, Y, loss=lambda out, y: F.cross_entropy(out[0], y))
    assert certificate.verdict == "failed"
    assert math.isnan(next(r.value for r in certificate.residuals if r.kind == "forward"))


def test_a_dead_network_is_not_assessed() -> None:
    model = Net()
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    assert lifted(model).verify(X, Y, loss=F.cross_entropy).verdict == "not assessed"


# ------------------------------------------------------------------ scales
@pytest.mark.parametrize("scale", [1e-13, 1e-9, 1.0, 1e8, 1e13])
def test_a_wrong_stage_fails_at_every_scale_of_the_loss(scale: float) -> None:
    def loss(output: Tensor, target: Tensor) -> Tensor:
        return scale * F.cross_entropy(output, target)

    right = lifted()
    assert right.verify(X, Y, loss=loss).verdict == "ok"
    assert _broken(right).verify(X, Y, loss=loss).verdict == "failed"


@pytest.mark.parametrize("scale", [1e-6, 1e-3, 1e3, 1e6])
def test_a_wrong_stage_fails_at_every_scale_of_the_weights(scale: float) -> None:
    model = nn.Sequential(nn.Linear(5, 6), nn.Softplus(), nn.Linear(6, 6), nn.Softplus(), nn.Linear(6, 3))
    with torch.no_grad():
        model.get_parameter("0.weight").mul_(scale)
        model.get_parameter("2.weight").div_(scale)
    right = lc.lift(model, X, split={"policy": "at", "after": ["0", "2"]})
    assert right.verify(X, Y, loss=F.cross_entropy).verdict == "ok"
    assert _broken(right).verify(X, Y, loss=F.cross_entropy).verdict == "failed"


def _broken(right: lc.Lifted) -> lc.Lifted:
    """A stage that gives 1.0001 times what it should."""
    network = right.network.copy()
    module = network.stages[-1].module
    for node in module.graph.nodes:
        if node.op == "output":
            with module.graph.inserting_before(node):
                moved = module.graph.call_function(torch.mul, (node.args[0][0], 1.0001))
            node.args = ((moved, *node.args[0][1:]),)
    module.recompile()
    return replace(right, network=network)


def test_a_stage_that_was_changed_is_not_certified() -> None:
    found = genuine().check(_broken(lifted()))
    assert [f.split(":")[0] for f in found] == ["what the stages compute"]


# ------------------------------------------------------------------ solutions
@cache
def solved() -> tuple[lc.Solution, lc.Certificate]:
    problem = ZOO["tanh_2"]
    solution = problem.solve(lc.SQP())
    return solution, certify_kkt(problem.bind(), solution)


def _negated(values: Any) -> Any:
    return {n: -v for n, v in values.items()}


def _nudged(values: Any) -> Any:
    return {n: v + 1e-3 for n, v in values.items()}


FORGED: dict[str, Callable[[lc.Solution], lc.Solution]] = {
    "multipliers negated": lambda s: replace(s, multipliers=_negated(s.multipliers)),
    "multipliers moved": lambda s: replace(s, multipliers=_nudged(s.multipliers)),
    "multipliers zero": lambda s: replace(s, multipliers={n: 0.0 * v for n, v in s.multipliers.items()}),
    "multipliers NaN": lambda s: replace(s, multipliers={n: v * math.nan for n, v in s.multipliers.items()}),
    "states moved": lambda s: replace(s, states=_nudged(s.states)),
    "states NaN": lambda s: replace(s, states={n: v * math.nan for n, v in s.states.items()}),
    "weights moved": lambda s: replace(s, details={**s.details, "weights": _nudged(s.details["weights"])}),
    "weights negated": lambda s: replace(s, details={**s.details, "weights": _negated(s.details["weights"])}),
    "weights infinite": lambda s: replace(
        s, details={**s.details, "weights": {n: v + math.inf for n, v in s.details["weights"].items()}}
    ),
}


@pytest.mark.parametrize("name", FORGED)
def test_a_forged_solution_is_not_certified(name: str) -> None:
    solution, certificate = solved()
    assert certificate.verdict == "ok", str(certificate)
    forged = certify_kkt(ZOO["tanh_2"].bind(), FORGED[name](solution))
    assert forged.verdict == "failed"
    assert forged.values != certificate.values


def test_a_solution_of_a_constant_loss_is_not_assessed() -> None:
    problem = replace(ZOO["tanh_2"], loss=lambda out, y: (out - y).square().mean() * 1e-12, options={})
    solution = problem.solve(lc.Extragradient(), options=lc.RunOptions(steps=0))
    certificate = certify_kkt(problem.bind(), replace(solution, states={}, multipliers={}))
    assert certificate.verdict == "not assessed", str(certificate)
    assert any("scale the loss" in r for r in certificate.reasons)


def test_a_loss_that_stops_gradients_is_not_certified_as_optimal() -> None:
    def loss(output: Tensor, target: Tensor) -> Tensor:
        return F.mse_loss(output.detach() + 0.0 * output, target)

    problem = replace(ZOO["tanh_2"], loss=loss, options={})
    solution = problem.solve(lc.Extragradient(), options=lc.RunOptions(steps=0))
    certificate = certify_kkt(problem.bind(), replace(solution, states={}, multipliers={}))
    assert certificate.verdict == "not assessed", str(certificate)
    assert any("not the derivative" in r for r in certificate.reasons)


# ------------------------------------------------------------------ solve certifies what it gives back
def test_solve_says_whether_the_network_is_the_model() -> None:
    solution = lifted().solve((X, Y), loss=F.cross_entropy, options=lc.RunOptions(steps=3, batch_size=4))
    assert solution.certificate is not None
    assert solution.certificate.ok, str(solution.certificate)
    assert "certificate ok" in repr(solution)
    assert isinstance(solution.certificate, Certificate)
    assert solution.certificate.check(lifted(copy.deepcopy(solution.model))) == []


def test_certifying_changes_no_solution(monkeypatch: pytest.MonkeyPatch) -> None:
    options = lc.RunOptions(steps=3, batch_size=4)
    torch.manual_seed(5)
    first = lifted().solve((X, Y), loss=F.cross_entropy, options=options)
    after = torch.get_rng_state()
    monkeypatch.setattr(lc.Lifted, "_certificate", lambda *_: None)
    torch.manual_seed(5)
    second = lifted().solve((X, Y), loss=F.cross_entropy, options=options)
    assert torch.equal(after, torch.get_rng_state())
    a, b = first.model.state_dict(), second.model.state_dict()
    assert all(torch.equal(a[n], b[n]) for n in a)
    assert first.model.training == second.model.training


def test_a_solution_that_cannot_be_certified_says_why() -> None:
    def loss(output: Tensor, target: Tensor) -> Tensor:
        if output.dtype == torch.float64:
            raise RuntimeError("float32 only")
        return F.cross_entropy(output, target)

    solution = lifted().solve((X, Y), loss=loss, options=lc.RunOptions(steps=2))
    assert solution.certificate is not None
    assert solution.certificate.verdict == "not assessed"
    assert "float32 only" in solution.certificate.reasons[0]


@pytest.mark.parametrize(
    "other",
    [
        lambda out, y: F.mse_loss(out, F.one_hot(y, out.shape[1]).to(out.dtype)),
        lambda out, y: -F.cross_entropy(out, y),
        lambda out, y: F.cross_entropy(out, y) * (1 + 1e-6),
    ],
)
def test_a_loss_of_the_same_name_is_another_loss(other: Any) -> None:
    own = lifted().verify(X, Y, loss=lambda out, y: F.cross_entropy(out, y))
    assert own.check(lifted(), X, Y, loss=lambda out, y: F.cross_entropy(out, y)) == []
    assert any(p.startswith("the loss: in train mode it was") for p in own.check(lifted(), X, Y, loss=other))
