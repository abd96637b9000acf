"""SHA-256 of every file of a folder, kept in `lagcompile.sums`, so that no damaged file is read silently.

In: files of a folder. Out: the list, in the form of `sha256sum -c`; its last line is the digest of the list. Invariant:
at each moment, crashes included, every listed file is what one of its lines says: a file's new line reaches the disk
before the file does, and its old line is removed after that.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path

from lagcompile.ir.base import DataError
from lagcompile.ir.disk import read_bytes, replace

SUMS = "lagcompile.sums"
MARKS = ("run.id", "checkpoint-a.state", "checkpoint-b.state")
"""Files of run folders, which have a list."""
Listed = dict[str, tuple[str, ...]]
"""File name -> digests that the file may have: one, or two while it is being replaced."""


def listed(folder: Path) -> Listed:
    """Return the list of a folder; empty where it has none.

    Raises:
        DataError: the list is damaged.
    """
    path = folder / SUMS
    if not path.is_file():
        return {}
    text, _, own = read_bytes(path).rpartition(b"# ")
    if own != f"{hashlib.sha256(text).hexdigest()}\n".encode():
        raise DataError(
            f"{path} is damaged, so that no file of {folder} can be checked: take an undamaged copy, or delete it to "
            "trust them as they are"
        )
    found: Listed = {}
    for line in text.decode().splitlines():
        digest, _, name = line.partition("  ")
        found[name] = (*found.get(name, ()), digest)
    return found


def is_listed(path: Path) -> bool:
    """Return whether the list of its folder names a file, which should then exist.

    Raises:
        DataError: the list is damaged.
    """
    return path.name in listed(path.parent)


def check(path: Path, data: bytes) -> bytes:
    """Return content once it is known to be what was written, where the folder has a list.

    Raises:
        DataError: it is something else.
    """
    digests = listed(path.parent).get(path.name)
    if digests is None and not (path.parent / SUMS).exists() and any((path.parent / m).exists() for m in MARKS):
        warnings.warn(f"{path.parent / SUMS} is gone: whether {path} was damaged cannot be said", stacklevel=2)
    if digests is not None and hashlib.sha256(data).hexdigest() not in digests:
        raise DataError(
            f"{path} is damaged or was changed: it is not what was written with {SUMS} beside it. Take an undamaged "
            "copy; to change a file, copy it to another folder first"
        )
    return data


def read(path: Path) -> bytes:
    """Return the content of a file, checked.

    Raises:
        DataError: there is none, or it is not what was written.
    """
    return check(path, read_bytes(path))


def problems(folder: Path) -> list[str]:
    """Return one sentence for each file of a folder that is not what was written."""
    found: list[str] = []
    try:
        names = sorted(listed(folder))
    except DataError as error:
        return list(error.problems)
    for name in names:
        try:
            read(folder / name)
        except DataError as error:
            found += error.problems
    return found


def write(folder: Path, files: Mapping[str, bytes], without: Iterable[str] = (), *, anew: bool = False) -> None:
    """Replace files of a folder, or make them, and list them.

    Args:
        folder: where.
        files: name -> content.
        without: names of files that change from now on, which are not listed any more.
        anew: replace a damaged list by a new one.

    Raises:
        DataError: a file cannot be written, or the list is damaged.
    """
    try:
        before = listed(folder)
    except DataError:
        if not anew:
            raise
        before = {}
    kept = {n: d for n, d in before.items() if n not in {*without, *files}}
    coming = {n: hashlib.sha256(data).hexdigest() for n, data in files.items()}
    both = {n: tuple(dict.fromkeys((*before.get(n, ()), d))) for n, d in coming.items()}
    _store(folder, kept | both)
    for name, data in files.items():
        replace(folder / name, data)
    _store(folder, kept | {n: (d,) for n, d in coming.items()})


def _store(folder: Path, sums: Listed) -> None:
    text = "".join(f"{digest}  {name}\n" for name in sorted(sums) for digest in sums[name]).encode()
    replace(folder / SUMS, text, f"# {hashlib.sha256(text).hexdigest()}\n".encode())
