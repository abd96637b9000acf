"""The graphs of a folder: what `data.json`, `stage_K.json` and `network.json` say, and how they are read.

Each of these files is a function of values and of the model's tensors:

    {"reads": [PORT, ...], "writes": [PORT, ...], "tensors": [NAME, ...], "train": GRAPH, "evaluation": GRAPH}
           without "evaluation" both modes run the same graph; a stage has further keys, which tell of its parameters:
           "weights", "slots" (in the order of their use), "signature" (equal for stages of one function)
    PORT   {"name": N, "kind": "tensor"}               a tensor
           {"name": N, "kind": "size"}                 a whole number
           {"name": N, "kind": "sizes", "count": C}    C of them, a tuple together
           {"name": N, "kind": "constant", "value": V} the same in every call (`templates.encode`); null without "value"
    GRAPH  {"inputs": [N, ...], "nodes": [NODE, ...], "outputs": [ARGUMENT, ...]}
           an input for each tensor and size that is read, and an output for each that is written, in order
    NODE   {"name": N, "operator": OPERATOR, "args": [ARGUMENT, ...], "kwargs": {NAME: ARGUMENT, ...}}
           OPERATOR  aten.NAME.OVERLOAD   an operator of PyTorch, one of `operators.OPERATORS`
                     size.NAME            arithmetic on numbers, one of `operators.SCALARS`
                     item                 the entry of a number (second argument) of a node's several values
                     grad, autocast       its own "body" (a GRAPH) of its args, under the "setting" [enabled], or
                                          [device, dtype or null, enabled, cache]; it has as many values as outputs
    ARGUMENT  null, true, false, a whole number, a finite number, a text, a list of ARGUMENTs, or one of
           {"node": N} {"tensor": NAME} {"float": "inf" | "-inf" | "nan"} {"dtype": "float32"} {"device": "cpu"}
           {"layout": "strided"} {"memory_format": "contiguous_format"}

Nodes are in the order in which they run, and read only what comes before them. Names N are identifiers, used once
in a graph. The tensors are in `tensors.safetensors`. Arguments fit the operator's schema (`operators.misfit`).

In: data of such a file. Out: graphs of torch.fx. Invariant: only `Graph.create_node` with functions of the tables is
called, with names that are identifiers; nothing is evaluated, and nothing runs before the network is called.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, Literal

import torch
from pydantic import Field, JsonValue
from torch import fx, nn

from lagcompile.export import plain
from lagcompile.export.operators import Kind, function_of, kind_of, misfit
from lagcompile.export.plain import hold, is_name
from lagcompile.export.templates import decode_plain
from lagcompile.frontend.graphmodule import StageGraph
from lagcompile.frontend.modes import merge
from lagcompile.frontend.regions import Region
from lagcompile.frontend.structure import Reference
from lagcompile.frontend.symbolic import Traced
from lagcompile.ir.base import DataError, Frozen

Typed = tuple[Any, Any]
"""A node (or a number), and its kind as `operators.kind_of` says."""


class Port(Frozen):
    """A value that a function reads or writes."""

    name: str
    kind: Literal["tensor", "size", "sizes", "constant"]
    count: int = Field(default=1, ge=1, le=64)
    value: JsonValue = None

    @property
    def flat(self) -> int:
        """Number of inputs or outputs of the graph that it takes."""
        return {"tensor": 1, "size": 1, "sizes": self.count, "constant": 0}[self.kind]


class ProgramFile(Frozen):
    """A function of values and tensors."""

    reads: tuple[Port, ...]
    writes: tuple[Port, ...]
    tensors: tuple[str, ...]
    weights: tuple[str, ...] = ()
    slots: tuple[str, ...] = ()
    signature: str = ""
    train: JsonValue
    evaluation: JsonValue = None


LONGEST = 1 << 20
"""Largest number of entries that a list of tensors is assumed to have."""


def same(value: Any) -> Any:
    """Return the value's node, adding an alias where it shares one or has none."""
    return value


def graph_module(
    program: ProgramFile, model: nn.Module, known: Container[str], name: str, file: str, *, attributes: bool = True
) -> StageGraph:
    """A program as one graph module for both modes.

    Args:
        program: the file.
        model: holds the tensors by name, and the mode.
        known: names of tensors that the folder holds.
        name: class name of the module.
        file: what problems call it.
        attributes: read the tensors as attributes; else they are inputs behind the values that are read.

    Raises:
        DataError: the file holds what this format does not allow.
    """
    both = [g for g in (program.train, program.evaluation) if g is not None]
    try:
        graphs = [_Reader(program, known, attributes).traced(g) for g in both]
    except DataError as error:
        raise DataError([f"{file}: {p}" for p in error.problems]) from None
    found = graphs[0] if len(graphs) == 1 else merge(model, *graphs)
    root = nn.Module()
    root.__dict__.update({**vars(model), "_modules": dict(model._modules)})
    for own, value in found.attributes.items():
        root.add_module(own, value)
    return StageGraph(root, found.graph, name)


