"""Capture with torch.fx's symbolic trace: the first front end.

In: a private copy of the model, its signature, modules to keep whole. Out: `Traced`, a graph over the copy. Invariant:
the copy's buffers are as they were; a sub-module that cannot be traced is kept whole, as one opaque node.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx, nn

from lagcompile.frontend.capture import Sizes, reason_of, user_line
from lagcompile.frontend.proxies import (
    Custom,
    Proxy,
    Reads,
    custom_functions,
    detached,
    lengths,
    unchecked_distributions,
)
from lagcompile.frontend.signature import Signature
from lagcompile.frontend.still import Before
from lagcompile.frontend.storage import named_write
from lagcompile.frontend.structure import Reference, leaves, opened, transform
from lagcompile.ir.alone import ALONE

# torch.nn classes that hold several layers, and whose forward is worth looking into
_LAYERED = ("Transformer", "TransformerEncoder", "TransformerDecoder", "TransformerEncoderLayer")
_LAYERED_TYPES = (*_LAYERED, "TransformerDecoderLayer", "Sequential", "ModuleList", "ModuleDict")


@dataclass(frozen=True)
class Traced:
    """A graph of a model in one mode.

    Attributes:
        graph: the graph; its output is a flat tuple.
        output: template of the output, with references to nodes.
        whole: modules kept as one node -> why.
        faults: modules whose forward did while it was traced what the graph now lacks (changed a buffer, drew random
            numbers on which its control flow depends) -> what it did; '' is the model itself.
        attributes: constants and modules that the graph reads besides the model's own, by name.
        sizes: the inputs' sizes that the graph holds for.
    """

    graph: fx.Graph
    output: Any
    whole: Mapping[str, str]
    faults: Mapping[str, str]
    attributes: Mapping[str, Any] = field(default_factory=dict)
    sizes: Sizes = field(default_factory=Sizes)


_RANDOM = "its forward draws random numbers that its control flow or its constants depend on (LayerDrop: set it to 0)"


_FACTORIES = (torch.zeros, torch.ones, torch.empty, torch.full, torch.arange, torch.rand, torch.randn, torch.eye)
"""Functions of sizes alone, which are not values of the trace unless they are named."""


def is_leaf(module: nn.Module) -> bool:
    """Whether a module is one operation: torch's own layers, but not its containers of layers."""
    kind = type(module)
    return kind.__module__.startswith(("torch.nn", "torch.ao.nn")) and kind.__name__ not in _LAYERED_TYPES


def trace(model: nn.Module, signature: Signature, whole: Mapping[str, str]) -> Traced:
    """Trace a model in the mode that it is in.

    Args:
        model: the private copy; tracing runs its Python code, changes to buffers are undone.
        signature: how it is called.
        whole: module paths to keep as one node each, with the reason.

    Raises:
        Exception: whatever the model's forward raises on proxies for tensors.
    """
    traced = _trace(model, signature, whole)
    for made in (True, False):
        if not traced.faults and not _folded(traced.graph):
            break
        try:  # what follows from buffers must follow when they change, or are converted
            again = _trace(model, signature, whole, buffers=True, made=made)
        except Exception:  # control flow on one of them: a constant as long as the model is the same
            continue
        worse = (
            again.faults
            or dict(again.whole) != dict(traced.whole)
            or (not traced.faults and len(_folded(again.graph)) >= len(_folded(traced.graph)))
        )
        return traced if worse else again
    return traced


def _folded(graph: fx.Graph) -> list[fx.Node]:
    """Constants that the trace computed: from buffers, or from nothing."""
    return [n for n in graph.nodes if n.op == "get_attr" and str(n.target).startswith("_tensor_constant")]


def _trace(
    model: nn.Module, signature: Signature, whole: Mapping[str, str], *, buffers: bool = False, made: bool = False
) -> Traced:
    """A trace in which buffers (`buffers`), and tensors that are made of numbers (`made`), are values, or constants."""
    tracer = _Tracer(model, signature, whole)
    tracer.proxy_buffer_attributes = buffers
    before = Before(model)
    versions = {n: b._version for n, b in before.held.items()}
    try:
        with ALONE, torch.random.fork_rng(devices=[]), torch.enable_grad():
            state = torch.get_rng_state()
            reads = Reads(tracer.parameter, tracer if made else None)
            with custom_functions(tracer.custom), unchecked_distributions(), reads, lengths():
                graph = tracer.trace(model)
            if not tracer.faults and not torch.equal(state, torch.get_rng_state()):
                tracer.faults[""] = _RANDOM
        changed = [n for n, b in model.named_buffers() if b is not before.held.get(n) or b._version != versions[n]]
    finally:
        before.put_back()
    faults = tracer.faults | {n.rpartition(".")[0]: f"its forward changes the buffer '{n}'" for n in changed}
    _stopped(graph, model)
    output = next(n for n in reversed(graph.nodes) if n.op == "output")
    names = iter(output.args[0])
    template = transform(tracer.template, lambda v: Reference(next(names).name) if isinstance(v, Reference) else v)
    return Traced(graph, template, dict(tracer.opaque), faults, tracer.attributes)


