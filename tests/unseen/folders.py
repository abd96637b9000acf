"""Exported folders that were damaged, or changed by somebody who knows the format: a refusal, or a network.

A few small networks are exported once. Each case changes one of these folders: bytes, values of JSON, the structure
of files or of the folder, mostly with hashes that fit again. Loading raises one `LagcompileError` that names the
folder, or gives a network; nothing else is raised, nothing is run, imported, written or unpickled meanwhile, and it
ends in time.
"""

from __future__ import annotations

import ast
import copy
import functools
import json
import os
import random
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import lagcompile as lc
from tests.export.folders import edited, rewritten
from tests.nets import Normalised, Residual

CI, NIGHTLY = 600, 3000
SECONDS = 5.0


class Mixed(nn.Module):
    """Sizes, a part without gradients, noise, an operation of one mode, several outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 3)
        self.register_buffer("shift", torch.linspace(0, 1, 6))

    def forward(self, x: Tensor, *, scale: float = 2.0) -> dict[str, Any]:
        h = torch.tanh(self.a(x)) + self.get_buffer("shift")
        with torch.no_grad():
            gate = torch.sigmoid(h.max(1, keepdim=True).values)
        if self.training:
            h = h * (torch.rand_like(h) > 0.1)
        y = self.c(self.b(h).view(x.shape[0], -1) * gate * scale)
        return {"y": y, "parts": (h, y.chunk(3, 1)[0]), "name": "mixed"}


@functools.cache
def exported() -> tuple[dict[str, bytes], ...]:
    """Files of some exported networks, one with a solution."""
    torch.manual_seed(0)
    nets: list[tuple[nn.Module, Tensor, int]] = [
        (Residual(), torch.randn(4, 6), 3),
        (Normalised(), torch.randn(4, 1, 4, 4), 2),
        (Mixed(), torch.randn(4, 4), 3),
    ]
    found = []
    with tempfile.TemporaryDirectory() as here:
        for i, (net, x, split) in enumerate(nets):
            lifted = lc.lift(net, (x,), split=split)
            solution = None
            if i == 0:
                options = lc.RunOptions(steps=1, seed=0)
                solution = lifted.solve((x, torch.randn(4, 3)), loss=nn.functional.mse_loss, options=options)
            folder = lifted.save(Path(here) / str(i), solution=solution)
            found.append({f.name: f.read_bytes() for f in folder.iterdir()})
            load(folder)  # whatever is imported or compiled once for all is so now
    with watched() as events:
        compile("0", "", "eval")
    assert events  # the watch watches
    return tuple(found)


def load(folder: Path) -> lc.Lifted:
    """All that is read of a folder."""
    lifted = lc.load(folder)
    if (folder / "solution.json").exists():
        lc.load_solution(folder)
    return lifted


# ---------------------------------------------------------------- changes
VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 3, 1 << 31, (1 << 63) - 1, -(1 << 63), 0.5, 1e308, "", "x", "a.b", "B", "2B", "∞"),
    *(
        "__class__",
        "__import__('os').system('id')",
        "lambda",
        "x\nimport os",
        "..",
        "/etc/passwd",
        "a\x00b",
        "x" * 3000,
    ),
    *(
        [],
        {},
        [[]],
        {"node": "v0"},
        {"tensor": "a.weight"},
        {"ref": "x"},
        {"value": {"float": "nan"}},
        {"dtype": "load"},
    ),
    *({"kind": "torch", "name": "max", "items": []}, {"kind": "named", "name": "A", "keys": ["b"], "items": []}),
    *("os.system", "aten.from_file.default", "aten.tanh.default", "aten.zeros.default", "size.pow", "item", "grad"),
    [0] * 2000,
    json.loads("[" * 55 + "]" * 55),
    {"dtype": "load"},
)


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Paths of all values inside a value."""
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield from places(item, (*path, key))


def at(value: Any, path: tuple[Any, ...]) -> Any:
    """The value at a path."""
    for key in path:
        value = value[key]
    return value


def changed_json(draw: random.Random, value: Any, other: Any) -> Any:
    """JSON data with one value replaced, left out, repeated, renamed or moved."""
    found = [p for p in places(value) if p]
    if not found:
        return draw.choice(VALUES)
    path = draw.choice(found)
    owner, key = at(value, path[:-1]), path[-1]
    how = draw.choice(("replace", "replace", "replace", "drop", "repeat", "rename", "move", "swap"))
    if how == "drop":
        del owner[key]
    elif how == "repeat" and isinstance(owner, list):
        owner.insert(draw.randrange(len(owner) + 1), copy.deepcopy(owner[key]))
    elif how == "rename" and isinstance(owner, dict):
        owner[str(draw.choice(VALUES))[:4000]] = owner.pop(key)
    elif how == "swap":
        second = draw.choice(found)
        owner[key] = copy.deepcopy(at(value, second))
    elif how == "move":
        owner[key] = copy.deepcopy(at(other, draw.choice(list(places(other)))))
    else:
        owner[key] = copy.deepcopy(draw.choice(VALUES))
    return value


def changed_bytes(draw: random.Random, data: bytes) -> bytes:
    """Bytes with a bit turned, a part left out, repeated, zeroed or put in."""
    place, length = draw.randrange(len(data) + 1), draw.choice((1, 1, 4, 50, len(data)))
    middle = data[place : place + length]
    put = draw.choice((b"", bytes(len(middle)), middle * 2, b"NaN", b'"', b"[" * 5000, b"\xff", b"1" * 5000))
    if middle and draw.random() < 0.5:
        put = bytes([middle[0] ^ (1 << draw.randrange(8))]) + middle[1:]
    return data[:place] + put + data[place + length :]


