"""`lagcompile solve` in folders: deaths at any operation, with baseline and report; damage is named by its readers."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from lagcompile.workbench import tables
from lagcompile.workbench.cli import main
from lagcompile.workbench.rows import Rows
from tests.store.damage import damage
from tests.store.dying import died
from tests.store.runs import files
from tests.workbench.specs import MOONS

Captured = pytest.CaptureFixture[str]
SPEC = MOONS.replace("steps: 30, batch_size: 16, look_every: 5, checkpoint_every: 10", "steps: 4, checkpoint_every: 2")


def call(*arguments: str | Path) -> int:
    """Exit status of a command line, run in this process with its clock at zero."""
    with (
        mock.patch.object(sys, "argv", ["lagcompile", *map(str, arguments)]),
        mock.patch.object(time, "perf_counter", return_value=0.0),
        pytest.raises(SystemExit) as caught,
    ):
        main()
    return int(caught.value.code or 0)


@pytest.fixture
def spec(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "120")
    path = tmp_path / "moons.yaml"
    path.write_text(SPEC)
    return path


def test_a_solve_with_a_baseline_that_dies_goes_on_to_the_same_folder(spec: Path, tmp_path: Path) -> None:
    """Report, numbers, curves and the baseline's own states included."""
    command = ("solve", spec, "--baseline", "--quiet", "--out")
    count = died(tmp_path / "runs", None, lambda: call(*command, "runs/whole")).done
    wanted = files(tmp_path / "runs" / "whole")
    assert {"report.md", "report.json", "curves.png", "network.png", "baseline-a.state"} <= set(wanted)
    for at in (3, 40, *random.Random(0).sample(range(60, count - 30), 4), count - 20):
        assert died(tmp_path / "runs", at, lambda: call(*command, "runs/broken")).dead
        again = (*command, "runs/broken", *(["--resume"] if (tmp_path / "runs" / "broken").exists() else []))
        assert died(tmp_path / "runs", None, lambda again=again: call(*again)).done  # type: ignore[misc]
        left = files(tmp_path / "runs" / "broken")
        assert sorted(n for n in left.keys() | wanted.keys() if left.get(n) != wanted.get(n)) == [], f"operation {at}"
        shutil.rmtree(tmp_path / "runs" / "broken")


def test_commands_name_the_damaged_file_that_they_read(spec: Path, tmp_path: Path, capsys: Captured) -> None:
    assert call("solve", spec, "--quiet", "--out", "run") == 0
    folder = Path("run")
    readers = {
        "certificate.json": ("verify", spec, "--against", folder / "certificate.json"),
        "model.pt": ("verify", spec, "--against", folder / "certificate.json"),
        "spec.yaml": ("show", folder / "spec.yaml"),
        "program.json": ("diff", spec, folder / "program.json"),
        "lagcompile.sums": ("verify", spec, "--weights", folder / "model.pt"),
    }
    generator = random.Random(1)
    for name, command in readers.items():
        whole = (folder / name).read_bytes()
        for _ in range(4):
            how = damage(folder / name, generator)
            capsys.readouterr()
            assert call(*command) == 2, how
            said = capsys.readouterr().err
            assert f"run/{name} is damaged" in said, how
            assert said.count("\n") == 1, how
            (folder / name).write_bytes(whole)
        assert call(*command) == 0


def test_what_is_damaged_and_does_no_harm_is_said_on_standard_error(spec: Path, capsys: Captured) -> None:
    assert call("solve", spec, "--quiet", "--out", "run") == 0
    wanted = files(Path("run"))
    for name in ("checkpoint-b.state", "report.md", "curves.png"):
        damage(Path("run") / name, random.Random(0))
    capsys.readouterr()
    assert call("solve", spec, "--quiet", "--out", "run", "--resume") == 0
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 3
    assert said[0].startswith("run/checkpoint-b.state is damaged: ")
    assert said[0].endswith("going on from checkpoint-a.state")
    assert files(Path("run")) == wanted


def test_a_folder_of_an_older_lagcompile_is_refused(spec: Path, capsys: Captured) -> None:
    Path("run").mkdir()
    Path("run/spec.yaml").write_text(SPEC)
    Path("run/checkpoint.pt").write_bytes(b"old")
    assert call("solve", spec, "--out", "run", "--resume") == 2
    assert capsys.readouterr().err.endswith("run holds no checkpoint: there is nothing to resume\n")
    assert call("solve", spec, "--out", "run", "--force", "--quiet") == 0
    assert not Path("run/checkpoint.pt").exists()


def test_force_takes_no_folder_from_a_run_that_goes_on(spec: Path, capsys: Captured) -> None:
    from lagcompile.ir.disk import held

    assert call("solve", spec, "--quiet", "--out", "run") == 0
    before = files(Path("run"))
    with held(Path("run")):
        for option in ("--force", "--resume"):
            capsys.readouterr()
            assert call("solve", spec, "--quiet", "--out", "run", option) == 2
            assert "run is in use by process " in capsys.readouterr().err
    assert files(Path("run")) == before


