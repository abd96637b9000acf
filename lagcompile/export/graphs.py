"""torch.export programs as graphs again: archives become stage graphs over a model's tensors, or one whole network.

In: bytes of `.pt2` archives, their `ProgramRecord`, the model that holds the tensors. Out: graph modules. Invariant:
an archive with anything pickled in it is refused before torch opens it; both modes become one graph that does what
the mode of the model asks for.
"""

from __future__ import annotations

import io
import operator
import zipfile
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import fx, nn

from lagcompile.export.record import ProgramRecord
from lagcompile.export.templates import decode
from lagcompile.frontend.export import quietly
from lagcompile.frontend.graphmodule import StageGraph
from lagcompile.frontend.modes import merge
from lagcompile.frontend.regions import Region, region_of
from lagcompile.frontend.structure import Reference
from lagcompile.frontend.symbolic import Traced
from lagcompile.ir.base import DataError

_CHECKS = ("_assert_tensor_metadata", "_assert_scalar", "_assert_async", "sym_constrain_range", "_check")


def same(value: Any) -> Any:
    """The value: a node of its own for a value that has another node's, or none."""
    return value


def graph_module(
    files: Mapping[str, bytes], record: ProgramRecord, model: nn.Module, *, attributes: bool
) -> StageGraph:
    """A program as one graph module for both modes.

    Args:
        files: archives by file name.
        record: what the program reads, uses and gives.
        model: holds the tensors by name, and the mode.
        attributes: read the tensors as attributes; else they are inputs behind the values that are read.

    Raises:
        DataError: an archive is no torch.export program, or one that does not fit its record.
    """
    if not record.train:
        return _nothing(record)
    graphs = [traced(files[f], record, mode, attributes=attributes, file=f) for f, mode in _files(record)]
    found = graphs[0] if len(graphs) == 1 else merge(model, *graphs)
    root = nn.Module()
    root.__dict__.update({**vars(model), "_modules": dict(model._modules)})
    for name, value in found.attributes.items():
        root.add_module(name, value)
    return StageGraph(root, found.graph, record.name)


def _nothing(record: ProgramRecord) -> StageGraph:
    """A graph that gives nothing but what does not hang on its inputs."""
    graph = fx.Graph()
    for name in record.reads:
        graph.placeholder(name)
    graph.output(tuple(graph.call_function(same, (decode(b.value),)) for b in record.baked_writes))
    return StageGraph(nn.Module(), graph, record.name)


def _files(record: ProgramRecord) -> list[tuple[str, str]]:
    if record.train == record.evaluation:
        return [(record.train, "train")]
    return [(record.train, "train"), (record.evaluation, "eval")]


def opened(data: bytes, file: str) -> Any:
    """The exported program of an archive.

    Raises:
        DataError: it is none, or it holds pickled data.
    """
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            pickled = [i.filename for i in archive.infolist() if _pickled(archive, i)]
    except zipfile.BadZipFile as error:
        raise DataError(f"{file} is damaged: it is no archive of torch.export") from error
    if pickled:
        raise DataError(f"{file} holds pickled data ({', '.join(pickled)}) and is not opened: it could run code")
    try:
        with quietly():
            return torch.export.load(io.BytesIO(data))
    except Exception as error:  # torch raises many kinds for an archive of another version
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise DataError(f"{file} cannot be read by torch {torch.__version__}: {first}") from error


def _pickled(archive: zipfile.ZipFile, entry: zipfile.ZipInfo) -> bool:
    if entry.filename.endswith("_config.json"):
        return b'"use_pickle": true' in archive.read(entry).replace(b":true", b": true")
    return entry.filename.endswith((".pt", ".pkl")) and entry.file_size > 0


def traced(data: bytes, record: ProgramRecord, mode: str, *, attributes: bool, file: str) -> Traced:
    """Graph of an archive, with the record's names.

    Raises:
        DataError: the archive does not fit its record.
    """
    program = opened(data, file)
    try:
        return _Reader(program, record, mode).traced(attributes=attributes)
    except (KeyError, ValueError, StopIteration) as error:
        raise DataError(f"{file} does not fit its entry in manifest.json ({error})") from error


