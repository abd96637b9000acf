"""Run folders that die, are damaged or cannot be written: the unbroken run comes back, or what is wrong is named.

A case is a small run of a random method with random looks and checkpoints. It dies at one or two operations on files
(and loses what was not synchronised), its process is killed at random times, the system refuses an operation, or a
signal stops it; then a file of what is left may be damaged. Going on gives the folder of the unbroken run bit for bit;
where both checkpoints are damaged, one line names them and nothing is changed.
"""

from __future__ import annotations

import errno
import os
import random
import shutil
import signal
import tempfile
import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path

import lagcompile as lc
from tests.store.damage import damage
from tests.store.dying import died
from tests.store.runs import KINDS, Run, files

CI, NIGHTLY = 80, 4000
ERRORS = (errno.ENOSPC, errno.EROFS, errno.EACCES, errno.EIO, errno.EDQUOT, errno.EFBIG, errno.ENOENT)


def case(seed: int) -> Mapping[str, int]:
    """One run, broken and mended."""
    generator = random.Random(seed)
    kind = generator.choice(list(KINDS))
    steps, every = generator.choice(((3, 1), (4, 2), (5, 2), (4, None)))
    with _place() as root, warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".* keeps nothing half-way")
        run = _run(kind, steps, every, generator.choice((1, 2)))
        run.root = root
        wanted, count = _whole(run)
        how = generator.choice(("dies", "dies", "refused", "signal", "killed"))
        {"dies": _dies, "refused": _refused, "signal": _signalled, "killed": _killed}[how](run, count, generator)
        counts = {how: 1}
        if (root / "broken").exists() and generator.random() < 0.5:
            counts |= _damaged(run, generator)
        if counts.get("both"):
            return counts
        said = run.mended("broken")
        left = files(root / "broken")
        wrong = sorted(n for n in left.keys() | wanted.keys() if left.get(n) != wanted.get(n))
        assert not wrong, f"{kind}: {wrong} differ from the unbroken run's ({said})"
        assert [p.name for p in root.iterdir()] == ["broken"], f"{kind}: something is left beside the folder"
    return counts


def judge(tally: Mapping[str, int], cases: int) -> None:
    """Each way of breaking a run was tried."""
    assert min(tally.get(n, 0) for n in ("dies", "refused", "signal", "killed", "damaged")) >= cases // 20


@contextmanager
def _place() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as name:
        yield Path(name)


@cache
def _run(kind: str, steps: int, every: int | None, look: int) -> Run:
    return Run(Path(), kind, steps=steps, checkpoint_every=every, look_every=look)


_WHOLE: dict[int, tuple[dict[str, bytes], int]] = {}


def _whole(run: Run) -> tuple[dict[str, bytes], int]:
    """What the unbroken run leaves, and its number of operations."""
    if id(run) not in _WHOLE:
        count = run.operations("broken")
        _WHOLE[id(run)] = files(run.root / "broken"), count
        shutil.rmtree(run.root / "broken")
    return _WHOLE[id(run)]


def _dies(run: Run, count: int, generator: random.Random) -> None:
    run.broken("broken", generator.randint(1, count))
    if generator.random() < 0.3 and (run.root / "broken").exists():
        died(run.root, generator.randint(1, 60), lambda: run("broken", resume=True))


def _refused(run: Run, count: int, generator: random.Random) -> None:
    code, problems = generator.choice(ERRORS), list[str]()

    def action() -> None:
        try:
            run("broken")
        except lc.DataError as error:
            problems.extend(error.problems)

    died(run.root, generator.randint(1, count), action, fail=OSError(code, os.strerror(code)))
    assert len(problems) <= 1, problems
    assert all(os.strerror(code) in p or "no file" in p for p in problems), problems


def _signalled(run: Run, count: int, generator: random.Random) -> None:
    del count
    step = float(generator.randint(1, run.options.steps))
    number = generator.choice((signal.SIGINT, signal.SIGTERM, signal.SIGHUP))

    sent: list[int] = []

    def watch(row: Mapping[str, float]) -> None:
        if row["step"] >= step and not sent:
            sent.append(number)
            os.kill(os.getpid(), number)

    with suppress(KeyboardInterrupt):  # of solvers that are one call
        died(run.root, None, lambda: run("broken", watch=watch))


def _killed(run: Run, count: int, generator: random.Random) -> None:
    """A process of its own, killed for good at a random time, up to three times."""
    del count
    for _ in range(generator.randint(1, 3)):
        child = os.fork()
        if child == 0:
            try:
                run("broken", resume=(run.root / "broken").exists())
            finally:
                os._exit(0)
        time.sleep(generator.random() * 0.3)
        with suppress(ProcessLookupError):
            os.kill(child, generator.choice((signal.SIGKILL, signal.SIGKILL, signal.SIGTERM)))
        os.waitpid(child, 0)


def _damaged(run: Run, generator: random.Random) -> dict[str, int]:
    """Damage one file, or both checkpoints: these are named, and nothing is changed."""
    folder = run.root / "broken"
    there = sorted(p for p in folder.iterdir() if p.is_file() and p.stat().st_size)
    states = [p for p in there if p.name.startswith("checkpoint-")]
    if generator.random() < 0.7 or len(states) < 2:
        path = generator.choice(there)
        if len(states) == 1 and path in states:
            return {}
        damage(path, generator)
        return {"damaged": 1}
    for path in states:
        damage(path, generator)
    before, problems = _but_lock(folder), tuple[str, ...]()
    try:
        run("broken", resume=True)
    except lc.DataError as error:
        problems = error.problems
    assert all(any(p.name in text for text in problems) for p in states), problems
    assert _but_lock(folder) == before, "a refused run changed the folder"
    return {"damaged": 1, "both": 1}


def _but_lock(folder: Path) -> dict[str, bytes]:
    """Its files, without a lock that a dead process left."""
    return {name: data for name, data in files(folder).items() if name != ".lock"}
