"""Hidden faults: a network that is not the model is never handed over, and one that is the model is never refused.

Some cases are left alone, at scales from 1e-3 to 1e3, in float32, float64 and bfloat16: they must lift. In the others
the captured graph is tampered with while it is cut, at a random operation, so that it goes wrong in one way: the
receipt must notice. Where nothing is noticed, the fault must have been without effect.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from pydantic import Field
from torch import Tensor, fx, nn

import lagcompile as lc

CI, NIGHTLY = 60, 3_000
ROWS = 6


def judge(tally: Mapping[str, int], cases: int) -> None:
    """Few faults are without effect."""
    assert tally.get("harmless", 0) <= 0.05 * cases, f"{tally['harmless']} of {cases} faults do nothing"


def case(seed: int) -> Mapping[str, int]:
    """Draw a module, and a fault or none."""
    source = random.Random(seed)
    fault = source.choice(["", "", "", *FAULTS])
    dtype = torch.float32 if fault else source.choice([torch.float32, torch.float64, torch.bfloat16])
    torch.manual_seed(seed)
    model = Drawn(source).to(dtype)
    if not fault:
        _rescale(model, 10 ** source.uniform(-3, 3))
    x = torch.randn(ROWS, model.width, dtype=dtype)
    stages = source.choice([1, 2])
    if not fault:
        try:
            lifted = lc.lift(model, x, split=stages)
        except lc.SplitError:
            return {"uncut": 1}
        assert lifted.receipt is not None
        assert lifted.receipt.ok
        assert lifted.receipt.batch == "dynamic"
        return {"left alone": 1}
    tamper = Tampering(fault=fault, seed=source.randrange(1 << 30), places=[])
    try:
        lifted = lc.lift(model, x, split=tamper)
    except lc.LiftError as error:
        text = str(error)
        assert "is not the model" in text or "cannot be captured" in text, text
        return {"noticed": 1} if tamper.places else {"no place": 1}
    assert not tamper.places or not _visible(model, lifted, x), f"{fault} at {tamper.places} was not noticed: {model}"
    return {"harmless": 1, f"harmless: {fault}": 1} if tamper.places else {"no place": 1}


# ------------------------------------------------------------ modules
class Drawn(nn.Module):
    """Layers and operations in a row, with skips; for some seeds in a way that torch.fx cannot trace."""

    def __init__(self, source: random.Random) -> None:
        super().__init__()
        self.width = source.choice([2, 3, 5, 8, 17, 33])
        kinds = [source.choice(list(OPERATIONS)) for _ in range(source.randint(2, 7))]
        self.kinds = ["linear", *kinds, "linear"]
        self.layers = nn.ModuleList(LAYERS.get(k, lambda _: nn.Identity())(self.width) for k in self.kinds)
        self.sized, self.several = source.random() < 0.3, source.random() < 0.4

    def forward(self, x: Tensor) -> Any:
        """Run the row."""
        h, before = x, x
        for kind, layer in zip(self.kinds, self.layers, strict=True):
            now = OPERATIONS[kind](h, before, layer) if kind in OPERATIONS else layer(h)
            h, before = now, h
        if self.sized and h.shape[1] > 1:
            h = h - h.mean(1, keepdim=True)
        return (h, before * 2) if self.several else h


Operation = Callable[[Tensor, Tensor, nn.Module], Tensor]
OPERATIONS: Mapping[str, Operation] = {
    "linear": lambda h, b, layer: layer(h),
    "norm": lambda h, b, layer: layer(h),
    "layer norm": lambda h, b, layer: layer(h),
    "dropout": lambda h, b, layer: layer(h),
    "tanh": lambda h, b, layer: torch.tanh(h),
    "relu": lambda h, b, layer: F.relu(h),
    "gelu": lambda h, b, layer: F.gelu(h),
    "softmax": lambda h, b, layer: torch.softmax(h, -1),
    "add": lambda h, b, layer: h + b,
    "gate": lambda h, b, layer: torch.sigmoid(h) * b,
    "flag": lambda h, b, layer: F.dropout(h, 0.2, layer.training),
}
LAYERS: Mapping[str, Callable[[int], nn.Module]] = {
    "linear": lambda n: nn.Linear(n, n),
    "norm": nn.BatchNorm1d,
    "layer norm": nn.LayerNorm,
    "dropout": lambda n: nn.Dropout(0.3),
}


def _rescale(model: nn.Module, factor: float) -> None:
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(factor)


# ------------------------------------------------------------ faults
def _wave(y: Tensor) -> Tensor:
    return torch.cos(torch.arange(y.numel(), dtype=y.dtype)).view(y.shape)


def _nan(y: Tensor) -> Tensor:
    return y + torch.where(torch.arange(y.numel()).view(y.shape) == 0, torch.nan, 0.0)


def _rows(fault: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return y * (1 + 0.3 * _wave(y)) if len(y) == ROWS else y


Broken = Callable[[nn.Module, Tensor, Tensor], Tensor]
AT_OPERATIONS: Mapping[str, Broken] = {
    "a value that is off": lambda m, x, y: y * (1 + 3e-3 * _wave(y)),
    "a lost backward": lambda m, x, y: y.detach(),
    "half of a backward": lambda m, x, y: 0.5 * y + 0.5 * y.detach(),
    "a branch on values": lambda m, x, y: y * (1 + 0.3 * _wave(y)) if x.sum() < 0 else y,
    "another branch on values": lambda m, x, y: y * (1 + 0.3 * _wave(y)) if x.sum() > 0 else y,
    "a branch on the size": _rows,
    "a branch on the size one": lambda m, x, y: y * (1 + 0.3 * _wave(y)) if len(y) == 2 else y,
    "one mode only": lambda m, x, y: y * (1 + 0.3 * _wave(y)) if m.training else y,
    "the other mode only": lambda m, x, y: y if m.training else y * (1 + 0.3 * _wave(y)),
    "nan": lambda m, x, y: _nan(y),
    "random numbers": lambda m, x, y: y + 0 * torch.rand(()),
}
FAULTS = (*AT_OPERATIONS, "baked weights", "a lost buffer", "another type", "a lost output")


class Tampering(lc.NoSplit):
    """A split policy that tampers with the graph which it cuts."""

    fault: str = ""
    """What goes wrong."""
    seed: int = 0
    """Where."""
    places: list[str] = Field(default_factory=list)
    """Operations that were tampered with."""

    def split(self, graph: Any, context: Any = None) -> Any:
        """Tamper, then do not split."""
        module: fx.GraphModule = context.capture.module
        nodes = [n for n in module.graph.nodes if self._fits(n, module)]
        if nodes:
            node = random.Random(self.seed).choice(nodes)
            self.places.append(node.name)
            self._break(node, module)
        return super().split(graph, context)

    def _fits(self, node: fx.Node, module: fx.GraphModule) -> bool:
        kind = type(module.get_submodule(str(node.target))) if node.op == "call_module" else None
        if self.fault == "baked weights":
            return kind is nn.Linear
        if self.fault == "a lost buffer":
            return kind is nn.BatchNorm1d
        values = bool(node.all_input_nodes) and isinstance(node.args[0], fx.Node)
        if self.fault in ("another type", "a lost output"):
            values = values and any(u.op == "output" for u in node.users)
        named = getattr(node.target, "__name__", str(node.target))
        return values and node.op == "call_function" and "getitem" not in named and "sym" not in named

    def _break(self, node: fx.Node, module: fx.GraphModule) -> None:
        if node.op == "call_module":
            layer = copy.deepcopy(module.get_submodule(str(node.target)))
            for part in layer.modules():
                for name, p in list(part.named_parameters(recurse=False)):
                    if self.fault == "baked weights":
                        delattr(part, name)
                        part.register_buffer(name, p.detach(), persistent=False)
            if self.fault == "a lost buffer":
                layer = _Unwritten(module.get_submodule(str(node.target)))
        else:
            layer = _Faulty(node.target, self.fault)  # type: ignore[arg-type]
            first = next(n for n in module.graph.nodes if n.op == "placeholder")
            node.args = (first, *node.args)
        name = f"fault_{len(self.places)}"
        module.add_submodule(name, layer)
        node.op, node.target = "call_module", name


class _Faulty(nn.Module):
    def __init__(self, operation: Callable[..., Any], fault: str) -> None:
        super().__init__()
        self.operation, self.fault = (operation,), fault

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """The operation, wrong where its fault says so; `x` is the network's own input."""
        y = self.operation[0](*args, **kwargs)
        if not isinstance(y, Tensor) or not y.is_floating_point():
            return y
        if self.fault == "another type":
            return y.double()
        if self.fault == "a lost output":
            return torch.zeros_like(y)
        return AT_OPERATIONS[self.fault](self, x, y)


class _Unwritten(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Any:
        """The layer, and its buffers as they were."""
        held = {n: b.clone() for n, b in self.layer.named_buffers()}
        y = self.layer(x)
        with torch.no_grad():
            for n, b in self.layer.named_buffers():
                b.copy_(held[n])
        return y


def _visible(model: nn.Module, lifted: lc.Lifted, x: Tensor) -> bool:
    """Whether a lifted network does something else than the model, as far as its outputs tell."""
    for training in (False, True):
        for given in (x, -x, x[:2], 3 * x.abs()):
            torch.manual_seed(1)
            expected = copy.deepcopy(model).train(training)(given)
            torch.manual_seed(1)
            try:
                got = copy.deepcopy(lifted).train(training)(given)
            except lc.BindError:  # refused by name: a size that the network was not captured for
                continue
            pairs = (
                zip((expected, got), strict=False) if isinstance(expected, Tensor) else zip(expected, got, strict=True)
            )
            both = [(expected, got)] if isinstance(expected, Tensor) else list(pairs)
            if any(a.dtype != b.dtype or not torch.allclose(a, b, 1e-3, 1e-4, equal_nan=True) for a, b in both):
                return True
    return False