class _Reader:
    """Make a graph of torch.fx from the data of one mode."""

    def __init__(self, program: ProgramFile, known: Container[str], attributes: bool) -> None:
        self.program = program
        self.known = known
        self.attributes = attributes
        self.graph = fx.Graph()
        self.regions: dict[str, Region] = {}

    def traced(self, data: Any) -> Traced:
        """The graph; its output is the tuple of the values that it writes."""
        flat: list[Typed] = []
        for port in self.program.reads:
            hold(is_name(port.name), f"{port.name!r:.60} is not the name of a value")
            node = self.graph.placeholder(port.name)
            if port.kind == "sizes":
                flat += [(self.graph.call_function(operator.getitem, (node, i)), "number") for i in range(port.count)]
            elif port.kind != "constant":
                flat.append((node, "tensor" if port.kind == "tensor" else "number"))
        tensors: dict[str, Typed] = {}
        for i, name in enumerate(self.program.tensors):
            hold(name in self.known, f"the tensor {name!r:.60} is not in the folder")
            op, target = ("get_attr", name) if self.attributes else ("placeholder", f"tensor_{i}")
            tensors[name] = (self.graph.create_node(op, target), "tensor")
        outputs = tuple(self._outputs(_Body(self.graph, data, flat, tensors, self.regions).outputs))
        self.graph.output(outputs)
        return Traced(self.graph, tuple(Reference(n.name) for n in outputs), {}, {}, dict(self.regions))

    def _outputs(self, found: Sequence[Typed]) -> Iterator[fx.Node]:
        wanted = sum(p.flat for p in self.program.writes)
        hold(len(found) == wanted, f"the graph gives {len(found)} values, expected {wanted}")
        values = iter(found)
        for port in self.program.writes:
            given = [next(values) for _ in range(port.flat)]
            kind = "tensor" if port.kind == "tensor" else "number"
            hold(all(k == kind for _, k in given), f"'{port.name:.60}' is declared as a {port.kind} and is none")
            if port.kind == "sizes":
                yield self.graph.call_function(torch.Size, ([v for v, _ in given],))
            else:
                value = given[0][0] if given else decode_plain(port.value)
                yield value if isinstance(value, fx.Node) else self.graph.call_function(same, (value,))


class _Body:
    """The nodes of one graph, or of a region within it."""

    def __init__(
        self,
        graph: fx.Graph,
        data: Any,
        inputs: Sequence[Typed],
        tensors: Mapping[str, Typed],
        regions: dict[str, Region],
    ) -> None:
        self.graph = graph
        self.tensors = tensors
        self.regions = regions
        self.env: dict[str, Typed] = {}
        names, nodes, outputs = _fields(data, "a graph", inputs=list, nodes=list, outputs=list)
        hold(len(names) == len(inputs), f"the graph takes {len(names)} values, expected {len(inputs)}")
        for name, value in zip(names, inputs, strict=True):
            self._new(name, value)
        for node in nodes:
            name = node.get("name") if isinstance(node, dict) else None
            try:
                self._new(name, self._node(node))
            except DataError as error:
                raise DataError([f"node {name!r:.60}: {p}" for p in error.problems]) from None
        self.outputs = [self._typed(v) for v in outputs]

    def _new(self, name: Any, value: Typed) -> None:
        hold(is_name(name), f"{name!r:.60} is not the name of a node")
        hold(name not in self.env, f"two nodes are called {name:.60}")
        self.env[name] = value

    def _node(self, data: Any) -> Typed:
        if isinstance(data, dict) and isinstance(called := data.get("operator"), str) and called in _SETTINGS:
            return self._region(
                *_fields(data, "a node", name=str, operator=str, args=list, setting=list, body=dict)[1:]
            )
        name, called, args, named = _fields(data, "a node", name=str, operator=str, args=list, kwargs=dict)
        if called == "item":
            return self._item(args, named)
        function = function_of(called)
        if function is None:
            raise DataError(f"the operator {called!r:.80} is not among those that a folder may hold")
        kinds: list[Any] = []
        values = [self._argument(a, kinds) for a in args]
        given = {k: self._argument(a, kinds) for k, a in named.items()}
        wrong = misfit(function, kinds[: len(args)], dict(zip(named, kinds[len(args) :], strict=True)))
        hold(not wrong, f"{called}: {wrong}")
        made = self.graph.create_node("call_function", function, tuple(values), given, name=name)
        return made, kind_of(function)

    def _item(self, args: list[Any], named: Mapping[str, Any]) -> Typed:
        hold(len(args) == 2 and not named and type(args[1]) is int, "item takes a node and a whole number")
        number = args[1]
        node, kind = self._typed(args[0])
        count = LONGEST if kind == "list" else len(kind) if isinstance(kind, tuple) else 0
        hold(0 <= number < count, f"there is no entry {number}")
        made = self.graph.call_function(operator.getitem, (node, number))
        return made, "tensor" if kind == "list" else kind[number]

    def _region(self, called: str, args: list[Any], setting: list[Any], body: Any) -> Typed:
        settings = _SETTINGS[called](setting)
        operands = [self._typed(a) for a in args]
        inner = fx.Graph()
        given = [(inner.placeholder(f"v{i}"), kind) for i, (_, kind) in enumerate(operands)]
        results = _Body(inner, body, given, {}, self.regions).outputs
        inner.output(tuple(v for v, _ in results))
        root = nn.Module()
        for own, region in self.regions.items():
            root.add_module(own, region)  # a region within this one
        own = f"_region_{len(self.regions)}"
        self.regions[own] = Region(StageGraph(root, inner, "Region"), (called, settings))
        return self.graph.call_module(own, tuple(v for v, _ in operands)), tuple(k for _, k in results)

    # ------------------------------------------------------------ arguments
    def _found(self, data: Any) -> Typed | None:
        """Return the node or tensor that an argument refers to, with its kind; None where it is not a reference."""
        if not isinstance(data, dict) or len(data) != 1:
            return None
        ((key, name),) = data.items()
        table = {"node": self.env, "tensor": self.tensors}.get(key)
        if table is None:
            return None
        hold(isinstance(name, str) and name in table, f"there is no {key} {name!r:.60} before it")
        return table[name]

    def _typed(self, data: Any) -> Typed:
        """A node, a tensor or a number, with its kind."""
        found = self._found(data)
        if found is None:
            found = self._argument(data, []), "number"
            hold(type(found[0]) in (bool, int, float), f"expected a node, a tensor or a number, got {data!r:.80}")
        return found

    def _argument(self, data: Any, kinds: list[Any]) -> Any:
        """An argument as torch.fx takes it; what it is (`operators.misfit`) is added to `kinds`."""
        if isinstance(data, list):
            inner: list[Any] = []
            values = [self._argument(v, inner) for v in data]
            kinds.append(inner)
            return values
        found = self._found(data)
        if found is not None:
            kinds.append(Kind(found[1] if isinstance(found[1], str) else "several"))
            return found[0]
        value = plain.read(data)
        kinds.append(value)
        return value


