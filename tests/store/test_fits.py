"""Fits by multiple shooting in folders: what dies or is stopped goes on as the unbroken fit."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

import lagcompile as lc
from lagcompile.store.keeping import Keeping
from tests.store.dying import died
from tests.store.fits import FITS, Fit
from tests.store.runs import files


@pytest.mark.parametrize("kind", FITS)
def test_a_fit_that_dies_or_ended_goes_on_to_the_same_folder(kind: str, tmp_path: Path) -> None:
    fit, runs = Fit(tmp_path, kind), tmp_path / "runs"
    count = died(runs, None, lambda: fit("whole")).done
    wanted = files(runs / "whole")
    assert {"checkpoint-a.state", "checkpoint-b.state", "log.jsonl", "result.txt", "parameters.png"} <= set(wanted)
    for at in (count // 3, count // 2, count - 25, None):
        died(runs, at, lambda: fit("broken"))
        for _ in range(1 if at else 2):
            fit("broken", resume=(runs / "broken").exists())
        left = files(runs / "broken")
        assert [n for n in left.keys() | wanted.keys() if left.get(n) != wanted.get(n)] == [], f"operation {at}"
        shutil.rmtree(runs / "broken")


@pytest.mark.parametrize("kind", ["shooting", "first_order"])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_a_fit_behind_its_iteration(kind: str, number: int, tmp_path: Path) -> None:
    fit, runs, watch = Fit(tmp_path, kind), tmp_path / "runs", Keeping.watch
    fit("whole")

    def seen(keeping: Keeping, row: Mapping[str, Any]) -> None:
        watch(keeping, row)
        if len(keeping.rows) == 3:
            os.kill(os.getpid(), number)

    with mock.patch.object(Keeping, "watch", seen):
        assert fit("broken") == 128 + number
    assert fit.said[-2].startswith("interrupted: ")
    assert fit("broken", resume=True) == fit("whole", resume=True)
    assert files(runs / "broken") == files(runs / "whole")


def test_a_time_limit_may_be_raised_and_nothing_else(tmp_path: Path) -> None:
    fit, runs = Fit(tmp_path, "shooting"), tmp_path / "runs"
    fit("whole")
    text = fit.path.read_text()
    fit.path.write_text(text.replace("stage_length: 2", "stage_length: 2, time_limit: 1e-9"))
    fit.clock = iter(range(10**6)).__next__
    assert fit("broken") == 1
    fit.clock = lambda: 0.0
    assert fit.said[-2].startswith("time_limit: ")
    fit.path.write_text(text)
    assert fit("broken", resume=True) == 0
    assert files(runs / "broken")["log.jsonl"].count(b"\n") == files(runs / "whole")["log.jsonl"].count(b"\n")
    fit.path.write_text(text.replace("count: 3", "count: 2"))
    with pytest.raises(lc.DataError, match="was run with another spec"):
        fit("broken", resume=True)
