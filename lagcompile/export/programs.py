"""Modules as graphs of PyTorch's operators: a function of the values that are read and of the tensors that are used.

In: a stage module (or the un-split network), example values, the tensors by their names. Out: `ProgramFile`, the data
of a file. Invariant: the graph is the one that torch.export makes, with the batch axis free wherever the capture leaves
it free; a module is exported in train and in eval mode, and once where they do not differ; what the format cannot
express is refused with the module's path.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import Tensor, fx, nn
from torch.fx.traceback import preserve_node_meta

from lagcompile.export.graphs import Port, ProgramFile
from lagcompile.export.operators import named
from lagcompile.export.plain import written
from lagcompile.export.templates import encode
from lagcompile.frontend.capture import Capture, reason_of
from lagcompile.frontend.export import quietly
from lagcompile.frontend.graphmodule import Runner
from lagcompile.frontend.regions import Layer, region_of
from lagcompile.frontend.still import set_mode
from lagcompile.ir.base import LiftError


@dataclass(frozen=True)
class Source:
    """What is exported: `module(*reads) -> writes`."""

    name: str
    module: nn.Module
    reads: tuple[str, ...]
    writes: tuple[str, ...]


@dataclass(frozen=True)
class Exported:
    """A program, and constants that it holds besides the model's tensors."""

    file: ProgramFile
    constants: Mapping[str, Tensor]


def known_tensors(captured: Capture) -> dict[str, Tensor]:
    """Every tensor of a captured model by name: the user's, aliases included, then those of the graph alone."""
    found: dict[str, Tensor] = {}
    for module in (captured.original, captured.module):
        for name, tensor in (
            *module.named_parameters(remove_duplicate=False),
            *module.named_buffers(remove_duplicate=False),
        ):
            found.setdefault(name, tensor)
    return found


def export_program(
    source: Source,
    captured: Capture,
    free: Mapping[str, Sequence[int]],
    values: Mapping[str, Any],
    known: Mapping[str, Tensor],
) -> Exported:
    """Export a module in both modes; the modes of the captured model are put back.

    Args:
        source: the module.
        captured: the capture that it comes from.
        free: axes of each value whose sizes are free.
        values: example values by name.
        known: tensors by name (`known_tensors`).

    Raises:
        LiftError: torch.export refuses the module, or it runs or gives what a folder cannot hold.
    """
    function = _Function(source, captured.original, values, _used(source, known))
    roots = (captured.original, source.module)
    before = [(m, m.training) for root in roots for m in root.modules()]
    programs = []
    try:
        for training in (True, False) if _has_modes(source.module) else (True,):
            captured.original.train(training)
            set_mode(captured.original, (source.module,), training)
            prefix = f"_{source.name}_{'train' if training else 'eval'}_"
            programs.append(_Writer(function, _export(function, free), prefix))
    finally:
        for module, mode in before:
            module.training = mode
    return _collected(function, programs)


_WITHOUT_MODES = (
    *(nn.Linear, nn.Bilinear, nn.Embedding, nn.Flatten, nn.Identity, nn.LayerNorm, nn.GroupNorm),
    *(nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d),
    *(nn.MaxPool1d, nn.MaxPool2d, nn.AvgPool1d, nn.AvgPool2d, nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d),
    *(nn.ReLU, nn.ReLU6, nn.GELU, nn.SiLU, nn.ELU, nn.LeakyReLU, nn.Tanh, nn.Sigmoid, nn.Softplus, nn.Hardtanh),
    *(nn.Hardswish, nn.Hardsigmoid, nn.Softmax, nn.LogSoftmax, nn.RNNCell, nn.LSTMCell, nn.GRUCell),
)


def _has_modes(module: nn.Module) -> bool:
    """Whether train and eval mode may differ: the stage calls a module that is not known to do the same in both."""
    called = (
        {str(n.target) for n in module.graph.nodes if n.op == "call_module"}
        if isinstance(module, fx.GraphModule)
        else {""}
    )
    modules = dict(module.named_modules(remove_duplicate=False))
    return any(type(modules[path]) not in _WITHOUT_MODES for path in called)


