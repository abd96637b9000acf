"""Reading: an exported folder as a network that can be lifted, bound, solved and verified, without the model's source.

In: the path of a folder that anybody may have written. Out: `Parts`. Invariant: every file is there, is a regular file,
has the size and the hash that the manifest says, and no other file is there; nothing of the folder is run, evaluated,
imported or unpickled; the program that the loaded network lowers to is the one that was written. The hashes show
damage; whoever changes a folder can make new ones, and gets another network, or an error.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from lagcompile.export.graphs import Port, ProgramFile, graph_module, inlined
from lagcompile.export.model import Exported, ExportedModel, fill_tensors
from lagcompile.export.plain import is_name, is_path
from lagcompile.export.record import (
    DATA,
    FORMAT,
    FORMULATION,
    GRAPH,
    MANIFEST,
    NETWORK,
    PROGRAM,
    RECEIPT,
    SOLUTION,
    SOLUTION_TENSORS,
    SPLIT,
    TENSORS,
    CallRecord,
    Manifest,
    digest_of,
    program_files,
)
from lagcompile.export.strict import parse, read_file, record, tensors_of
from lagcompile.export.templates import decode_output, decode_plain
from lagcompile.frontend.capture import Capture, ModeOutput
from lagcompile.frontend.graph import Graph, Node
from lagcompile.frontend.lower import Formulation, lower
from lagcompile.frontend.partition import Partition
from lagcompile.frontend.receipt import Receipt
from lagcompile.frontend.signature import Signature
from lagcompile.frontend.stages import Network, StageModule
from lagcompile.frontend.still import set_mode
from lagcompile.frontend.structure import Reference, leaves
from lagcompile.ir.base import DataError, Frozen, LagcompileError
from lagcompile.ir.program import Program
from lagcompile.ir.reading import decoded
from lagcompile.ir.text import from_json

TOLD = 10
"""Number of missing files that are listed."""


@dataclass(frozen=True)
class Parts:
    """What a folder holds.

    Attributes:
        network: the loaded stages over an `ExportedModel`.
        program: the program.
        split: the split file.
        formulation: the lifting options.
        receipt: of the capture that was exported.
        manifest: versions, names and hashes.
    """

    network: Network
    program: Program
    split: bytes
    formulation: Formulation
    receipt: Receipt
    manifest: Manifest


def read_manifest(path: str | Path) -> Manifest:
    """The manifest of an exported folder.

    Raises:
        DataError: there is none, it was edited, or it is of another version.
    """
    file = Path(path) / MANIFEST
    if not file.is_symlink() and not file.is_file():
        raise DataError(f"{path} is not an exported folder: it has no {MANIFEST}")
    text = read_file(Path(path), MANIFEST)
    data = parse(text, str(file))
    found = data.get("format") if isinstance(data, dict) else None
    if found != FORMAT or type(found) is not int:
        made = f" (written by lagcompile {data.get('lagcompile', 'unknown')!s:.40})" if isinstance(data, dict) else ""
        raise DataError(
            f"{file} is of format {found!r:.40}{made}, this lagcompile reads format {FORMAT}: "
            "load it where it was written, and export the model again"
        )
    manifest = record(text, str(file), Manifest)
    if digest_of(manifest) != manifest.digest:
        raise DataError(f"{file} was changed after it was written: its digest does not fit. Export the model again")
    return manifest


def read_files(path: str | Path, manifest: Manifest) -> dict[str, bytes]:
    """The files of a folder: those that its manifest names, and no others.

    Raises:
        DataError: each file that is missing, was changed, or does not belong to an exported folder.
    """
    folder = Path(path)
    needed = {PROGRAM, SPLIT, FORMULATION, GRAPH, RECEIPT, TENSORS, *program_files(manifest.stages)}
    solution = {SOLUTION, SOLUTION_TENSORS}
    named = manifest.files.keys()
    wrong = (needed - named) | (named - needed - (solution if solution <= named else set()))
    if wrong:
        first = sorted(wrong)[:TOLD]
        more = [f"{folder / MANIFEST}: {len(wrong) - TOLD} more of its entries"] if len(wrong) > TOLD else []
        raise DataError(
            [*(f"{folder / MANIFEST}: its entry of the file {n!r:.60} is missing or wrong" for n in first), *more]
        )
    files: dict[str, bytes] = {}
    problems = [
        f"{folder / name} does not belong to the exported folder: {MANIFEST} does not name it"
        for name in sorted({p.name for p in folder.iterdir()} - named - {MANIFEST})
    ]
    for name, entry in manifest.files.items():
        try:
            data = read_file(folder, name, entry.bytes)
        except DataError as error:
            problems += error.problems
            continue
        if hashlib.sha256(data).hexdigest() != entry.sha256:
            problems.append(f"{folder / name} was changed or damaged: its SHA-256 is not the one in {MANIFEST}")
        files[name] = data
    if problems:
        raise DataError(problems)
    return files


def load_folder(path: str | Path) -> Parts:
    """Load an exported folder.

    Raises:
        DataError: a file is missing, was changed, or is of another version; each is named.
    """
    try:
        manifest = read_manifest(path)
        files = read_files(path, manifest)
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from None
    try:
        parts = _parts(manifest, files)
        again = lower(parts.network, parts.formulation, loss=parts.program.objective.loss, name=manifest.name)
    except LagcompileError as error:
        hint = "" if manifest.torch == _torch() else f" (written with torch {manifest.torch}, here is {_torch()})"
        raise DataError([f"{path}: {p:.600}{hint}" for p in error.problems]) from error
    except MemoryError:
        raise
    except Exception as error:  # no known forged folder gets here: `tests/unseen/folders.py` counts them
        first = (str(error).strip().splitlines() or [""])[0]
        raise DataError(f"{path}: its files do not fit each other ({type(error).__name__}: {first:.200})") from error
    if again != parts.program:
        raise DataError(
            f"{Path(path) / PROGRAM} is not the program that the folder's stages give with this lagcompile "
            f"(written by {manifest.lagcompile}): export the model again"
        )
    return parts


def _torch() -> str:
    import torch

    return str(torch.__version__)


def _parts(manifest: Manifest, files: Mapping[str, bytes]) -> Parts:
    program = from_json(decoded(files[PROGRAM], PROGRAM), PROGRAM, error=DataError)
    receipt = record(files[RECEIPT], RECEIPT, Receipt)
    if receipt.sizes.step < 1:
        raise DataError(f"{RECEIPT}: sizes.step: must be at least 1")
    formulation = record(files[FORMULATION], FORMULATION, Formulation)
    functions = [c.function for c in formulation.constraints if c.function is not None]
    if functions:
        raise DataError(f"{FORMULATION}: a constraint calls {functions[0]!r:.80}, and a folder holds no code")
    partition = _partition(files[GRAPH], manifest.stages)
    model = _model(manifest, tensors_of(files[TENSORS], TENSORS))
    read = [(name, record(files[name], name, ProgramFile)) for name in program_files(manifest.stages)]
    _connected(manifest, model.exported, dict(read))
    names = ("data", *(f"f{k}" for k in range(manifest.stages)), "network")
    modules = [
        graph_module(p, model, manifest.tensors, name, file, attributes=file != NETWORK)
        for name, (file, p) in zip(names, read, strict=True)
    ]
    prologue, *stages = [_stage(n, m, p) for n, m, (_, p) in zip(names[:-1], modules, read, strict=False)]
    own, uncut = model.exported, read[-1][1]
    own.network, own.returns, own.tensors = modules[-1], tuple(p.name for p in uncut.writes), uncut.tensors
    parts = [(s.name, s.module, s.reads, s.writes) for s in (prologue, *stages)]
    whole, where = inlined(parts, own.signature.names, own.returns, model)  # type: ignore[arg-type]
    numbers = {s.name: k for k, s in enumerate(stages)}
    extended = {**{n: numbers[s] for n, s in where.items() if s in numbers}, **partition.stage_of}
    captured = Capture(
        module=whole,
        original=model,
        signature=own.signature,
        output=own.output,
        front_end=manifest.front_end,
        whole=dict(manifest.whole),
        ties={n: a for n, a in manifest.ties.items() if manifest.tensors[n].kind == "parameter"},
        notes=manifest.notes,
        sizes=receipt.sizes,
    )
    network = Network(captured, Partition(partition.graph, extended, partition.reasons), prologue, tuple(stages))
    network.train(manifest.training)
    set_mode(model, modules, manifest.training)
    return Parts(network, program, files[SPLIT], formulation, receipt, manifest)


class _GraphFile(Frozen):
    """Read the operations of the captured network, and the stage in which each runs."""

    nodes: tuple[Node, ...]
    outputs: tuple[str, ...]
    shapes_known: bool
    stage_of: Mapping[str, int]
    reasons: tuple[str, ...]


def _partition(data: bytes, stages: int) -> Partition:
    found = record(data, GRAPH, _GraphFile)
    graph = Graph(found.nodes, found.outputs, found.shapes_known)
    before: set[str] = set()
    for node in graph.nodes:
        ahead = {*node.inputs, *node.after} <= before and all(
            found.stage_of.get(i, 0) <= found.stage_of.get(node.name, stages) for i in node.inputs
        )
        if node.name in before or not is_name(node.name) or not ahead:
            raise DataError(f"{GRAPH}: the node {node.name!r:.60} occurs twice, or before what it reads")
        before.add(node.name)
    staged = {n.name for n in graph.staged}
    inside = all(0 <= k < stages for k in found.stage_of.values()) and len(found.reasons) == stages - 1
    if found.stage_of.keys() != staged or not set(graph.outputs) <= before or not inside:
        raise DataError(f"{GRAPH}: its stages or outputs are not those of its {stages} stages")
    return Partition(graph, dict(found.stage_of), found.reasons)


def _connected(manifest: Manifest, model: Exported, programs: Mapping[str, ProgramFile]) -> None:
    """Check that each program reads values that are there, of their kind.

    Raises:
        DataError: one does not.
    """
    inputs = {n: Port(name=n, kind="tensor") for n in model.signature.names}
    templates = (
        (model.output.train, model.output.evaluation) if isinstance(model.output, ModeOutput) else (model.output,)
    )
    outputs = {v.name for t in templates for v in leaves(t) if isinstance(v, Reference)}
    own = {a for n, t in manifest.tensors.items() if t.kind == "parameter" for a in (n, *manifest.ties.get(n, ()))}
    there = dict(inputs)
    for file, program in programs.items():
        if file == NETWORK:
            there = dict(inputs)
        for port in program.reads:
            if there.get(port.name) != port:
                raise DataError(f"{file}: it reads '{port.name:.60}', which is not there, or of another kind")
        if file in {DATA, NETWORK} and tuple(p.name for p in program.reads) != model.signature.names:
            raise DataError(f"{file}: it does not take the inputs of the model's call")
        for port in program.writes:
            if not is_name(port.name) or there.get(port.name, port) != port:
                raise DataError(f"{file}: it writes '{port.name!s:.60}', which is not a name, or is another value's")
            there[port.name] = port
        if {*program.weights, *program.slots} - own:
            raise DataError(f"{file}: its weights are not parameters of the model")
        if file == NETWORK or file == program_files(manifest.stages)[-2]:
            absent = outputs - there.keys()
            if absent:
                raise DataError(f"{file}: nothing writes '{min(absent):.60}', which the model returns")


def _model(manifest: Manifest, tensors: Mapping[str, Tensor]) -> ExportedModel:
    kinds = {n: (str(t.dtype).removeprefix("torch."), tuple(t.shape)) for n, t in tensors.items()}
    declared = {n: (t.dtype, t.shape) for n, t in manifest.tensors.items()}
    wrong = [n for n in kinds.keys() | declared.keys() if kinds.get(n) != declared.get(n)]
    if wrong:
        raise DataError(f"{TENSORS}: '{min(wrong):.80}' is not there, or not as {MANIFEST} declares it")
    names = [*declared, *(a for others in manifest.ties.values() for a in others)]
    odd = [n for n in names if not is_path(n)]
    if odd or len(set(names)) != len(names) or not manifest.ties.keys() <= declared.keys():
        raise DataError(f"{MANIFEST}: the names of its tensors are not names ({odd[:1]}), or occur twice")
    signature = signature_from(manifest.call)
    model = ExportedModel(Exported(manifest.model, signature, decode_output(manifest.output)))
    fill_tensors(model, tensors, manifest.tensors, manifest.ties)
    return model


def signature_from(call: CallRecord) -> Signature:
    """The call of a model from its record.

    Raises:
        DataError: it is damaged.
    """
    structure = decode_plain(call.structure)
    positions = sorted(p for p in leaves(structure) if type(p) is int)
    constants = {i: decode_plain(v) for i, v in call.constants.items()}
    count = len(call.names) + len(constants)
    names = (*call.names, *call.parameters)
    starred = call.starred in ("", *call.parameters)
    if positions != list(range(count)) or not constants.keys() <= set(positions) or not starred:
        raise DataError(f"{MANIFEST}: the structure of the call does not fit its names")
    if not all(map(is_name, names)) or any(len(set(n)) != len(n) for n in (call.names, call.parameters)):
        raise DataError(f"{MANIFEST}: the names of the call's arguments are not names, or occur twice")
    return Signature(call.names, call.parameters, structure, constants, exact=True, starred=call.starred)


def _stage(name: str, module: Any, program: ProgramFile) -> StageModule:
    return StageModule(
        name=name,
        module=module,
        reads=tuple(p.name for p in program.reads),
        writes=tuple(p.name for p in program.writes),
        weights=program.weights,
        slots=program.slots,
        signature=program.signature,
    )
