"""What folders hold beyond plain layers: names, sizes that the model hangs on, operators that write, odd numbers."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import lagcompile as lc
from lagcompile.ir.solution import History
from tests.frontend.test_zoo import same


class Named(nn.Module):
    """Names that modules of torch.fx have for themselves, and some that Python cannot say."""

    code: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("code", torch.ones(6))
        self.graph = nn.Linear(6, 6)
        self.odd = nn.ParameterDict({"a b": torch.randn(6, 6), "x-1": torch.randn(6, 3)})

    def forward(self, input: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        h = torch.tanh(self.graph(input) * self.code)
        return input, h, torch.tanh(h @ self.odd["a b"]) @ self.odd["x-1"]


class UpToFour(nn.Module):
    """Hangs on the batch size."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.a(x))
        if x.shape[0] > 4:
            h = h * 2
        return self.b(h)


class Masked(nn.Module):
    """Constants, infinities among them; truth values and numbers among the outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, None, float]:
        h = torch.tanh(self.a(x)) * torch.tensor([1.0, 2, 3, 4, 5, math.inf]).clamp(max=3.0)
        y = self.b(h).masked_fill(torch.tensor([True, False, False]), -math.inf)
        return y, h > 0, h.argmax(1), None, math.inf


class Spectral(nn.Module):
    """Normalised weights: buffers that are written into, in train mode."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.utils.parametrizations.weight_norm(nn.Linear(6, 6))
        self.b = nn.utils.parametrizations.spectral_norm(nn.Linear(6, 3))

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.b(torch.tanh(self.a(x)))
        return found


@pytest.mark.parametrize("kind", [Named, UpToFour, Masked, Spectral])
def test_what_is_loaded_does_the_same(kind: type[nn.Module], tmp_path: Path) -> None:
    torch.manual_seed(0)
    lifted = lc.lift(kind(), (torch.randn(4, 6),), split=2)
    loaded = lc.load(lifted.save(tmp_path / "out"))
    assert loaded.module.state_dict().keys() == lifted.module.state_dict().keys()
    for training in (False, True):
        for size in (2, 4):
            x = torch.randn(size, 6)
            assert same(loaded.train(training)(x), lifted.train(training)(x))
    assert loaded.receipt == lifted.receipt


def test_batch_sizes_that_the_model_was_not_captured_for_stay_refused(tmp_path: Path) -> None:
    lifted = lc.lift(UpToFour(), (torch.randn(4, 6),), split=2)
    loaded = lc.load(lifted.save(tmp_path / "out"))
    for one in (lifted, loaded):
        with pytest.raises(lc.BindError, match=r"captured for batches of 1 to 4 .* this batch has 5"):
            one(torch.randn(5, 6))


def test_a_solution_with_numbers_that_are_none(tmp_path: Path) -> None:
    x, y = torch.randn(8, 5), torch.randn(8, 2)
    lifted = lc.lift(nn.Sequential(nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, 2)), (x,), split=2)
    solved = lifted.solve((x, y), loss=nn.functional.mse_loss, options=lc.RunOptions(steps=1, seed=0))
    rows = ({"step": 1.0, "loss": math.inf}, {"step": 2.0, "loss": -math.inf}, {"step": 3.0, "loss": math.nan})
    given = replace(solved, history=History(rows), details={"a": {"b": [math.nan, True, None, "x"]}, "model": lifted})
    back = lc.load_solution(lifted.save(tmp_path / "out", solution=given))
    assert back.history.column("loss")[:2] == [math.inf, -math.inf]
    assert math.isnan(back.history.column("loss")[2])
    assert math.isnan(back.details["a"]["b"][0])
    assert back.details["a"]["b"][1:] == [True, None, "x"]
    assert "model" not in back.details


WRITE = """
import sys, torch, lagcompile as lc
from tests.nets import Residual

torch.manual_seed(0)
lc.lift(Residual(), (torch.randn(4, 6),), split=3).save(sys.argv[1])
"""


def test_two_processes_write_the_same_bytes(tmp_path: Path) -> None:
    found = []
    for name in ("one", "two"):
        root = str(Path(lc.__file__).parent.parent)
        run = [sys.executable, "-c", WRITE, str(tmp_path / name)]
        subprocess.run(run, check=True, env={**os.environ, "PYTHONPATH": root})
        found.append({f.name: f.read_bytes() for f in (tmp_path / name).iterdir()})
    assert found[0] == found[1]
