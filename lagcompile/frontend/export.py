"""Capture with torch.export (non-strict): the second front end, for models whose Python torch.fx cannot follow.

In: a private copy of the model, its signature, example tensors. Out: `Traced`, one graph for each mode, over the copy.
Invariant: parameters and buffers are read under the user's names, torch's layers are calls of the user's modules,
changes of buffers are operations of the graph, and the batch size is free wherever the model leaves it free.
"""

from __future__ import annotations

import importlib
import operator as operators
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx, nn

from lagcompile.frontend.capture import is_users
from lagcompile.frontend.graphmodule import StageGraph
from lagcompile.frontend.guards import sizes_of
from lagcompile.frontend.leaves import Calls, layers_as_calls, operator, parameters_of
from lagcompile.frontend.proxies import Custom, DataAsDetach, inference_as_no_grad, lengths, unchecked_distributions
from lagcompile.frontend.regions import Layer, Region, region_of
from lagcompile.frontend.signature import Signature
from lagcompile.frontend.still import Before
from lagcompile.frontend.structure import Reference, leaves, opened, transform
from lagcompile.frontend.symbolic import Traced
from lagcompile.ir.alone import ALONE, without_logs, without_prints, without_warnings

_CHECKS = ("_assert_tensor_metadata", "_assert_scalar", "_assert_async", "sym_constrain_range", "_check")
_VALUES = (Tensor, torch.SymInt, torch.SymFloat, torch.SymBool)
"""Types of what a graph returns: numbers that depend on sizes are values, too."""


class _Adapter(nn.Module):
    """The model with a flat list of tensors in, a flat tuple of tensors out."""

    def __init__(self, model: nn.Module, signature: Signature, calls: Calls) -> None:
        super().__init__()
        self.model = model
        self.signature = signature
        self.calls = calls

    def forward(self, *tensors: Any) -> tuple[Any, ...]:
        held = dict(self.model.named_buffers())
        self.calls.placed = parameters_of(self.model)  # as torch.export put them there
        output = opened(self.signature.call(self.model, list(tensors)))
        self._write_back(held)
        self.calls.output = transform(output, lambda v: Reference("") if isinstance(v, _VALUES) else v)
        return tuple(v for v in leaves(output) if isinstance(v, _VALUES))

    def _write_back(self, held: Mapping[str, Tensor]) -> None:
        """Make `self.buffer = value` an operation of the graph (torch.export drops it in sub-modules)."""
        for name, before in held.items():
            path, _, last = name.rpartition(".")
            owner = self.model.get_submodule(path)
            now = owner._buffers.get(last)
            if now is not None and now is not before:
                with torch.no_grad():
                    before.copy_(now)
                owner._buffers[last] = before


def export(
    model: nn.Module, signature: Signature, tensors: Sequence[Tensor], whole: Mapping[str, str], dynamic: bool = True
) -> Traced:
    """Graph of a model in the mode that it is in.

    Args:
        model: the private copy; it is left as it was.
        signature: how it is called.
        tensors: example inputs.
        whole: module paths to keep as one node each, with the reason.
        dynamic: leave the size of the first axis free where all inputs share it.

    Raises:
        Exception: what torch.export says about the model's Python.
    """
    before = Before(model)
    try:
        with (
            quietly(),
            torch.enable_grad(),
            DataAsDetach(),
            lengths(),
            inference_as_no_grad(),
            unchecked_distributions(),
            layers_as_calls(model, whole) as calls,
        ):
            adapter = _Adapter(model, signature, calls)
            program = torch.export.export(
                adapter, tuple(tensors), dynamic_shapes=_shapes(tensors, dynamic), strict=False
            )
    finally:
        before.put_back()
    traced = _Converter(model, signature, program, calls).traced(calls.output, whole)
    return replace(traced, sizes=sizes_of(program, tensors))