class _Reader:
    """Copies an exported graph, values and tensors under the names of the record."""

    def __init__(self, program: Any, record: ProgramRecord, mode: str) -> None:
        self.program = program
        self.record = record
        self.mode = mode
        self.graph = fx.Graph()
        self.env: dict[fx.Node, fx.Node] = {}
        self.regions: dict[str, Region] = {}

    def traced(self, *, attributes: bool) -> Traced:
        """The graph; its output is the tuple of the values that it gives."""
        inputs = iter(self._inputs(attributes=attributes))
        source = self.program.graph_module
        placeholders = [n for n in source.graph.nodes if n.op == "placeholder"]
        for node, spec in zip(placeholders, self.program.graph_signature.input_specs, strict=True):
            if spec.kind.name == "USER_INPUT":
                self.env[node] = next(inputs)
            elif spec.kind.name == "CONSTANT_TENSOR":
                self.env[node] = self._read(self.record.constants[f"{self.mode}/{spec.target}"])
            else:
                raise ValueError(f"input of kind {spec.kind.name}")
        left = len(list(inputs))
        if left:
            raise ValueError(f"{left} inputs more than the archive takes")
        results = self._copy(source, self.graph, self.env)
        outputs = self._outputs(iter(results))
        self.graph.output(tuple(outputs))
        _drop_unused(self.graph)
        return Traced(self.graph, tuple(Reference(n.name) for n in outputs), {}, {}, dict(self.regions))

    def _inputs(self, *, attributes: bool) -> list[fx.Node]:
        found: list[fx.Node] = []
        baked = {b.name for b in self.record.baked_reads}
        for name in self.record.reads:
            node = self.graph.placeholder(name)
            if name in self.record.sizes:
                count = self.record.sizes[name]
                found += [self.graph.call_function(operator.getitem, (node, i)) for i in range(count)]
            elif name not in baked:
                found.append(node)
        for i, name in enumerate(self.record.tensors):
            found.append(self._read(name) if attributes else self.graph.placeholder(f"tensor_{i}"))
        return found

    def _read(self, name: str) -> fx.Node:
        return self.graph.create_node("get_attr", name)

    def _copy(self, source: fx.GraphModule, graph: fx.Graph, env: dict[fx.Node, fx.Node]) -> list[Any]:
        """Copy the operations; returns what the source graph returns."""
        for node in source.graph.nodes:
            if node.op == "output":
                found: list[Any] = list(fx.node.map_arg(node.args[0], lambda n: env[n]))
                return found
            if node.op in {"placeholder", "get_attr"} or any(word in str(node.target) for word in _CHECKS):
                continue
            if isinstance(node.target, torch._ops.HigherOrderOperator):
                env[node] = self._region(node, source, graph, env)
            else:
                env[node] = graph.node_copy(node, lambda n: env[n])
            env[node].meta = {}
        raise ValueError("the graph returns nothing")

    def _region(
        self, node: fx.Node, source: fx.GraphModule, graph: fx.Graph, env: Mapping[fx.Node, fx.Node]
    ) -> fx.Node:
        body, settings, operands = region_of(node)
        inner_source = getattr(source, str(body.target))
        inner, inside = fx.Graph(), dict[fx.Node, fx.Node]()
        for n in inner_source.graph.nodes:
            if n.op == "placeholder":
                inside[n] = inner.placeholder(n.name)
        inner.output(tuple(self._copy(inner_source, inner, inside)))
        root = nn.Module()
        for name, region in self.regions.items():
            root.add_module(name, region)  # a region within this one
        name = f"_region_{len(self.regions)}"
        self.regions[name] = Region(StageGraph(root, inner, "Region"), settings)
        return graph.call_module(name, tuple(env[n] if isinstance(n, fx.Node) else n for n in operands))

    def _outputs(self, results: Any) -> list[fx.Node]:
        baked = {b.name: b.value for b in self.record.baked_writes}
        found: list[fx.Node] = []
        for name in self.record.writes:
            if name in self.record.sizes:
                parts = [next(results) for _ in range(self.record.sizes[name])]
                found.append(self.graph.call_function(torch.Size, (parts,)))
                continue
            value = decode(baked[name]) if name in baked else next(results)
            found.append(value if isinstance(value, fx.Node) else self.graph.call_function(same, (value,)))
        return found


def _drop_unused(graph: fx.Graph) -> None:
    """Remove what nothing reads; what writes, draws random numbers or is read by name stays."""
    for node in reversed(list(graph.nodes)):
        if node.users or node.op != "call_function":
            continue
        schema = node.target._schema if isinstance(node.target, torch._ops.OpOverload) else None
        random = torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())
        if not random and not (schema is not None and schema.is_mutable):
            graph.erase_node(node)


def inlined(
    parts: Sequence[tuple[str, StageGraph, tuple[str, ...], tuple[str, ...]]],
    inputs: Sequence[str],
    outputs: Sequence[str],
    model: nn.Module,
) -> tuple[StageGraph, dict[str, str]]:
    """One graph of all stages, in which each value that they give is a node of its own name.

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
