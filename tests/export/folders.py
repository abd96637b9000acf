"""An exported folder for the tests."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch

import lagcompile as lc
from tests.nets import Residual


def residual(tmp_path: Path) -> tuple[lc.Lifted, Path]:
    """A residual network in three stages, and the folder it was written to."""
    torch.manual_seed(0)
    lifted = lc.lift(Residual(), (torch.randn(4, 6),), split=3)
    return lifted, lifted.save(tmp_path / "out")


def rewritten(folder: Path, name: str, data: bytes) -> None:
    """Change a file and its hash, as somebody would who knows the format."""
    (folder / name).write_bytes(data)
    manifest = json.loads((folder / "manifest.json").read_text())
    if not isinstance(manifest, dict) or not isinstance(manifest.get("files"), dict):
        return  # the manifest is damaged already
    manifest["files"][name] = {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}
    sealed(folder, manifest)


def edited(folder: Path, name: str, data: Any) -> None:
    """Write a JSON file of a folder anew, with its hash; the manifest with its own digest."""
    if name == "manifest.json":
        sealed(folder, data)
    else:
        rewritten(folder, name, json.dumps(data).encode())


def sealed(folder: Path, manifest: Any) -> None:
    """Write a manifest with the digest that its content asks for, where it has the form of one."""
    from pydantic import ValidationError

    from lagcompile.export.record import Manifest, digest_of

    if not isinstance(manifest, dict):
        (folder / "manifest.json").write_text(json.dumps(manifest))
        return
    try:
        digest = digest_of(Manifest.model_validate({**manifest, "digest": ""}))
    except (ValidationError, TypeError):
        digest = manifest.get("digest", "")
    (folder / "manifest.json").write_text(json.dumps({**manifest, "digest": digest}))
