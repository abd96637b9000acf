"""What the manifest of an exported folder says: versions, hashes, tensors, stages, the call and the output.

In: nothing. Out: the records of `manifest.json`. Invariant: with the files it names, the manifest is all that loading
needs; it carries its own digest, so that an edited manifest is noticed as well.
"""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Mapping
from typing import Literal

import torch
from pydantic import Field, JsonValue

from lagcompile.ir.base import Frozen

FORMAT = 1
MANIFEST = "manifest.json"
PROGRAM, SPLIT, FORMULATION, GRAPH, RECEIPT = (
    "program.json",
    "split.yaml",
    "formulation.yaml",
    "graph.json",
    "receipt.json",
)
TENSORS, SOLUTION, SOLUTION_TENSORS = "tensors.safetensors", "solution.json", "solution.safetensors"


class FileRecord(Frozen):
    """One file of the folder."""

    sha256: str
    bytes: int


class TensorRecord(Frozen):
    """One tensor of `tensors.safetensors`."""

    kind: Literal["parameter", "buffer", "constant"]
    """constant: what the captured graph holds besides the model's own tensors."""
    trainable: bool = False
    """requires_grad of a parameter."""
    persistent: bool = True
    """Whether a buffer stands in the state_dict."""


class Baked(Frozen):
    """A value that crosses breakpoints and is no tensor and no size; it is the same for every batch size."""

    name: str
    value: JsonValue


class ProgramRecord(Frozen):
    """One torch.export program, or one for each mode: a function of the values it reads and of its tensors."""

    name: str
    train: str
    """File of the program in train mode; empty where it gives nothing."""
    evaluation: str
    """File of the program in eval mode; the same file where the modes do not differ."""
    reads: tuple[str, ...]
    """Names of the values that it takes, in order."""
    tensors: tuple[str, ...]
    """Names of the tensors that it takes after them."""
    writes: tuple[str, ...]
    """Names of the values that it gives, in order."""
    sizes: Mapping[str, int] = Field(default_factory=dict)
    """Values that are tuples of sizes, passed one by one -> how many."""
    baked_reads: tuple[Baked, ...] = ()
    baked_writes: tuple[Baked, ...] = ()
    constants: Mapping[str, str] = Field(default_factory=dict)
    """Constants of the program -> their names among the tensors."""
    weights: tuple[str, ...] = ()
    slots: tuple[str, ...] = ()
    signature: str = ""


class CallRecord(Frozen):
    """How the model is called (`frontend/signature.py`)."""

    names: tuple[str, ...]
    parameters: tuple[str, ...]
    structure: JsonValue
    constants: Mapping[int, JsonValue]
    starred: str = ""


class Manifest(Frozen):
    """`manifest.json`."""

    format: Literal[1] = 1
    lagcompile: str
    torch: str
    python: str
    name: str
    """Name of the program."""
    model: str
    """Class of the model that was lifted."""
    front_end: Literal["torch.fx", "torch.export"]
    training: bool
    """The mode in which the model was exported, and is after loading."""
    batch: str
    """dynamic, or why the programs hold for one batch size only."""
    rows: int
    """Number of examples with which the programs were exported."""
    call: CallRecord
    output: JsonValue
    tensors: Mapping[str, TensorRecord]
    ties: Mapping[str, tuple[str, ...]]
    """Name of a tied parameter -> its other names."""
    whole: Mapping[str, str] = Field(default_factory=dict)
    notes: tuple[str, ...] = ()
    prologue: ProgramRecord
    stages: tuple[ProgramRecord, ...]
    network: ProgramRecord
    """The network that was not cut: what the stages are checked against."""
    files: Mapping[str, FileRecord]
    digest: str = ""
    """SHA-256 of this manifest without this entry."""

    @property
    def programs(self) -> tuple[ProgramRecord, ...]:
        """All programs."""
        return (self.prologue, *self.stages, self.network)


def digest_of(manifest: Manifest) -> str:
    """SHA-256 of a manifest without its digest."""
    data = manifest.model_dump(mode="json", exclude={"digest"})
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()


def file_record(data: bytes) -> FileRecord:
    """Hash and size of a file."""
    return FileRecord(sha256=hashlib.sha256(data).hexdigest(), bytes=len(data))


def versions() -> dict[str, str]:
    """Versions that a manifest notes."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        own = version("lagcompile")
    except PackageNotFoundError:
        own = "not installed"
    return {"lagcompile": own, "torch": str(torch.__version__), "python": platform.python_version()}
