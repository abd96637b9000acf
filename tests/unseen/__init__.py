"""Generators of cases that nobody has looked at, one file for each promise.

Each file of this room (but `__main__` and `test_unseen`) is a source and has

    CI, NIGHTLY: int                        how many cases `make test` and `make nightly` draw
    case(seed: int) -> Mapping[str, int]    draws one case from the seed alone and tries it: raises AssertionError
                                            where a promise is broken, else counts what happened ("refused", ...)
    judge(tally: Mapping[str, int], cases: int) -> None
                                            raises AssertionError where the counts of many cases break a promise

A new source is one new file. A seed that failed once belongs into the tests of the room that was wrong.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Mapping
from typing import Protocol


class Source(Protocol):
    """A file of this room."""

    CI: int
    NIGHTLY: int

    def case(self, seed: int) -> Mapping[str, int]: ...

    def judge(self, tally: Mapping[str, int], cases: int) -> None: ...


def names() -> list[str]:
    """Names of all sources."""
    found = (m.name for m in pkgutil.iter_modules(__path__))
    return sorted(n for n in found if not n.startswith(("_", "test_")))


def source(name: str) -> Source:
    """Import the source of a name."""
    return importlib.import_module(f"{__name__}.{name}")