def _setting(data: list[Any], *, autocast: bool) -> tuple[Any, ...]:
    problem = f"not a setting: {data!r:.80}"
    if not autocast:
        hold(len(data) == 1 and type(data[0]) is bool, problem)
        return tuple(data)
    hold(len(data) == 4 and data[0] in ("cpu", "cuda") and all(type(v) is bool for v in data[2:]), problem)
    hold(data[1] is None or (isinstance(data[1], dict) and data[1].keys() == {"dtype"}), problem)
    return data[0], plain.read(data[1]), data[2], data[3]


_SETTINGS: Mapping[Any, Callable[[list[Any]], tuple[Any, ...]]] = {
    "grad": partial(_setting, autocast=False),
    "autocast": partial(_setting, autocast=True),
}


def _fields(data: Any, what: str, **types: type[Any]) -> list[Any]:
    """Return the values of an object that has exactly these keys."""
    hold(isinstance(data, dict) and data.keys() == types.keys(), f"{what} has the keys {', '.join(types)}")
    for key, kind in types.items():
        hold(type(data[key]) is kind, f"{what} has a {kind.__name__} as '{key}'")
    return [data[key] for key in types]


def inlined(
    parts: Sequence[tuple[str, StageGraph, tuple[str, ...], tuple[str, ...]]],
    inputs: Sequence[str],
    outputs: Sequence[str],
    model: nn.Module,
) -> tuple[StageGraph, dict[str, str]]:
    """Make one graph of all stages, in which each value that they give is the node of its name.

    Args:
        parts: (name, graph, reads, writes) of prologue and stages, in order.
        inputs: names of the network's inputs.
        outputs: names of the values that it returns.
        model: holds the tensors.

    Returns:
        the graph module, and the part in which each of its nodes runs.
    """
    root = nn.Module()
    root.__dict__.update({**vars(model), "_modules": dict(model._modules)})
    graph = fx.Graph()
    env: dict[str, fx.Node] = {n: graph.placeholder(n) for n in inputs}
    reserved = {w for _, _, _, writes in parts for w in writes} | set(inputs)
    prefix = "at_"
    while any(n.startswith(prefix) for n in reserved):
        prefix += "_"
    where: dict[str, str] = {}
    for name, module, reads, writes in parts:
        inner: dict[fx.Node, fx.Node] = {}
        given = iter(reads)
        for node in module.graph.nodes:
            if node.op == "placeholder":
                inner[node] = env[next(given)]
                continue
            if node.op == "output":
                for write, value in zip(writes, node.args[0], strict=True):
                    env[write] = graph.create_node("call_function", same, (inner[value],), name=write)
                    where[env[write].name] = name
                continue
            target = node.target
            if node.op == "call_module":
                target = f"{prefix}{name}{node.target}"
                root.add_module(target, module.get_submodule(str(node.target)))
            args = fx.node.map_arg(node.args, lambda n: inner[n])  # noqa: B023 - used at once
            kwargs = fx.node.map_arg(node.kwargs, lambda n: inner[n])  # noqa: B023 - used at once
            inner[node] = graph.create_node(node.op, target, args, kwargs, name=f"{prefix}{name}_{node.name}")
            where[inner[node].name] = name
    graph.output(tuple(env[n] for n in outputs))
    return StageGraph(root, graph, "Network"), where
