"""Hostile specs for the tests of what runs, and a canary that tells whether anything did."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from lagcompile.workbench.cli import main
from tests.workbench.specs import MOONS

DATA = "{name: two_moons, args: {train: 64, test: 32}}"
MODEL = "{name: mlp, args: {widths: [2, 8, 8, 2], activation: tanh}}"
SPLIT = "{policy: at, after: [layers.2, layers.4]}"
CANARY = "canary"
SECRET = "s3cret-w0rd"
MODULE = f"""\
import pathlib
pathlib.Path(__file__).parent.joinpath("{CANARY}").write_text("ran")
import torch

def net():
    return torch.nn.Sequential(torch.nn.Linear(2, 4), torch.nn.Tanh(), torch.nn.Linear(4, 2))

def data():
    x = torch.linspace(-1, 1, 64).reshape(32, 2)
    return {{"train": (x, (x[:, 0] > 0).long()), "test": (x, (x[:, 0] > 0).long())}}

def loss(output, target):
    return torch.nn.functional.cross_entropy(output, target)

def rule(h):
    return h.sum() - 1e6
"""
"""Writes the canary beside itself when it is imported; its functions are good ones."""

COMMANDS = (
    ("show",),
    ("show", "--receipt"),
    ("plan",),
    ("solve", "--steps", "1", "--quiet"),
    ("verify",),
    ("verify", "--exact"),
    ("spy",),
    ("export", "--to", "exported"),
    ("export", "--latex", "out.tex"),
    ("diff", "moons.yaml"),
)
"""Every command that takes a spec, which stands behind the first word."""


def spec(folder: Path, *replacements: tuple[str, str], more: str = "", name: str = "x.yaml") -> Path:
    """The two-moons spec with parts replaced and lines added."""
    text = MOONS
    for old, new in replacements:
        assert old in text
        text = text.replace(old, new)
    path = folder / name
    path.write_text(text + more)
    return path


def constrained(function: str) -> tuple[str, str]:
    """A replacement that adds a constraint with a function of that name."""
    constraint = f"  constraints: [{{name: rule, reads: [h1], function: '{function}'}}]\n  weight:"
    return "  weight:", constraint


def run(monkeypatch: pytest.MonkeyPatch, command: tuple[str, ...], path: Path | str, *more: str) -> int:
    """Exit status of one command on one spec, in this process."""
    monkeypatch.setattr(sys, "argv", ["lagcompile", command[0], str(path), *command[1:], *more])
    imports = list(sys.path)
    with pytest.raises(SystemExit) as caught:
        main()
    assert sys.path == imports
    return int(caught.value.code or 0)


def files(folder: Path) -> set[str]:
    """Every file below a folder."""
    return {str(Path(root, name).relative_to(folder)) for root, _, names in os.walk(folder) for name in names}