class _Function(nn.Module):
    """The module as a function of plain inputs: tensors and sizes that it reads, then the tensors that it uses."""

    def __init__(
        self, source: Source, original: nn.Module, values: Mapping[str, Any], used: Mapping[str, Tensor]
    ) -> None:
        super().__init__()
        self.source = source
        self.values = values
        self.used = used
        self.roots = (source.module, original)  # in a tuple: their tensors are inputs, not attributes

    def forward(self, *inputs: Any) -> tuple[Any, ...]:
        given = iter(inputs)
        reads = []
        for name in self.source.reads:
            value, count = self.values[name], _count(self.values[name])
            if count is None:
                reads.append(value)
            else:
                reads.append(tuple(next(given) for _ in range(count)) if isinstance(value, tuple) else next(given))
        tensors = {tensor: next(given) for tensor in self.used.values()}
        with _swapped(self.roots, tensors):
            results = self._run(reads)
        flat: list[Any] = []
        for name, value in zip(self.source.writes, results, strict=True):
            if _count(self.values[name]) is not None:
                flat += list(value) if isinstance(self.values[name], tuple) else [value]
        return tuple(flat)

    def _run(self, reads: Sequence[Any]) -> Any:
        """Run the module; where it is a graph, torch.export notes the user's module of each of its nodes."""
        if not isinstance(self.source.module, fx.GraphModule):
            return self.source.module(*reads)
        with preserve_node_meta():
            return Runner(self.source.module).run(*reads)


@contextmanager
def _swapped(roots: Sequence[nn.Module], tensors: Mapping[Tensor, Any]) -> Iterator[None]:
    """Other tensors in the places of parameters and buffers; what is assigned to a buffer is copied into it.

    A layer that is a child of both roots is one module: each place is swapped once (torch.func.functional_call would
    swap it twice and put the first replacement back).
    """
    modules = dict.fromkeys(m for root in roots for m in root.modules())
    places = [
        (entries, name, tensor)
        for m in modules
        for entries in (m._parameters, m._buffers)
        for name, tensor in entries.items()
        if tensor is not None and tensor in tensors
    ]
    try:
        for entries, name, tensor in places:
            entries[name] = tensors[tensor]
        yield
        for entries, name, tensor in places:
            now = entries[name]
            if now is not tensors[tensor] and now is not None:
                with torch.no_grad():
                    tensors[tensor].copy_(now)
    finally:
        for entries, name, tensor in places:
            entries[name] = tensor  # type: ignore[assignment]


def _count(value: Any) -> int | None:
    """Return how many inputs a value is; None where it is neither a tensor nor a size."""
    if isinstance(value, Tensor) or (isinstance(value, int) and not isinstance(value, bool)):
        return 1
    if isinstance(value, tuple) and value and all(type(v) is int for v in value):
        return len(value)
    return None


def _used(source: Source, known: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors that a module uses, each once, by the model's names."""
    names: dict[Tensor, str] = {}
    for name, tensor in known.items():
        names.setdefault(tensor, name)
    module = source.module
    own = [*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)]
    for part in module.modules():
        if isinstance(part, Layer):
            own += [*part.layer[0].named_parameters(), *part.layer[0].named_buffers()]
    foreign = [n for n, t in own if t not in names]
    if foreign:
        raise LiftError(f"{source.name}: the tensor '{foreign[0]}' belongs neither to the model nor to its graph")
    return {names[t]: t for _, t in own}


def _export(function: _Function, axes: Mapping[str, Sequence[int]]) -> Any:
    source = function.source
    inputs: list[Any] = []
    free: list[Any] = []
    for name in source.reads:
        value = function.values[name]
        if _count(value) is None:
            continue
        if isinstance(value, Tensor):
            inputs.append(value.detach().clone())
            free.append(dict.fromkeys(axes.get(name, ()), torch.export.Dim.AUTO) or None)
        else:
            sizes = value if isinstance(value, tuple) else (value,)
            inputs += sizes
            free += [torch.export.Dim.AUTO for _ in sizes]
    for tensor in function.used.values():
        # a parameter wants a gradient here even where it is frozen: layers that would run a fused operator without
        # a derivative must not (nn.TransformerEncoderLayer in eval mode)
        wants = isinstance(tensor, nn.Parameter) and tensor.is_floating_point()
        inputs.append(tensor.detach().clone().requires_grad_(wants))
        free.append(None)
    dynamic = any(f is not None for f in free)
    try:
        with quietly():
            return torch.export.export(
                function, tuple(inputs), dynamic_shapes=(tuple(free),) if dynamic else None, strict=False
            )
    except Exception as error:  # whatever torch.export raises
        raise LiftError(
            f"{source.name} cannot be written as a graph: {reason_of(error)}. What it runs must be "
            "tensor operations: change the line, or keep the model's source and save the split alone (save_split)"
        ) from error


def _collected(function: _Function, programs: Sequence[_Writer]) -> Exported:
    source, values = function.source, function.values
    graphs = [p.graph(p.program.graph_module) for p in programs]
    constants = {n: t for p in programs for n, t in p.constants.items()}
    file = ProgramFile(
        reads=tuple(_port(n, values[n]) for n in source.reads),
        writes=tuple(_port(n, values[n]) for n in source.writes),
        tensors=(*function.used, *constants),
        train=graphs[0],
        evaluation=graphs[-1] if graphs[0] != graphs[-1] else None,
    )
    return Exported(file, constants)


