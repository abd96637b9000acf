"""Certificates of random networks and losses: the genuine one holds, and whatever was tampered with does not."""

from __future__ import annotations

import copy
import json
import math
import random
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

import lagcompile as lc

CI, NIGHTLY = 40, 2000
ACTIVATIONS: tuple[Callable[[Tensor], Tensor], ...] = (torch.relu, torch.tanh, F.softplus, torch.sigmoid, F.gelu)


class Net(nn.Module):
    """Layers with skips, norms, dropout and tied weights."""

    def __init__(self, draw: random.Random) -> None:
        super().__init__()
        torch.manual_seed(draw.randrange(2**31))
        self.width, depth = draw.randint(2, 6), draw.randint(1, 4)
        self.layers = nn.ModuleList(nn.Linear(self.width, self.width) for _ in range(depth))
        self.norms = nn.ModuleList(
            draw.choice((nn.Identity(), nn.BatchNorm1d(self.width), nn.LayerNorm(self.width), nn.Dropout(0.2)))
            for _ in range(depth)
        )
        self.activations = [draw.choice(ACTIVATIONS) for _ in range(depth)]
        self.skips = [draw.random() < 0.3 for _ in range(depth)]
        self.head = nn.Linear(self.width, 3)
        if depth > 1 and draw.random() < 0.2:
            self.layers[depth - 1].weight = self.get_parameter("layers.0.weight")
        with torch.no_grad():
            for i in range(depth):
                self.get_parameter(f"layers.{i}.weight").mul_(10 ** draw.uniform(-2, 2))

    def forward(self, x: Tensor) -> Tensor:
        for layer, norm, act, skip in zip(self.layers, self.norms, self.activations, self.skips, strict=True):
            h = norm(act(layer(x)))
            x = h + x if skip else h
        output: Tensor = self.head(x)
        return output


def case(seed: int) -> Mapping[str, int]:
    """One network, its certificate, and one thing of each kind that was tampered with."""
    draw = random.Random(seed)
    model = Net(draw)
    rows = draw.randint(3, 8)
    x, y = torch.randn(rows, model.width) * 10 ** draw.uniform(-3, 3), torch.arange(rows) % 3
    scale = 10 ** draw.uniform(-9, 8)

    def loss(output: Tensor, target: Tensor) -> Tensor:
        return scale * F.cross_entropy(output, target)

    split = draw.randint(1, 1 + len(model.layers))
    try:
        lifted = lc.lift(model, x, split=split)
    except lc.LagcompileError:
        return {"refused": 1}
    genuine = lifted.verify(x, y, loss=loss)
    assert genuine.verdict != "failed", str(genuine)
    if not genuine.ok:
        return {"not assessed": 1}
    assert genuine.check(lifted, x, y, loss=loss) == []
    text(draw, genuine, lambda forged: forged.check(lifted, x, y, loss=loss))
    state(draw, genuine, model, x, split)
    stage(draw, lifted, x, y, loss)
    assert genuine.check(lifted, x.flip(0), y, loss=loss), "other rows"
    assert genuine.check(lifted, x, y, loss=lambda out, target: 2.0 * loss(out, target)), "another loss"
    return {"ok": 1}


def text(draw: random.Random, genuine: lc.Certificate, check: Callable[[lc.Certificate], list[str]]) -> None:
    """A changed entry, without the digest that belongs to it and with it."""
    data: dict[str, Any] = json.loads(genuine.model_dump_json())
    key = draw.choice([k for k in data if k not in ("format", "dtype", "seed", "versions", "facts", "values", "loss")])
    if key == "residuals":
        chosen = draw.choice(data[key])
        what, new = draw.choice(
            (("value", 1e-3), ("value", math.nan), ("tolerance", 1.0), ("scale", 0.0), ("value", 2e-10))
        )
        chosen["tolerance"] = draw.choice((chosen["tolerance"], 1e-2))
        chosen[what] = new
        if draw.random() < 0.3:
            data[key] = []
    else:
        other = {"rows": -1, "modes": ["eval"], "claim": "solution", "unassessed": ["something"], "losses": [0.5]}
        data[key] = other.get(key, "0" * 16)
    forged = lc.Certificate.model_validate_json(json.dumps(data))
    assert not forged.ok, f"{key} was changed"
    sealed = forged.model_copy(update={"digest": forged.own_digest()})
    assert key == "digest" or not sealed.ok or check(sealed), f"{key} was changed, with a fitting digest"


def state(draw: random.Random, genuine: lc.Certificate, model: Net, x: Tensor, split: int) -> None:
    """A parameter or buffer that moved a little."""
    moved = copy.deepcopy(model)
    tensor = draw.choice(list(moved.state_dict(keep_vars=True).values()))
    with torch.no_grad():
        if tensor.is_floating_point():
            flat = tensor.view(-1)
            position = draw.randrange(flat.numel())
            flat[position] = torch.nextafter(flat[position], torch.tensor(math.inf))
        else:
            tensor.add_(1)
    assert genuine.check(lc.lift(moved, x, split=split)), "a number moved"


def stage(
    draw: random.Random, lifted: lc.Lifted, x: Tensor, y: Tensor, loss: Callable[[Tensor, Tensor], Tensor]
) -> None:
    """A stage that computes something else."""
    network = lifted.network.copy()
    module = draw.choice(network.stages).module
    factor = 1.0 + 10 ** draw.uniform(-6, 0)
    for node in module.graph.nodes:
        if node.op == "output":
            with module.graph.inserting_before(node):
                moved = module.graph.call_function(torch.mul, (node.args[0][0], factor))
            node.args = ((moved, *node.args[0][1:]),)
    module.recompile()
    broken = replace(lifted, network=network)
    assert not broken.verify(x, y, loss=loss).ok, f"a stage gives {factor} times what it should"


def judge(tally: Mapping[str, int], cases: int) -> None:
    """Nearly all networks are certified."""
    assert tally.get("ok", 0) >= 0.9 * cases, dict(tally)
