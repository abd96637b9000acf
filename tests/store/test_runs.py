"""Runs in folders from Python: what dies, is stopped or damaged goes on as the unbroken run, or is refused by name."""

from __future__ import annotations

import errno
import os
import random
import shutil
import signal
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


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run(tmp_path)


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


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_a_run_behind_its_step(number: int, run: Run) -> None:
    run.operations("whole")
    before = signal.getsignal(number)

    def watch(row: Mapping[str, float]) -> None:
        if row["step"] == 3.0:
            os.kill(os.getpid(), number)

    solution = run("broken", watch=watch)
    assert (solution.status, solution.steps) == (lc.Status.INTERRUPTED, 3)
    assert signal.getsignal(number) == before
    run.mended("broken")
    assert files(run.root / "broken") == files(run.root / "whole")


def test_a_second_ctrl_c_ends_at_once_and_keeps_the_last_checkpoint(run: Run) -> None:
    run.operations("whole")

    def watch(row: Mapping[str, float]) -> None:
        if row["step"] == 3.0:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        run("broken", watch=watch)
    run.mended("broken")
    assert files(run.root / "broken") == files(run.root / "whole")


def test_runs_of_threads_leave_signals_alone(run: Run) -> None:
    before = signal.getsignal(signal.SIGTERM)
    threads = [
        threading.Thread(
            target=lambda i=i: run.lifted.solve(
                run.data, loss=torch.nn.functional.cross_entropy, options=run.options, folder=run.root / f"t{i}"
            )
        )
        for i in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert signal.getsignal(signal.SIGTERM) == before
    assert (run.root / "t0" / "model.pt").is_file()


def test_more_steps_go_on_from_the_last_one(run: Run) -> None:
    long = run.options.model_copy(update={"steps": 7})
    whole = run("whole", options=long)
    run("broken")
    model = lc.lift(Run(run.root).lifted.module, (run.data[0],), lc.AtSplit(after=("tanh",)))
    with torch.no_grad():
        for p in model.module.parameters():
            p.zero_()  # what the model holds does not matter: the checkpoint does
    run.lifted = model
    resumed = run("broken", options=long, resume=True)
    assert resumed.steps == 7
    assert all(
        torch.equal(a, b)
        for a, b in zip(whole.model.state_dict().values(), resumed.model.state_dict().values(), strict=True)
    )
    assert (run.root / "broken" / "log.jsonl").read_text() == (run.root / "whole" / "log.jsonl").read_text()


def test_a_run_that_diverged_does_not_go_on(run: Run) -> None:
    options = run.options.model_copy(update={"steps": 50})
    run.method = lc.DescentAscent(weights=lc.SGD(lr=1e30), states=lc.SGD(lr=1e30))
    assert run("wild", options=options).status is lc.Status.DIVERGED
    before = files(run.root / "wild")
    assert run("wild", options=options, resume=True).status is lc.Status.DIVERGED
    assert files(run.root / "wild") == before


def test_what_cannot_be_resumed_is_said(run: Run) -> None:
    with pytest.raises(lc.DataError, match="holds no checkpoint: there is nothing to resume"):
        run("absent", resume=True)
    with pytest.raises(lc.DataError, match=r"needs the folder of the run"):
        run.lifted.solve(run.data, loss=torch.nn.functional.cross_entropy, resume=True)
    assert list(run.root.iterdir()) == []


@pytest.mark.parametrize("kind", ["extragradient", "sqp"])
def test_a_start_belongs_to_a_run_that_begins(kind: str, tmp_path: Path) -> None:
    run = Run(tmp_path, kind)
    found = run("whole")
    with pytest.raises(lc.DataError, match=r"start=\.\.\. and resume=True exclude each other"):
        run("whole", resume=True, start=found)


@pytest.mark.parametrize("kind", ["sqp", "bfgs"])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_an_exact_run_behind_its_iteration(kind: str, number: int, tmp_path: Path) -> None:
    run = Run(tmp_path, kind)
    run("whole")

    def watch(row: Mapping[str, float]) -> None:
        if row["step"] == 3.0:
            os.kill(os.getpid(), number)

    stopped = run("broken", watch=watch)
    assert (stopped.status, stopped.steps) == (lc.Status.INTERRUPTED, 3)
    with torch.no_grad():  # the checkpoint holds the weights, and what the model holds does not matter
        for p in run.lifted.module.parameters():
            p.zero_()
    assert run.mended("broken") == []
    assert files(tmp_path / "broken") == files(tmp_path / "whole")


def test_an_exact_run_goes_on_with_more_iterations(tmp_path: Path) -> None:
    run = Run(tmp_path, "sqp")
    run("whole")
    run.method = lc.SQP(max_iterations=3)
    assert run("broken").status is lc.Status.STEPS_DONE
    run.method = lc.SQP()
    for _ in range(2):
        assert run("broken", resume=True).status is lc.Status.SOLVED
        assert files(tmp_path / "broken") == files(tmp_path / "whole")
    run.method = lc.SQP(hessian="bfgs")
    with pytest.raises(lc.DataError, match="was run with another spec, or by a lagcompile with other options"):
        run("broken", resume=True)


@pytest.mark.parametrize("kind", ["convex", "mixed_integer", "ipopt"])
def test_a_solver_of_one_call_starts_it_again_and_says_so(kind: str, tmp_path: Path) -> None:
    run = Run(tmp_path, kind)
    count = run.operations("whole")
    assert run.broken("broken", count - 30).dead
    with torch.no_grad():
        for p in run.lifted.module.parameters():
            p.zero_()
    (said,) = run.mended("broken")
    assert "keeps nothing half-way: it starts again from how it began" in said
    assert files(tmp_path / "broken") == files(tmp_path / "whole")


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