def _port(name: str, value: Any) -> Port:
    count = _count(value)
    if count is None:
        return Port(name=name, kind="constant", value=encode(value, f"the value '{name}'"))
    if isinstance(value, tuple):
        return Port(name=name, kind="sizes", count=count)
    return Port(name=name, kind="tensor" if isinstance(value, Tensor) else "size")


class _Writer:
    """Write an exported graph as data (`lagcompile.export.graphs`)."""

    def __init__(self, function: _Function, program: Any, prefix: str) -> None:
        self.function = function
        self.program = program
        self.prefix = prefix
        self.constants: dict[str, Tensor] = {}

    def graph(self, source: fx.GraphModule) -> dict[str, Any]:
        """A graph with its inputs: those of the program, or the operands of a region."""
        _drop_unused(source.graph)
        env: dict[fx.Node, Any] = {}
        placeholders = [n for n in source.graph.nodes if n.op == "placeholder"]
        inputs = self._inputs(placeholders, env) if source is self.program.graph_module else placeholders
        env |= {n: {"node": f"v{i}"} for i, n in enumerate(inputs)}
        nodes: list[dict[str, Any]] = []
        for node in source.graph.nodes:
            if node.op == "output":
                outputs = [self._argument(v, env, node) for v in node.args[0]]
            elif node.op not in {"placeholder", "get_attr"}:
                name = f"v{len(inputs) + len(nodes)}"
                nodes.append({"name": name, **self._node(node, source, env)})
                env[node] = {"node": name}
        return {"inputs": [f"v{i}" for i in range(len(inputs))], "nodes": nodes, "outputs": outputs}

    def _inputs(self, placeholders: Sequence[fx.Node], env: dict[fx.Node, Any]) -> list[fx.Node]:
        """The inputs that are values; those that are tensors of the model, and constants, are referred to by name."""
        given: list[fx.Node] = []
        for node, spec in zip(placeholders, self.program.graph_signature.input_specs, strict=True):
            if spec.kind.name == "USER_INPUT":
                given.append(node)
                continue
            value = self.program.constants.get(spec.target)
            if not isinstance(value, Tensor):
                self._refuse(node, f"a {type(value).__qualname__}")
            name = self.prefix + spec.target.replace(".", "_")
            self.constants[name] = value.detach().clone()
            env[node] = {"tensor": name}
        count = len(given) - len(self.function.used)
        env |= {n: {"tensor": name} for n, name in zip(given[count:], self.function.used, strict=True)}
        return given[:count]

    def _node(self, node: fx.Node, source: fx.GraphModule, env: Mapping[fx.Node, Any]) -> dict[str, Any]:
        if isinstance(node.target, torch._ops.HigherOrderOperator):
            body, (kind, setting), operands = region_of(node)
            inner = self.graph(getattr(source, str(body.target)))
            args = [self._argument(v, env, node) for v in operands]
            return {
                "operator": kind,
                "args": args,
                "setting": [self._argument(v, env, node) for v in setting],
                "body": inner,
            }
        name = "item" if node.target is operator.getitem else named(node.target)
        if name is None:
            self._refuse(node, f"the operator {node.target}")
        return {
            "operator": name,
            "args": [self._argument(v, env, node) for v in node.args],
            "kwargs": {k: self._argument(v, env, node) for k, v in node.kwargs.items()},
        }

    def _argument(self, value: Any, env: Mapping[fx.Node, Any], node: fx.Node) -> Any:
        if isinstance(value, fx.Node):
            return env[value]
        if isinstance(value, list | tuple):
            return [self._argument(v, env, node) for v in value]
        try:
            return written(value)
        except TypeError as error:
            self._refuse(node, str(error))

    def _refuse(self, node: fx.Node, what: str) -> NoReturn:
        """Say what cannot be written, and where it is in the model.

        Raises:
            LiftError: always.
        """
        stack = [path for path, _ in (node.meta.get("nn_module_stack") or {}).values() if path]
        place = f"the module '{stack[-1]}'" if stack else f"the model ({self.function.source.name})"
        raise LiftError(
            f"{place} uses {what}, which an exported folder cannot hold: it holds PyTorch's own operators on tensors "
            "(lagcompile.export.operators). Write it with these, or keep the model's source and save the split alone "
            "(save_split)"
        )


_CHECKS = ("_assert_tensor_metadata", "_assert_scalar", "_assert_async", "sym_constrain_range", "_check")


def _drop_unused(graph: fx.Graph) -> None:
    """Remove assertions and what nothing reads; operations that write or draw random numbers stay."""
    for node in reversed(list(graph.nodes)):
        if node.users or node.op != "call_function" or isinstance(node.target, torch._ops.HigherOrderOperator):
            continue
        schema = node.target._schema if isinstance(node.target, torch._ops.OpOverload) else None
        random = torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())
        if any(word in str(node.target) for word in _CHECKS) or not (random or (schema and schema.is_mutable)):
            graph.erase_node(node)
