"""Text files in: the one way in which files are opened, whatever they hold, and what is said where that fails.

In: a path. Out: text with Unix line ends, or one problem that names file, place and remedy. Invariant: a file that is
not text, is too large or cannot be read is refused before anything looks at its content.
"""

from __future__ import annotations

import codecs
import errno
import os
import re
import stat
from collections.abc import Sequence
from pathlib import Path

from pydantic import BaseModel

from lagcompile.ir import sums
from lagcompile.ir.base import DataError, LagcompileError

LARGEST = 64 * 2**20
"""Bytes that a text by a person or lagcompile may have; tables of numbers may have more."""
LONGEST_INTEGER = 100
"""Digits that a number may have: Python takes quadratic time to read one, and none of ours is longer."""
_UTF16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
_REMEDIES = {
    errno.ENOSPC: "free some space there, or write to another place",
    errno.EDQUOT: "free some space there, or write to another place",
    errno.EROFS: "write to another place",
    errno.EACCES: "change its permissions, or choose another place",
    errno.EPERM: "change its permissions, or choose another place",
    errno.EEXIST: "remove it, or choose another place",
    errno.ENOENT: "check the path; if it was there before, something removed it meanwhile",
    errno.ENOTDIR: "check the path: a part of it is a file",
    errno.EISDIR: "give a file",
    errno.ENAMETOOLONG: "choose a shorter name",
    errno.ELOOP: "its symbolic links lead in a circle",
    errno.EMFILE: "close files, or raise the limit (ulimit -n)",
}


def os_problem(error: OSError, path: str | Path | None = None) -> str:
    """Say in one sentence what the system refused: file, reason, remedy.

    Args:
        error: what was raised.
        path: the file, where the error does not know it.
    """
    named = path if path is not None else error.filename2 or error.filename
    place = "" if named is None else f"{named}: "
    remedy = _REMEDIES.get(error.errno or 0, "")
    return f"{place}{error.strerror or str(error) or type(error).__name__}" + (f": {remedy}" if remedy else "")


def read_text(
    path: str | Path, *, error: type[LagcompileError] = DataError, kind: str = "text", largest: int = LARGEST
) -> str:
    """Return the content of a text file.

    Args:
        path: the file.
        error: class of the problem.
        kind: what the file should be, for messages: "YAML", "CSV".
        largest: refuse more bytes than this.

    Raises:
        LagcompileError: of class `error`: the file does not exist, cannot be read, is not text, or is not what was
            written with the list of digests beside it.
    """
    try:
        with open(Path(path), "rb", opener=_opened) as file:
            found = os.fstat(file.fileno())
            # What is too large is not read first; devices have no size.
            data = b"" if found.st_size > largest else file.read(largest + 1)
    except FileNotFoundError:
        raise error(f"{path}: there is no such file") from None
    except IsADirectoryError:
        raise error(f"{path}: expected a {kind} file, got a folder") from None
    except OSError as caught:
        raise error(f"{path}: the file cannot be read: {os_problem(caught, '').removeprefix(': ')}") from None
    except ValueError as caught:  # a NUL byte in the name
        raise error(f"{str(path)!r} is not the name of a file: {caught}") from None
    if not data and stat.S_ISFIFO(found.st_mode):
        raise error(f"{path}: expected a {kind} file, got a pipe that nobody writes to")
    if max(len(data), found.st_size) > largest:
        raise error(f"{path}: the file is larger than {largest // 2**10:,} KiB, the most for a {kind} file")
    try:
        sums.check(Path(path), data)
    except DataError as caught:
        raise error(caught.problems) from None
    return decoded(data, str(path), error=error)


def _opened(path: str, flags: int) -> int:
    """Open a file for reading, without waiting for a pipe that nobody writes to."""
    handle = os.open(path, flags | os.O_NONBLOCK)
    os.set_blocking(handle, True)
    return handle


def decoded(data: bytes, source: str, *, error: type[LagcompileError] = DataError) -> str:
    """Decode UTF-8 text, with or without a byte order mark, with any line ends.

    Raises:
        LagcompileError: of class `error`: the bytes are something else.
    """
    if data.startswith(_UTF16):
        raise error(f"{source}: the file is not UTF-8 text but UTF-16: save it as UTF-8")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as caught:
        line = data.count(b"\n", 0, caught.start) + 1
        where = f"{source}:{line}: the file is not UTF-8 text (byte {caught.start})"
        raise error(f"{where}: save it as UTF-8, or take an undamaged copy") from None
    if "\0" in text:
        line = text.count("\n", 0, text.index("\0")) + 1
        raise error(f"{source}:{line}: the file holds a NUL byte: it is damaged, or not text")
    return text.replace("\r\n", "\n").replace("\r", "\n")


def check_kind(text: str, source: str, kinds: Sequence[type[BaseModel]], *, error: type[LagcompileError]) -> None:
    """Refuse a text that cannot be a file of some kinds, so that later problems may quote what is in it.

    Args:
        text: of the file.
        source: its name.
        kinds: classes; those without a `FILE` take any text.
        error: class of the problem.

    Raises:
        LagcompileError: of class `error`: keys are missing that each file of the kind has.
    """
    known: list[tuple[str, ...]] = [getattr(kind, "FILE", ()) for kind in kinds]
    if not text.strip() or any(all(_says(text, key) for key in keys) for _, *keys in (k or ("",) for k in known)):
        return
    expected = " nor ".join(f"a {name} (it says {' and '.join(f'`{k}:`' for k in keys)})" for name, *keys in known)
    raise error(f"{source}:1: this is {'neither' if len(known) > 1 else 'not'} {expected}")


def _says(text: str, key: str) -> bool:
    return re.search(rf"""(^|[{{,\s"']){key}["']?\s*:""", text) is not None
