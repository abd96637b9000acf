"""Stage modules: one graph module for each stage of a partition, and the network glued together from them.

In: a `Capture` and a `Partition`. Out: `Network`. Invariant: `Network.forward` computes what the captured module
computes; stage modules hold the captured module's own sub-modules under the user's names, so that weights, tied ones
included, are one tensor each.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from lagcompile.frontend.capture import Capture
from lagcompile.frontend.copies import copied
from lagcompile.frontend.graph import Graph, Node, told
from lagcompile.frontend.graphmodule import StageGraph, attribute
from lagcompile.frontend.partition import Partition
from lagcompile.frontend.still import set_mode
from lagcompile.frontend.storage import named_write
from lagcompile.frontend.structure import Reference, leaves

Values = dict[str, Any]


@dataclass(frozen=True)
class StageModule:
    """One stage: `module(*reads) -> writes`, both tuples of values by node name.

    Attributes:
        reads: names of the data and states that it takes, in order.
        writes: names of the states, outputs and sizes that it gives, in order.
        weights: state_dict names of its parameters.
        slots: names of its parameters in the order of their use; slot j of two stages of one signature corresponds.
        signature: equal for stages that compute the same function of their inputs and weights, in the same order.
    """

    name: str
    module: fx.GraphModule
    reads: tuple[str, ...]
    writes: tuple[str, ...]
    weights: tuple[str, ...]
    slots: tuple[str, ...]
    signature: str


@dataclass(frozen=True)
class Network:
    """The captured network as data preparation, stages, and an output structure."""

    capture: Capture
    partition: Partition
    prologue: StageModule
    stages: tuple[StageModule, ...]

    def copy(self) -> Network:
        """Copy the network with its modules; records are shared."""
        kept = (self.partition, self.capture.signature)
        return copied(self, {id(k): k for k in kept})

    @property
    def graphs(self) -> tuple[nn.Module, ...]:
        """The graph modules: of the whole network, of the data preparation, of each stage."""
        return (self.capture.module, self.prologue.module, *(s.module for s in self.stages))

    def train(self, training: bool) -> None:
        """Put everything in a mode; parts keep the mode that the user's own `train` gives them."""
        self.capture.original.train(training)
        set_mode(self.capture.original, self.graphs, training)

    def prepare(self, tensors: Sequence[torch.Tensor]) -> Values:
        """Inputs and what follows from inputs alone, by name.

        Raises:
            BindError: the network was captured for other sizes.
        """
        self.capture.sizes.check(self.capture.signature.names, tensors)
        values: Values = dict(zip(self.capture.signature.names, tensors, strict=True))
        return self.run(self.prologue, values)

    def run(self, stage: StageModule, values: Values) -> Values:
        """The values with those that a stage writes added."""
        written = stage.module(*(values[n] for n in stage.reads))
        return values | dict(zip(stage.writes, written, strict=True))

    def glue(self, tensors: Sequence[torch.Tensor]) -> Values:
        """All values of a forward pass through the stages, one after the other."""
        values = self.prepare(tensors)
        for stage in self.stages:
            values.update(zip(stage.writes, stage.module(*(values[n] for n in stage.reads)), strict=True))
        return values

    def call(self, tensors: Sequence[torch.Tensor]) -> Any:
        """The model's output, computed by the stages."""
        return self.assemble(self.glue(tensors))

    def assemble(self, values: Mapping[str, Any]) -> Any:
        """The model's output, as the user's forward returns it."""
        return self.capture.assemble(values)

    @property
    def output_names(self) -> tuple[str, ...]:
        """Names of the values that the output is made of."""
        return tuple(dict.fromkeys(v.name for v in leaves(self.capture.output) if isinstance(v, Reference)))


def build_network(captured: Capture, partition: Partition) -> Network:
    """Cut a captured module into stage modules along a partition."""
    graph = partition.graph
    outputs = set(graph.outputs)
    staged = partition.stage_of
    builder = _Builder(captured.module, graph)
    needed = {n for node in graph.staged for n in node.inputs} | outputs
    data = [n for n in graph.nodes if n.role == "data"]
    wanted = [n.name for n in data if n.name in needed]
    prologue = builder.build("data", data, wanted, signature=captured.signature.names)
    last_use = partition.last_use
    stages = []
    for k in range(partition.stages):
        members = partition.nodes_of(k)
        wanted_later = [m.name for m in members if last_use.get(m.name, -1) > k or m.name in outputs]
        stages.append(builder.build(f"f{k}", members, wanted_later))
    free = [n for n in outputs if n not in staged and n not in wanted and graph.by_name[n].role != "input"]
    if free:  # parameters or buffers that the model returns as they are
        stages[-1] = builder.build(
            stages[-1].name, partition.nodes_of(partition.stages - 1), [*stages[-1].writes, *sorted(free)]
        )
    return Network(captured, partition, prologue, tuple(stages))


