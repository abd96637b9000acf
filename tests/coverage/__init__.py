"""Which public models can be lifted, with a certificate for each.

In: a family (torchvision, timm, transformers) and, if wanted, names in it. Out: one `Row` per model, kept in a JSON
file so that an interrupted run can be resumed, and a Markdown table. Invariant: a row is what was measured; a failure
is a row with its error, never left out.
"""

from __future__ import annotations

import gc
import json
import signal
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lagcompile.frontend.structure import leaves
from lagcompile.ir import jsonfile, sums
from lagcompile.ir.alone import without_warnings
from lagcompile.ir.base import DataError, Measured
from lagcompile.ir.disk import held
from lagcompile.lift import lift
from tests.coverage.subjects import Subject, subjects_of

STAGES = 4
EQUAL = 1e-6
FAMILIES = ("torchvision", "timm", "transformers")


class Row(Measured):
    """What was measured of one model."""

    family: str
    name: str
    model: str = ""
    """Class of the model."""
    parameters: int = 0
    nodes: int = 0
    """Nodes of the captured graph."""
    front_end: str = ""
    whole: int = 0
    """Modules kept whole as one node."""
    batch: str = ""
    """dynamic, or why the graph holds for one batch size only."""
    stages: int = 0
    states: int = 0
    difference: float | None = None
    """Largest |glued - original| in eval, over the largest |original|; 0 where bit-equal."""
    certificate: float | None = None
    """Worst residual of the float64 certificate."""
    certified: bool = False
    seconds: float | None = None
    """Processor seconds to lift (so that a busy machine does not decide)."""
    error: str = ""

    @property
    def ok(self) -> bool:
        """Lifted, equal and certified at four stages."""
        equal = self.difference is not None and self.difference <= EQUAL
        return not self.error and equal and self.certified and self.stages == STAGES


def run(
    family: str,
    names: Sequence[str] | None = None,
    limit: int | None = None,
    *,
    folder: Path | None = None,
    again: bool = False,
    seconds: int = 900,
) -> list[Row]:
    """Lift and certify models of a family.

    Args:
        family: torchvision, timm or transformers.
        names: models to run; None for all of the family.
        limit: at most so many.
        folder: where `<family>.json` and `<family>.md` are kept; models that succeeded there are not run
            again. None keeps nothing.
        again: run those too.
        seconds: time after which one model is given up.

    Returns:
        the rows of all models asked for, in order.

    Raises:
        MissingExtraError: the family's library is not installed.
        DataError: another process has the folder, or a file of it is damaged.
    """
    subjects = subjects_of(family)
    chosen = [n for n in subjects if names is None or n in names][:limit]
    with held(folder) if folder is not None else nullcontext():
        kept = _measured_all(family, subjects, chosen, folder, again=again, seconds=seconds)
    return [kept[n] for n in chosen]


def _measured_all(
    family: str,
    subjects: Mapping[str, Subject],
    chosen: Sequence[str],
    folder: Path | None,
    *,
    again: bool,
    seconds: int,
) -> dict[str, Row]:
    kept = {} if folder is None else _stored(folder / f"{family}.json")
    for name in chosen:
        if name in kept and kept[name].ok and not again:
            continue
        kept[name] = measure(family, name, subjects[name], seconds=seconds)
        print(line(kept[name]), flush=True)
        if folder is not None:
            _store(folder, family, kept, list(subjects))
    return kept


def measure(family: str, name: str, subject: Subject, *, seconds: int = 600) -> Row:
    """Row of one model; whatever goes wrong becomes the row's error."""
    row: dict[str, Any] = {"family": family, "name": name}
    try:
        with _at_most(seconds), without_warnings():
            for key, value in _measured(subject):  # one by one: what was measured before a failure is kept
                row |= {key: value}
    except Exception as error:
        row["error"] = f"{type(error).__name__}: {error}"[:2000]
    gc.collect()
    return Row(**row)


