"""The graph of a captured model as plain records, and how values flow through it.

In: a `Capture` and what a run of it showed (`receipt.Observed`), or nothing. Out: `Graph`. Invariant: nodes are in
execution order; names are torch.fx node names; sizes are of one example of the batch that was seen.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Set
from dataclasses import dataclass
from functools import cached_property
from types import BuiltinFunctionType, FunctionType, ModuleType
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import fx, nn

from lagcompile.frontend.capture import Capture
from lagcompile.frontend.effects import ordered
from lagcompile.frontend.structure import leaves
from lagcompile.ir.program import TensorType

if TYPE_CHECKING:
    import networkx as nx

Role = Literal["input", "attribute", "weights", "data", "value", "structure", "output"]
"""input; attribute (parameter or buffer read); weights (from parameters alone, recomputed where it is used);
data (from inputs alone); value (from inputs and parameters); structure (sizes: no tensor); output."""

_STRUCTURE_METHODS = frozenset({"size", "dim", "numel", "stride", "ndimension", "element_size"})
_STRUCTURE_ATTRIBUTES = frozenset({"shape", "ndim", "device", "dtype", "itemsize", "layout", "is_cuda"})


@dataclass(frozen=True)
class Observation:
    """What one node gave in a run: `kind` tensor, tuple or other; the type has 'B' at the batch axis."""

    kind: Literal["tensor", "tuple", "other"]
    type: TensorType | None = None
    flops: int = 0
    batch: int = 1
    writes: tuple[str, ...] = ()
    """Names of the inputs whose memory the operation wrote into."""
    aliases: tuple[str, ...] = ()
    """Names of the nodes whose memory the value shares."""
    random: bool = False
    """Whether it drew random numbers."""


@dataclass(frozen=True)
class Node:
    """One operation of the network."""

    name: str
    op: str
    target: str
    module: str
    module_types: tuple[str, ...]
    inputs: tuple[str, ...]
    parameters: tuple[str, ...]
    role: Role
    type: TensorType | None
    flops: int
    source: str
    floating: bool
    """A floating-point tensor whose size depends on no value, as far as is known: what can be a state."""
    writes: tuple[str, ...] = ()
    """Inputs whose memory it writes into."""
    aliases: tuple[str, ...] = ()
    """Nodes whose memory it shares."""
    random: bool = False
    """Draws random numbers."""
    after: tuple[str, ...] = ()
    """Nodes that must run before it although it does not read them."""
    caller: str = ""
    """Call of a module whose forward made it: its path, with a number behind it where that is not the first call."""
    operation: str = ""
    """What it computes of its inputs: target, constants, settings of its module."""

    @property
    def bytes(self) -> int:
        """Bytes of one example of this value."""
        if self.type is None or self.type.count is None:
            return 0
        return self.type.count * dtype_of(self.type.dtype).itemsize


@dataclass(frozen=True)
class Graph:
    """The network as a directed acyclic graph."""

    nodes: tuple[Node, ...]
    outputs: tuple[str, ...]
    shapes_known: bool

    @cached_property
    def by_name(self) -> Mapping[str, Node]:
        """Nodes by name."""
        return {n.name: n for n in self.nodes}

    @cached_property
    def staged(self) -> tuple[Node, ...]:
        """Nodes that are divided among stages: what both inputs and parameters influence."""
        return tuple(n for n in self.nodes if n.role in {"value", "structure"})

    @cached_property
    def networkx(self) -> nx.DiGraph[str]:
        """The graph for networkx: node names, edges along the flow of values, node attribute `node`."""
        import networkx as nx

        graph: nx.DiGraph[str] = nx.DiGraph()
        for node in self.nodes:
            graph.add_node(node.name, node=node)
        for node in self.nodes:
            graph.add_edges_from((name, node.name) for name in node.inputs)
        return graph


def dtype_of(name: str) -> torch.dtype:
    """Return the torch dtype of a name, as programs store it ("float32")."""
    value = getattr(torch, name)
    assert isinstance(value, torch.dtype)
    return value


def build_graph(captured: Capture, observed: Mapping[str, Observation] | None) -> Graph:
    """Graph records of a captured model.

    Args:
        captured: the captured model.
        observed: what each node gave in a run; None where no example inputs are known, in which case work is
            counted in parameter elements.
    """
    modules = dict(captured.module.named_modules())
    parameters = dict(captured.module.named_parameters(remove_duplicate=False))
    canonical = {alias: name for name, aliases in captured.ties.items() for alias in aliases}
    own = {n for n, _ in captured.original.named_modules(remove_duplicate=False)}
    roles: dict[str, Role] = {}
    moved = _moved(observed)
    drawn = False
    nodes: list[Node] = []
    outputs: tuple[str, ...] = ()
    for node in captured.module.graph.nodes:
        inputs = tuple(dict.fromkeys(n.name for n in node.all_input_nodes))
        if node.op == "output":
            outputs = inputs
            continue
        read = tuple(canonical.get(p, p) for p in _parameters(node, modules, parameters))
        seen = observed.get(node.name) if observed is not None else None
        role = _role(node, [roles[i] for i in inputs], bool(read), seen)
        if seen is not None and node.op.startswith("call"):
            role = _placed(role, seen, any(i in moved for i in inputs), drawn)
            drawn = drawn or (seen.random and role == "value")
        roles[node.name] = role
        nodes.append(_record(node, inputs, read, role, seen, parameters, own, modules))
    return Graph(ordered(nodes), outputs, observed is not None)


def _moved(observed: Mapping[str, Observation] | None) -> set[str]:
    """Nodes that share memory with a buffer or parameter that some operation modifies in place."""
    if observed is None:
        return set()
    written = {m for o in observed.values() for w in o.writes for m in (observed[w].aliases or (w,))}
    return {n for n, o in observed.items() if written & set(o.aliases or (n,))} if written else set()


def _placed(role: Role, seen: Observation, moved: bool, drawn: bool) -> Role:
    """Operations with side effects belong to one stage each: nothing else may repeat or hoist them.

    Random numbers that are drawn before all stages (noise on the inputs) stay with the data.
    """
    if role not in {"attribute", "weights", "data"}:
        return role
    if moved and role != "data":
        return "value"
    if seen.random:
        return "value" if drawn or role == "weights" else "data"
    return role


def _parameters(
    node: fx.Node, modules: Mapping[str, nn.Module], parameters: Mapping[str, nn.Parameter]
) -> Iterator[str]:
    if node.op == "get_attr" and node.target in parameters:
        yield str(node.target)
    elif node.op == "call_module" and str(node.target) in modules:
        for name, _ in modules[str(node.target)].named_parameters(remove_duplicate=False):
            yield f"{node.target}.{name}"


def _role(node: fx.Node, inputs: list[Role], has_parameters: bool, seen: Observation | None) -> Role:
    if node.op == "placeholder":
        return "input"
    if node.op == "get_attr":
        return "weights" if has_parameters else "attribute"
    from_parameters = has_parameters or any(r in {"weights", "value", "structure"} for r in inputs)
    from_inputs = any(r in {"input", "data", "value", "structure"} for r in inputs)
    if from_parameters and from_inputs:
        return "structure" if _is_structure(node, seen) else "value"
    if from_parameters:
        return "weights"
    return "data" if from_inputs else "attribute"


def _is_structure(node: fx.Node, seen: Observation | None) -> bool:
    if seen is not None:
        return seen.kind == "other"
    if node.op == "call_method":
        return node.target in _STRUCTURE_METHODS
    if node.op == "call_function" and node.target is getattr:
        return node.args[1] in _STRUCTURE_ATTRIBUTES
    if node.target is len:
        return True
    sources = node.all_input_nodes
    return bool(sources) and node.op == "call_function" and all(_is_structure(n, None) for n in sources)


def _record(
    node: fx.Node,
    inputs: tuple[str, ...],
    parameters: tuple[str, ...],
    role: Role,
    seen: Observation | None,
    tensors: Mapping[str, nn.Parameter],
    own: Set[str],
    modules: Mapping[str, nn.Module],
) -> Node:
    stack: dict[str, Any] = node.meta.get("nn_module_stack") or {}
    path, types = "", []
    for value in stack.values():
        path = str(value[0])
        types.append(value[1].__name__ if isinstance(value[1], type) else str(value[1]).rsplit(".", 1)[-1])
    if node.op == "call_module" and node.target in own:
        path = str(node.target)
    if seen is not None:
        flops = seen.flops
        kind = seen.type
        floating = kind is not None and dtype_of(kind.dtype).is_floating_point and "?" not in (kind.shape or ())
    else:
        flops = 1 + sum(tensors[p].numel() for p in parameters if p in tensors)
        floating = role in {"value", "data", "input"}
    return Node(
        name=node.name,
        op=node.op,
        target=_target(node),
        module=path,
        module_types=tuple(types),
        inputs=inputs,
        parameters=parameters,
        role=role,
        type=seen.type if seen is not None else None,
        flops=flops,
        source=str(node.meta.get("source", "")),
        floating=floating,
        writes=seen.writes if seen is not None else (),
        aliases=seen.aliases if seen is not None else (),
        random=seen.random if seen is not None else False,
        caller=_caller(node, list(stack)),
        operation=_operation(node, modules),
    )


def _caller(node: fx.Node, stack: list[str]) -> str:
    """Key of the innermost module call around a node; a layer's own call does not count."""
    entries = list((node.meta.get("nn_module_stack") or {}).values())
    if node.op == "call_module" and entries and str(entries[-1][0]) == str(node.target):
        stack = stack[:-1]
    return stack[-1] if stack else ""


