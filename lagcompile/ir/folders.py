"""Folders that appear whole or not at all.

In: a path and what is written into a folder beside it. Out: the folder in its place. Invariant: a crash or an exception
leaves what stood there before.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def appearing(path: Path) -> Iterator[Path]:
    """A new folder beside `path` to write to, which takes its place in one move where no exception was raised.

    Args:
        path: where the folder is to be; a folder that stands there is replaced. Parents are made.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.parent / f".{path.name}.part-{os.getpid()}"
    part.mkdir()
    try:
        yield part
        old = path.parent / f".{path.name}.old-{os.getpid()}"
        if path.exists():
            os.replace(path, old)
        os.replace(part, path)
        if old.exists():
            shutil.rmtree(old)
    finally:
        if part.exists():
            shutil.rmtree(part)
