"""Measured on what could not have failed, or at another scale: it is not assessed, or fails as at every scale."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

import lagcompile as lc
from tests.check.genuine import Net, X, Y, genuine, lifted


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
