"""Reading: an exported folder as a network that can be lifted, bound, solved and verified, without the model's source.

In: the path of a folder. Out: `Parts`. Invariant: every file is there and has the hash that the manifest says; nothing
pickled is opened; the program that the loaded network lowers to is the one that was written. The hashes tell damage
from what was written, not friend from foe: torch.export evaluates the symbolic sizes of an archive.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError
from torch import Tensor

from lagcompile.export.graphs import graph_module, inlined
from lagcompile.export.model import Exported, ExportedModel, fill_tensors
from lagcompile.export.record import (
    FORMAT,
    FORMULATION,
    GRAPH,
    MANIFEST,
    PROGRAM,
    RECEIPT,
    SPLIT,
    TENSORS,
    CallRecord,
    Manifest,
    ProgramRecord,
    digest_of,
)
from lagcompile.export.templates import decode, decode_output
from lagcompile.frontend.capture import Capture
from lagcompile.frontend.graph import Graph, Node
from lagcompile.frontend.lower import Formulation, lower
from lagcompile.frontend.partition import Partition
from lagcompile.frontend.receipt import Receipt
from lagcompile.frontend.signature import Signature
from lagcompile.frontend.stages import Network, StageModule
from lagcompile.frontend.structure import fill
from lagcompile.ir.base import DataError, LagcompileError
from lagcompile.ir.program import Program
from lagcompile.ir.text import from_json
from lagcompile.ir.yamlfile import check, read_text


@dataclass(frozen=True)
class Parts:
    """What a folder holds.

    Attributes:
        network: the loaded stages over an `ExportedModel`.
        program: the program.
        split: text of the split file.
        formulation: the lifting options.
        receipt: of the capture that was exported.
        manifest: versions, names and hashes.
    """

    network: Network
    program: Program
    split: str
    formulation: Formulation
    receipt: Receipt
    manifest: Manifest


def read_manifest(path: str | Path) -> Manifest:
    """The manifest of an exported folder.

    Raises:
        DataError: there is none, it was edited, or it is of another version.
    """
    file = Path(path) / MANIFEST
    if not file.is_file():
        raise DataError(f"{path} is no exported folder: it has no {MANIFEST}")
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise DataError(f"{file} is damaged: {error}") from error
    found = data.get("format") if isinstance(data, dict) else None
    if found != FORMAT:
        made = f" (written by lagcompile {data.get('lagcompile', 'unknown')})" if isinstance(data, dict) else ""
        raise DataError(f"{file} is of format {found!r}{made}, this lagcompile reads format {FORMAT}: export it again")
    try:
        manifest = Manifest.model_validate_json(file.read_text(encoding="utf-8"))
    except ValidationError as error:
        first = error.errors()[0]
        raise DataError(f"{file}: {'.'.join(map(str, first['loc']))}: {first['msg']}") from error
    if digest_of(manifest) != manifest.digest:
        raise DataError(f"{file} was changed after it was written: its digest does not fit. Export the model again")
    return manifest


def read_files(path: str | Path, manifest: Manifest) -> dict[str, bytes]:
    """The files that a manifest names.

    Raises:
        DataError: each file that is missing or was changed.
    """
    files: dict[str, bytes] = {}
    problems = []
    for name, record in manifest.files.items():
        file = Path(path) / name
        if Path(name).name != name or not file.is_file():
            problems.append(f"{file} is missing: {MANIFEST} names it")
            continue
        data = file.read_bytes()
        if hashlib.sha256(data).hexdigest() != record.sha256:
            problems.append(f"{file} was changed or damaged: its SHA-256 is not the one in {MANIFEST}")
        files[name] = data
    if problems:
        raise DataError(problems)
    return files


def load_folder(path: str | Path) -> Parts:
    """Load an exported folder.

    Raises:
        DataError: a file is missing, was changed, or is of another version; each is named.
    """
    manifest = read_manifest(path)
    files = read_files(path, manifest)
    needed = {PROGRAM, SPLIT, FORMULATION, GRAPH, RECEIPT, TENSORS}
    needed |= {f for p in manifest.programs for f in (p.train, p.evaluation) if f}
    absent = sorted(needed - files.keys())
    if absent:
        raise DataError([f"{Path(path) / MANIFEST} names no file {name}, which loading needs" for name in absent])
    try:
        parts = _parts(manifest, files)
    except DataError as error:
        hint = "" if manifest.torch == _torch() else f" (written with torch {manifest.torch}, here is {_torch()})"
        raise DataError([f"{path}: {p}{hint}" for p in error.problems]) from error
    again = lower(parts.network, parts.formulation, loss=parts.program.objective.loss, name=manifest.name)
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
    program = _read(PROGRAM, files, lambda data: from_json(data.decode()))
    formulation = _read(FORMULATION, files, lambda data: check(read_text(data.decode(), FORMULATION), Formulation))
    receipt = _read(RECEIPT, files, Receipt.model_validate_json)
    graph, stage_of, reasons = _read(GRAPH, files, _graph)
    model = _model(manifest, _tensors(files[TENSORS], manifest))
    own = model.exported
    network_record = manifest.network
    own.network = graph_module(files, network_record, model, attributes=False)
    own.returns, own.tensors = network_record.writes, network_record.tensors
    prologue = _stage(manifest.prologue, files, model)
    stages = tuple(_stage(r, files, model) for r in manifest.stages)
    parts = [(s.name, s.module, s.reads, s.writes) for s in (prologue, *stages)]
    whole, where = inlined(parts, own.signature.names, network_record.writes, model)  # type: ignore[arg-type]
    numbers = {s.name: k for k, s in enumerate(stages)}
    extended = {**{n: numbers[s] for n, s in where.items() if s in numbers}, **stage_of}
    captured = Capture(
        module=whole,
        original=model,
        signature=own.signature,
        output=own.output,
        front_end=manifest.front_end,
        whole=dict(manifest.whole),
        ties={n: a for n, a in manifest.ties.items() if manifest.tensors[n].kind == "parameter"},
        notes=manifest.notes,
    )
    network = Network(captured, Partition(graph, extended, reasons), prologue, stages)
    for module in (model, whole, prologue.module, *(s.module for s in stages)):
        module.train(manifest.training)
    return Parts(network, program, files[SPLIT].decode(), formulation, receipt, manifest)


Value = TypeVar("Value")


def _read(name: str, files: Mapping[str, bytes], reader: Callable[[bytes], Value]) -> Value:
    try:
        return reader(files[name])
    except (ValidationError, LagcompileError, ValueError, KeyError, TypeError) as error:
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DataError(f"{name} is not what this lagcompile writes: {first}") from error


def _graph(data: bytes) -> tuple[Graph, dict[str, int], tuple[str, ...]]:
    found = json.loads(data)
    nodes = TypeAdapter(tuple[Node, ...]).validate_python(found["nodes"])
    graph = Graph(nodes, tuple(found["outputs"]), bool(found["shapes_known"]))
    return graph, dict(found["stage_of"]), tuple(found["reasons"])


def _tensors(data: bytes, manifest: Manifest) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        found: dict[str, Tensor] = load(data)
    except SafetensorError as error:
        raise DataError(f"{TENSORS} is damaged: {error}") from error
    absent = sorted(manifest.tensors.keys() - found.keys())
    if absent:
        raise DataError(f"{TENSORS} lacks {', '.join(absent)}")
    return found


def _model(manifest: Manifest, tensors: Mapping[str, Tensor]) -> ExportedModel:
    signature = signature_from(manifest.call)
    model = ExportedModel(Exported(manifest.model, signature, decode_output(manifest.output)))
    fill_tensors(model, tensors, manifest.tensors, manifest.ties)
    return model


def signature_from(record: CallRecord) -> Signature:
    """The call of a model from its record.

    Raises:
        DataError: it is damaged.
    """
    return Signature(
        names=record.names,
        parameters=record.parameters,
        structure=fill(decode(record.structure), lambda v: v),
        constants={i: fill(decode(v), lambda x: x) for i, v in record.constants.items()},
        exact=True,
        starred=record.starred,
    )


def _stage(record: ProgramRecord, files: Mapping[str, bytes], model: ExportedModel) -> StageModule:
    module: Any = graph_module(files, record, model, attributes=True)
    return StageModule(
        name=record.name,
        module=module,
        reads=record.reads,
        writes=record.writes,
        weights=record.weights,
        slots=record.slots,
        signature=record.signature,
    )
