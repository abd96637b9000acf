"""Strict reading of a folder's files: no links, no surprises in size, and JSON that has one meaning.

In: paths and bytes that somebody else may have written. Out: bytes; plain data. Invariant: a file is read only where it
is a regular file of the size that was declared; JSON with duplicate keys, NaN, numbers beyond 64 bits or deep nesting
is refused with the file's name.
"""

from __future__ import annotations

import json
import os
import re
import stat
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from torch import Tensor

from lagcompile.ir import jsonfile
from lagcompile.ir.base import DataError
from lagcompile.ir.reading import decoded

LARGEST = 1 << 28
"""Bytes of the largest JSON file."""
_OPEN = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*", re.ASCII)


def read_file(folder: Path, name: str, size: int | None = None) -> bytes:
    """A regular file of a folder, read to its end.

    Args:
        folder: the folder.
        name: the file's name in it.
        size: bytes that it must have; None for a JSON file of any size up to `LARGEST`.

    Raises:
        DataError: the file does not exist, is a link or not a regular file, or has another size.
    """
    path = folder / name
    if not _NAME.fullmatch(name):
        raise DataError(f"{folder}: {name!r} is not the name of a file in this folder")
    try:
        handle = os.open(path, _OPEN)
    except FileNotFoundError:
        raise DataError(f"{path} is missing") from None
    except OSError as error:
        what = "is a link, which is not followed" if path.is_symlink() else f"cannot be read: {error.strerror}"
        raise DataError(f"{path} {what}") from None
    try:
        found = os.fstat(handle)
        if not stat.S_ISREG(found.st_mode):
            raise DataError(f"{path} is not a regular file")
        if found.st_size != size if size is not None else found.st_size > LARGEST:
            expected = f"{size}" if size is not None else f"at most {LARGEST}"
            raise DataError(f"{path} was changed or damaged: it has {found.st_size} bytes, expected {expected}")
        with open(handle, "rb", closefd=False) as file:
            data = file.read(found.st_size + 1)
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from None
    finally:
        os.close(handle)
    if len(data) != found.st_size:
        raise DataError(f"{path} changed while it was read")
    return data


def parse(data: bytes, name: str) -> Any:
    """Plain data of a JSON file.

    Raises:
        DataError: it is no JSON, or JSON that not every reader takes for the same.
    """
    return jsonfile.parse(decoded(data, name), name, standard=True)


Record = TypeVar("Record", bound=BaseModel)


def record(data: bytes, name: str, kind: type[Record]) -> Record:
    """A JSON file as a record.

    Raises:
        DataError: it is not one of these records; the place is named.
    """
    try:
        # as JSON, because strict validation there still takes a list for a tuple
        return kind.model_validate_json(json.dumps(parse(data, name)), strict=True)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(f"{part!s:.60}" for part in first["loc"])
        raise DataError(f"{name}: {place}: {first['msg']:.400}") from None


def tensors_of(data: bytes, name: str) -> dict[str, Tensor]:
    """The tensors of a file.

    Raises:
        DataError: it is damaged.
    """
    from safetensors.torch import load

    try:
        return load(data)
    except Exception as error:  # SafetensorError, and KeyError for types that torch does not have
        raise DataError(f"{name} is damaged: {error!s:.200}") from None