def of_bytes(draw: random.Random, folder: Path) -> None:
    file = draw.choice(sorted(folder.iterdir()))
    data = changed_bytes(draw, file.read_bytes())
    if draw.random() < 0.3 or file.name == "manifest.json":
        file.write_bytes(data)
    else:
        rewritten(folder, file.name, data)


def of_json(draw: random.Random, folder: Path) -> None:
    files = sorted(f for f in folder.iterdir() if f.suffix == ".json")
    weights = [3.0 if f.name.startswith(("stage", "manifest")) else 1.0 for f in files]
    for _ in range(draw.choice((1, 1, 1, 2, 5))):
        (file,) = draw.choices(files, weights)
        try:
            value, other = json.loads(file.read_text()), json.loads(draw.choice(files).read_text())
        except ValueError:
            continue
        edited(folder, file.name, changed_json(draw, value, other))


def of_files(draw: random.Random, folder: Path) -> None:
    file, other = draw.sample(sorted(folder.iterdir()), 2)
    how = draw.choice(("remove", "add", "link", "swap", "copy", "folder", "pipe"))
    if how == "swap":
        data = file.read_bytes()
        file.write_bytes(other.read_bytes())
        other.write_bytes(data)
    elif how == "copy" and file.name != "manifest.json":
        rewritten(folder, file.name, other.read_bytes())
    elif how == "add":
        (folder / draw.choice(("x", ".hidden", "stage_9.json", "stage_0.pt2", "\u221e"))).write_text("{}")
    else:
        file.unlink()
        if how == "link":
            file.symlink_to(draw.choice((other, Path("/etc/passwd"), Path("/dev/zero"))))
        elif how == "folder":
            file.mkdir()
        elif how == "pipe":
            os.mkfifo(file)


CHANGES: tuple[Callable[[random.Random, Path], None], ...] = (of_json, of_json, of_json, of_json, of_bytes, of_files)

# ---------------------------------------------------------------- what may not happen
_EVENTS = """
exec compile import subprocess.Popen os.system os.exec os.posix_spawn os.fork os.forkpty os.remove os.rename os.mkdir
os.rmdir os.link os.symlink os.truncate pickle.find_class marshal.loads marshal.load code.__new__ function.__new__
ctypes.dlopen ctypes.dlsym socket.connect socket.bind shutil.rmtree
"""
_ALWAYS = frozenset(_EVENTS.split())
_seen: list[str] | None = None


def _hook(event: str, args: tuple[Any, ...]) -> None:
    if _seen is None:
        return
    writes = event == "open" and (
        any(c in str(args[1] or "") for c in "wax+")
        or (isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR))
    )
    if writes or event in _ALWAYS:
        _seen.append(f"{event} {args!r:.200}")


@contextmanager
def watched() -> Iterator[list[str]]:
    """Notes whatever runs code, or leaves a trace."""
    global _seen
    _installed()
    found: list[str] = []
    _seen = found
    try:
        yield found
    finally:
        _seen = None


@functools.cache
def _installed() -> None:
    sys.addaudithook(_hook)


_CALLED = re.compile(
    r"self\..+|getattr\(self, .+|torch\.ops\.aten\.\w+\.\w+|torch\.(Size|device)|torch\.sym_\w+|device|getattr"
    r"|_?operator\.\w+|math\.\w+|\w*_same|round"
)


def check_code(source: str) -> None:
    """The code that runs when a stage is called: one function of assignments and known calls, no dunder name."""
    tree = ast.parse(source.strip())
    (function,) = (n for n in tree.body if not isinstance(n, ast.Expr))
    assert isinstance(function, ast.FunctionDef), source
    assert all(isinstance(n, ast.Assign | ast.Return | ast.Expr | ast.Delete) for n in function.body), source
    for n in ast.walk(tree):
        word = n.attr if isinstance(n, ast.Attribute) else n.id if isinstance(n, ast.Name) else ""
        assert not word.startswith("__"), source
        assert not isinstance(n, ast.Call) or _CALLED.fullmatch(ast.unparse(n.func)), ast.unparse(n)


def case(seed: int) -> Mapping[str, int]:
    draw = random.Random(seed)
    files = draw.choice(exported())
    with tempfile.TemporaryDirectory() as here:
        folder = Path(here) / "out"
        folder.mkdir()
        for name, data in files.items():
            (folder / name).write_bytes(data)
        changed = draw.random() < 0.97
        if changed:
            draw.choice(CHANGES)(draw, folder)
        begin = time.monotonic()
        with watched() as events:
            try:
                lifted = load(folder)
                str(lifted.program)
                sources = [stage.code for stage in lifted.stages.values()]
                outcome = "loaded"
            except lc.LagcompileError as error:
                outcome, message = "refused", str(error)
        seconds = time.monotonic() - begin
        assert not events, events[0]
        assert seconds < SECONDS, f"{seconds:.1f} s"
        if outcome == "loaded":
            for source in sources:
                check_code(source)
        else:
            assert changed, message
            assert str(folder) in message, message
            # What nobody foresaw is refused too, so that a folder gives no traceback; here it is a failure.
            assert "do not fit each other" not in message, message
            assert len(message) < 5000, message[:300]
        shutil.rmtree(folder)
    return {outcome: 1, "unchanged": int(not changed)}


def judge(tally: Mapping[str, int], cases: int) -> None:
    assert tally["refused"] >= 0.6 * cases, tally
    assert tally["loaded"] >= max(1, tally["unchanged"]), tally
