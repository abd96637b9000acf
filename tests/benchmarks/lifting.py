"""How long lifting takes: against torch's own tools on the same models, and on very long graphs.

In: nothing. Out: rows of the benchmark table. Invariant: both sides of a ratio are measured in turns, in one process,
in processor seconds (so that a busy machine does not decide).
"""

from __future__ import annotations

import resource
import statistics
import time
import warnings
from collections.abc import Callable

import torch
from torch import Tensor, fx, nn
from torch.fx.passes.shape_prop import ShapeProp

import lagcompile as lc
from lagcompile.workbench.resnet import ResNet
from tests.benchmarks.timing import Row, at_most


class Cell(nn.Module):
    """A recurrent cell of 25 operations."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Linear(width, width) for _ in range(3))

    def forward(self, x: Tensor, h: Tensor) -> Tensor:
        gate = torch.sigmoid(self.a(h) + x)
        new = torch.tanh(self.b(h * gate) + x)
        h = h + torch.sigmoid(self.c(new)) * (new - h)
        h = h * 0.99 + 0.01 * torch.sin(h)
        h = torch.relu(h) - 0.1 * torch.tanh(h)
        return (h / (1 + h.abs())).clamp(-3, 3)


class Rollout(nn.Module):
    """The cell, unrolled over time in Python."""

    def __init__(self, steps: int) -> None:
        super().__init__()
        self.steps, self.cell, self.out = steps, Cell(), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = x[:, 0]
        for t in range(self.steps):
            h = self.cell(x[:, t], h)
        return self.out(h)


class Encoder(nn.Module):
    """A transformer that torch.fx cannot trace."""

    def __init__(self, layers: int = 6) -> None:
        super().__init__()
        self.token = nn.Embedding(100, 64)
        self.layers = nn.ModuleList(nn.TransformerEncoderLayer(64, 4, 128, batch_first=True) for _ in range(layers))
        self.head = nn.Linear(64, 100)

    def forward(self, tokens: Tensor) -> Tensor:
        h = self.token(tokens)
        for layer in self.layers:
            h = layer(h)
        return self.head(h)


def run() -> list[Row]:
    """Rows of the table."""
    return [*_resnet(), *_exported(), *_long()]


def _seconds(calls: list[Callable[[], object]], rounds: int = 3) -> list[float]:
    """Median processor seconds of each call; the calls take turns."""
    found: list[list[float]] = [[] for _ in calls]
    for _ in range(rounds):
        for call, times in zip(calls, found, strict=True):
            start = time.process_time()
            call()
            times.append(time.process_time() - start)
    return [statistics.median(t) for t in found]


def _resnet() -> list[Row]:
    rows = []
    model = ResNet(152).eval()
    for batch, size in ((8, 64), (8, 224)):
        x = torch.randn(batch, 3, size, size)

        def shapes(x: Tensor = x) -> None:
            ShapeProp(fx.symbolic_trace(model)).propagate(x)

        ours, theirs = _seconds([lambda x=x: lc.lift(model, (x,), split=16), shapes])  # type: ignore[misc]
        rows.append(
            at_most(
                f"lift ResNet-152 into 16 stages, input {batch}x3x{size}x{size}, against torch.fx symbolic_trace and "
                "ShapeProp",
                ours / theirs,
                2.0,
                f"{ours:.2f} s against {theirs:.2f} s",
            )
        )
    return rows


def _exported() -> list[Row]:
    torch.manual_seed(0)
    tokens, image = torch.randint(0, 100, (8, 16)), torch.randn(8, 3, 64, 64)
    rows = _beside("a 6-layer transformer", lambda: Encoder().eval(), tokens, ("layers.2", "layers.4"))
    return rows + _beside("ResNet-50", lambda: ResNet(50).eval(), image, ("blocks.4", "blocks.10"))


def _beside(name: str, build: Callable[[], nn.Module], x: Tensor, places: tuple[str, ...]) -> list[Row]:
    """Lifting against torch.export and torch.distributed.pipelining, all cut at the same places."""
    from torch.distributed.pipelining import SplitPoint, pipeline

    model = build()
    free = {0: torch.export.Dim.AUTO}  # lifting leaves the batch size free, so must the other side
    cuts = dict.fromkeys(places, SplitPoint.BEGINNING)
    calls: list[Callable[[], object]] = [
        lambda: lc.lift(model, (x,), split=lc.AtSplit(before=places)),
        lambda: torch.export.export(model, (x,), dynamic_shapes=(free,), strict=False),
        lambda: torch.export.export(model, (x,), strict=False),
        lambda: pipeline(build(), (x,), split_spec=cuts),
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        calls[0](), calls[1]()  # what torch loads on first use is no one's cost
        ours, export, fixed, pipe = _seconds(calls)
    detail = (
        f"{ours:.2f} s against {export:.2f} s; for one batch size only: torch.export {fixed:.2f} s, "
        f"torch.distributed.pipelining {pipe:.2f} s"
    )
    return [
        at_most(f"lift {name}, against torch.export alone, batch size free", ours / export, 1.5, detail),
        Row(f"lift {name}, against torch.distributed.pipelining (one batch size only)", ours / pipe, "", True, detail),
    ]


def _long() -> list[Row]:
    times = {}
    for steps in (500, 1000, 2000):
        model, x = Rollout(steps), torch.randn(4, steps, 8)
        start = time.process_time()
        lifted = lc.lift(model, (x,), split=16)
        times[steps] = time.process_time() - start
    nodes = len(lifted.graph.nodes)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    growth = times[2000] / times[1000]
    return [
        at_most(
            "seconds to lift an unrolled recurrent cell of 2,000 steps into 16 stages",
            times[2000],
            60.0,
            f"{nodes:,} nodes; peak memory of the process {peak:.0f} MiB",
        ),
        at_most(
            "growth of that time from 1,000 to 2,000 steps (2 is linear)",
            growth,
            2.5,
            ", ".join(f"{s} steps {t:.2f} s" for s, t in times.items()),
        ),
    ]
