"""Runs that are stopped by signals, or resumed with other options, go on from the last step."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch

import lagcompile as lc
from tests.store.runs import Run, files


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