class _Builder:
    """Copies nodes of one graph module into stage graphs."""

    def __init__(self, root: fx.GraphModule, graph: Graph) -> None:
        self.root = root
        self.nodes = {n.name: n for n in root.graph.nodes}
        self.records = graph.by_name
        self.known = graph.shapes_known
        self.modules = dict(root.named_modules())
        self.parameters = dict(root.named_parameters(remove_duplicate=False))

    def build(
        self, name: str, members: Sequence[Node], writes: Sequence[str], *, signature: Sequence[str] = ()
    ) -> StageModule:
        """Stage module from its nodes; values from elsewhere become placeholders, attributes are read again."""
        own = {m.name for m in members}
        order, reads = self._closure(own, [*(m.name for m in members), *writes])
        reads = list(dict.fromkeys([*signature, *reads]))
        graph = fx.Graph()
        env: dict[str, fx.Node] = {r: graph.placeholder(r) for r in reads}
        for r in self._overwritten(order, reads):
            # an operation that writes into its input would write into a state or into the user's data
            env[r] = graph.call_method("clone", (env[r],))
        for node_name in order:
            node = self.nodes[node_name]
            env[node_name] = graph.node_copy(node, lambda n: env[n.name])
        graph.output(tuple(env[w] for w in writes))
        module = StageGraph(self.root, graph, name)
        slots = tuple(self._slots(order))
        weights = tuple(dict(module.named_parameters()))
        signature_text = self._signature(order, reads, writes, slots)
        return StageModule(name, module, tuple(reads), tuple(writes), weights, slots, signature_text)

    def _closure(self, own: set[str], names: Sequence[str]) -> tuple[list[str], list[str]]:
        """Nodes to copy in execution order, and names to read from elsewhere."""
        order: dict[str, None] = {}
        reads: dict[str, None] = {}
        visited: set[str] = set()
        stack = [(n, False) for n in reversed(names)]
        while stack:
            name, done = stack.pop()
            if done:
                order[name] = None
                continue
            if name in visited:
                continue
            visited.add(name)
            if name not in own and not self._replicated(name):
                reads[name] = None
                continue
            stack.append((name, True))
            stack.extend((n.name, False) for n in reversed(self.nodes[name].all_input_nodes))
        return list(order), list(reads)

    def _replicated(self, name: str) -> bool:
        """Reads of attributes and what follows from them alone are repeated in every stage that needs them."""
        return self.records[name].role in {"attribute", "weights"}

    def _overwritten(self, order: Sequence[str], reads: Sequence[str]) -> list[str]:
        """Values from elsewhere whose memory the stage writes into; any of them where nothing was observed."""
        if not self.known:
            here = any(self._in_place(self.nodes[n]) for n in order)
            return [r for r in reads if self.records[r].role != "structure"] if here else []
        memory = {r: self.records[r].aliases or (r,) for r in [*reads, *order]}
        written = {m for n in order for w in self.records[n].writes for m in memory.get(w, ())}
        return [r for r in reads if written & set(memory[r]) and self.records[r].type is not None]

    def _in_place(self, node: fx.Node) -> bool:
        inside = self.modules[str(node.target)].modules() if node.op == "call_module" else ()
        return named_write(node, self.modules) or any(_is_in_place(m) for m in inside)

    def _slots(self, order: Sequence[str]) -> Iterator[str]:
        """Parameters in the order of their use, once for each use."""
        for name in order:
            node = self.nodes[name]
            if node.op == "get_attr" and node.target in self.parameters:
                yield str(node.target)
            elif node.op == "call_module":
                for p, _ in self.modules[str(node.target)].named_parameters(remove_duplicate=False):
                    yield f"{node.target}.{p}"

    def _signature(
        self, order: Sequence[str], reads: Sequence[str], writes: Sequence[str], slots: Sequence[str]
    ) -> str:
        """Write the stage's computation as canonical text; leaf modules by class, settings and parameter shapes."""
        number = {r: f"i{i}" for i, r in enumerate(reads)}
        lines: list[str] = []
        for i, name in enumerate(order):
            node = self.nodes[name]
            number[name] = f"v{i}"
            target = told(node.target)
            if node.op == "call_module":
                target = describe_module(self.modules[target])
            elif node.op == "get_attr":
                value = attribute(self.root, target)
                target = f"{type(value).__name__}{tuple(getattr(value, 'shape', ()))}"
            args = fx.node.map_arg((node.args, node.kwargs), lambda n: _Name(number[n.name]))
            lines.append(f"{node.op} {target} {args}")
        lines.append("-> " + " ".join(number[w] for w in writes))
        first: dict[nn.Parameter, int] = {}
        lines.append(f"weights {[first.setdefault(self.parameters[s], i) for i, s in enumerate(slots)]}")
        return "\n".join(lines)


class _Name(str):
    """A value's number inside a signature, printed without quotes."""

    def __repr__(self) -> str:
        return str(self)


def _is_in_place(module: nn.Module) -> bool:
    return bool(vars(module).get("inplace", False))


_NOT_SETTINGS = frozenset({"training", "owner", "meta"})


def describe_module(module: nn.Module) -> str:
    """Text that is equal for modules of one class with the same settings and tensor shapes."""
    lines = []
    for name, part in module.named_modules():
        settings = {k: told(v) for k, v in vars(part).items() if not k.startswith("_") and k not in _NOT_SETTINGS}
        if isinstance(part, fx.GraphModule):
            settings["graph"] = str(part.graph)
        lines.append(f"{name} {type(part).__module__}.{type(part).__qualname__} {settings}")
    tensors = [(n, tuple(p.shape), str(p.dtype)) for n, p in [*module.named_parameters(), *module.named_buffers()]]
    return f"{lines} {tensors}"
