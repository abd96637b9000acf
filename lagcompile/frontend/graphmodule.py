"""Graph modules that compile late and pickle exactly.

In: a root module and an fx graph. Out: `StageGraph`. Invariant: node names survive pickling (torch.fx traces the
generated code again and renames them); Python code is generated at the first call, not when the module is built.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import fx, nn

from lagcompile.frontend.structure import fill, transform

_META = ("source", "nn_module_stack")


class StageGraph(fx.GraphModule):
    """An fx graph module whose nodes are pickled as they are, and whose code is generated at its first call."""

    def recompile(self) -> Any:
        """Forget the generated code; the next call generates it again."""
        if "forward" in vars(type(self)):
            del type(self).forward

    def forward(self, *args: Any) -> Any:
        """Generate the code, which takes this method's place, and run it."""
        super().recompile()
        return type(self).forward(self, *args)

    @property
    def code(self) -> str:
        """The generated Python code."""
        return str(self.graph.python_code("self").src)

    def __reduce__(self) -> tuple[Any, ...]:
        state = {k: v for k, v in self.__dict__.items() if k not in {"_graph", "_code", "_compiled", "meta"}}
        return _restore, (state, [_record(n) for n in self.graph.nodes], type(self).__name__)


class _Ref:
    """Stands for a node, by name, in pickled arguments."""

    def __init__(self, name: str) -> None:
        self.name = name


def _named(value: Any) -> Any:
    return _Ref(value.name) if isinstance(value, fx.Node) else value


def _record(node: fx.Node) -> tuple[Any, ...]:
    args, kwargs = fill(transform((node.args, node.kwargs), _named), lambda v: v)
    meta = {k: node.meta[k] for k in _META if k in node.meta}
    return node.name, node.op, _written(node.target), args, kwargs, meta


def _written(target: Any) -> tuple[str, Any]:
    """A target as plain data: names of operators, the rest as pickle stores it."""
    if isinstance(target, torch._ops.OpOverload):
        return "operator", (target.namespace, target._opname, target._overloadname)
    module, name = getattr(target, "__module__", None), getattr(target, "__qualname__", "")
    if not isinstance(target, str) and module is not None and "<" not in name:
        found: Any = importlib.import_module(module)
        for part in name.split("."):
            found = getattr(found, part, None)
        if found is target:
            return "function", (module, name)
    return "value", target


def _read(written: tuple[str, Any]) -> Any:
    kind, value = written
    if kind == "operator":
        namespace, name, overload = value
        return getattr(getattr(getattr(torch.ops, namespace), name), overload)
    if kind == "function":
        found: Any = importlib.import_module(value[0])
        for part in value[1].split("."):
            found = getattr(found, part)
        return found
    return value


def _restore(state: Mapping[str, Any], records: list[tuple[Any, ...]], name: str) -> StageGraph:
    graph = fx.Graph()
    env: dict[str, fx.Node] = {}

    def node_of(value: Any) -> Any:
        return env[value.name] if isinstance(value, _Ref) else value

    for own, op, target, args, kwargs, meta in records:
        read = fill(transform((args, kwargs), node_of), lambda v: v)
        if op == "output":
            env[own] = graph.output(read[0][0])
        else:
            env[own] = graph.create_node(op, _read(target), read[0], read[1], name=own)
        env[own].meta.update(meta)
    root = nn.Module()
    root.__dict__.update(state)
    return StageGraph(root, graph, name)
