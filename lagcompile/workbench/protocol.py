"""Settings that a study's folder was begun with: rows of two protocols never share a table.

In: a folder and what all its rows share. Out: `protocol.json`. Invariant: it is written once, before the first row.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lagcompile.ir import jsonfile, sums
from lagcompile.ir.base import DataError, SpecError

FILE = "protocol.json"
_EARLIER = ("rows", "search", "runs")
"""Folders in which lagcompile kept one file a row before there was `rows.jsonl`."""


def keep_protocol(folder: Path, study: str, protocol: Mapping[str, Any]) -> None:
    """Write a folder's protocol, or compare with it what is asked for now.

    Args:
        folder: where rows are, or will be.
        study: name of the study.
        protocol: values of JSON by name, those of every row there.

    Raises:
        SpecError: the folder was begun with other values, or by an earlier edition.
        DataError: the folder's protocol is damaged.
    """
    if any((folder / name).is_dir() for name in _EARLIER):
        raise SpecError(
            f"{folder} holds one file a row, as lagcompile wrote them before it had rows.jsonl; they are not read any "
            "more: give another folder (--out)"
        )
    now: dict[str, Any] = json.loads(json.dumps({"study": study, **protocol}))
    if not (folder / FILE).exists():
        sums.write(folder, {FILE: f"{json.dumps(now, indent=1)}\n".encode()})
        return
    before = protocol_of(folder)
    other = [f"{key} {before.get(key)} (now {value})" for key, value in now.items() if before.get(key) != value]
    if other:
        raise SpecError(
            f"{folder} was begun with {', '.join(other)}: rows with different settings must not share a table. Give "
            "the options that it was begun with, or another folder (--out)"
        )


def protocol_of(folder: Path) -> dict[str, Any]:
    """A folder's protocol, the study's name in it.

    Raises:
        DataError: there is none, or it is damaged.
    """
    found = jsonfile.read(folder / FILE)
    if not isinstance(found, dict):
        raise DataError(f"{folder / FILE}: expected a mapping of options to values: take another folder (--out)")
    return found
