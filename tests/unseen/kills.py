"""Real processes of every kind of run, killed for good at random times: what resumes leaves the unbroken run's folder.

Case n is kind n modulo the number of kinds: one to three processes, each killed somewhere between its beginning and the
time that the unbroken run took, more often late, where there is something to lose.
"""

from __future__ import annotations

import os
import random
import signal
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Mapping
from functools import cache
from importlib import import_module
from pathlib import Path

from tests.store.kinds import ALL, made, run
from tests.store.runs import files

CI, NIGHTLY = 6, 200
LONGEST = 120.0
"""Seconds after which a process that nobody killed is taken for hanging."""


def case(seed: int) -> Mapping[str, int]:
    """One run, killed up to three times."""
    generator = random.Random(seed)
    kind = ALL[seed % len(ALL)]
    wanted, seconds = _whole(kind)
    killed = 0
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        for _ in range(generator.randint(1, 3)):
            child = _started(lambda: run(kind, root, resume=(root / "run").exists()))
            killed += _ended(child, (1 - generator.random() ** 2) * seconds)
        begun = (root / "run").exists()
        child = _started(lambda: run(kind, root, resume=(root / "run").exists()))
        assert not _ended(child, LONGEST), f"{kind}: it does not end"
        left = files(root / "run")
        wrong = sorted(n for n in left.keys() | wanted.keys() if left.get(n) != wanted.get(n))
        assert not wrong, f"{kind}: {wrong} differ from the unbroken run's"
        assert [p.name for p in root.iterdir()] == ["run"], f"{kind}: something is left beside the folder"
    return {kind: 1, "killed": killed, "in mid-run": int(killed > 0 and begun)}


def judge(tally: Mapping[str, int], cases: int) -> None:
    """Many processes were killed, and some of them in mid-run: when depends on the machine."""
    assert tally["killed"] >= cases // 2
    assert tally["in mid-run"] >= cases // 10


def _started(action: Callable[[], None]) -> int:
    """Start an action in a process of its own: the number of the process."""
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        warnings.simplefilter("ignore")
        action()
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)


def _ended(child: int, seconds: float) -> bool:
    """Kill a process after some seconds: whether it was still there. One that ends by itself ends well."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            assert status == 0, "a process failed; its traceback is above"
            return False
        time.sleep(0.002)
    os.kill(child, signal.SIGKILL)
    return os.WIFSIGNALED(os.waitpid(child, 0)[1])


@cache
def _whole(kind: str) -> tuple[dict[str, bytes], float]:
    """What the unbroken run leaves, and how long it took."""
    with tempfile.TemporaryDirectory() as name:
        for library in ("cvxpy", "casadi", "sklearn.datasets", "matplotlib.figure"):
            import_module(library)  # once, for all children
        made(kind)
        begin = time.monotonic()
        assert not _ended(_started(lambda: run(kind, Path(name), resume=False)), LONGEST)
        return files(Path(name) / "run"), time.monotonic() - begin
