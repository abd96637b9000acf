"""Nothing that is not so passes as ok: certificates that were changed, or are of other things."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

import lagcompile as lc
from lagcompile.check.certificate import Certificate
from tests.check.genuine import SPLIT, Net, X, Y, genuine, lifted, said, sealed


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
