"""Arguments of another type: a named problem where they are given, and never another exception."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import lagcompile as lc
from lagcompile.check.kkt import certify_kkt
from lagcompile.exact import minimize
from lagcompile.ir.text import from_json
from tests.unseen.files import limited

X, Y, MSE = torch.zeros(4, 3), torch.ones(4, 2), nn.functional.mse_loss
WRONG: Mapping[str, object] = {
    "None": None,
    "a number": 3,
    "a list": [1],
    "bytes": b"x",
    "no text": "",
    "an object": object(),
    "NUL": "a\0b",
    "NaN": float("nan"),
    "a tensor": torch.zeros(2),
    "a mapping": {"a": 1},
}


@cache
def lifted() -> lc.Lifted:
    torch.manual_seed(0)
    return lc.lift(nn.Sequential(nn.Linear(3, 2), nn.Tanh(), nn.Linear(2, 2)), X, split=2)


@cache
def certificate() -> lc.Certificate:
    return lifted().verify(X, Y, loss=MSE)


@cache
def solved() -> lc.Solution:
    return lifted().solve((X, Y), loss=MSE, options=lc.RunOptions(steps=1))


def _solve(**given: Any) -> object:
    return lifted().solve((X, Y), loss=MSE, **{"options": lc.RunOptions(steps=1), **given})


PATHS: Mapping[str, Callable[[Any], object]] = {
    "load": lc.load,
    "load_solution": lc.load_solution,
    "Certificate.load": lc.Certificate.load,
    "Certificate.save": lambda v: certificate().save(v),
    "save": lambda v: lifted().save(v),
    "save_split": lambda v: lifted().save_split(v),
    "draw": lambda v: lifted().draw(v),
    "from_json": from_json,
}
OTHERS: Mapping[str, tuple[Callable[[Any], object], set[str]]] = {
    "weights": (lambda v: lifted().verify(X, Y, loss=MSE, weights=v), {"None"}),
    "a certificate's network": (lambda v: certificate().check(v), set()),
    "a certificate's tolerance": (lambda v: certificate().check(lifted(), tolerance=v), {"a number"}),
    "evaluate": (lambda v: _solve(evaluate=v), {"None"}),
    "watch": (lambda v: _solve(watch=v), {"None"}),
    "options": (lambda v: _solve(options=v) if v is not None else None, {"None"}),
    "start": (lambda v: _solve(start=v), {"None"}),
    "method": (lambda v: _solve(method=v), {"None"}),
    "folder": (lambda v: _solve(folder=v), {"None"}),
    "a bound program": (lambda v: certify_kkt(v, solved()), set()),
    "a solution": (lambda v: certify_kkt(lifted().bind((X, Y), loss=MSE), v), set()),
    "x0": (lambda v: minimize(lambda z: z.sum(), v), set()),
}


@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize("function", PATHS)
def test_what_is_no_path_is_said(function: str, wrong: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with (
        limited(),
        pytest.raises(lc.LagcompileError, match=r"got (an object of type|''|'a|b'x)|not valid JSON|program"),
    ):
        PATHS[function](WRONG[wrong])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("function", PATHS)
@pytest.mark.parametrize("kind", ["folder", "pipe", "missing", "long"])
def test_paths_of_something_else_are_said(function: str, kind: str, tmp_path: Path) -> None:
    path = tmp_path / ("x" * 5000 if kind == "long" else "nothing/there")
    if kind in ("folder", "pipe"):
        path = tmp_path / kind
        path.mkdir() if kind == "folder" else os.mkfifo(path)
    if (function, kind) in {
        ("Certificate.save", "pipe"),
        ("save_split", "pipe"),
        ("save", "missing"),
        ("save", "folder"),
    }:
        return  # a file takes the pipe's place; folders above an exported one are made, an empty one is filled
    with limited(), pytest.raises(lc.LagcompileError):
        PATHS[function](str(path))


@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize("function", OTHERS)
def test_what_is_of_another_type_is_said(
    function: str, wrong: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    call, allowed = OTHERS[function]
    if wrong in allowed:
        call(WRONG[wrong])
        return
    with pytest.raises(lc.LagcompileError):
        call(WRONG[wrong])
