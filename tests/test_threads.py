"""Eight threads at once: lifting, verifying, solving, exporting, plain modules; each gives what it gives alone."""

from __future__ import annotations

import contextlib
import copy
import functools
import logging
import os
import sys
import threading
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import lagcompile as lc

SECONDS = float(os.environ.get("LAGCOMPILE_THREADS_SECONDS", "6"))
X = torch.randn(16, 4, generator=torch.Generator().manual_seed(0))
Y = torch.randn(16, 2, generator=torch.Generator().manual_seed(1))
MSE = nn.functional.mse_loss


def seeded(model: nn.Module) -> nn.Module:
    """The same weights without the default generator."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.5 * torch.randn(parameter.shape, generator=generator))
    return model


@functools.cache
def chain(drops: float = 0.0, *, norm: bool = False) -> nn.Module:
    between = [nn.Dropout(drops)] * (drops > 0) + [nn.BatchNorm1d(6)] * norm
    return seeded(nn.Sequential(nn.Linear(4, 6), nn.Tanh(), *between, nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 2)))


class Branching(nn.Module):
    """Needs torch.export: its shapes decide."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 6), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x).tanh()
        return self.b(h if x.shape[0] < 1000 else -h)


class Control(nn.Module):
    """Cannot be lifted: its values decide."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.a(x) if x.sum() > 0 else -self.a(x)


@functools.cache
def branching() -> nn.Module:
    return seeded(Branching())


@functools.cache
def control() -> nn.Module:
    return seeded(Control())


@functools.cache
def small() -> nn.Module:
    return seeded(nn.Sequential(nn.Linear(4, 1), nn.Tanh(), nn.Linear(1, 2)))


def lifting() -> object:
    return str(lc.lift(chain(0.2), X, split=2).program)


def exporting() -> object:
    return str(lc.lift(branching(), X).program)


def refused() -> object:
    with pytest.raises(lc.LiftError) as caught:
        lc.lift(control(), X)
    return [p.split("(")[0] for p in caught.value.problems]


def verifying() -> object:
    certificate = lc.lift(chain(0.2), X, split=2).verify(X, Y, loss=MSE)
    return certificate.ok, [(r.kind, r.name, r.mode, r.value) for r in certificate.residuals]


def solving(drops: float = 0.0) -> object:
    solution = lc.lift(chain(drops), X, split=2).solve((X, Y), loss=MSE, options=lc.RunOptions(steps=4))
    return [v.tolist() for v in solution.model.state_dict().values()]


def dropping() -> object:
    return solving(0.3)


def exact() -> object:
    formulation = lc.Formulation(regularisers=(lc.Regulariser(kind="l2", on="weights", weight=0.1),))
    lifted = lc.lift(small(), X[:2], split=2, formulation=formulation)
    return round(float(lifted.solve((X[:2], Y[:2]), loss=MSE, method=lc.SQP()).details.get("objective", 0.0)), 6)


def plain() -> object:
    """What a user's own thread does."""
    model = copy.deepcopy(chain(norm=True))
    loss = MSE(model(X), Y)
    loss.backward()
    drawn = torch.randn(3, generator=torch.Generator().manual_seed(3))
    return loss.item(), torch.zeros(1).dtype, (torch.ones(1, dtype=torch.int64) / 2).dtype, drawn.tolist()


def warned() -> object:
    """A warning of this thread is heard."""
    with pytest.warns(UserWarning, match="heard"):
        warnings.warn("heard", UserWarning, stacklevel=1)
    return True


class _Stopped(Exception):  # noqa: N818
    pass


def state() -> dict[str, object]:
    return {
        "stdout": sys.stdout,
        "stderr": sys.stderr,
        "logging": logging.root.manager.disable,
        "loggers": [
            list(logging.getLogger(n).filters) for n in sorted(logging.root.manager.loggerDict) if "torch" in n
        ],
        "dtype": torch.get_default_dtype(),
        "filters": list(warnings.filters),
        "random": torch.get_rng_state().tolist(),
        "folder": os.getcwd(),
        "path": list(sys.path),
        "gradients": torch.is_grad_enabled(),
        "environment": dict(os.environ),
    }


def together(jobs: list[Callable[[], object]], seconds: float) -> list[str]:
    """What differs from each job alone when all run at once for a while."""
    alone = {job: job() for job in jobs}
    before = state()
    end, failures = time.monotonic() + seconds, list[str]()

    def work(job: Callable[[], object]) -> None:
        while time.monotonic() < end and not failures:
            try:
                got = job()
                if got != alone[job]:
                    failures.append(f"{job.__name__}: {got} instead of {alone[job]}"[:600])
            except BaseException as error:  # whatever ends a thread
                failures.append(f"{job.__name__}: {type(error).__name__}: {error}"[:600])

    threads = [threading.Thread(target=work, args=(job,)) for job in jobs]  # a job may stand twice
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    after = state()
    return failures + [f"{name} changed" for name in before if before[name] != after[name]]


def test_eight_threads(tmp_path: Path) -> None:
    numbers = iter(range(10**6))

    def saving() -> object:
        folder = tmp_path / str(next(numbers))
        lc.lift(chain(), X, split=2).save(folder)
        return lc.load(folder)(X).tolist()

    jobs = [lifting, exporting, refused, verifying, solving, dropping, saving, plain]
    assert not together(jobs, SECONDS)


def test_exact_solves_beside_plain_modules() -> None:
    assert not together([exact, plain, lifting, verifying], SECONDS / 2)


def test_draws_from_the_default_generator_beside_a_solve() -> None:
    """A network that draws nothing leaves the default generator alone, also while it is solved for."""
    lifted = lc.lift(chain(), X, split=2)
    running, stop = threading.Event(), threading.Event()

    def work() -> None:
        options = lc.RunOptions(steps=10_000, batch_size=4, time_limit=20.0)
        with contextlib.suppress(_Stopped):
            lifted.solve((X, Y), loss=MSE, options=options, watch=lambda row: watch())

    def watch() -> None:
        running.set()
        if stop.is_set():
            raise _Stopped

    thread = threading.Thread(target=work)
    torch.manual_seed(7)
    expected = [torch.randn(()).item() for _ in range(3000)]
    thread.start()
    assert running.wait(60)
    torch.manual_seed(7)
    got = [torch.randn(()).item() for _ in range(3000)]
    stop.set()
    thread.join()
    assert got == expected


def test_warnings_of_other_threads_are_heard(recwarn: pytest.WarningsRecorder) -> None:
    from lagcompile.ir.alone import without_warnings

    before = list(warnings.filters)
    heard: list[bool] = []

    def speak() -> None:
        warnings.warn("from another thread", UserWarning, stacklevel=1)
        heard.append(True)

    with without_warnings():
        warnings.warn("from this thread", UserWarning, stacklevel=1)
        thread = threading.Thread(target=speak)
        thread.start()
        thread.join()
    assert [str(w.message) for w in recwarn] == ["from another thread"]
    assert list(warnings.filters) == before


def test_nothing_is_printed_while_lifting(capfd: pytest.CaptureFixture[str]) -> None:
    refused()
    exporting()
    said = capfd.readouterr()
    assert said.out == ""
    assert said.err == ""
