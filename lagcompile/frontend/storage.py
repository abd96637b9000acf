"""Which values of a graph are one memory, and which operations write into it.

In: a graph module, and inputs to run it on (or none: then what is known of the operations). Out: `Sharing`, one for
each run. Invariant: two values with no memory in common in any run never see each other's changes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn

from lagcompile.frontend.graphmodule import Runner
from lagcompile.frontend.proxies import IN_PLACE
from lagcompile.frontend.structure import leaves
from lagcompile.frontend.tensors import identical, memory_of

Form = tuple[int, tuple[int, ...], tuple[int, ...]]


@dataclass
class Sharing:
    """What one run showed.

    Attributes:
        memory: node -> keys of the memory that its value is made of.
        writes: node -> names of the inputs that it wrote into.
        same: node -> the input that it gives back.
        bent: nodes that changed the form of a tensor in place (`t_`), which no copy can represent.
        form: node -> offset, shape and strides of its tensor.
    """

    memory: dict[str, frozenset[str]] = field(default_factory=dict)
    writes: dict[str, tuple[str, ...]] = field(default_factory=dict)
    same: dict[str, str] = field(default_factory=dict)
    bent: set[str] = field(default_factory=set)
    form: dict[str, Form] = field(default_factory=dict)


def named_write(node: fx.Node, modules: Mapping[str, nn.Module]) -> bool:
    """Return whether an operation writes into its input, judged by its name."""
    if node.op == "call_module":
        return bool(vars(modules[str(node.target)]).get("inplace")) if str(node.target) in modules else False
    if node.op not in {"call_method", "call_function"}:
        return False
    if isinstance(node.target, torch._ops.OpOverload):
        return node.target._schema.is_mutable
    name = str(getattr(node.target, "__name__", node.target))
    inplace = bool(node.kwargs.get("inplace")) or "out" in node.kwargs
    return inplace or name.strip("_") in _IN_PLACE or (name.endswith("_") and not name.endswith("__"))


_IN_PLACE = frozenset({"setitem", "delitem", *IN_PLACE})


def unclear(node: fx.Node, modules: Mapping[str, nn.Module]) -> bool:
    """Whether an operation may write although its name does not say so: modules that are not torch's, flags."""
    if node.op == "call_module":
        return not type(modules[str(node.target)]).__module__.startswith("torch.nn.modules")
    return node.op == "call_function" and any(a is True for a in node.args)


class _Watcher(Runner):
    """Runs a graph and notes memory and writes."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.found = Sharing()
        self.owner: dict[str, dict[int, str]] = {}
        self.attributes: dict[int, str] = {}

    def run_node(self, n: fx.Node) -> Any:
        before = {s.name: (t, t._version, _form(t)) for s in n.all_input_nodes if isinstance(t := self.env[s], Tensor)}
        hides = unclear(n, self.submodules)  # a write through .data, which no version tells of
        held = {name: t.clone() for name, (t, _, _) in before.items()} if hides else {}
        value = super().run_node(n)
        written = tuple(
            name
            for name, (t, version, _) in before.items()
            if t._version != version or (hides and not identical(t, held[name]))
        )
        if written:
            self.found.writes[n.name] = written
            if any(_form(before[name][0]) != before[name][2] for name in written):
                self.found.bent.add(n.name)
        inherited: dict[int, str] = {}
        for source in n.all_input_nodes:
            inherited |= self.owner.get(source.name, {})
        self.owner[n.name] = {}
        tensors = [value] if isinstance(value, Tensor) else [v for v in leaves(value) if isinstance(v, Tensor)]
        for i, tensor in enumerate(tensors):
            key = memory_of(tensor)
            fresh = n.name if tensor is value else f"{n.name}#{i}"
            if n.op == "get_attr":
                fresh = self.attributes.setdefault(key, fresh)
            self.owner[n.name].setdefault(key, inherited.get(key, fresh))
        self.found.memory[n.name] = frozenset(self.owner[n.name].values())
        if isinstance(value, Tensor):
            self.found.form[n.name] = _form(value)
            same = (name for name, (t, _, _) in before.items() if t is value or _is(t, value))
            if (name := next(same, None)) is not None and (written or value is before[name][0]):
                self.found.same[n.name] = name
        return value


def _form(tensor: Tensor) -> Form:
    if tensor.layout is not torch.strided:
        return 0, tuple(tensor.shape), ()
    return int(tensor.storage_offset()), tuple(tensor.shape), tuple(tensor.stride())


def _is(a: Tensor, b: Tensor) -> bool:
    return memory_of(a) == memory_of(b) and _form(a) == _form(b) and a.dtype == b.dtype


def watched(module: fx.GraphModule, tensors: Sequence[Tensor]) -> Sharing:
    """Return the sharing in one run."""
    watcher = _Watcher(module)
    watcher.run(*tensors)
    return watcher.found


_FRESH_LAYERS: tuple[type[nn.Module], ...] = (nn.Linear, nn.Embedding, nn.LayerNorm, nn.GroupNorm)
_FRESH_LAYERS += (nn.modules.conv._ConvNd, nn.modules.batchnorm._NormBase)
_FRESH_LAYERS += (nn.modules.pooling._MaxPoolNd, nn.modules.pooling._AvgPoolNd)
_FRESH_NAMES = (
    "add sub mul truediv neg matmul pow abs exp log sqrt rsqrt cos tanh sigmoid relu gelu silu softmax log_softmax "
    "sum mean cat stack zeros_like ones_like empty_like full_like rand_like randn_like new_zeros new_ones clone linear "
    "conv1d conv2d conv3d layer_norm batch_norm where max_pool2d avg_pool2d lt gt le ge eq ne and_ or_ bmm mm einsum "
    "scaled_dot_product_attention zeros ones empty full arange"
)
_FRESH_FUNCTIONS = frozenset(_FRESH_NAMES.split())


def assumed(graph: fx.Graph, modules: Mapping[str, nn.Module]) -> tuple[Sharing, Sharing]:
    """Sharing where nothing is run: with the least and with the most that values may have in common."""
    least, most = Sharing(), Sharing()
    for node in graph.nodes:
        inputs = [n.name for n in node.all_input_nodes]
        written = named_write(node, modules)
        for found, shares in ((least, False), (most, not _is_fresh(node, modules))):
            inherited = [found.memory[i] for i in inputs] if shares else []
            found.memory[node.name] = frozenset({node.name}) if not inherited else frozenset().union(*inherited)
            if written and inputs:
                target = node.kwargs.get("out")
                name = target.name if isinstance(target, fx.Node) else inputs[0]
                found.writes[node.name] = (name,)
                gives = getattr(node.target, "__name__", "") not in {"setitem", "delitem"}
                found.memory[node.name] = found.memory[name] if gives else frozenset()
                if gives:
                    found.same[node.name] = name
    return least, most


def _is_fresh(node: fx.Node, modules: Mapping[str, nn.Module]) -> bool:
    """Whether a value is new memory for certain."""
    if node.op in {"placeholder", "get_attr"}:
        return True
    if node.op == "call_module":
        module = modules[str(node.target)]
        return isinstance(module, _FRESH_LAYERS) or (isinstance(module, nn.ReLU) and not module.inplace)
    return str(getattr(node.target, "__name__", node.target)) in _FRESH_FUNCTIONS


def detaches(node: fx.Node) -> bool:
    """Whether a node gives the same memory without gradients."""
    if node.target is getattr:
        return node.args[1] == "data"
    return str(getattr(node.target, "__name__", node.target)) in {"detach", "detached", "detach.default"}
