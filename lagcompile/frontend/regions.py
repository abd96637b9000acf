"""Parts of an exported graph that run under a setting: without gradients, or under autocast.

In: a higher-order operator's node. Out: `Region`, a plain module that applies the setting and runs the part. Invariant:
a region runs under vmap, jvp and autograd as the user's own `with` block does.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx, nn
from torch.func import functional_call

from lagcompile.ir.base import LiftError

Settings = tuple[str, tuple[Any, ...]]


class Region(nn.Module):
    """A sub-graph under `torch.set_grad_enabled` or `torch.autocast`."""

    def __init__(self, body: fx.GraphModule, settings: Settings) -> None:
        super().__init__()
        self.body = body
        self.settings = settings

    def forward(self, *operands: Any) -> Any:
        """Run the part under its setting."""
        kind, values = self.settings
        if kind == "grad":
            with torch.set_grad_enabled(values[0]):
                return self.body(*operands)
        device, dtype, enabled, cache = values
        with torch.autocast(device, dtype=dtype, enabled=enabled, cache_enabled=cache):
            return self.body(*operands)


class Layer(nn.Module):
    """A layer whose parameters are inputs, so that they keep their names outside."""

    def __init__(self, layer: nn.Module, names: tuple[str, ...]) -> None:
        super().__init__()
        self.layer = (layer,)
        self.names = names

    def forward(self, *operands: Any, **kwargs: Any) -> Any:
        """Run the layer with its parameters, which come first."""
        count = len(self.names)
        weights = dict(zip(self.names, operands[:count], strict=True))
        return functional_call(self.layer[0], weights, operands[count:], kwargs)


def region_of(node: fx.Node) -> tuple[fx.Node, Settings, Sequence[Any]]:
    """Sub-graph, settings and operands of a higher-order operator's node.

    Raises:
        LiftError: an operator that is no `with` block (control flow on values, for one).
    """
    name = str(node.target)
    args: tuple[Any, ...] = node.args
    if "wrap_with_set_grad_enabled" in name:
        return args[1], ("grad", args[:1]), args[2:]
    if "wrap_with_autocast" in name:
        return args[4], ("autocast", args[:4]), args[5:]
    raise LiftError(
        f"the model uses {name}, which cannot be cut: call it inside a sub-module, which is then kept whole"
    )
