"""State of the whole process, changed by one thread at a time or for one thread only.

In: code that needs torch's default random generator, its default dtype or its tracers, or that is to run without
warnings. Out: the same code, run so that other threads are left alone. Invariant: streams, warning filters and levels
of logging are never exchanged: a filter is added that other threads pass through.
"""

from __future__ import annotations

import functools
import io
import logging
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any, ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")

ALONE = threading.RLock()
"""Held while shared state is changed, where torch leaves no other way."""


def alone(function: Callable[P, R]) -> Callable[P, R]:
    """Decorate a function so that one thread at a time runs it."""

    @functools.wraps(function)
    def locked(*args: P.args, **kwargs: P.kwargs) -> R:
        with ALONE:
            return function(*args, **kwargs)

    return locked


class _Mine:
    """Tell whether the calling thread is the one that made this object, until `over` is set."""

    def __init__(self) -> None:
        self.thread: int | None = threading.get_ident()

    def __bool__(self) -> bool:
        return self.thread == threading.get_ident()

    def over(self) -> None:
        self.thread = None

    def match(self, text: str) -> bool:
        """As the pattern of a warning's filter."""
        return bool(self)

    def filter(self, record: logging.LogRecord) -> bool:
        """As the filter of a logger."""
        return not self


@contextmanager
def without_warnings(category: type[Warning] = Warning) -> Iterator[None]:
    """Warnings of this thread are not shown; those of other threads are.

    `warnings.catch_warnings` would exchange the filters of all threads, and put back those of another moment.
    """
    mine = _Mine()
    filters: list[Any] = warnings.filters  # type: ignore[assignment]
    entry = ("ignore", mine, category, None, 0)
    filters.insert(0, entry)
    try:
        yield
    finally:
        mine.over()
        current: list[Any] = warnings.filters  # type: ignore[assignment]
        for held in (filters, current):  # another thread may have exchanged the list meanwhile
            if entry in held:
                held.remove(entry)


@contextmanager
def without_logs(package: str) -> Iterator[None]:
    """What this thread logs through the loggers of a package is dropped."""
    mine = _Mine()
    names = [n for n in list(logging.root.manager.loggerDict) if n == package or n.startswith(package + ".")]
    loggers = [logging.getLogger(n) for n in names]
    for logger in loggers:
        logger.addFilter(mine)
    try:
        yield
    finally:
        mine.over()
        for logger in loggers:
            logger.removeFilter(mine)


class _Streams:
    """`sys` as one module sees it: without standard output and error in one thread."""

    def __init__(self) -> None:
        self.mine, self.nowhere = _Mine(), io.StringIO()

    def __getattr__(self, name: str) -> Any:
        return self.nowhere if name in {"stdout", "stderr"} and self.mine else getattr(sys, name)


@contextmanager
def without_prints(module: ModuleType) -> Iterator[None]:
    """What this thread prints by `print(..., file=sys.stderr)` in a module is dropped; one thread at a time."""
    with ALONE:
        before = vars(module).get("sys")
        streams = _Streams()
        if before is sys:
            vars(module)["sys"] = streams
        try:
            yield
        finally:
            streams.mine.over()
            if before is sys:
                vars(module)["sys"] = sys
