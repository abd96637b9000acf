"""Speed of the first-order executor: two stages, depth, tables, memory, against Cooper."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

import lagcompile as lc
from lagcompile.workbench.models import MnistConvNet
from tests.benchmarks.timing import Row, at_most, ms, side_by_side


def two_stages() -> list[Row]:
    """A two-stage step of the MNIST network against two hand-written forward+backward+Adagrad steps."""
    torch.manual_seed(0)
    model = MnistConvNet()
    x, y = torch.randn(1024, 1, 28, 28), torch.randint(0, 10, (1024,))
    lifted = lc.lift(
        model,
        x[:2],
        split={"policy": "at", "after": ["relu3"]},
        formulation=lc.Formulation(domain=lc.NonNegative(), transform=lc.Softshrink(epsilon=0.4)),
    )
    executor = lc.Extragradient().executor(lifted.bind((x, y), loss=F.cross_entropy))
    optimizer = torch.optim.Adagrad(model.parameters(), lr=1e-3)
    rows = torch.arange(256)

    def plain() -> None:
        for _ in range(2):
            optimizer.zero_grad()
            F.cross_entropy(model(x[:256]), y[:256]).backward()
            optimizer.step()

    ours, floor = side_by_side(lambda: executor.step(rows), plain, rounds=7, warm_up=1)
    detail = f"{ms(ours)} against {ms(floor)}"
    return [at_most("two-stage extragradient step / two backprop+Adagrad steps (MNIST)", ours / floor, 1.25, detail)]


def depth() -> list[Row]:
    """One extragradient step of equal stages against one eager backprop step, over depth."""
    rows = []
    bounds = {(100, 64, 32): 1 / 3, (1000, 32, 8): 1 / 20}
    for count, (width, batch) in itertools.product((10, 30, 100, 300, 1000), ((64, 32), (32, 8))):
        ours, plain = side_by_side(*_deep(count, width, batch), rounds=11)
        name = f"depth {count}, width {width}, batch {batch}: step / backprop step"
        detail = f"{ms(ours)} against {ms(plain)}"
        bound = bounds.get((count, width, batch))
        rows.append(at_most(name, ours / plain, bound, detail) if bound else Row(name, ours / plain, "", True, detail))
    return rows


def _deep(count: int, width: int, batch: int) -> tuple[Callable[[], None], Callable[[], None]]:
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for _ in range(count):
        layers += [nn.Linear(width, width), nn.Tanh()]
    model = nn.Sequential(*layers)
    x, y = torch.randn(batch, width), torch.randn(batch, width)
    executor = lc.Extragradient().executor(lc.lift(model, x, split=count).bind((x, y), loss=F.mse_loss))
    optimizer = torch.optim.Adagrad(model.parameters(), lr=1e-3)
    rows = torch.arange(batch)

    def plain() -> None:
        optimizer.zero_grad()
        F.mse_loss(model(x), y).backward()
        optimizer.step()

    return lambda: executor.step(rows), plain


def _table_executor(examples: int, width: int = 64) -> tuple[lc.Executor, Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, width), nn.ReLU(), nn.Linear(width, 10))
    x, y = torch.randn(examples, 16), torch.randint(0, 10, (examples,))
    instance = lc.lift(model, x[:2], split=2).bind((x, y), loss=F.cross_entropy)
    return lc.Extragradient().executor(instance), torch.randperm(examples)


def tables() -> list[Row]:
    """Step time and memory with a million rows against a thousand."""
    small, _ = _table_executor(1_000)
    before = _resident()
    large, order = _table_executor(1_000_000)
    used = _resident() - before
    batches = itertools.cycle(order.split(128)[:2000])
    small_batches = itertools.cycle(torch.randperm(1000).split(125))
    slow, fast = side_by_side(
        lambda: large.step(next(batches)), lambda: small.step(next(small_batches)), rounds=101, warm_up=10
    )
    data = 1_000_000 * (16 * 4 + 8)
    tables_bytes = large.bytes()
    return [
        at_most("step with 1,000,000 rows / with 1,000", slow / fast, 1.2, f"{ms(slow)} against {ms(fast)}"),
        at_most(
            "memory of 1,000,000 rows / (states + multipliers + optimiser rows)",
            (used - data) / tables_bytes,
            1.1,
            f"{(used - data) / 2**20:.0f} MiB against {tables_bytes / 2**20:.0f} MiB",
        ),
    ]


def _resident() -> int:
    """Resident bytes of this process now."""
    import gc
    from pathlib import Path

    gc.collect()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096


def run() -> list[Row]:
    """All of them."""
    return [*tables(), *two_stages(), *depth()]