def _stopped(graph: fx.Graph, model: nn.Module) -> None:
    """Stop gradients behind what was traced without them; a write gives back its input, which keeps its gradient."""
    modules = dict(model.named_modules(remove_duplicate=False))
    for node in list(graph.nodes):
        node.meta.pop("is_wrapped", None)  # torch.fx would declare the function to be wrapped for the whole process
        if node.meta.get("grad", True) or not node.op.startswith("call") or named_write(node, modules):
            continue
        readers = [u for u in node.users if u.meta.get("grad", True)]
        if readers:
            with graph.inserting_after(node):
                made = graph.call_function(detached, (node,))
            made.meta = {k: v for k, v in node.meta.items() if k != "grad"}
            for reader in readers:
                reader.replace_input_with(node, made)


class _Tracer(fx.Tracer):
    """torch.fx's tracer with our arguments, source lines, and opaque modules in place of failures."""

    def __init__(self, model: nn.Module, signature: Signature, whole: Mapping[str, str]) -> None:
        super().__init__(autowrap_functions=_FACTORIES)
        self._autowrap_search.append(torch)
        self.thread = threading.get_ident()
        self.own: dict[torch.Tensor, str] = {p: n for n, p in model.named_parameters()}
        self.buffers = {b: n for n, b in model.named_buffers()}
        self.placed = {id(m): tuple(m._parameters.items()) for m in model.modules()}
        self.attributes: dict[str, Any] = {}
        self.signature = signature
        self.keep = whole
        self.opaque: dict[str, str] = {}
        self.faults: dict[str, str] = {}
        self.template: Any = None

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        if module_qualified_name in self.keep:
            self.opaque[module_qualified_name] = self.keep[module_qualified_name]
            return True
        return is_leaf(m) and not any(self._moved(p) for p in m.modules())

    def create_args_for_root(
        self, root_fn: Callable[..., Any], is_module: bool, concrete_args: Any = None
    ) -> tuple[Callable[..., Any], list[Any]]:
        proxies = [self.create_proxy("placeholder", name, (), {}) for name in self.signature.names]

        def run(root: nn.Module) -> tuple[Any, ...]:
            output = opened(self.signature.call(lambda *args, **kwargs: root_fn(root, *args, **kwargs), proxies))
            self.template = transform(output, lambda v: Reference("") if _is_value(v) else v)
            return tuple(v for v in leaves(output) if _is_value(v))

        return run, [self.root]

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        node = super().create_node(*args, **kwargs)
        node.meta["source"] = user_line()
        if not torch.is_grad_enabled() and node.op.startswith("call"):
            node.meta["grad"] = False
        return node

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return Proxy(node, self)

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, fx.Proxy]) -> Any:
        if threading.get_ident() != self.thread:
            return attr_val
        buffers = self.proxy_buffer_attributes and isinstance(attr_val, torch.Tensor)
        names = self.own if isinstance(attr_val, nn.Parameter) else self.buffers if buffers else {}
        name = names.get(attr_val)  # torch.fx would go through all names at each read
        if name is None:
            return attr_val
        if name not in parameter_proxy_cache:
            parameter_proxy_cache[name] = self.create_proxy("get_attr", name, (), {})
        return parameter_proxy_cache[name]

    def parameter(self, value: torch.Tensor) -> fx.Proxy | None:
        """Return the proxy of a parameter that was reached by another way than its module's attribute."""
        name = self.own.get(value) if isinstance(value, nn.Parameter) else None
        return None if name is None else self.create_proxy("get_attr", name, (), {})

    def custom(self, function: type[torch.autograd.Function], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """One node for a custom function."""
        if not any(isinstance(v, fx.Proxy) for v in leaves((args, kwargs))):
            return NotImplemented
        name = f"_function_{len(self.attributes)}"
        self.attributes[name] = Custom(function)
        return self.create_proxy("call_module", name, args, kwargs, name=function.__name__)

    def _moved(self, module: nn.Module) -> bool:
        """Whether a module holds other tensors than its own (torch.func.functional_call)."""
        before = self.placed.get(id(module), ())
        return len(before) != len(module._parameters) or any(
            a is not b for (_, a), b in zip(before, module._parameters.values(), strict=True)
        )

    def call_module(
        self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        if threading.get_ident() != self.thread:
            return forward(*args, **kwargs)
        last = next(iter(reversed(self.graph.nodes)))
        stack = dict(self.module_stack)
        state, faults = torch.get_rng_state(), len(self.faults)
        try:
            value = super().call_module(m, forward, args, kwargs)
            if len(self.faults) == faults and not torch.equal(state, torch.get_rng_state()):
                self.faults[self.path_of_module(m)] = _RANDOM
            return value
        except Exception as error:
            path = self.path_of_module(m)
            self.opaque[path] = reason_of(error)
            self.module_stack.clear()
            self.module_stack.update(stack)
            while (node := next(iter(reversed(self.graph.nodes)))) is not last:
                self.graph.erase_node(node)
            return self.create_proxy("call_module", path, args, kwargs)


def _is_value(value: Any) -> bool:
    return isinstance(value, fx.Proxy | torch.Tensor)