@contextmanager
def quietly() -> Iterator[None]:
    """Keep torch.export's own log and warnings to itself: what went wrong is in its exception."""
    with (
        ALONE,
        without_warnings(),
        without_logs("torch"),
        without_prints(importlib.import_module("torch.export._trace")),
    ):
        yield


def _shapes(tensors: Sequence[Tensor], dynamic: bool) -> Any:
    sizes = {t.shape[0] for t in tensors if t.dim() > 0}
    if not dynamic or len(sizes) != 1 or sizes <= {0, 1}:
        return None
    return (tuple({0: torch.export.Dim.AUTO} if t.dim() else None for t in tensors),)


class _Converter:
    """Rewrites an exported program as a graph over the private copy."""

    def __init__(self, model: nn.Module, signature: Signature, program: Any, calls: Calls) -> None:
        self.model = model
        self.signature = signature
        self.program = program
        self.calls = calls
        self.graph = fx.Graph()
        self.env: dict[fx.Node, Any] = {}
        self.attributes: dict[str, Any] = {}
        """Constants and regions, by the name under which the graph reads them."""

    def traced(self, template: Any, whole: Mapping[str, str]) -> Traced:
        """The converted graph with what it needs besides the model."""
        self._placeholders()
        source = self.program.graph_module
        for node in source.graph.nodes:
            if node.op not in {"placeholder", "output"}:
                self._node(node, source)
        outputs = self._outputs(source)
        names = iter(outputs)
        filled = transform(template, lambda v: Reference(next(names).name) if isinstance(v, Reference) else v)
        self.graph.output(tuple(outputs))
        _drop_unused(self.graph)
        _write_early(self.graph)
        used = {c.path for c in self.calls.made}
        kept = {path: why for path, why in whole.items() if path in used}
        return Traced(self.graph, filled, kept, {}, self.attributes)

    def _placeholders(self) -> None:
        described = self.program.graph_signature
        parameters = {**described.inputs_to_parameters, **described.inputs_to_buffers}
        constants = described.inputs_to_lifted_tensor_constants
        names = iter(self.signature.names)
        placeholders = [n for n in self.program.graph_module.graph.nodes if n.op == "placeholder"]
        for node in placeholders:  # the user's inputs come first
            if node.name in described.user_inputs:
                self.env[node] = self.graph.placeholder(next(names))
        for node in placeholders:
            if node.name in parameters:
                self.env[node] = self.graph.get_attr(parameters[node.name].removeprefix("model."))
            elif node.name in constants:
                name = f"_constant_{len(self.attributes)}"
                self.attributes[name] = self.program.constants[constants[node.name]].detach().clone()
                self.env[node] = self._read(name)

    def _read(self, name: str) -> fx.Node:
        with without_warnings():  # the attribute is added when the graph module is built
            return self.graph.get_attr(name)

    def _outputs(self, source: fx.GraphModule) -> list[fx.Node]:
        described = self.program.graph_signature
        by_name = {n.name: n for n in source.graph.nodes}
        for value, buffer in described.buffers_to_mutate.items():
            self._write_back(self.env[by_name[value]], buffer.removeprefix("model."))
        return [self.env[by_name[n]] for n in described.user_outputs]

    def _write_back(self, value: fx.Node, buffer: str) -> None:
        if value.args and isinstance(value.args[0], fx.Node) and _writes(value) and value.args[0].target == buffer:
            return  # written in place already
        target = next((n for n in self.graph.nodes if n.op == "get_attr" and n.target == buffer), None)
        node = self.graph.call_function(torch.ops.aten.copy_.default, (target or self.graph.get_attr(buffer), value))
        node.meta.update(value.meta)

    def _node(self, node: fx.Node, source: fx.GraphModule) -> None:
        if node.op == "get_attr":
            return  # a sub-graph: taken over where it is called
        if any(word in str(node.target) for word in _CHECKS):
            return
        if node.target is operator().target:
            self._layer(node)
        elif node.target is torch.ops.aten.copy_.default and self._repeats(node):
            self.env[node] = self.env[node.args[1]]  # type: ignore[index]
        elif isinstance(node.target, torch._ops.HigherOrderOperator):
            self._region(node, source)
        elif isinstance(self.env.get(node.args[0] if node.args else None), list):  # type: ignore[arg-type]
            self.env[node] = self.env[node.args[0]][node.args[1]]  # type: ignore[index]
        else:
            self.env[node] = self.graph.node_copy(node, lambda n: self.env[n])
            self.env[node].meta = _meta(node)

    def _repeats(self, node: fx.Node) -> bool:
        """A copy of a value into the buffer in which it was computed."""
        target, value = self.env[node.args[0]], self.env[node.args[1]]  # type: ignore[index]
        return _writes(value) and value.args[0] is target

    def _layer(self, node: fx.Node) -> None:
        tensors, number = node.args
        call = self.calls.made[int(number)]  # type: ignore[arg-type]
        if isinstance(call.layer, Custom):
            self.attributes[call.path] = call.layer
        given = [self.env[n] for n in tensors]  # type: ignore[union-attr, index]
        args, kwargs = _plain(call.arguments, given)
        made = self.graph.create_node("call_module", call.path, args, kwargs)  # an attribute may be added later
        made.meta = _meta(node, call.path, type(call.layer))
        self.env[node] = _unpacked(self.graph, call.result, made)

    def _region(self, node: fx.Node, source: fx.GraphModule) -> None:
        body, settings, operands = region_of(node)
        name = f"_region_{len(self.attributes)}"
        module, weights = self._body(getattr(source, str(body.target)))
        self.attributes[name] = Region(module, settings)
        outer = [self.env[n] if isinstance(n, fx.Node) else n for n in operands]
        made = self.graph.call_module(name, (*outer, *(self._attribute(w) for w in weights)))
        made.meta = _meta(node)
        self.env[node] = made

    def _attribute(self, name: str) -> fx.Node:
        found = next((n for n in self.graph.nodes if n.op == "get_attr" and n.target == name), None)
        return found or self.graph.get_attr(name)

    def _body(self, source: fx.GraphModule) -> tuple[fx.GraphModule, list[str]]:
        """A sub-graph as a module: no assertions (a float64 copy would fail them), layers with weights from outside."""
        graph, root = fx.Graph(), nn.Module()
        env: dict[fx.Node, Any] = {}
        weights: dict[str, fx.Node] = {}
        nodes = list(source.graph.nodes)
        for node in nodes:
            if node.op == "placeholder":
                env[node] = graph.placeholder(node.name)
        layers = [n for n in nodes if n.target is operator().target]
        for node in layers:
            path, layer = self.calls.made[int(node.args[1])].path, self.calls.made[int(node.args[1])].layer
            for name, _ in layer.named_parameters(remove_duplicate=False):
                weights.setdefault(f"{path}.{name}", graph.placeholder(f"weight_{len(weights)}"))
        for node in nodes:
            if node.op in {"placeholder", "output"} or any(word in str(node.target) for word in _CHECKS):
                continue
            if node in layers:
                call = self.calls.made[int(node.args[1])]
                layer = call.layer
                names = tuple(n for n, _ in layer.named_parameters(remove_duplicate=False))
                own = call.path.replace(".", "__")
                root.add_module(own, Layer(layer, names))
                args, kwargs = _plain(call.arguments, [env[n] for n in node.args[0]])
                given = (*(weights[f"{call.path}.{n}"] for n in names), *args)
                env[node] = _unpacked(graph, call.result, graph.call_module(own, given, kwargs))
            elif node.args and isinstance(node.args[0], fx.Node) and isinstance(env.get(node.args[0]), list):
                env[node] = env[node.args[0]][node.args[1]]
            else:
                if node.op in {"get_attr", "call_module"}:
                    setattr(root, str(node.target), getattr(source, str(node.target)))
                env[node] = graph.node_copy(node, lambda n: env[n])
        graph.output(fx.node.map_arg(nodes[-1].args[0], lambda n: env[n]))
        return StageGraph(root, graph, "Region"), list(weights)


