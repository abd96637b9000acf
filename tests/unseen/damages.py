"""One damaged file of any kind, in a folder of any kind: its readers name it, or what comes out is as if it were whole.

Each case damages a file (a bit, a lost end, zeros) of a run folder, a bench or an exported folder that was whole, and
has it read: runs are resumed, a bench is run again, an exported folder is loaded. The file is named on the way, or the
folder (the loaded network) is what it was: nothing is silent. Where it is refused, nothing else is changed.
"""

from __future__ import annotations

import contextlib
import io
import os
import random
import tempfile
import warnings
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path

import torch

import lagcompile as lc
from tests.store.damage import damage
from tests.store.kinds import run
from tests.store.runs import files
from tests.store.test_commands import SPEC, call
from tests.unseen.folders import Mixed

CI, NIGHTLY = 60, 1000
KEPT = ("extragradient", "memory", "sqp", "mixed_integer", "first_order", "bench")
PLACES = (*KEPT, "solve", "export")
REFUSED = "refused"


def case(seed: int) -> Mapping[str, int]:
    """One file."""
    generator = random.Random(seed)
    kind = PLACES[seed % len(PLACES)]
    whole = _whole(kind)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "run"
        for path, data in whole.items():
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            (folder / path).write_bytes(data)
        chosen = generator.choice(sorted(p for p, data in whole.items() if data))
        how = damage(folder / chosen, generator)
        before = files(folder)
        refused, said = _read(kind, Path(name))
        named = chosen in said
        left = files(folder)
        if refused:
            assert named, f"{kind}, {how}: refused without the file's name: {said}"
            assert {n: d for n, d in left.items() if n != ".lock"} == before, f"{kind}, {how}: a refused folder changed"
            return {REFUSED: 1, kind: 1}
        wrong = sorted(n for n in left.keys() | whole.keys() if left.get(n) != whole.get(n))
        assert not wrong or (named and wrong == [chosen]), f"{kind}, {how}: {wrong} differ silently ({said})"
    return {"named" if named else "harmless": 1, kind: 1}


def judge(tally: Mapping[str, int], cases: int) -> None:
    """Every kind of folder was damaged, and each way out was seen."""
    assert all(tally.get(kind, 0) for kind in PLACES)
    assert min(tally.get(REFUSED, 0), tally.get("named", 0)) >= cases // 20


def _read(kind: str, root: Path) -> tuple[bool, str]:
    """Have a folder read: whether it was refused, and all that was said."""
    told, streams = io.StringIO(), io.StringIO()
    with (
        warnings.catch_warnings(record=True) as said,
        contextlib.redirect_stderr(told),
        contextlib.redirect_stdout(streams),
    ):
        warnings.simplefilter("always")
        refused = False
        try:
            _READERS.get(kind, lambda root: run(kind, root, resume=True))(root)
        except lc.LagcompileError as error:
            refused = True
            told.write("\n".join(error.problems))
    return refused, "\n".join([*(str(w.message) for w in said), told.getvalue()])


def _solve(root: Path) -> None:
    resume = (root / "run").exists()
    (root.parent / f"{root.name}.yaml").write_text(SPEC)
    status = call("solve", root.parent / f"{root.name}.yaml", "-q", "--out", root / "run", *["--resume"] * resume)
    os.unlink(root.parent / f"{root.name}.yaml")
    if status:
        raise lc.DataError("")


def _export(root: Path) -> None:
    if not (root / "run").exists():
        torch.manual_seed(0)
        lc.lift(Mixed(), (torch.ones(3, 4),), split=2).save(root / "run")
        return
    found, wanted = lc.load(root / "run"), _loaded()
    for name, value in wanted.module.state_dict().items():
        assert torch.equal(found.module.state_dict()[name], value)
    assert str(found.program) == str(wanted.program)


_READERS: Mapping[str, Callable[[Path], None]] = {"solve": _solve, "export": _export}


@cache
def _loaded() -> lc.Lifted:
    with tempfile.TemporaryDirectory() as name:
        _export(Path(name))
        return lc.load(Path(name) / "run")


@cache
def _whole(kind: str) -> dict[str, bytes]:
    """Files of a folder that is whole."""
    with tempfile.TemporaryDirectory() as name:
        if kind in _READERS:
            with contextlib.redirect_stdout(io.StringIO()):
                _READERS[kind](Path(name))
        else:
            run(kind, Path(name), resume=False)
        return files(Path(name) / "run")