def _measured(subject: Subject) -> Iterator[tuple[str, Any]]:
    torch.manual_seed(0)
    model, args, kwargs = subject()
    yield "model", type(model).__name__
    yield "parameters", sum(p.numel() for p in model.parameters())
    model.eval()
    with torch.no_grad():
        expected = leaves(model(*args, **kwargs))
    start = time.process_time()
    lifted = lift(model, args, split=STAGES, example_kwargs=kwargs)
    yield "seconds", time.process_time() - start
    del model
    assert lifted.receipt is not None
    yield "nodes", len(lifted.graph.nodes)
    yield "front_end", lifted.receipt.front_end
    yield "whole", len(lifted.receipt.whole)
    yield "batch", lifted.receipt.batch
    yield "stages", len(lifted.stages)
    yield "states", len(lifted.partition.states)
    with torch.no_grad():
        got = leaves(lifted.eval()(*args, **kwargs))
    yield "difference", _difference(expected, got)
    del expected, got
    certificate = lifted.verify(args, None, loss=smooth_loss, kwargs=kwargs)
    worst = certificate.worst
    yield "certificate", None if worst is None else worst.value
    yield "certified", certificate.ok
    if certificate.reasons:
        yield "error", f"certificate not assessed: {certificate.reasons[0]}"


def smooth_loss(output: Any, target: None) -> Tensor:
    """A smooth function of every floating output.

    It weighs each entry differently: a plain mean of squares is constant behind a layer norm.
    """
    del target
    found = [v for v in leaves(output) if isinstance(v, Tensor) and v.is_floating_point()]
    total = torch.zeros(())
    for value in found:
        weights = torch.arange(value.numel(), dtype=value.dtype).cos().reshape(value.shape)
        total = total + (weights * value).mean() + 0.1 * value.square().mean()
    return total


def _difference(expected: Sequence[Any], got: Sequence[Any]) -> float:
    if len(expected) != len(got):
        return float("inf")
    worst = 0.0
    for a, b in zip(expected, got, strict=True):
        if isinstance(a, Tensor) and not torch.equal(a, b):
            scale = float(a.abs().max())
            worst = max(worst, float((a - b).abs().max()) / (scale or 1.0))
    return worst


@contextmanager
def _at_most(seconds: int) -> Iterator[None]:
    """Give up after some seconds (where the system has alarms)."""

    def stop(number: int, frame: Any) -> None:
        raise TimeoutError(f"not finished after {seconds} seconds")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def _stored(path: Path) -> dict[str, Row]:
    if not path.exists():
        return {}
    try:
        return {row.name: row for row in rows_of(path)}
    except DataError as error:
        raise DataError([*error.problems, f"{path}: remove this file, and what it held is run again"]) from None


def rows_of(path: Path) -> list[Row]:
    """Rows of a file that a run has written."""
    found = jsonfile.read(path)
    if not isinstance(found, list):
        raise DataError(f"{path}: expected a list of rows")
    return [jsonfile.check(json.dumps(row), f"{path}: row {number}", Row) for number, row in enumerate(found, 1)]


def _store(folder: Path, family: str, rows: dict[str, Row], order: Sequence[str]) -> None:
    listed = [rows[n] for n in order if n in rows]
    text = json.dumps([r.model_dump() for r in listed], indent=1)
    sums.write(folder, {f"{family}.json": f"{text}\n".encode(), f"{family}.md": table(listed).encode()})


def line(row: Row) -> str:
    """One line of a run's log."""
    if row.error:
        return f"FAIL {row.name}: {row.error.splitlines()[0]}"
    return (
        f"{'ok  ' if row.ok else 'FAIL'} {row.name}: {row.front_end}, {row.nodes} nodes, {row.stages} stages, "
        f"difference {row.difference:.1e}, certificate {row.certificate:.1e}, {row.seconds:.1f} s"
    )


def table(rows: Sequence[Row]) -> str:
    """Rows as a Markdown table, with a summary before it."""
    good = sum(r.ok for r in rows)
    family = rows[0].family if rows else ""
    lines = [
        f"# Coverage: {family}",
        "",
        f"{good} of {len(rows)} models lift, equal the original in eval and pass the float64 certificate at {STAGES} "
        "stages. Weights are random; seconds are of one processor, to lift.",
        "",
        "| model | parameters | front end | nodes | states | difference | certificate | seconds | result |",
        "|---|---:|---|---:|---:|---:|---:|---:|---|",
    ]
    for r in rows:
        result = "ok" if r.ok else (r.error.splitlines()[0][:120].replace("|", "/") if r.error else "not certified")
        lines.append(
            f"| {r.name} | {r.parameters:,} | {r.front_end} | {r.nodes} | {r.states} | {_number(r.difference)} | "
            f"{_number(r.certificate)} | {'' if r.seconds is None else f'{r.seconds:.1f}'} | {result} |"
        )
    return "\n".join(lines) + "\n"


def _number(value: float | None) -> str:
    return "" if value is None else "0" if value == 0 else f"{value:.1e}"