def _unpacked(graph: fx.Graph, template: Any, made: fx.Node) -> list[fx.Node]:
    """Nodes of a layer's tensors, in order."""
    if isinstance(template, Reference):
        return [made]
    items = getattr(template, "items", ())
    keys = getattr(template, "keys", None) or range(len(items))
    found: list[fx.Node] = []
    for key, item in zip(keys, items, strict=True):
        if any(isinstance(v, Reference) for v in leaves(item)):
            entry = graph.call_function(operators.getitem, (made, key))
            entry.meta = dict(made.meta)
            found += _unpacked(graph, item, entry)
    return found


def _plain(template: Any, given: Sequence[fx.Node]) -> Any:
    """Arguments of a call as plain containers of nodes and constants."""
    if isinstance(template, Reference):
        return given[int(template.name)]
    items = getattr(template, "items", None)
    if items is None or not hasattr(template, "kind"):
        return template
    filled = [_plain(v, given) for v in items]
    if template.keys is not None:
        return dict(zip(template.keys, filled, strict=True))
    return filled if template.kind is list else tuple(filled)


def _writes(node: fx.Node) -> bool:
    """Whether a node writes into its first argument."""
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable and bool(node.args)


def _write_early(graph: fx.Graph) -> None:
    """Write a buffer's new value where it is made: at the end, one mode's write would hold all in between together."""
    place = {n: i for i, n in enumerate(graph.nodes)}
    for node in list(graph.nodes):
        given = node.all_input_nodes
        values, buffers = [n for n in given if n.op != "get_attr"], [n for n in given if n.op == "get_attr"]
        if node.users or not node.op.startswith("call") or len(values) != 1 or len(buffers) != 1:
            continue
        (value,), (buffer,) = values, buffers
        read = any(place[value] < place[u] < place[node] for u in buffer.users)
        if len(value.users) == 1 and _is_new(value) and not read:
            value.append(node)


