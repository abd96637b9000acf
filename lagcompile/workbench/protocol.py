"""What a bench's folder was begun with: rows of two protocols never stand in one table.

In: a folder and what all its rows share. Out: `protocol.json`. Invariant: it is written once; a folder of rows that has
none (from before there were protocols) takes the first one it is given.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lagcompile.ir import jsonfile
from lagcompile.ir.base import DataError, SpecError
from lagcompile.workbench.search import write

FILE = "protocol.json"


def keep_protocol(folder: Path, protocol: Mapping[str, Any]) -> None:
    """Write a folder's protocol, or hold against it what is asked for now.

    Args:
        folder: where rows lie, or will.
        protocol: values of JSON by name, those of every row there.

    Raises:
        SpecError: the folder was begun with other values.
        DataError: the folder's protocol is damaged.
    """
    path = folder / FILE
    now: dict[str, Any] = json.loads(json.dumps(protocol))
    if not path.exists():
        write(path, now)
        return
    before = jsonfile.read(path)
    if not isinstance(before, dict):
        raise DataError(f"{path}: expected a mapping of options to values: take another folder (--out)")
    other = [f"{key} {before.get(key)} (now {value})" for key, value in now.items() if before.get(key) != value]
    if other:
        raise SpecError(
            f"{folder} was begun with {', '.join(other)}: rows of both would stand in one table. Give the options that "
            "it was begun with, or another folder (--out)"
        )
