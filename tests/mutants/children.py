"""Tests of a tree in a process of its own, bounded test by test.

In: a tree, tests. Out: `Ending`. Invariant: the child imports the tree's own package; it is forked, so that what other
packages load is loaded once for all; nothing that it starts outlives it.
"""

from __future__ import annotations

import os
import resource
import signal
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

WAITS = 10.0
"""A test without any sign for this many times its processor time waits for something that never comes."""

PLAIN = ("-q", "-p", "no:cacheprovider", "-p", "no:xdist")


@dataclass(frozen=True)
class Ending:
    """How tests ended.

    Attributes:
        status: exit status of pytest; None where the process was ended by a signal, a limit's among them.
        last: the test that was begun last, or the file that could not be collected.
        outcomes: test -> "passed", "failed" or "skipped", and the seconds that it took.
        seconds: of processor time that the child and its own children took.
    """

    status: int | None
    last: str
    outcomes: dict[str, tuple[str, float]]
    seconds: float


@dataclass(eq=False)  # pytest asks for plugins that can be members of a set
class _Reporter:
    """Plugin: tells what happens to each test, and limits the processor time that it may take."""

    pipe: int
    limit: Callable[[str], float]

    def allow(self, name: str) -> None:
        self._tell("begins", 0.0, name)
        used = resource.getrusage(resource.RUSAGE_SELF)
        seconds = int(used.ru_utime + used.ru_stime + self.limit(name)) + 1
        resource.setrlimit(resource.RLIMIT_CPU, (seconds, resource.RLIM_INFINITY))

    def _tell(self, what: str, seconds: float, name: str) -> None:
        os.write(self.pipe, f"{what}\t{seconds}\t{name}\n".encode())

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self.allow(nodeid)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self._tell(report.outcome, report.duration, report.nodeid)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self._tell("begins", 0.0, report.nodeid)


def run(tree: Path, arguments: Sequence[str], limit: Callable[[str], float]) -> Ending:
    """Run pytest in a child.

    Args:
        tree: folder to run in; its package is the one that is tested.
        arguments: of pytest.
        limit: test -> seconds of processor time that it may take.
    """
    ours, theirs = os.pipe()
    child = os.fork()
    if child == 0:
        _child(tree, arguments, _Reporter(theirs, limit))
    os.close(theirs)
    os.set_blocking(ours, False)
    try:
        return _followed(child, ours, limit)
    finally:
        os.close(ours)
        with suppress(ProcessLookupError):
            os.killpg(child, signal.SIGKILL)


def _followed(child: int, pipe: int, limit: Callable[[str], float]) -> Ending:
    last, told, rest, outcomes = "", time.monotonic(), "", dict[str, tuple[str, float]]()
    while True:
        done, status, used = os.wait4(child, os.WNOHANG)
        while text := _read(pipe):
            *lines, rest = (rest + text).split("\n")
            told = time.monotonic()
            for what, seconds, name in (line.split("\t", 2) for line in lines):
                if what == "begins":
                    last = name
                else:  # each test is set up, called and torn down
                    before, total = outcomes.get(name, ("passed", 0.0))
                    outcomes[name] = (before if what == "passed" else what, total + float(seconds))
        if not done and time.monotonic() - told > WAITS * limit(last):
            os.killpg(child, signal.SIGKILL)
            done, status, used = os.wait4(child, 0)
        if done:
            code = os.WEXITSTATUS(status) if os.WIFEXITED(status) else None
            return Ending(code, last, outcomes, used.ru_utime + used.ru_stime)
        time.sleep(0.02)


def _read(pipe: int) -> str:
    try:
        return os.read(pipe, 1 << 16).decode()
    except BlockingIOError:
        return ""


def warm(root: Path) -> None:
    """Run a few tests here, so that torch and its like are loaded, on first use too, before the first fork."""
    quiet, real = os.open(os.devnull, os.O_WRONLY), os.dup(1)
    os.dup2(quiet, 1)
    try:
        if pytest.main([*PLAIN, str(root / "tests/golden")]):
            raise SystemExit("tests/golden fails without any change")
    finally:
        os.dup2(real, 1)


def _child(tree: Path, arguments: Sequence[str], reporter: _Reporter) -> None:
    code = 1
    try:
        os.setpgrp()
        signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where this runs in the background
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
        reporter.allow("")
        quiet = os.open(os.devnull, os.O_WRONLY)
        os.dup2(quiet, 1)
        os.dup2(quiet, 2)
        os.chdir(tree)
        os.environ |= {"PYTHONPATH": str(tree), "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}
        sys.dont_write_bytecode = True  # a file of a changed module must not outlive the change
        sys.path[:] = [str(tree), *(p for p in sys.path if not (Path(p or ".") / "lagcompile").is_dir())]
        for name in [n for n in sys.modules if n.split(".")[0] in {"lagcompile", "tests"}]:
            del sys.modules[name]
        torch.set_num_threads(1)
        code = int(pytest.main([*PLAIN, *arguments], plugins=[reporter]))
    finally:
        os._exit(code)