def _is_new(node: fx.Node) -> bool:
    """Whether a node gives memory of its own."""
    target = node.target
    return isinstance(target, torch._ops.OpOverload) and all(r.alias_info is None for r in target._schema.returns)


def _drop_unused(graph: fx.Graph) -> None:
    """Remove what nothing reads; random operations stay, so that random numbers are those of the model."""
    for node in reversed(list(graph.nodes)):
        if node.users or node.op in {"placeholder", "output"} or _writes(node) or node.op == "call_module":
            continue
        tags = getattr(node.target, "tags", ())
        if torch.Tag.nondeterministic_seeded not in tags:
            graph.erase_node(node)


_FRAME = re.compile(r'File "([^"]+)", line (\d+)')


def _meta(node: fx.Node, path: str | None = None, kind: type[Any] | None = None) -> dict[str, Any]:
    """Module path and source line of an exported node, as torch.fx's tracer would note them."""
    stack = {k: v for k, v in _stack(node) if v[0] or k == ""}
    if path is not None and kind is not None and not any(v[0] == path for v in stack.values()):
        stack[path] = (path, kind)
    lines = [f"{f}:{n}" for f, n in _FRAME.findall(node.meta.get("stack_trace") or "") if is_users(f)]
    return {"nn_module_stack": stack, "source": lines[-1] if lines else ""}


def _stack(node: fx.Node) -> Iterator[tuple[str, tuple[str, Any]]]:
    for key, (path, kind) in (node.meta.get("nn_module_stack") or {}).items():
        own = re.sub(r"@\d+$", "", str(path))
        if own.startswith("model."):
            yield str(key), (own.removeprefix("model."), kind)
