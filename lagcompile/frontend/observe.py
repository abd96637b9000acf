"""What every node of a captured graph gives when it runs: type, work, side effects.

In: a graph module and inputs of two batch sizes. Out: `Observation` by node name. Invariant: the batch axis is the one
whose size follows the batch size of the two runs; work is counted per example.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, fx, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from lagcompile.frontend.effects import Watch
from lagcompile.frontend.graph import Observation
from lagcompile.frontend.graphmodule import Runner
from lagcompile.frontend.structure import leaves
from lagcompile.ir.program import TensorType

Kind = Literal["tensor", "tuple", "other"]
Seen = tuple[Kind, torch.dtype | None, tuple[int, ...]]

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_PRODUCTS: tuple[str, ...] = ("mm", "linear", "conv", "einsum", "matmul", "attention", "tensordot", "dot", "mv")
_PRODUCTS += ("rnn", "lstm", "gru", "bilinear")
_SELECTIONS = ("masked_select", "nonzero", "argwhere", "unique")


class Recorder(Runner):
    """Runs a graph and keeps the shape, dtype, flops and side effects of every value.

    Args:
        module: the graph.
        random: whether the model draws random numbers in this mode (else the generator need not be watched).
        count: whether to count flops.
    """

    def __init__(self, module: fx.GraphModule, *, random: bool, count: bool) -> None:
        super().__init__(module)
        self.seen: dict[str, Seen] = {}
        self.flops: dict[str, int] = {}
        self.selected: set[str] = set()
        """Values whose length depends on values."""
        self.watch = Watch(random=random)
        self.count = count

    def run_node(self, n: fx.Node) -> Any:
        """Run one node and note what it did."""
        self.watch.before(n, self.env)
        counted = self.count and n.op.startswith("call") and self._multiplies(n)
        if counted:
            with _Flops() as counter:
                value = super().run_node(n)
            self.flops[n.name] = counter.total
        else:
            value = super().run_node(n)
        self.watch.after(n, value)
        self.seen[n.name] = _seen(value)
        if isinstance(value, Tensor) and value.dim() and self._selects(n, value):
            self.selected.add(n.name)
        if isinstance(value, Tensor) and n.op.startswith("call"):
            known = 0 if counted or n.op != "call_module" else _work(self.submodules[str(n.target)], value)
            self.flops[n.name] = self.flops.get(n.name, 0) + value.numel() + known
        return value

    def _selects(self, node: fx.Node, value: Tensor) -> bool:
        """Whether a value is a selection of rows, or as long as one that it follows from and as nothing else."""
        name = _name(node) if node.op in {"call_function", "call_method"} else ""
        if any(w in name for w in _SELECTIONS):
            return True
        if name in {"getitem", "index.Tensor"}:
            index = node.args[1]
            first = index[0] if isinstance(index, (tuple, list)) and index else index
            mask = self.env.get(first) if isinstance(first, fx.Node) and first.op != "get_attr" else None
            if isinstance(mask, Tensor) and mask.dtype == torch.bool:
                return True
        given = [(a.name, self.env.get(a)) for a in node.all_input_nodes if a.op != "get_attr"]
        alike = [a in self.selected for a, v in given if isinstance(v, Tensor) and v.shape[:1] == value.shape[:1]]
        return bool(alike) and all(alike)

    def _multiplies(self, node: fx.Node) -> bool:
        """Whether the node may hold matrix products whose work is not known from shapes alone."""
        if node.op != "call_module":
            return any(word in _name(node) for word in _PRODUCTS)
        kind = type(self.submodules[str(node.target)])
        plain = kind.__module__.startswith("torch.nn.modules") and not kind.__module__.endswith(
            (".rnn", ".activation", ".transformer", ".sparse", ".adaptive", ".conv")
        )
        return not plain and kind not in _CONVOLUTIONS


def _name(node: fx.Node) -> str:
    """What a node calls."""
    return node.target if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))


class _Flops(TorchDispatchMode):
    """Adds up the work of matrix products, by torch's own formulas."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type[Any]],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        formula = flop_registry.get(func.overloadpacket)
        if formula is not None:
            self.total += int(formula(*args, **(kwargs or {}), out_val=result))
        return result


def _work(module: nn.Module, value: Tensor) -> int:
    """Flops of a layer whose work follows from its shapes."""
    if isinstance(module, nn.Linear):
        return 2 * value.numel() * module.in_features
    if isinstance(module, _CONVOLUTIONS):
        return 2 * value.numel() * module.weight[0].numel()
    if isinstance(module, nn.Bilinear):
        return 2 * value.numel() * module.in1_features * module.in2_features
    return 0


def _seen(value: Any) -> Seen:
    if isinstance(value, Tensor):
        return "tensor", value.dtype, tuple(value.shape)
    return ("tuple" if any(isinstance(v, Tensor) for v in leaves(value)) else "other"), None, ()


def observations(first: Recorder, second: Recorder, size: int | None, other: int | None) -> dict[str, Observation]:
    """One record per node.

    Args:
        first: a run (in eval mode) that counted flops.
        second: a run in train mode.
        size: batch size of the first run; None where the inputs have no common first axis.
        other: batch size of the second.
    """
    result: dict[str, Observation] = {}
    for name, (kind, dtype, shape) in first.seen.items():
        marked = None
        if kind == "tensor":
            again = second.seen.get(name, (kind, dtype, shape))[2]
            axes = _marked(shape, again, size, other)
            if name in first.selected & second.selected:  # two runs may agree by chance
                axes = ("?", *axes[1:])
            marked = TensorType(dtype=str(dtype).removeprefix("torch."), shape=axes)
        result[name] = Observation(
            kind,
            marked,
            flops=first.flops.get(name, 0) // (size or 1),
            batch=size or 1,
            writes=_both(first.watch.writes, second.watch.writes, name),
            aliases=_both(first.watch.aliases, second.watch.aliases, name),
            random=name in first.watch.random or name in second.watch.random,
        )
    return result


def _both(a: Mapping[str, tuple[str, ...]], b: Mapping[str, tuple[str, ...]], name: str) -> tuple[str, ...]:
    return tuple(dict.fromkeys([*a.get(name, ()), *b.get(name, ())]))


def _marked(
    shape: tuple[int, ...], again: tuple[int, ...], size: int | None, other: int | None
) -> tuple[int | str, ...]:
    if size is None or len(shape) != len(again):
        return shape
    if size == other:
        return tuple("B" if i == 0 and d == size else d for i, d in enumerate(shape))
    marked: list[int | str] = []
    for d, e in zip(shape, again, strict=True):
        if d == e:
            marked.append(d)
        elif d * (other or 1) == e * size:
            marked.append("B" if d == size else f"{d // size}B")
        else:
            marked.append("?")
    return tuple(marked)
