"""Runs in folders from Python: what dies or is damaged goes on as the unbroken run, or is refused by name."""

from __future__ import annotations

import errno
import os
import random
import shutil
import subprocess
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

import lagcompile as lc
from tests.store.damage import damage
from tests.store.dying import died
from tests.store.runs import EXACT, KINDS, Run, files


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_that_dies_goes_on_as_the_unbroken_one(kind: str, tmp_path: Path) -> None:
    """Bit for bit: log, weights, states of all kinds, digests; nothing is left beside the folder."""
    run = Run(tmp_path, kind)
    count = run.operations("whole")
    wanted = files(tmp_path / "whole")
    assert count > 110
    for at in range(1 + len(kind) % 3, count + 1, 19 if kind == "extragradient" else 41):
        assert run.broken("broken", at).dead
        run.mended("broken")
        assert files(tmp_path / "broken") == wanted, f"operation {at}"
        shutil.rmtree(tmp_path / "broken")
        assert [p.name for p in tmp_path.iterdir()] == ["whole"]


def test_a_run_that_dies_twice(run: Run) -> None:
    count = run.operations("whole")
    for first, second in ((100, 20), (100, 60), (count - 3, 50), (150, 90)):
        run.broken("broken", first)
        died(run.root, second, lambda: run("broken", resume=True))
        run.mended("broken")
        assert files(run.root / "broken") == files(run.root / "whole")
        shutil.rmtree(run.root / "broken")


def test_damage_is_named_or_harmless(run: Run) -> None:
    """Of every file, in a folder of a run that ended and of one that died: none goes on with what was damaged."""
    count = run.operations("whole")
    wanted = files(run.root / "whole")
    run.broken("half", int(0.7 * count))
    for seed in range(120):
        generator = random.Random(seed)
        source = generator.choice(("whole", "half"))
        shutil.copytree(run.root / source, run.root / "broken")
        path = generator.choice(sorted(p for p in (run.root / "broken").iterdir() if p.is_file() and p.stat().st_size))
        how = damage(path, generator)
        said = run.mended("broken")
        assert files(run.root / "broken") == wanted, how
        if not path.name.startswith("log"):  # the log is written anew from the checkpoint
            assert any(path.name in text for text in said) or source == "half", how
        shutil.rmtree(run.root / "broken")


def test_two_damaged_checkpoints_are_refused_and_nothing_is_changed(run: Run) -> None:
    run.operations("whole")
    for seed in range(10):
        shutil.copytree(run.root / "whole", run.root / "broken")
        for path in sorted((run.root / "broken").glob("checkpoint-*")):
            damage(path, random.Random(seed))
        before = files(run.root / "broken")
        with pytest.raises(lc.DataError, match=r"checkpoint-a\.state is damaged") as caught:
            run("broken", resume=True)
        assert len(caught.value.problems) == 2
        assert files(run.root / "broken") == before
        shutil.rmtree(run.root / "broken")


def foreign(path: Path) -> Mapping[str, object]:
    """What may stand in the place of a checkpoint."""
    return {
        "text": lambda: path.write_text("not a checkpoint"),
        "empty": lambda: path.write_bytes(b""),
        "zeros": lambda: path.write_bytes(bytes(5000)),
        "pickle": lambda: torch.save({"executor": {}, "spec": "x"}, path),
        "folder": path.mkdir,
        "fifo": lambda: os.mkfifo(path),
        "nothing that is there": lambda: path.symlink_to(path.parent / "absent"),
        "huge number": lambda: path.write_text("lagcompile state 1 sha256 " + "9" * 5000),
    }


@pytest.mark.parametrize("kind", foreign(Path()))
def test_foreign_files_in_the_place_of_checkpoints_are_one_line(kind: str, run: Run) -> None:
    run.operations("whole")
    for path in sorted((run.root / "whole").glob("checkpoint-*")):
        path.unlink()
        make = foreign(path)[kind]
        assert callable(make)
        make()
    with pytest.raises(lc.DataError, match=r"checkpoint") as caught:
        run("whole", resume=True)
    assert all("\n" not in p for p in caught.value.problems)


def test_a_checkpoint_of_another_run_is_refused_by_what_differs(run: Run, tmp_path: Path) -> None:
    run.operations("whole")
    before = files(run.root / "whole")
    with pytest.raises(lc.DataError, match="was run with other data"):
        Run.__call__(other_data(run), "whole", resume=True)
    with pytest.raises(lc.DataError, match="was run with another spec, or by a lagcompile with other options"):
        run("whole", resume=True, options=run.options.model_copy(update={"seed": 4}))
    with pytest.raises(lc.DataError, match=r"was run with another program|another spec"):
        Run(run.root, "classes")("whole", resume=True)
    assert files(run.root / "whole") == before


