"""Plain nets with unusual parts: names, ties, types, hidden and frozen weights, outputs of every kind.

In: a `random.Random`. Out: `Net`, a module of one input of four features, and a line that says what was drawn.
Invariant: the same seed always gives the same net.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

NAMES = ("body", "code", "graph", "self", "meta", "input", "add", "tanh", "h1", "f0", "class", "0", "a b", "output")
ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "tanh": torch.tanh,
    "relu": torch.relu,
    "gelu": nn.functional.gelu,
    "sin": torch.sin,
}
PARTS = ("none", "none", "norm", "layer norm", "dropout", "complex", "hidden", "whole numbers", "frozen")
TIES = ("none", "none", "weights", "layers", "bias")


class Pair(NamedTuple):
    first: Any
    second: Any


@dataclasses.dataclass
class Record:
    first: Any
    second: Any


Give = Callable[[Tensor, list[Tensor], Tensor, "Net"], Any]
OUTPUTS: Mapping[str, Give] = {
    "output": lambda x, h, y, net: y,
    "states": lambda x, h, y, net: (*h, y),
    "a state alone": lambda x, h, y, net: h[0],
    "data": lambda x, h, y, net: (y, x * 2, x),
    "containers": lambda x, h, y, net: {"y": y, "more": [h[-1], (x.sum(1), None, 3)]},
    "named": lambda x, h, y, net: Pair(y, (h[0],)),
    "record": lambda x, h, y, net: Record(h[-1], y),
    "twice": lambda x, h, y, net: (y, y, h[0], h[0]),
    "weights": lambda x, h, y, net: (y, net.scale * 2, net.scale),
    "whole numbers": lambda x, h, y, net: (y, y.argmax(1), x.shape[0]),
    "views": lambda x, h, y, net: (h[0].t(), y.flatten()),
}


class Net(nn.Module):
    """Some layers of one width, a head, and what was drawn."""

    def __init__(self, source: random.Random) -> None:
        super().__init__()
        self.depth = source.randint(1, 4)
        self.part, self.ties = source.choice(PARTS), source.choice(TIES)
        self.act, self.give = source.choice([*ACTIVATIONS]), source.choice([*OUTPUTS])
        self.named = [f"{source.choice(NAMES)}{i or ''}" for i in range(self.depth)]
        for name in self.named:
            self.add_module(name, nn.Linear(4, 4))
        self.head = nn.Linear(4, 3)
        self.scale: nn.Parameter = nn.Parameter(torch.rand(4) + 0.5)
        self._tie()
        self.extra: Any = None
        if self.part == "norm":
            self.extra = nn.BatchNorm1d(4)
        elif self.part == "layer norm":
            self.extra = nn.LayerNorm(4)
        elif self.part == "dropout":
            self.extra = nn.Dropout(0.3)
        elif self.part == "complex":
            self.turn = nn.Parameter(torch.randn(4, dtype=torch.complex64))
        elif self.part == "hidden":
            self.extra = [nn.Linear(4, 4)]
        elif self.part == "whole numbers":
            self.counts = nn.Parameter(torch.tensor([1, 2, 1, 1]), requires_grad=False)
        elif self.part == "frozen":
            for p in self.parameters():
                p.requires_grad_(source.random() < 0.3)

    def _layers(self) -> list[nn.Linear]:
        found = [self._modules[n] for n in self.named]
        return [m for m in found if isinstance(m, nn.Linear)]

    def _tie(self) -> None:
        first, *others = self._layers()
        for name, layer in zip(self.named[1:], others, strict=True):
            if self.ties == "layers":
                self._modules[name] = first
            elif self.ties == "weights":
                layer.weight = first.weight
            elif self.ties == "bias":
                layer.bias = first.bias

    def _after(self, h: Tensor) -> Tensor:
        if self.part == "complex":
            z = h * self.turn
            return z.real + z.imag
        if self.part == "whole numbers":
            return h * self.counts
        if self.part in {"norm", "layer norm", "dropout", "hidden"}:
            part = self.extra[0] if self.part == "hidden" else self.extra
            result: Tensor = part(h)
            return result
        return h

    def forward(self, x: Tensor) -> Any:
        states, h = [], x
        for layer in self._layers():
            h = self._after(ACTIVATIONS[self.act](layer(h)))
            states.append(h)
        return OUTPUTS[self.give](x, states, self.head(h * self.scale), self)

    def __str__(self) -> str:
        drawn = ("depth", "part", "ties", "act", "give", "named")
        return ", ".join(f"{n} {getattr(self, n)!r}" for n in drawn)


def tensors_of(output: Any) -> list[Tensor]:
    """Tensors of an output, in order."""
    if isinstance(output, Tensor):
        return [output]
    if isinstance(output, Mapping):
        return [t for v in output.values() for t in tensors_of(v)]
    if isinstance(output, tuple | list):
        return [t for v in output for t in tensors_of(v)]
    if dataclasses.is_dataclass(output):
        return [t for f in dataclasses.fields(output) for t in tensors_of(getattr(output, f.name))]
    return []
