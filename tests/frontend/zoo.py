"""Small models, one for each thing that people's models do; every one must lift."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from tests.nets import Normalised, Residual


class FunctionalDropout(nn.Module):
    """fx freezes the flag."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(F.dropout(torch.tanh(self.a(x)), 0.4, training=self.training))


class StochasticDepth(nn.Module):
    """Other operations in train mode than in eval mode."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.a(x))
        y = torch.tanh(self.b(h))
        if self.training:
            keep = torch.empty(y.shape[0], 1, dtype=y.dtype).bernoulli_(0.8)
            y = y * keep / 0.8
        return self.c(h + y)


class TrainOnlyLayer(nn.Module):
    """A layer with weights that runs in one mode only."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.a(x))
        if self.training:
            h = h + self.b(h)
        return self.c(h)


class CountedInPlace(nn.Module):
    """Buffers of the model itself, one changed in place, one assigned."""

    count: Tensor
    mean: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 3)
        self.register_buffer("count", torch.zeros(()))
        self.register_buffer("mean", torch.zeros(6))

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.a(x))
        if self.training:
            self.count += 1
            self.mean = 0.9 * self.mean + 0.1 * h.detach().mean(0)
        return self.b(h - self.mean)


class Centre(nn.Module):
    mean: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(6))

    def forward(self, x: Tensor) -> Tensor:
        self.mean.mul_(0.9).add_(0.1 * x.detach().mean(0))
        return x - self.mean


class CountedInside(nn.Module):
    """A sub-module that changes its buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.centre, self.b = nn.Linear(6, 6), Centre(), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.relu(self.centre(self.a(x))))


class ShapeControl(nn.Module):
    """Control flow on shapes."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.a(x))
        if h.shape[1] > 4:
            h = h.reshape(h.shape[0] * 2, 3).view(-1, 6)
        return self.b(h)


class InPlace(nn.Module):
    """In-place operations on values that are read again."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        h.mul_(2.0)
        h[:, 0] = 1.0
        v = h[:, 2:]
        v.add_(1.0)
        y = self.b(F.relu(h, inplace=True))
        y += h
        return self.c(y)


class Views(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 12), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        p, q = torch.tanh(self.a(x)).chunk(2, dim=1)
        r = torch.stack([p, q], 1).transpose(1, 2).flatten(1)
        return self.b(r[:, ::2] * p + q.flip(1))


class TiedTransformer(nn.Module):
    """Integer inputs, embeddings, attention, tied input and output embeddings."""

    def __init__(self) -> None:
        super().__init__()
        self.token, self.place = nn.Embedding(11, 8), nn.Embedding(7, 8)
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(8, 2, 12, dropout=0.2, batch_first=True) for _ in range(2)
        )
        self.head = nn.Linear(8, 11, bias=False)
        self.head.weight = self.token.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.token(tokens) + self.place(torch.arange(tokens.shape[1]))
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.qkv, self.out = nn.Linear(8, 24), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y, weights = self.attention(self.norm(x), x, x)
        q, k, v = self.qkv(x + y).chunk(3, -1)
        z = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(z), weights


class Recurrent(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 5)
        self.cell: nn.RNNBase = {"rnn": nn.RNN, "gru": nn.GRU, "lstm": nn.LSTM}[kind](5, 6, 2, batch_first=True)
        self.outer = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        y, _ = self.cell(torch.tanh(self.inner(x)))
        return self.outer(y[:, -1])


class Unrolled(nn.Module):
    """A Python loop over time with a learned first state."""

    def __init__(self) -> None:
        super().__init__()
        self.cell, self.first, self.out = nn.GRUCell(4, 6), nn.Parameter(torch.zeros(6)), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first.expand(x.shape[0], -1)
        for t in range(5):
            h = self.cell(x[:, t], h)
        return self.out(h)


class Norms(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 4, 3, padding=1)
        self.batch, self.group, self.instance = nn.BatchNorm2d(4), nn.GroupNorm(2, 4), nn.InstanceNorm2d(4)
        self.drop, self.out = nn.Dropout2d(0.3), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.group(torch.relu(self.batch(self.conv(x))))
        return self.out(self.drop(self.instance(h)).mean((2, 3)))


class Frozen(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8)).requires_grad_(False)
        self.head = nn.Sequential(nn.ReLU(), nn.Linear(8, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x))


class HardCodedFloat32(nn.Module):
    """Casts and constants of float32 that a float64 copy would run into."""

    table: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 3)
        self.register_buffer("table", torch.arange(6, dtype=torch.float32))

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.a(x)).to(torch.float32) * self.table.float()
        scale = torch.tensor([0.5], dtype=torch.float32)
        angle = torch.arange(6, dtype=torch.float32, device=x.device)
        weights = F.softmax(h, -1, dtype=torch.float32).type_as(h)
        return self.b(h * scale + angle.cos() * weights)


class OfBuffers(nn.Module):
    """Constants that follow from buffers, and are no round numbers."""

    variance: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 3)
        self.register_buffer("variance", torch.rand(6) + 0.1)

    def forward(self, x: Tensor) -> Tensor:
        scale = 1 / (self.variance**0.5 + 1e-8)
        return self.b(torch.tanh(self.a(x * scale)) * scale)


class HalfPrecision(nn.Module):
    """bfloat16 in the middle."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 3)
        self.b.bfloat16()

    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.b(torch.tanh(self.a(x)).to(torch.bfloat16)).to(torch.float32))