def other_data(run: Run) -> Run:
    other = Run(run.root)
    other.data = (run.data[0] + 1e-3, run.data[1])
    return other


def test_another_version_is_refused_by_name(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.metadata.version", lambda name: "9.9.9")
    run.operations("whole")
    monkeypatch.undo()
    with pytest.raises(lc.DataError, match=r"another version of lagcompile \(9\.9\.9; this is \d"):
        run("whole", resume=True)


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS, errno.EACCES, errno.EIO, errno.EDQUOT, errno.EFBIG])
def test_what_the_system_refuses_is_one_line_and_the_old_state_stays(code: int, run: Run) -> None:
    count = run.operations("whole")
    failed = 0
    for at in range(2, count, 23):
        problems: list[str] = []

        def action(problems: list[str] = problems) -> None:
            try:
                run("broken")
            except lc.DataError as error:
                problems += error.problems

        died(run.root, at, action, fail=OSError(code, os.strerror(code)))
        assert len(problems) <= 1
        assert all(os.strerror(code) in p and "broken" in p for p in problems)
        failed += len(problems)
        run.mended("broken")
        assert files(run.root / "broken") == files(run.root / "whole")
        shutil.rmtree(run.root / "broken")
    assert failed > 5


def test_a_limit_on_the_size_of_files(run: Run) -> None:
    """The system's own refusal, in a process of its own."""
    code = (
        "import resource, signal; from pathlib import Path; from tests.store.runs import Run; import lagcompile as lc\n"
        f"run = Run(Path({str(run.root)!r}))\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (3000, 3000))\n"
        "try:\n    run('small')\nexcept lc.DataError as error:\n    print(error)\n"
    )
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert told.stdout == f"{run.root}/small/checkpoint-a.state cannot be written: File too large\n" or (
        "cannot be written: File too large" in told.stdout and told.stdout.count("\n") == 1
    )
    assert list(run.root.iterdir()) == []


def test_a_folder_that_is_removed_or_replaced_by_a_file_in_mid_run(run: Run) -> None:
    for make in (lambda: None, lambda: (run.root / "gone").write_text("a file")):

        def watch(row: Mapping[str, float], make: object = make) -> None:
            if row["step"] == 2.0:
                shutil.rmtree(run.root / "gone")
                assert callable(make)
                make()

        with pytest.raises(lc.DataError, match=r"cannot be written: (No such file|Not a directory)") as caught:
            run("gone", watch=watch)
        assert len(caught.value.problems) == 1
        (run.root / "gone").unlink(missing_ok=True)


def test_no_link_is_followed(run: Run) -> None:
    precious = run.root / "precious"
    precious.write_text("precious")
    run.operations("whole")
    for name in (".checkpoint-a.state.part", ".checkpoint-b.state.part", ".lagcompile.sums.part", ".model.pt.part"):
        (run.root / "whole" / name).symlink_to(precious)
    run.mended("whole")
    assert not any(p.name.startswith(".") for p in (run.root / "whole").iterdir())
    (run.root / "whole" / "log.jsonl").unlink()
    (run.root / "whole" / "log.jsonl").symlink_to(precious)
    run.mended("whole")
    (run.root / "whole" / ".lock").symlink_to(precious)
    with pytest.raises(lc.DataError, match="whole cannot be written"):
        run("whole", resume=True)
    assert precious.read_text() == "precious"


def test_one_run_at_a_time_has_a_folder(run: Run) -> None:
    said: list[str] = []

    def watch(row: Mapping[str, float]) -> None:
        if row["step"] == 2.0:
            for keywords in ({"resume": True}, {}):
                with pytest.raises(lc.DataError) as caught:
                    run("mine", **keywords)
                said.append(str(caught.value))

    run("mine", watch=watch)
    assert f"mine is in use by process {os.getpid()} on " in said[0]
    assert " since 20" in said[0]
    assert "mine exists" in said[1]
    assert not (run.root / "mine" / ".lock").exists()
    run("mine", resume=True)


def test_a_lock_of_a_dead_process_is_taken_over(run: Run) -> None:
    run.operations("whole")
    before = files(run.root / "whole")
    (run.root / "whole" / ".lock").write_text("process 1 on nowhere since 1970-01-01 00:00:00\n")
    run("whole", resume=True)
    assert files(run.root / "whole") == before


