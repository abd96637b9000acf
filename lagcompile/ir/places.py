"""Paths that a file names: they stay in the folder that the file lies in.

In: a path as a spec gives it, and the folder of the spec. Out: the real path. Invariant: neither `..` nor an absolute
path nor a link leads out; only a folder that the person trusts as a whole is entered beside it.
"""

from __future__ import annotations

import os
from pathlib import Path

from lagcompile.ir.base import SpecError


def contained(name: str, folder: Path, *, trusted: Path | None = None) -> Path:
    """Return the real path of a name in a file.

    Args:
        name: as the file gives it, from the file's folder.
        folder: the file's folder.
        trusted: a folder that the person trusts, into which paths may also lead.

    Raises:
        SpecError: it leads out.
    """
    path, home = Path(name), folder.resolve()
    try:
        real = (home / path).resolve()
    except (OSError, ValueError, RuntimeError):
        raise SpecError(f"{name!r} is not a path") from None
    if trusted is not None and real.is_relative_to(trusted):
        return real
    if path.is_absolute() or ".." in path.parts or not real.is_relative_to(home):
        raise SpecError(
            f"{name!r} leads out of this file's folder: a spec names what lies beside it or below; copy the file there"
        )
    return real


def path_of(name: str, value: object) -> Path:
    """Return an argument of a public function as the path that it should be.

    Raises:
        SpecError: it is none.
    """
    path = os.fspath(value) if isinstance(value, os.PathLike) else value
    if not isinstance(path, str) or not path or "\0" in path:
        shown = repr(value)[:60] if isinstance(value, (str, bytes)) else f"an object of type {type(value).__name__}"
        raise SpecError(f"{name} takes the path of a file or folder, got {shown}")
    return Path(path)