def _operation(node: fx.Node, modules: Mapping[str, nn.Module]) -> str:
    """Operation with its constants; a module by its class and settings."""
    if node.op == "call_module":
        module = modules[str(node.target)]
        return f"{type(module).__module__}.{module!r}"
    constants = [v for v in leaves((node.args, node.kwargs)) if not isinstance(v, fx.Node)]
    return f"{'' if node.op == 'get_attr' else told(node.target)} {constants}"


def _target(node: fx.Node) -> str:
    if isinstance(node.target, str):
        return node.target
    if isinstance(node.target, torch._ops.OpOverload):
        return node.target._opname
    return str(getattr(node.target, "__name__", node.target))


def told(value: Any) -> str:
    """Text of a function or a setting that is equal in every process: functions by name, not by address."""
    if isinstance(value, str | torch._ops.OpOverload):
        return str(value)
    if isinstance(value, FunctionType) and _lies_there(value):
        return f"{value.__module__}.{value.__qualname__}"
    if isinstance(value, BuiltinFunctionType) and isinstance(value.__self__, ModuleType | type | None):
        return f"{value.__module__}.{value.__qualname__}"
    return repr(value)


def _lies_there(function: FunctionType) -> bool:
    """Whether a function is what its module holds under its name."""
    home = sys.modules.get(function.__module__)
    return home is not None and vars(home).get(function.__qualname__) is function