def test_a_folder_may_be_named_by_a_link(run: Run) -> None:
    """What it points to is made, gone on with and replaced; the link stays."""
    from lagcompile.store.folder import RunFolder

    run.operations("whole")
    wanted = files(run.root / "whole")
    (run.root / "link").symlink_to("target")
    for keywords in ({}, {"resume": True}):
        run("link", **keywords)
        assert files(run.root / "target") == wanted
    RunFolder.create(run.root / "link", {"spec.yaml": b""}, {}, force=True).close()
    assert set(files(run.root / "target")) == {"spec.yaml", "lagcompile.sums"}
    assert (run.root / "link").is_symlink()
    assert sorted(p.name for p in run.root.iterdir()) == ["link", "target", "whole"]


@pytest.mark.parametrize("name", ["checkpoint-a.state", "checkpoint-b.state", "lagcompile.sums"])
def test_a_file_that_is_gone_is_named(name: str, run: Run) -> None:
    run.operations("whole")
    wanted = files(run.root / "whole")
    assert run.mended("whole") == []
    (run.root / "whole" / name).unlink()
    (said,) = run.mended("whole")
    assert f"whole/{name} is gone" in said
    assert files(run.root / "whole") == wanted


def test_runs_of_threads_do_not_wait_for_each_other(run: Run) -> None:
    """Where the network draws no random numbers: each run is seen in the middle of the other's."""
    run = Run(run.root, "altmin")
    meeting = threading.Barrier(2, timeout=60)
    met: list[int] = []

    def one(i: int) -> None:
        def watch(row: Mapping[str, float]) -> None:
            if row["step"] == 2.0:
                met.append(meeting.wait())

        options = run.options
        run.lifted.solve(
            run.data,
            loss=torch.nn.functional.cross_entropy,
            method=run.method,
            options=options,
            watch=watch,
            folder=run.root / str(i),
        )

    threads = [threading.Thread(target=one, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(met) == [0, 1]
    assert (run.root / "0" / "model.pt").read_bytes() == (run.root / "1" / "model.pt").read_bytes()


def test_checkpoints_of_two_runs_are_refused(run: Run) -> None:
    run("whole", start=run("other"))
    before = files(run.root / "whole")
    shutil.copy(run.root / "other" / "checkpoint-a.state", run.root / "whole")
    with pytest.warns(UserWarning, match=r"checkpoint-a\.state is of another run .*going on from checkpoint-b"):
        run("whole", resume=True)
    assert files(run.root / "whole") == before
    for slot in "ab":
        shutil.copy(run.root / "other" / f"checkpoint-{slot}.state", run.root / "whole")
    before = files(run.root / "whole")
    with pytest.raises(lc.DataError, match=r"checkpoint-a\.state is of another run than .*: take this run's own back"):
        run("whole", resume=True)
    assert files(run.root / "whole") == before


@pytest.mark.parametrize("options", [{"seed": 4}, {"batch_size": 5}, {}])
def test_the_whole_state_of_another_run_is_noticed(options: dict[str, Any], run: Run) -> None:
    """Asked for as the run whose state it is, too; other data where the options are the same."""
    run("own")
    other = Run(run.root, **options) if options else other_data(run)
    other("other")
    for slot in "ab":
        shutil.copy(run.root / "other" / f"checkpoint-{slot}.state", run.root / "own")
    for asked in (run, other):
        with pytest.raises(lc.DataError, match=r"checkpoint-a\.state is of another run than .*own"):
            asked("own", resume=True)


@pytest.mark.parametrize("damaged", [True, False])
def test_a_run_id_that_is_damaged_or_gone_is_named(damaged: bool, run: Run) -> None:
    run("whole")
    wanted = files(run.root / "whole")
    path = run.root / "whole" / "run.id"
    if damaged:
        damage(path, random.Random(0))
    else:
        path.unlink()
    said = run.mended("whole")
    assert any("run.id" in text for text in said)
    assert len(said) == 1
    assert files(run.root / "whole") == wanted


@pytest.mark.parametrize("folder", [3, b"x", "a\0b"])
def test_what_is_no_path_is_refused(folder: object, run: Run) -> None:
    with pytest.raises(lc.DataError, match="folder takes the path of a folder"):
        run.lifted.solve(run.data, loss=torch.nn.functional.cross_entropy, folder=folder)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", [k for k in KINDS if k not in EXACT])
def test_the_callers_random_numbers_are_neither_kept_nor_moved(tmp_path: Path, kind: str) -> None:
    run = Run(tmp_path, kind)
    for number in (1, 2):
        torch.manual_seed(number)
        before = torch.get_rng_state()
        run(str(number))
        assert torch.equal(torch.get_rng_state(), before)
    assert files(tmp_path / "1") == files(tmp_path / "2")
    torch.manual_seed(3)
    before = torch.get_rng_state()
    run("1", resume=True, options=run.options.model_copy(update={"steps": 6}))
    assert torch.equal(torch.get_rng_state(), before)
