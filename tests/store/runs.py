"""Small runs in folders, and what they leave, with all clocks at zero so that it can be compared bit for bit."""

from __future__ import annotations

import time
import warnings
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import nn

import lagcompile as lc
from lagcompile.backends.convex import Convex
from lagcompile.backends.mip import MixedInteger
from lagcompile.backends.sqp_oracle import Ipopt
from lagcompile.ir.solution import Solution
from tests.store.dying import Machine, died

PENALTY = lc.ConstantWeight(value=1.0)
TABLE, BATCH = lc.Formulation(), lc.Formulation(storage=lc.Transient(), multiplier=None, weight=PENALTY)
CLASSES = lc.Formulation(storage=lc.ClassGaussian(samples=2), start=lc.UnitSphere(), classes=2)
STEPS: dict[str, tuple[Any, lc.Formulation]] = {
    "extragradient": (lc.Extragradient(weights=lc.Adam(lr=0.01)), TABLE),
    "past": (lc.ExtragradientFromPast(), TABLE),
    "optimistic": (lc.OptimisticGradient(states=lc.Adagrad(lr=0.1)), TABLE),
    "descent_ascent": (lc.DescentAscent(), TABLE),
    "classes": (lc.Extragradient(), CLASSES),
    "augmented": (lc.AugmentedLagrangian(), lc.Formulation(weight=PENALTY)),
    "altmin": (lc.AltMin(), BATCH),
    "memory": (lc.AltMin(memory=True), BATCH),
    "proxprop": (lc.ProxProp(), BATCH),
    "backprop": (lc.Backprop(), TABLE),
    "targets": (lc.DifferenceTargetPropagation(), BATCH),
    "feedback": (lc.FeedbackAlignment(), BATCH),
}
"""One of each family that makes steps, with a formulation that it is defined on."""
DECAY = lc.Formulation(regularisers=(lc.Regulariser(kind="l2", on="weights", weight=0.2),))
MOVED = lc.Formulation(frozen=("*",), inputs={"input_1": lc.InputFormulation(lower=-2.0, upper=2.0)})
EXACT: dict[str, tuple[Any, lc.Formulation]] = {
    "sqp": (lc.SQP(), DECAY),
    "bfgs": (lc.SQP(hessian="bfgs", max_iterations=9), DECAY),
    "convex": (Convex(), DECAY),
    "mixed_integer": (MixedInteger(), MOVED),
    "ipopt": (Ipopt(), DECAY),
}
"""Solvers of the exact program; the last three are one call of another library each."""
KINDS = STEPS | EXACT


class Net(nn.Module):
    """A network with dropout."""

    def __init__(self, noise: float) -> None:
        super().__init__()
        self.first, self.middle, self.last = nn.Linear(2, 4), nn.Linear(4, 4), nn.Linear(4, 2)
        self.drop = nn.Dropout(noise)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = torch.tanh(self.first(x))
        h = torch.tanh(self.middle(self.drop(h)))
        return self.last(h)


def _exact(kind: str) -> tuple[nn.Module, tuple[torch.Tensor, torch.Tensor], Any, int]:
    """A small network, rows, a loss and a number of stages."""
    generator = torch.Generator().manual_seed(1)
    x, y = (torch.randn(4, n, generator=generator, dtype=torch.float64) for n in (2, 1))
    if kind == "mixed_integer":
        net = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1)).double().requires_grad_(False)
        return net, (x[:1], y[:1]), _first, 1
    layers = [nn.Linear(2, 1)] if kind == "convex" else [nn.Linear(2, 2), nn.Tanh(), nn.Linear(2, 1)]
    return nn.Sequential(*layers).double(), (x, y), nn.functional.mse_loss, len(layers) // 2 + 1


def _first(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return output.sum()


class Run:
    """A run of one method on a handful of rows.

    Args:
        root: where folders are made.
        kind: name of the method.
        options: of the run.
    """

    def __init__(self, root: Path, kind: str = "extragradient", **options: Any) -> None:
        generator = torch.Generator().manual_seed(1)
        self.root, (self.method, formulation) = root, KINDS[kind]
        self.loss: Any = nn.functional.cross_entropy
        split: Any = lc.AtSplit(after=("first", "middle") if kind == "memory" else ("tanh",))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(2)
            if kind in EXACT:
                net, self.data, self.loss, split = _exact(kind)
            else:
                net = Net(0.0 if kind in {"altmin", "memory", "proxprop", "targets", "feedback"} else 0.3)
                self.data = (torch.randn(10, 2, generator=generator), torch.arange(10) % 2)
        self.lifted = lc.lift(net, (self.data[0],), split, formulation)
        given = {"steps": 4, "batch_size": 4, "look_every": 1, "checkpoint_every": 2, "seed": 3}
        self.options = lc.RunOptions.model_validate({**given, **options})

    def __call__(self, name: str, **keywords: Any) -> Solution:
        """Solve into a folder."""
        given = {"options": self.options, **keywords}
        with mock.patch.object(time, "perf_counter", return_value=0.0):
            return self.lifted.solve(self.data, loss=self.loss, method=self.method, folder=self.root / name, **given)

    def operations(self, name: str) -> int:
        """Number of operations on files of the unbroken run."""
        return died(self.root, None, lambda: self(name)).done

    def broken(self, name: str, at: int, lost: float = 0.0) -> Machine:
        """The run, dying at an operation."""
        return died(self.root, at, lambda: self(name), lost=lost)

    def mended(self, name: str) -> list[str]:
        """Go on, or begin where nothing is there yet; what was said."""
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            there = (self.root / name).exists()
            died(self.root, None, lambda: self(name, resume=there))
        return [str(w.message) for w in said]


def files(folder: Path) -> dict[str, bytes]:
    """All files of a folder, hidden ones too."""
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
