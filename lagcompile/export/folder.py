"""Writing: a lifted model as a self-contained folder.

In: a network with its program, split, formulation and receipt. Out: a folder (manifest, program, split, graph, a file
for each stage, tensors in safetensors). Invariant: the folder appears complete and checked, in one move, or not at all:
what was written has been loaded and run against the original in both modes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from dataclasses import replace as changed
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter
from torch import Tensor, nn

from lagcompile.export.check import check
from lagcompile.export.examples import batch_sizes, examples_of, rows_of
from lagcompile.export.graphs import ProgramFile
from lagcompile.export.plain import is_path
from lagcompile.export.programs import Source, export_program, known_tensors
from lagcompile.export.record import (
    FORMULATION,
    GRAPH,
    MANIFEST,
    PROGRAM,
    RECEIPT,
    SPLIT,
    TENSORS,
    CallRecord,
    Manifest,
    TensorRecord,
    digest_of,
    file_record,
    program_files,
    versions,
)
from lagcompile.export.solutions import solution_files
from lagcompile.export.templates import encode, encode_output, plain_containers
from lagcompile.frontend.graph import Node
from lagcompile.frontend.lower import Formulation
from lagcompile.frontend.partition import Partition
from lagcompile.frontend.receipt import Receipt
from lagcompile.frontend.signature import Signature
from lagcompile.frontend.stages import Network, StageModule
from lagcompile.frontend.trials import resized
from lagcompile.ir.base import DataError, Frozen, LiftError
from lagcompile.ir.disk import appearing
from lagcompile.ir.disk import replace as replace_file
from lagcompile.ir.program import Program
from lagcompile.ir.solution import Solution
from lagcompile.ir.text import to_json
from lagcompile.ir.yamlfile import plain
from lagcompile.runtime.instance import convert, quiet


@dataclass(frozen=True)
class Contents:
    """Content of a folder.

    Attributes:
        network: stages of the lifted model; not changed.
        program: the program that they were lowered to.
        split: the split by names, as a split file.
        formulation: the lifting options.
        receipt: of the capture.
        name: name of the program.
    """

    network: Network
    program: Program
    split: Frozen
    formulation: Formulation
    receipt: Receipt
    name: str

    @property
    def dynamic(self) -> bool:
        """Whether the capture holds for any batch size."""
        return self.receipt.batch == "dynamic"


def write_folder(
    contents: Contents,
    path: str | Path,
    *,
    tensors: Sequence[Tensor] | None = None,
    solution: Solution | None = None,
    replace: bool = False,
) -> Path:
    """Write a folder that `load_folder` reads without the model's source.

    Args:
        contents: what to write.
        path: the folder to make.
        tensors: example inputs in the order of the call; None makes them up from the types.
        solution: a solution of the program: its weights are written instead of the network's, and its states and
            multipliers next to them.
        replace: replace an exported folder that is there.

    Raises:
        DataError: something is there already.
        LiftError: the model cannot be written: a stage runs what a folder cannot hold, the call or the output holds
            objects that are not data, or what was written does something else than the model.
    """
    target = Path(path)
    _free(target, replace=replace)
    contents, tensors = _on_cpu(contents, tensors)
    files = folder_files(contents, tensors, solution)
    weights = None if solution is None else solution.model
    with appearing(target) as part:
        for name, data in files.items():
            replace_file(part / name, data)
        check(contents.network, part, _inputs(contents, tensors), weights=weights, free=contents.dynamic)
    return target


def _on_cpu(contents: Contents, tensors: Sequence[Tensor] | None) -> tuple[Contents, Sequence[Tensor] | None]:
    """Copy tensors to the CPU, because the folder may be read on a machine without this device."""
    given = None if tensors is None else [t.cpu() for t in tensors]
    model = contents.network.capture.original
    if all(t.device.type == "cpu" for t in (*model.parameters(), *model.buffers())):
        return contents, given
    return changed(contents, network=convert(contents.network.copy(), torch.device("cpu"))), given


def _free(path: Path, *, replace: bool) -> None:
    if not path.exists() or (path.is_dir() and not any(path.iterdir())):
        return
    if not replace:
        raise DataError(f"{path} exists: name another folder, or ask to replace it (replace=True, --force)")
    if not (path / MANIFEST).is_file():
        raise DataError(f"{path} is not an exported folder (it has no {MANIFEST}) and is not replaced")


def folder_files(
    contents: Contents, tensors: Sequence[Tensor] | None = None, solution: Solution | None = None
) -> dict[str, bytes]:
    """Return the files of a folder by name.

    Raises:
        LiftError: the model cannot be written.
    """
    network, captured = contents.network, contents.network.capture
    _one_mode(captured.original)
    for constraint in contents.formulation.constraints:
        if constraint.function is not None:
            raise LiftError(
                f"the constraint '{constraint.name}' calls {constraint.function}, and a folder holds no code: save "
                "without it, and lift lagcompile.saved.load_model(folder) with the constraint"
            )
    if solution is not None:
        _fits(contents, solution)
    inputs = _inputs(contents, tensors)
    with torch.no_grad(), quiet(captured.original):
        values = network.glue([t.clone() for t in inputs])
    known = known_tensors(captured)
    whole = _whole(network)
    exported = [
        export_program(s, captured, _types(contents), values, known)
        for s in (_source(network.prologue), *map(_source, network.stages), whole)
    ]
    stages = (network.prologue, *network.stages)
    programs = [_with_stage(e.file, s) for e, s in zip(exported[:-1], stages, strict=True)] + [exported[-1].file]
    known |= {n: t for e in exported for n, t in e.constants.items()}
    records = _tensor_records(network, programs, known)
    files = {
        name: _json(program.model_dump(mode="json", exclude_defaults=True))
        for name, program in zip(program_files(len(network.stages)), programs, strict=True)
    }
    stored = {n: t for n, t in known.items() if n in records}
    if solution is not None:
        stored |= {n: t for n, t in solution.model.state_dict().items() if n in records}
        files |= solution_files(solution)
    files[TENSORS] = _safetensors(stored)
    files[PROGRAM] = (to_json(contents.program) + "\n").encode()
    files[SPLIT] = _json(plain(contents.split))
    files[FORMULATION] = _json(plain(contents.formulation))
    files[GRAPH] = _json(_graph(network.partition))
    files[RECEIPT] = (contents.receipt.model_dump_json(indent=2) + "\n").encode()
    manifest = Manifest(
        **versions(),
        name=contents.name,
        model=_class_name(captured.original),
        front_end=captured.front_end,
        training=captured.original.training,
        batch=contents.receipt.batch,
        rows=rows_of(inputs),
        call=_call(captured.signature),
        output=encode_output(captured.output),
        tensors=records,
        ties=_aliases(network),
        whole=dict(captured.whole),
        notes=captured.notes,
        stages=len(network.stages),
        files={name: file_record(data) for name, data in sorted(files.items())},
    )
    files[MANIFEST] = (sealed(manifest).model_dump_json(indent=2) + "\n").encode()
    return files


def _json(data: Any) -> bytes:
    return (json.dumps(data, allow_nan=False) + "\n").encode()


def _inputs(contents: Contents, tensors: Sequence[Tensor] | None) -> list[Tensor]:
    """Inputs with which the programs are exported.

    Raises:
        LiftError: they must be given.
    """
    if tensors is not None:
        size = batch_sizes(contents.network.capture.sizes)[0]
        return resized(tensors, size) if contents.dynamic else list(tensors)
    if not contents.dynamic:
        raise LiftError(
            f"give example_inputs: the model was captured for one batch size only ({contents.receipt.batch})"
        )
    return examples_of(contents.network)


def _types(contents: Contents) -> dict[str, tuple[int, ...]]:
    """Axes of each value whose sizes are free: those with the batch in them."""
    found: dict[str, tuple[int, ...]] = {}
    for node in contents.network.partition.graph.nodes:
        shape = node.type.shape if node.type is not None and contents.dynamic else None
        found[node.name] = tuple(i for i, d in enumerate(shape or ()) if isinstance(d, str))
    return found


def _one_mode(model: nn.Module) -> None:
    """Check that all modules are in the mode of the model.

    Raises:
        LiftError: some are not (such as a frozen batch normalisation).
    """
    other = [n for n, m in model.named_modules() if m.training != model.training]
    if other:
        own, theirs = ("train", "eval") if model.training else ("eval", "train")
        raise LiftError(
            f"the model is in {own} mode, but {', '.join(other[:4])} in {theirs} mode: an exported program has one "
            "mode for all. Call train() or eval() on the lifted model first, or replace what is to stay frozen"
        )


def _fits(contents: Contents, solution: Solution) -> None:
    """Check that a solution belongs to this program.

    Raises:
        LiftError: it is of another model, or of other states.
    """
    own, other = contents.network.capture.original.state_dict(), solution.model.state_dict()
    different = sorted(n for n in own.keys() | other.keys() if n not in own or n not in other)
    different += sorted(n for n in own.keys() & other.keys() if own[n].shape != other[n].shape)
    if different:
        raise LiftError(f"the solution is of another model: it differs in {', '.join(different[:4])}")
    names, theirs = ([s.name for s in p.states] for p in (contents.program, solution.program))
    if names != theirs:
        raise LiftError(
            f"the solution is of another split: its states are {', '.join(theirs) or 'none'}, those of the lifted "
            f"model are {', '.join(names) or 'none'}"
        )


def sealed(manifest: Manifest) -> Manifest:
    """Return a manifest with its digest."""
    return manifest.model_copy(update={"digest": digest_of(manifest)})


def _class_name(model: nn.Module) -> str:
    from lagcompile.export.model import ExportedModel

    return model.exported.model if isinstance(model, ExportedModel) else type(model).__name__


def _source(stage: StageModule) -> Source:
    name = f"stage_{stage.name.removeprefix('f')}" if stage.name != "data" else "data"
    return Source(name, stage.module, stage.reads, stage.writes)


def _whole(network: Network) -> Source:
    """Return the network that was never cut."""
    module = network.capture.module
    output = next(n for n in reversed(module.graph.nodes) if n.op == "output")
    returns = tuple(n.name for n in output.args[0])
    return Source("network", module, network.capture.signature.names, returns)


def _with_stage(file: ProgramFile, stage: StageModule) -> ProgramFile:
    return file.model_copy(update={"weights": stage.weights, "slots": stage.slots, "signature": stage.signature})


def _tensor_records(
    network: Network, programs: Sequence[ProgramFile], known: Mapping[str, Tensor]
) -> dict[str, TensorRecord]:
    """The model's own tensors, each once, and the constants that the programs use.

    Raises:
        LiftError: a name that cannot be written.
    """
    original = network.capture.original
    hidden = {
        f"{path}.{name}" if path else name
        for path, module in original.named_modules(remove_duplicate=False)
        for name in module._non_persistent_buffers_set
    }
    aliases = _aliases(network)
    kinds: dict[str, dict[str, Any]] = {}
    for name, parameter in original.named_parameters():
        kinds[name] = {"kind": "parameter", "trainable": parameter.requires_grad}
    for name, _ in original.named_buffers():
        kinds[name] = {"kind": "buffer", "persistent": name not in hidden}
    other = {a for names in aliases.values() for a in names}
    for program in programs:
        for name in program.tensors:
            if name not in other:
                kinds.setdefault(name, {"kind": "constant", "persistent": False})
    wrong = [n for n in (*kinds, *other) if not is_path(n)]
    if wrong:
        raise LiftError(f"the tensor {wrong[0]!r} cannot be written: a name must not have quotes or braces")
    return {
        n: TensorRecord(dtype=str(known[n].dtype).removeprefix("torch."), shape=tuple(known[n].shape), **kind)
        for n, kind in kinds.items()
    }


def _aliases(network: Network) -> dict[str, tuple[str, ...]]:
    """Other names of parameters and buffers that a model holds more than once."""
    names: dict[Tensor, list[str]] = {}
    model = network.capture.original
    for name, tensor in (
        *model.named_parameters(remove_duplicate=False),
        *model.named_buffers(remove_duplicate=False),
    ):
        names.setdefault(tensor, []).append(name)
    return {n[0]: tuple(n[1:]) for n in names.values() if len(n) > 1}


def _call(signature: Signature) -> CallRecord:
    plain_containers(signature.structure, "the model's call")
    return CallRecord(
        names=signature.names,
        parameters=signature.parameters,
        structure=encode(signature.structure, "the model's call"),
        constants={i: encode(v, "the model's call") for i, v in signature.constants.items()},
        starred=signature.starred,
    )


def _graph(partition: Partition) -> dict[str, Any]:
    """Nodes, stage numbers and reasons as JSON data."""
    graph = partition.graph
    nodes = tuple(changed(n, source=Path(n.source).name) for n in graph.nodes)  # no paths of this machine
    return {
        "nodes": TypeAdapter(tuple[Node, ...]).dump_python(nodes, mode="json"),
        "outputs": graph.outputs,
        "shapes_known": graph.shapes_known,
        "stage_of": {n.name: partition.stage_of[n.name] for n in graph.staged},
        "reasons": partition.reasons,
    }


def _safetensors(tensors: Mapping[str, Tensor]) -> bytes:
    from safetensors.torch import save

    kept: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if tensor.is_complex() or tensor.layout is not torch.strided:
            raise LiftError(f"the tensor '{name}' ({tensor.dtype}, {tensor.layout}) cannot be written as safetensors")
        kept[name] = tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
    return bytes(save(kept))
