"""Graph modules that compile late, pickle exactly, and hold a user's tensors under any names.

In: a root module and an fx graph. Out: `StageGraph`, and `Runner`, which interprets one. Invariant: node names survive
pickling (torch.fx traces the generated code again and renames them); Python code is generated at the first call, not
when the module is built; a sub-module, parameter or buffer may be called like an attribute of graph modules.
"""

from __future__ import annotations

import copy
import importlib
import keyword
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from lagcompile.frontend.structure import fill, transform

_META = ("source", "nn_module_stack")
_HELD = ("_parameters", "_buffers", "_modules")


def attribute(root: Any, path: str) -> Any:
    """Return what a module holds at a dotted path, tensors and sub-modules before attributes of the class."""
    value = root
    for part in path.split("."):
        value = _held(value, part)
    return value


def _held(owner: Any, part: str) -> Any:
    for store in _HELD if isinstance(owner, nn.Module) else ():
        if part in vars(owner)[store]:
            return vars(owner)[store][part]
    return getattr(owner, part)


class StageGraph(fx.GraphModule):
    """An fx graph module whose nodes are pickled as they are, and whose code is generated at its first call."""

    def __init__(self, root: nn.Module, graph: fx.Graph, name: str) -> None:
        super().__init__(nn.Module(), fx.Graph(), name)
        self.training = root.training
        self.graph = graph
        for node in graph.nodes:
            if node.op in {"get_attr", "call_module"}:
                _hold(self, root, str(node.target).split("."))

    def recompile(self) -> Any:
        """Forget the generated code; the next call generates it again."""
        if "forward" in vars(type(self)):
            del type(self).forward

    def forward(self, *args: Any) -> Any:
        """Generate the code, which takes this method's place, and run it."""
        code = _callable(self).python_code("self")
        names = dict(code.globals)
        exec(compile(code.src, "<stage>", "exec"), names)
        type(self).forward = names["forward"]  # type: ignore[method-assign]
        return type(self).forward(self, *args)

    @property
    def code(self) -> str:
        """The generated Python code."""
        return str(_callable(self).python_code("self").src)

    def __deepcopy__(self, memo: dict[int, Any]) -> StageGraph:
        result = type(self).__new__(type(self))
        memo[id(self)] = result
        root = nn.Module()
        root.__dict__.update(copy.deepcopy(self._state(), memo))
        graph = fx.Graph()
        graph.output(graph.graph_copy(self.graph, {}))
        result.__init__(root, graph, type(self).__name__)  # type: ignore[misc]
        return result

    def __reduce__(self) -> tuple[Any, ...]:
        return _restore, (self._state(), [_record(n) for n in self.graph.nodes], type(self).__name__)

    def _state(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k not in {"_graph", "_code", "_compiled", "meta"}}


def _hold(module: nn.Module, root: nn.Module, path: list[str]) -> None:
    """Give a module what another one holds at a path, with empty modules on the way."""
    *ahead, last = path
    for part in ahead:
        root, inner = _held(root, part), vars(module)["_modules"].get(part)
        if inner is root:
            return
        if inner is None:
            inner = vars(module)["_modules"][part] = nn.Module()
        module = inner
    value = _held(root, last)
    kinds = (("_parameters", nn.Parameter), ("_modules", nn.Module), ("_buffers", Tensor))
    store = next((vars(module)[s] for s, kind in kinds if isinstance(value, kind)), vars(module))
    store[last] = value


def _callable(module: StageGraph) -> fx.Graph:
    """The module's graph; where Python cannot say a name, a copy of it that fetches the value by its path."""
    nodes = list(module.graph.nodes)
    hidden = {n for n in nodes if n.op in {"get_attr", "call_module"} and not _sayable(module, str(n.target))}
    if not hidden and all(n.name != "self" for n in nodes):
        return module.graph
    graph = fx.Graph()
    graph._graph_namespace.create_name("self", None)
    env: dict[fx.Node, fx.Node] = {}
    for node in nodes:
        if node not in hidden:
            env[node] = graph.node_copy(node, env.__getitem__)
            if node.op == "placeholder":
                env[node].target = env[node].name
            continue
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), env.__getitem__)
        fetch = _fetching(module, str(node.target), call=node.op == "call_module")
        env[node] = graph.create_node("call_function", fetch, args, kwargs, name=node.name)
    return graph


def _sayable(module: nn.Module, path: str) -> bool:
    """Whether `self.path` is Python, and means what the module holds there."""
    owner: Any = module
    for part in path.split("."):
        shadowed = part in vars(owner) or hasattr(type(owner), part)
        if keyword.iskeyword(part) or (shadowed and isinstance(owner, nn.Module)):
            return False
        owner = _held(owner, part)
    return True


def _fetching(module: nn.Module, path: str, *, call: bool) -> Callable[..., Any]:
    """A function that calls what lies at a path, or gives it as it is at the time of the call."""

    def fetched(*args: Any, **kwargs: Any) -> Any:
        found = attribute(module, path)
        return found(*args, **kwargs) if call else found

    return fetched


class WithWeights:
    """Calls a module with other tensors in the place of some of its parameters, wherever it holds them.

    `torch.func.functional_call` finds sub-modules by attribute, which names such as `graph` hide, and looks for tied
    parameters again at each call.
    """

    def __init__(self, module: nn.Module, names: Sequence[str]) -> None:
        self.module = module
        places: dict[int, list[tuple[dict[str, Any], str]]] = {}
        for part in module.modules():
            store = vars(part)["_parameters"]
            for name, parameter in store.items():
                places.setdefault(id(parameter), []).append((store, name))
        self._places = [places[id(attribute(module, name))] for name in names]

    def __call__(self, tensors: Sequence[Tensor], inputs: Sequence[Any]) -> Any:
        """Result for one tensor in the place of each name's parameter."""
        before = [places[0][0][places[0][1]] for places in self._places]
        try:
            self._put(tensors)
            return self.module(*inputs)
        finally:
            self._put(before)

    def _put(self, tensors: Sequence[Tensor]) -> None:
        for places, tensor in zip(self._places, tensors, strict=True):
            for store, name in places:
                store[name] = tensor


class Runner(fx.Interpreter):
    """Runs a graph module node by node."""

    def fetch_attr(self, target: str) -> Any:
        """What the module holds at a path."""
        return attribute(self.module, target)


class _Ref:
    """Replaces a node, by name, in pickled arguments."""

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
