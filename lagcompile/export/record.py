"""The manifest of an exported folder: versions, hashes, tensors, the call and the output.

In: nothing. Out: the records of `manifest.json`. Invariant: with the files it names, the manifest is all that loading
needs; it carries its digest, so that an edited manifest is noticed too.
"""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Mapping
from typing import Literal

import torch
from pydantic import Field, JsonValue

from lagcompile.frontend.capture import FrontEnd
from lagcompile.ir.base import Frozen

FORMAT = 2
MANIFEST = "manifest.json"
PROGRAM, SPLIT, FORMULATION, GRAPH, RECEIPT = (
    "program.json",
    "split.json",
    "formulation.json",
    "graph.json",
    "receipt.json",
)
DATA, NETWORK = "data.json", "network.json"
TENSORS, SOLUTION, SOLUTION_TENSORS = "tensors.safetensors", "solution.json", "solution.safetensors"


class FileRecord(Frozen):
    """One file of the folder."""

    sha256: str
    bytes: int


class TensorRecord(Frozen):
    """One tensor of `tensors.safetensors`."""

    kind: Literal["parameter", "buffer", "constant"]
    """constant: what the captured graph holds besides the model's own tensors."""
    dtype: str
    shape: tuple[int, ...]
    trainable: bool = False
    """requires_grad of a parameter."""
    persistent: bool = True
    """Whether a buffer is in the state_dict."""


class CallRecord(Frozen):
    """How the model is called (`frontend/signature.py`)."""

    names: tuple[str, ...]
    parameters: tuple[str, ...]
    structure: JsonValue
    constants: Mapping[int, JsonValue]
    starred: str = ""


class Manifest(Frozen):
    """`manifest.json`."""

    format: Literal[2] = 2
    lagcompile: str
    torch: str
    python: str
    name: str
    """Name of the program."""
    model: str
    """Class of the model that was lifted."""
    front_end: FrontEnd
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
    stages: int = Field(ge=1, le=100_000)
    """Number of stages, each in its file (`stage_file`); `data.json` is what runs before them,
    `network.json` the network that was not cut: what the stages are checked against."""
    files: Mapping[str, FileRecord]
    digest: str = ""
    """SHA-256 of this manifest without this entry."""


def stage_file(number: int) -> str:
    """Name of a stage's file."""
    return f"stage_{number}.json"


def program_files(stages: int) -> tuple[str, ...]:
    """Files of what runs before the stages, of the stages, and of the network that was not cut."""
    return (DATA, *map(stage_file, range(stages)), NETWORK)


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
