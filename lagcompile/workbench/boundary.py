"""The edge of the command line: whatever is raised inside leaves as lines on standard error and an exit status.

In: a command. Out: an exit status. Invariant: no traceback unless it is asked for (`--debug` or LAGCOMPILE_DEBUG=1);
input and surroundings that are wrong give 2, a signal 128 and its number (Ctrl-C 130), a closed pipe 141 as in a shell,
a defect of lagcompile 70.
"""

from __future__ import annotations

import os
import shlex
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import suppress

from lagcompile.ir.base import LagcompileError
from lagcompile.ir.reading import os_problem
from lagcompile.store.stop import ABANDONED, Ended, ending

VARIABLE, OPTION = "LAGCOMPILE_DEBUG", "--debug"
WRONG, DEFECT, INTERRUPTED, CLOSED = 2, 70, 130, 141
_NO_MEMORY = ("out of memory", "can't allocate memory", "not enough memory", "Storage size calculation overflowed")
_NOT_WRITTEN = ("PytorchStreamWriter failed", "Parent directory")


def guarded(command: Callable[[], object]) -> int:
    """Run a command, report what it raises on standard error, and return the exit status."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # characters that the terminal lacks are written as numbers
            stream.reconfigure(errors="backslashreplace")
    status, shown = 0, warnings.formatwarning
    warnings.formatwarning = lambda message, *_: f"warning: {message}\n"
    try:
        try:
            with ending():
                command()
        except SystemExit as left:
            behind = list(_behind(left))
            if behind:
                raise behind[-1] from None
            status = left.code if isinstance(left.code, int) else int(left.code is not None)
        sys.stdout.flush()
    except BaseException as error:  # the one place where everything ends
        if debugging():
            traceback.print_exc()
        status, lines = told(error)
        with suppress(OSError, ValueError):
            for line in lines:
                print(line, file=sys.stderr, flush=True)
        if isinstance(error, OSError):
            _drop_output()
    finally:
        warnings.formatwarning = shown
    if not all(ended.is_set() for ended in ABANDONED):  # libraries with threads of their own abort when Python ends
        sys.stderr.flush()
        os._exit(status)
    return status


def _behind(left: BaseException) -> Iterator[BaseException]:
    """Yield the pipes that closed and the interrupts that Click made an exit status of."""
    inner = left.__cause__ or left.__context__
    if inner is not None:
        yield from _behind(inner)
        if isinstance(inner, BrokenPipeError | KeyboardInterrupt):
            yield inner


def debugging() -> bool:
    """Return whether tracebacks were asked for."""
    return os.environ.get(VARIABLE, "0") not in {"", "0"} or OPTION in sys.argv


def told(error: BaseException) -> tuple[int, list[str]]:
    """Return the exit status and what the user reads."""
    text = str(error)
    if isinstance(error, LagcompileError):
        return WRONG, list(error.problems)
    if isinstance(error, Ended):
        return 128 + error.number, [error.said]
    if isinstance(error, KeyboardInterrupt):
        return INTERRUPTED, ["interrupted"]
    if isinstance(error, BrokenPipeError):
        return CLOSED, []
    if isinstance(error, OSError):
        return WRONG, [os_problem(error)]
    if isinstance(error, MemoryError) or any(words in text for words in _NO_MEMORY):
        said = f" ({text.splitlines()[0]})" if text else ""
        return WRONG, [
            f"out of memory{said}: take fewer examples or smaller layers; `lagcompile plan SPEC` counts what is needed"
        ]
    if isinstance(error, UnicodeError):
        return WRONG, [f"a text could not be read or written: {text}: save files as UTF-8, or set PYTHONUTF8=1"]
    if isinstance(error, RecursionError):
        return WRONG, ["something is nested more deeply than Python follows: a file's values, or the model's modules"]
    if any(words in text for words in _NOT_WRITTEN):
        return WRONG, [f"a file could not be written (is the disk full, or was the folder removed?): {_first(text)}"]
    return DEFECT, [
        f"lagcompile has a defect here: {type(error).__name__}: {_first(text)}",
        f"please report it with what this prints: {VARIABLE}=1 {_command()}",
    ]


def _first(text: str) -> str:
    return (text.strip().splitlines() or ["no message"])[0]


def _command() -> str:
    return shlex.join(["lagcompile", *(a for a in sys.argv[1:] if a != OPTION)])


def _drop_output() -> None:
    """Nobody reads on, or it cannot be stored: what Python still holds would fail again at its end."""
    with suppress(OSError, ValueError, AttributeError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)
