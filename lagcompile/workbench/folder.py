"""The run folder: what a run leaves behind, written so that a crash leaves the last good state.

In: texts, numbers, tensors. Out: files. Invariant: the folder appears complete (spec and program in it) or not at all;
each file is replaced in one move; the log has one line for each row and is flushed with it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, final

import torch

from lagcompile.ir.base import DataError
from lagcompile.ir.disk import appearing

SPEC, PROGRAM, PROGRAM_JSON, LOG = "spec.yaml", "program.txt", "program.json", "log.jsonl"
KKT = "kkt.json"
SOLUTION = "solution.pt"
CHECKPOINT, MODEL, CERTIFICATE, REPORT, REPORT_JSON = (
    "checkpoint.pt",
    "model.pt",
    "certificate.json",
    "report.md",
    "report.json",
)


@final
class RunFolder:
    """An existing run folder."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def write(self, name: str, text: str) -> None:
        """Replace a text file in one move."""
        self._replace(name, lambda target: target.write_text(text, encoding="utf-8"))

    def save(self, name: str, value: Any) -> None:
        """Replace a file of tensors in one move."""
        self._replace(name, lambda target: torch.save(value, target))

    def _replace(self, name: str, write: Any) -> None:
        part = self.path / f".{name}.part"
        write(part)
        os.replace(part, self.path / name)

    def log(self, row: Mapping[str, float]) -> None:
        """Append a row to the log."""
        with (self.path / LOG).open("a", encoding="utf-8") as file:
            file.write(json.dumps(dict(row)) + "\n")

    def start_log(self, rows: Sequence[Mapping[str, float]]) -> None:
        """Begin the log with the rows of the steps made before."""
        self.write(LOG, "".join(json.dumps(dict(row)) + "\n" for row in rows))

    def checkpoint(self) -> dict[str, Any]:
        """The last checkpoint.

        Raises:
            DataError: there is none, or it is damaged.
        """
        return load_tensors(self.path / CHECKPOINT)


def load_tensors(path: Path) -> dict[str, Any]:
    """A file that holds tensors and plain values, read without running code.

    Raises:
        DataError: there is none, or it is damaged.
    """
    if not path.is_file():
        raise DataError(f"there is no file {path}")
    try:
        found: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds for a damaged file
        raise DataError(f"{path} is damaged: {str(error).splitlines()[0]}") from error
    return found


def check_free(path: Path, *, force: bool) -> None:
    """Whether a folder may be made.

    Raises:
        DataError: something is there, and it may not be replaced.
    """
    if not path.exists():
        return
    if not force:
        raise DataError(f"{path} exists: --force replaces it, --resume goes on, --out names another folder")
    if not path.is_dir() or (any(path.iterdir()) and not (path / SPEC).is_file()):
        raise DataError(f"{path} is not a run folder (it has no {SPEC}); --force does not replace it")


def create(path: Path, texts: Mapping[str, str], *, force: bool) -> RunFolder:
    """Make a run folder with its first files, in one move.

    Args:
        path: where.
        texts: file name -> text.
        force: replace a run folder that is there.

    Raises:
        DataError: something is there, and it may not be replaced.
    """
    check_free(path, force=force)
    with appearing(path) as part:
        for name, text in texts.items():
            (part / name).write_text(text, encoding="utf-8")
    return RunFolder(path)


def reopen(path: Path) -> RunFolder:
    """The folder of a run that is to be resumed.

    Raises:
        DataError: there is none, or it holds no checkpoint.
    """
    if not (path / CHECKPOINT).is_file():
        raise DataError(f"{path} holds no {CHECKPOINT}: there is nothing to resume")
    return RunFolder(path)