def test_force_does_not_replace_the_folder_that_it_runs_in(
    spec: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert call("solve", spec, "--quiet", "--out", "run") == 0
    before = files(Path("run").absolute())
    monkeypatch.chdir("run")
    capsys.readouterr()
    for place in (".", Path.cwd(), "../run"):
        assert call("solve", spec, "--quiet", "--out", place, "--force") == 2
        assert "is the folder that this runs in" in capsys.readouterr().err
    assert call("solve", spec, "--quiet", "--out", ".", "--resume") == 0
    assert files(Path.cwd()) == before


def test_fewer_steps_than_were_made_are_said(spec: Path, capsys: Captured) -> None:
    assert call("solve", spec, "--quiet", "--out", "run") == 0
    model = Path("run/model.pt").read_bytes()
    capsys.readouterr()
    assert call("solve", spec, "--quiet", "--out", "run", "--resume", "--steps", "2") == 0
    assert "run holds 4 steps already, more than the 2 asked for: none is made" in capsys.readouterr().err
    assert Path("run/model.pt").read_bytes() == model


def test_readers_name_a_list_of_digests_that_is_gone(spec: Path) -> None:
    assert call("solve", spec, "--quiet", "--out", "run") == 0
    Path("run/lagcompile.sums").unlink()
    for command in (("verify", spec, "--against", "run/certificate.json"), ("diff", spec, "run/program.json")):
        with pytest.warns(UserWarning, match=r"^run/lagcompile\.sums is gone: whether run/\S+ was damaged"):
            assert call(*command) == 0
    shutil.copy("run/certificate.json", "alone.json")
    shutil.copy("run/model.pt", "alone.pt")
    assert call("verify", spec, "--weights", "alone.pt", "--against", "alone.json") == 0


BENCH = ("bench", "table1", "--systems", "backprop,altmin", "--seeds", "1", "--steps", "2", "--trials", "2", "--out")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_a_bench_with_one_line_and_its_rows_stay(
    number: signal.Signals, tmp_path: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(time, "process_time", lambda: 0.0)
    assert call(*BENCH, "whole", "--search-steps", "2") == 0
    score, calls = tables.score_of, list[int]()

    def ended(*given: Any, **options: Any) -> tuple[float, str]:
        calls.append(1)
        if len(calls) == 3:  # in the second system's search
            threading.Timer(0.0, lambda: os.kill(os.getpid(), number)).start()
            time.sleep(5.0)
        return score(*given, **options)

    capsys.readouterr()
    with mock.patch.object(tables, "score_of", ended):
        assert call(*BENCH, "broken", "--search-steps", "2") == 128 + number
    assert capsys.readouterr().err.splitlines()[-1] == ("interrupted" if number == 2 else f"ended by {number.name}")
    assert not Path("broken/.lock").exists()
    assert len(Rows(Path("broken")).rows) == 1
    assert call(*BENCH, "broken", "--search-steps", "2") == 0
    assert files(Path("broken")) == files(Path("whole"))


@pytest.mark.parametrize(("name", "told"), [("lagcompile", "interrupted\n"), ("mine.py", "Traceback")])
def test_ctrl_c_while_the_command_is_imported_is_one_line(tmp_path: Path, name: str, told: str) -> None:
    script = tmp_path / name
    script.write_text(
        "import os, signal, sys\n"
        "class Finder:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name == 'torch': os.kill(os.getpid(), signal.SIGINT)\n"
        "sys.meta_path.insert(0, Finder())\n"
        "import lagcompile\n"
    )
    found = subprocess.run([sys.executable, script], capture_output=True, text=True)
    assert found.returncode == -signal.SIGINT  # 130 for a shell
    assert found.stderr == told if name == "lagcompile" else found.stderr.startswith(told)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_a_call_of_another_library_at_once(number: signal.Signals) -> None:
    """One that holds on to its thread, as HiGHS does for minutes: the process ends, too."""
    code = (
        "import os, sys, threading, time\n"
        "from lagcompile.store.keeping import Keeping\n"
        "from lagcompile.store.stop import Stop\n"
        "from lagcompile.workbench import boundary\n"
        "def command():\n"
        "    stop = Stop()\n"
        "    with Keeping(stop) as keeping, stop.listening(), keeping.at_once('HiGHS') as wait:\n"
        f"        threading.Timer(0.2, os.kill, (os.getpid(), {int(number)})).start()\n"
        "        wait(lambda: time.sleep(600))\n"
        "sys.exit(boundary.guarded(command))\n"
    )
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert (told.returncode, told.stderr) == (128 + number, "HiGHS was ended by a signal\n")
