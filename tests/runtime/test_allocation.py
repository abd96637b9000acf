"""What would not fit the memory is refused by name, before it is allocated; what fits is as it was."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch

import lagcompile as lc
from lagcompile.runtime.allocation import WithinMemory
from lagcompile.workbench import prepare as prepare_module
from lagcompile.workbench.prepare import prepare
from lagcompile.workbench.spec import load
from tests.workbench.specs import replaced

HUGE = 10**12
"""More numbers than any machine that runs this has memory for."""


@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.nn.Linear(10**7, 10**7),
        lambda: torch.zeros(HUGE),
        lambda: torch.arange(HUGE),
        lambda: torch.arange(0, HUGE, 0.5),
        lambda: torch.randperm(HUGE),
        lambda: torch.randn(HUGE, generator=torch.Generator()),
        lambda: torch.nn.Embedding(HUGE, 8),
        lambda: torch.zeros(1).expand(HUGE).clone(),
        lambda: torch.zeros_like(torch.zeros(1).expand(HUGE)),
    ],
)
def test_what_does_not_fit_is_a_problem(make: object) -> None:
    assert callable(make)
    with WithinMemory(lc.DataError, "take less"), pytest.raises(lc.DataError, match=r"of memory are free: take less$"):
        make()


def test_numbers_are_as_without() -> None:
    def drawn() -> torch.Tensor:
        torch.manual_seed(3)
        return torch.cat([torch.nn.Linear(300, 200).weight.flatten(), torch.randperm(50), torch.arange(2, 9, 3)])

    expected = drawn()
    with WithinMemory(lc.DataError, ""):
        assert torch.equal(drawn(), expected)


@pytest.mark.parametrize(
    ("old", "new", "place"),
    [
        (
            "[2, 8, 8, 2]",
            "[2, 1000000, 1000000, 2]",
            r"moons\.yaml:3: model: the weights and their copies need 10\.9 TiB, but .* are free: take smaller layers",
        ),
        (
            "train: 64",
            "train: 1000000000000",
            r"moons\.yaml:4: data: a tensor of 1,000,000,000,032 numbers needs 7\.3 TiB",
        ),
    ],
)
def test_a_spec_that_asks_for_too_much_names_the_line(old: str, new: str, place: str, tmp_path: Path) -> None:
    with pytest.raises(lc.SpecError, match=place):
        prepare(load(replaced(tmp_path, old, new)))


def test_weights_are_counted_together_before_one_is_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each tensor would fit; all of them and their copies do not."""
    monkeypatch.setattr(prepare_module, "available_memory", lambda: 600 * 2**20)
    start = time.perf_counter()
    with pytest.raises(lc.SpecError, match=r"moons\.yaml:3: model: the weights and their copies need 1\.1 GiB"):
        prepare(load(replaced(tmp_path, "[2, 8, 8, 2]", "[2, 20000000, 2]")))
    assert time.perf_counter() - start < 2.0


def test_tables_are_counted_together(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.zeros(1, 1).expand(100_000, 1)
    model = torch.nn.Sequential(*(torch.nn.Linear(8 if i else 1, 8) for i in range(6)), torch.nn.Linear(8, 1))
    lifted = lc.lift(model, (torch.zeros(4, 1),), split=6)
    options = lc.RunOptions(steps=1, batch_size=50_000)
    monkeypatch.setattr("lagcompile.runtime.allocation.available_memory", lambda: 30 * 2**20)
    with pytest.raises(lc.ProgramError, match=r"multipliers and their optimiser rows need \d.* or more"):
        lifted.solve((x, x), loss=torch.nn.functional.mse_loss, options=options)
    monkeypatch.setattr("lagcompile.runtime.allocation.available_memory", lambda: 80 * 2**20)
    lifted.solve((x, x), loss=torch.nn.functional.mse_loss, options=options)


def test_tables_that_do_not_fit() -> None:
    """Ten billion rows that take no memory: one row, expanded."""
    model = torch.nn.Sequential(torch.nn.Linear(1, 64), torch.nn.Tanh(), torch.nn.Linear(64, 1))
    lifted = lc.lift(model, (torch.zeros(4, 1),), split=2)
    rows = torch.zeros(1, 1).expand(10**10, 1)
    with pytest.raises(lc.LagcompileError, match=r"of memory are free"):
        lifted.solve((rows, rows), loss=torch.nn.functional.mse_loss, options=lc.RunOptions(steps=1))
