"""Modules as torch.export programs: a pure function of the values that are read and of the tensors that are used.

In: a stage module (or the un-split network), example values, the tensors by their names. Out: bytes of a `.pt2` archive
and `ProgramRecord`. Invariant: an archive holds no tensor, so nothing in it is pickled; the batch axis is free
wherever the capture leaves it free; a module is exported in train and in eval mode, and once where they do not differ.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from lagcompile.export.record import Baked, ProgramRecord
from lagcompile.export.templates import encode
from lagcompile.frontend.capture import Capture, reason_of
from lagcompile.frontend.export import quietly
from lagcompile.frontend.regions import Layer
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
    """A record, its files, and constants that the programs hold."""

    record: ProgramRecord
    files: Mapping[str, bytes]
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
        LiftError: torch.export refuses the module, or a value that it reads or gives cannot be written.
    """
    function = _Function(source, captured.original, values, _used(source, known))
    if all(_count(values[n]) is None for n in source.writes):  # torch.export.save fails on a graph without outputs
        return _collected(function, [])
    roots = (captured.original, source.module)
    before = [(m, m.training) for root in roots for m in root.modules()]
    programs = []
    try:
        for training in (True, False) if _has_modes(source.module) else (True,):
            for root in roots:
                root.train(training)
            programs.append(_export(function, free))
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
            written = self.source.module(*reads)
        flat: list[Any] = []
        for name, value in zip(self.source.writes, written, strict=True):
            if _count(self.values[name]) is not None:
                flat += list(value) if isinstance(self.values[name], tuple) else [value]
        return tuple(flat)


@contextmanager
def _swapped(roots: Sequence[nn.Module], tensors: Mapping[Tensor, Any]) -> Iterator[None]:
    """Other tensors in the places of parameters and buffers; what is assigned to a buffer is copied into it.

    A layer that is a child of both roots is one module: each place is swapped once (torch.func.functional_call would
    swap it twice and put the first stand-in back).
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
    """How many inputs a value is; None where it is no tensor and no size."""
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
            f"{source.name} cannot be written as a torch.export program: {reason_of(error)}. What it runs must be "
            "tensor operations: change the line, or keep the model's source and save the split alone (save_split)"
        ) from error


def _collected(function: _Function, programs: Sequence[Any]) -> Exported:
    source = function.source
    constants: dict[str, Tensor] = {}
    names: dict[str, str] = {}
    for mode, program in zip(("train", "eval"), programs, strict=False):
        for target, value in program.constants.items():
            if not isinstance(value, Tensor):
                raise LiftError(
                    f"{source.name} holds a {type(value).__qualname__} besides tensors, which cannot be written"
                )
            names[f"{mode}/{target}"] = f"_{source.name}_{mode}_{target.replace('.', '_')}"
            constants[names[f"{mode}/{target}"]] = value.detach().clone()
    same = not constants and len({str(p.graph) for p in programs}) == 1
    files = {f"{source.name}.pt2": programs[0]} if same else {}
    if not same:
        files = {f"{source.name}.{mode}.pt2": p for mode, p in zip(("train", "eval"), programs, strict=False)}
    listed = list(files) or [""]
    sizes = {
        n: len(function.values[n])
        for n in (*source.reads, *source.writes)
        if isinstance(function.values[n], tuple) and _count(function.values[n])
    }
    return Exported(
        ProgramRecord(
            name=source.name,
            train=listed[0],
            evaluation=listed[-1],
            reads=source.reads,
            tensors=tuple(function.used),
            writes=source.writes,
            sizes=sizes,
            baked_reads=_baked(function, source.reads),
            baked_writes=_baked(function, source.writes),
            constants=names,
        ),
        {name: _bytes(program) for name, program in files.items()},
        constants,
    )


def _baked(function: _Function, names: Sequence[str]) -> tuple[Baked, ...]:
    values = function.values
    return tuple(Baked(name=n, value=encode(values[n], f"the value '{n}'")) for n in names if _count(values[n]) is None)


def _bytes(program: Any) -> bytes:
    """Archive of a program without any tensor in it."""
    program._example_inputs = None
    program._constants = {}
    _give_something(program.graph_module)
    for module in program.graph_module.modules():
        for node in module.graph.nodes if isinstance(module, fx.GraphModule) else ():
            node.meta.pop("stack_trace", None)  # paths of this machine
    buffer = io.BytesIO()
    with quietly():
        torch.export.save(program, buffer)
    return buffer.getvalue()


def _give_something(module: fx.GraphModule) -> None:
    """Let each part under a setting return a value: torch.export.load fails on one that gives nothing."""
    for node in list(module.graph.nodes):
        if not isinstance(node.target, torch._ops.HigherOrderOperator):
            continue
        (body,) = (getattr(module, str(n.target)) for n in node.all_input_nodes if n.op == "get_attr")
        _give_something(body)
        output = next(n for n in reversed(body.graph.nodes) if n.op == "output")
        if output.args[0]:
            continue
        if all(n.op in {"placeholder", "output"} for n in body.graph.nodes):
            module.graph.erase_node(node)
            continue
        given = next(n for n in body.graph.nodes if n.op == "placeholder" and isinstance(n.meta["val"], Tensor))
        output.args = ((given,),)
        node.meta["val"] = (given.meta["val"],)
        body.recompile()
    module.graph.eliminate_dead_code(lambda n: n.op != "get_attr")
    module.recompile()
