"""Files that commands leave beside runs: exported folders, rows of tables, coverage; crashes, damage, two processes."""

from __future__ import annotations

import errno
import random
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch

import lagcompile as lc
from lagcompile.workbench.rows import Rows
from lagcompile.workbench.search import Trial
from tests import coverage
from tests.nets import deep
from tests.store.damage import damage
from tests.store.dying import died
from tests.store.runs import files


def write(folder: Path, content: Mapping[str, bytes]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in content.items():
        (folder / name).write_bytes(data)


def test_an_export_that_dies_leaves_the_old_folder_or_the_new_one(tmp_path: Path) -> None:
    """At every operation on files; what it leaves beside the folder goes with the next export."""
    place = tmp_path / "here" / "out"
    old, new = (lc.lift(torch.nn.Linear(2, n), torch.ones(3, 2), split=1, name=f"n{n}") for n in (2, 3))
    old.save(place)
    before = files(place)
    whole = died(tmp_path, None, lambda: new.save(place, replace=True)).done
    after = files(place)
    assert before != after
    for at in [1, 2, 3, *random.Random(0).sample(range(4, whole - 9), 4), *range(whole - 9, whole + 1, 2)]:
        shutil.rmtree(place)
        write(place, before)
        machine = died(tmp_path, at, lambda: new.save(place, replace=True))
        assert machine.dead
        left = files(place) if place.exists() else None
        assert left in (before, after, None)
        if left is None:  # between two moves: the next command puts the old one back
            with pytest.raises(lc.DataError, match="exists"):
                new.save(place)
            assert files(place) == before
        new.save(place, replace=True)
        assert [p.name for p in place.parent.iterdir()] == ["out"]


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), PermissionError(13, "denied")])
def test_an_export_that_cannot_write_is_one_line(tmp_path: Path, error: OSError) -> None:
    place = tmp_path / "out"
    lifted = lc.lift(torch.nn.Linear(2, 2), torch.ones(3, 2), split=1)
    lifted.save(place)
    before = files(tmp_path)
    for at in (2, 3, 5, 8):  # the first operation makes a folder that is there

        def again() -> None:
            with pytest.raises(lc.DataError, match=re.escape(f"cannot be written: {error.strerror}")):
                lifted.save(place, replace=True)

        died(tmp_path, at, again, fail=error)
        assert files(tmp_path) == before


def test_damaged_lines_of_a_study_are_named(tmp_path: Path) -> None:
    kept = Rows(tmp_path)
    for score in (0.123456789, 0.5, 1.0):
        kept.keep_trial("backprop", Trial(draw={"method.weights.lr": 0.1}, score=score, note="fine"))
    path = tmp_path / "rows.jsonl"
    whole = path.read_bytes()
    for seed in range(300):
        how = damage(path, random.Random(seed))
        left = path.read_bytes()
        if whole.startswith(left) and left[-1:] in (b"", b"\n"):  # whole lines went: what they held is run again
            found = Rows(tmp_path).trials("backprop")
            assert found == kept.trials("backprop")[: left.count(b"\n")], how
        else:
            with pytest.raises(lc.LagcompileError, match=re.escape(str(path))):
                Rows(tmp_path)
        path.write_bytes(whole)


def test_rows_that_die_are_as_they_were_or_have_the_new_one(tmp_path: Path) -> None:
    def run(folder: Path) -> None:
        folder.mkdir(exist_ok=True)
        kept = Rows(folder)
        for score in (0.25, 0.5, 1.0)[len(kept.trials("gda")) :]:
            kept.keep_trial("gda", Trial(draw={}, score=score))

    whole = died(tmp_path, None, lambda: run(tmp_path / "whole")).done
    for at in range(1, whole + 1):
        folder = tmp_path / f"at{at}"
        assert died(tmp_path, at, lambda folder=folder: run(folder)).dead  # type: ignore[misc]
        run(folder)
        assert (folder / "rows.jsonl").read_bytes() == (tmp_path / "whole" / "rows.jsonl").read_bytes()


def test_coverage_keeps_its_rows_from_damage_and_from_a_second_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def family(name: str) -> Mapping[str, object]:
        return {"deep": lambda: (deep(5), (torch.randn(3, 5),), {})}

    monkeypatch.setattr(coverage, "subjects_of", family)
    coverage.run("own", folder=tmp_path)
    kept = (tmp_path / "own.json").read_text()
    (tmp_path / "own.json").write_text(kept.replace('"nodes": ', '"nodes": 1'))
    with pytest.raises(lc.DataError, match=r"own\.json is damaged or was changed"):
        coverage.run("own", folder=tmp_path)
    (tmp_path / "own.json").write_text(kept)
    code = (
        f"import sys; from pathlib import Path; from lagcompile.ir.disk import held; h = held(Path({str(tmp_path)!r}))"
    )
    code += "; h.__enter__(); print('held', flush=True); sys.stdin.read()"
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        with pytest.raises(lc.DataError, match=rf"is in use by process {other.pid} on \S+ since \d{{4}}-"):
            coverage.run("own", folder=tmp_path)
        other.kill()
    assert coverage.run("own", folder=tmp_path)[0].ok
    assert not (tmp_path / ".lock").exists()