class Several(nn.Module):
    """Two inputs, an optional one by keyword, a dictionary out."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 5), nn.Embedding(4, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor, kind: Tensor, *, scale: Tensor | None = None, bias: float = 0.0) -> dict[str, Any]:
        h = torch.tanh(self.a(x)) + self.b(kind)
        if scale is not None:
            h = h * scale
        return {"logits": self.c(h) + bias, "parts": (h, [h.sum(1)]), "name": "several"}


@dataclass
class Output:
    logits: Tensor
    hidden: Tensor | None = None
    tag: str = field(default="", init=False)


class Pair(NamedTuple):
    mean: Tensor
    spread: Tensor


class DataclassOut(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 5), nn.Linear(5, 4)

    def forward(self, x: Tensor) -> Output:
        h = torch.tanh(self.a(x))
        return Output(self.b(h), h)


class NamedOut(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 5), nn.Linear(5, 4)

    def forward(self, *parts: Tensor) -> Pair:
        mean, spread = self.b(torch.tanh(self.a(torch.cat(parts, 1)))).chunk(2, 1)
        return Pair(mean, F.softplus(spread))


class NoGrad(nn.Module):
    """A part without gradients, another under autocast."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.a(x))
        with torch.no_grad():
            gate = torch.sigmoid(h * 2)
        if h.shape[1] == 6:
            h = self.b(h) * gate.detach()
        with torch.autocast("cpu", enabled=False):
            return self.c(h)


class Noisy(nn.Module):
    """Noise on the inputs and between layers."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.a(x + 0.1 * torch.randn_like(x)))
        h = torch.tanh(self.b(h + 0.1 * torch.randn_like(h)))
        return self.c(h * (1 + 0.1 * torch.rand_like(h)))


class Auxiliary(nn.Module):
    """An auxiliary head with weights and dropout in train mode: another output structure than in eval mode."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 3)
        self.auxiliary = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Dropout(0.3), nn.Linear(5, 3))

    def forward(self, x: Tensor) -> Tensor | Pair:
        h = torch.tanh(self.a(x))
        side = self.auxiliary(h) if self.training else None
        y = self.c(F.dropout(torch.tanh(self.b(h)), 0.2, self.training))
        return y if side is None else Pair(y, side)


class LayerDrop(nn.Module):
    """Layers that are left out at random: control flow on a random number."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6), nn.Tanh())
        self.rest, self.last = _Dropped(), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.rest(self.first(x)))


class _Dropped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(6, 6) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            if not self.training or torch.rand([]) > 0.3:
                x = torch.tanh(layer(x))
        return x


class Shared(nn.Module):
    """One layer called twice, a parameter used by itself, an output that is an intermediate value."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 3)
        self.shift = nn.Parameter(torch.randn(6))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = torch.tanh(self.a(x) + self.shift)
        y = torch.tanh(self.a(h) * torch.softmax(self.shift, 0))
        return self.b(y + h), h


def vector(batch: int) -> tuple[Tensor, ...]:
    return (torch.randn(batch, 6),)


def sequence(batch: int) -> tuple[Tensor, ...]:
    return (torch.randn(batch, 5, 4),)


@dataclasses.dataclass(frozen=True)
class Case:
    """A model, its inputs for a batch size, keyword inputs, and what should capture it."""

    build: Callable[[], nn.Module]
    inputs: Callable[[int], tuple[Tensor, ...]] = vector
    kwargs: Callable[[int], dict[str, Any]] = lambda batch: {}
    front_end: str = "torch.fx"
    whole: tuple[str, ...] = ()


STOPS = frozenset({"buffers of the model", "buffer of a sub-module", "no grad"})
"""Cases that stop a gradient, which is not the derivative of the loss then: a certificate says no more than that."""
ZOO: Mapping[str, Case] = {
    "residual": Case(Residual),
    "normalised": Case(Normalised, lambda n: (torch.randn(n, 1, 4, 4),)),
    "functional dropout": Case(FunctionalDropout),
    "stochastic depth": Case(StochasticDepth),
    "layer in train only": Case(TrainOnlyLayer),
    "buffers of the model": Case(CountedInPlace, front_end="torch.export"),
    "buffer of a sub-module": Case(CountedInside),
    "shape control": Case(ShapeControl, front_end="torch.export"),
    "in place": Case(InPlace),
    "views": Case(Views),
    "tied transformer": Case(TiedTransformer, lambda n: (torch.randint(0, 11, (n, 6)),), front_end="torch.export"),
    "attention": Case(Attention, lambda n: (torch.randn(n, 4, 8),)),
    "rnn": Case(lambda: Recurrent("rnn"), sequence),
    "gru": Case(lambda: Recurrent("gru"), sequence),
    "lstm": Case(lambda: Recurrent("lstm"), sequence),
    "unrolled": Case(Unrolled, sequence),
    "norms": Case(Norms, lambda n: (torch.randn(n, 2, 4, 4),)),
    "frozen": Case(Frozen),
    "hard-coded float32": Case(HardCodedFloat32),
    "functions of buffers": Case(OfBuffers),
    "bfloat16": Case(HalfPrecision),
    "several": Case(
        Several,
        lambda n: (torch.randn(n, 6), torch.arange(n) % 4),
        lambda n: {"scale": torch.rand(n, 1), "bias": 0.5},
    ),
    "several without": Case(Several, lambda n: (torch.randn(n, 6), torch.arange(n) % 4)),
    "dataclass out": Case(DataclassOut),
    "named tuple out": Case(NamedOut, lambda n: (torch.randn(n, 4), torch.randn(n, 2))),
    "no grad": Case(NoGrad, front_end="torch.export"),
    "noisy": Case(Noisy),
    "layer drop": Case(LayerDrop, whole=("rest",)),
    "shared": Case(Shared),
    "auxiliary head": Case(Auxiliary),
}
