"""Certificates: they hold on lifted networks of every kind, fail when something is wrong, and survive a file."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import fx, nn
from torch.nn import functional as F  # noqa: N812

import lagcompile as lc
from lagcompile.check.certificate import Residual
from lagcompile.check.verify import verify_network
from lagcompile.frontend.stages import Network
from tests.nets import Normalised, classes, deep
from tests.nets import Residual as ResidualNet


@pytest.mark.parametrize("split", [1, 2, 3, 4])
def test_residual_network(split: int) -> None:
    x, y = classes(10, 6, 3)
    certificate = lc.lift(ResidualNet(), x, split=split).verify(x, y, loss=F.cross_entropy)
    assert certificate.ok, str(certificate)
    kinds = {r.kind for r in certificate.residuals}
    assert {"forward", "weight gradient"} <= kinds
    assert ("adjoint" in kinds) == (split > 1)


def test_batch_normalisation_and_dropout() -> None:
    x = torch.randn(8, 1, 4, 4)
    y = torch.arange(8) % 3
    for split in (2, {"policy": "at", "after": ["norm"]}, {"policy": "at", "after": ["drop"]}):
        certificate = lc.lift(Normalised(), x, split=split).verify(x, y, loss=F.cross_entropy)
        assert certificate.ok, str(certificate)


def test_shapes_unknown_at_lifting() -> None:
    x, y = classes(10, 6, 3)
    assert lc.lift(ResidualNet(), split=3).verify(x, y, loss=F.cross_entropy).ok


def broken(network: Network, number: int, change: Callable[[fx.Graph, fx.Node], fx.Node]) -> Network:
    """The network with another value written by one stage."""
    broken = network.copy()
    stage = broken.stages[number].module
    for node in stage.graph.nodes:
        if node.op == "output":
            with stage.graph.inserting_before(node):
                node.args = ((change(stage.graph, node.args[0][0]),),)
    stage.recompile()
    return broken


def scaled(graph: fx.Graph, value: fx.Node) -> fx.Node:
    return graph.call_function(torch.mul, (value, 1.0001))


@pytest.mark.parametrize("size", [1e-9, 1.0, 1e9])
def test_a_wrong_stage_is_caught_at_any_scale_of_the_loss(size: float) -> None:
    def loss(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return size * F.cross_entropy(output, target)

    x, y = classes(10, 5, 3)
    lifted = lc.lift(deep(4), x, split=4)
    assert lifted.verify(x, y, loss=loss).ok
    certificate = verify_network(broken(lifted.network, 2, scaled), lifted.program, [x], y, loss=loss)
    assert not certificate.ok
    wrong = [r for r in certificate.residuals if not r.ok]
    assert {r.kind for r in wrong} >= {"forward", "adjoint", "weight gradient"}
    assert all(1e-7 < r.value < 1e-2 for r in wrong)


def test_a_wrong_gradient_of_weights_of_another_size_is_caught() -> None:
    """The first layer's gradients are 1e-12 of the others', and count for as much: its weights are as much larger."""

    def other_slope(graph: fx.Graph, value: fx.Node) -> fx.Node:
        still = graph.call_method("detach", (value,))
        more = graph.call_function(torch.mul, (graph.call_function(torch.sub, (value, still)), 0.001))
        return graph.call_function(torch.add, (value, more))

    x, y = classes(10, 5, 3)
    model = nn.Sequential(nn.Linear(5, 5, bias=False), nn.Linear(5, 5))
    with torch.no_grad():
        model.get_parameter("0.weight").mul_(1e12)
    lifted = lc.lift(model, 1e-12 * x, split=2)
    assert lifted.verify(1e-12 * x, y, loss=F.cross_entropy).ok
    network = broken(lifted.network, 0, other_slope)
    certificate = verify_network(network, lifted.program, [1e-12 * x], y, loss=F.cross_entropy)
    assert ("weight gradient", "0.weight") in {(r.kind, r.name) for r in certificate.residuals if not r.ok}


def test_verification_leaves_everything_as_it_was() -> None:
    model = Normalised()
    x, y = torch.randn(8, 1, 4, 4), torch.arange(8) % 3
    lifted = lc.lift(model, x, split=2)
    before = {n: v.clone() for n, v in model.state_dict().items()}
    own = copy.deepcopy(lifted.module.state_dict())
    random = torch.get_rng_state()
    lifted.verify(x, y, loss=F.cross_entropy)
    assert torch.equal(random, torch.get_rng_state())
    assert all(torch.equal(v, before[n]) for n, v in model.state_dict().items())
    assert all(torch.equal(v, own[n]) for n, v in lifted.module.state_dict().items())
    assert all(v.dtype != torch.float64 for v in lifted.module.state_dict().values() if v.is_floating_point())


def test_file_round_trip(tmp_path: Path) -> None:
    x, y = classes(6, 5, 3)
    certificate = lc.lift(deep(3), x, split=3).verify(x, y, loss=F.cross_entropy)
    assert lc.Certificate.load(certificate.save(tmp_path / "c.json")) == certificate
    with pytest.raises(lc.DataError, match="there is no such file"):
        lc.Certificate.load(tmp_path / "absent.json")
    (tmp_path / "bad.json").write_text("{}")
    with pytest.raises(lc.DataError, match=r"bad\.json:1: required key 'model' is missing"):
        lc.Certificate.load(tmp_path / "bad.json")


def test_nan_is_not_ok() -> None:
    assert not Residual(kind="defect", name="h1", mode="eval", value=float("nan"), tolerance=1.0, scale=1.0).ok


def test_names_are_the_users() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = nn.Linear(5, 4)
            self.decoder = nn.Linear(4, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.decoder(self.encoder(x))

    x, y = classes(6, 5, 3)
    certificate = lc.lift(Model(), x, split=2).verify(x, y, loss=F.cross_entropy)
    names = {r.name for r in certificate.residuals}
    assert {"h1 (after encoder)", "encoder.weight", "decoder.bias"} <= names
    assert "certificate for Model in float64: ok" in str(certificate)


def test_one_example_is_enough_and_each_residual_is_counted_once() -> None:
    x, y = classes(3, 5, 3)
    certificate = lc.lift(deep(3), x, split=3).verify(x[:1], y[:1], loss=F.cross_entropy)
    assert certificate.ok
    assert certificate.rows == 1
    words = str(certificate).split()
    assert sum(int(words[i - 1]) for i, w in enumerate(words) if w == "checked,") == len(certificate.residuals)
