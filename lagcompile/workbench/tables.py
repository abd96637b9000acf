"""The tables: every system on one network, data set, number of steps and seeds, beside the published figures.

In: a bench's name, steps, seeds, a folder. Out: trials and rows in `rows.jsonl`, and from them `table.md` and
`defect.png`. Invariant: what is in the folder is not run again; hyper-parameters are chosen on the validation split
with the same number of trials and steps for every system; the test split is read once a row.
"""

from __future__ import annotations

import io
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from lagcompile.backends.base import drive
from lagcompile.ir import sums
from lagcompile.ir.base import Frozen, SpecError
from lagcompile.ir.disk import held
from lagcompile.ir.solution import Solution, Status
from lagcompile.lift import lift
from lagcompile.runtime.dataset import as_tensors
from lagcompile.workbench.benches import Bench, bench_of
from lagcompile.workbench.data import DataSplits
from lagcompile.workbench.protocol import keep_protocol
from lagcompile.workbench.references import DATA, LOSSES, MODELS
from lagcompile.workbench.rows import Row, Rows, row_of
from lagcompile.workbench.search import Draw, Trial, best, search
from lagcompile.workbench.spec import RunSpec
from lagcompile.workbench.supervise import Supervised
from lagcompile.workbench.systems import SYSTEMS, System, system_of

Say = Callable[[str], None]
Keep = Literal["last", "best"]
TABLE = "table.md"
EVALUATION_BATCH = 1000
CURVE_POINTS = 65
_KEPT: dict[Keep, str] = {
    "last": "Weights of the last step.",
    "best": "Weights of the best of twenty looks at the validation split, in searches too; defect at the last step.",
}
COLOURS = 10
"""Number of colours in Matplotlib's cycle: lines beyond it are dashed."""
LOOKS = 20
"""Looks at the validation split in a run that keeps its best weights."""


class TableOptions(Frozen):
    """Options of a table."""

    STUDY: ClassVar[str] = "table1"
    data: str = "digits"
    """mnist, cifar10 or digits."""
    systems: tuple[str, ...] = tuple(s.name for s in SYSTEMS)
    """Rows, in the order in which they are run."""
    steps: int = Field(default=1000, ge=1)
    """Steps of every row."""
    batch_size: int | None = Field(default=None, ge=1)
    """Examples of every step, in searches too; None: the bench's own."""
    decay: float | None = Field(default=None, ge=0, lt=1)
    """Share of itself that a weight loses in each move at full step size; None: the bench's own."""
    seeds: int = Field(default=5, ge=1)
    """Seeds 0 to seeds - 1 of every row."""
    trials: int = Field(default=8, ge=1)
    """Draws of every system's search; the first is the system's own starting point."""
    search_steps: int = Field(default=500, ge=1)
    """Steps of each draw."""
    sampler: Literal["random", "tpe"] = "random"
    """How draws are proposed."""
    keep: Keep = "last"
    """Weights that are kept: of the last step, or of the best validation accuracy of twenty looks, in searches too."""
    refit: bool = False
    """Rows train on the validation split too, once their search is done; then the last step's weights are kept."""

    @model_validator(mode="after")
    def _nothing_to_look_at(self) -> TableOptions:
        if self.refit and self.keep == "best":
            raise SpecError("refit leaves no validation split to look at: keep the weights of the last step")
        return self

    @property
    def bench(self) -> Bench:
        """The bench, at this batch size and decay.

        Raises:
            SpecError: there is none of that name.
        """
        bench = bench_of(self.data)
        size = bench.batch_size if self.batch_size is None else self.batch_size
        return replace(bench, batch_size=size, decay=bench.decay if self.decay is None else self.decay)

    def protocol(self) -> dict[str, Any]:
        """Settings that all rows of a folder share."""
        shared = self.model_dump(include={"data", "steps", "trials", "search_steps", "sampler", "keep", "refit"})
        return shared | {"batch_size": self.bench.batch_size, "decay": self.bench.decay}


def table1(options: TableOptions, folder: Path, *, say: Say = print) -> str:
    """Run what is missing and write the table.

    Args:
        options: of the table.
        folder: where rows, searches and the table are kept; an earlier run there is resumed.
        say: takes a line of progress.

    Returns:
        the table as Markdown.

    Raises:
        SpecError: an unknown bench or system, or a folder that was begun with other options.
        DataError: the data are missing, or another process has the folder.
    """
    with held(folder):
        return _table1(options, folder, say)


def _table1(options: TableOptions, folder: Path, say: Say) -> str:
    bench = options.bench
    systems = [system_of(name) for name in options.systems]
    keep_protocol(folder, options.STUDY, options.protocol())
    kept = Rows(folder)
    whole = {**bench.data, "args": {**_args(bench.data), "validation": 0}}
    rows_on = replace(bench, data=whole) if options.refit else bench
    data: DataSplits | None = None
    trained_on: DataSplits | None = None
    for seed in range(options.seeds):
        for system in systems:
            if kept.has(system.name, seed):
                continue
            data = data or _load(bench)
            trained_on = trained_on or (_load(rows_on) if options.refit else data)
            draw = tuned(system, bench, data, options, kept, say=say).draw
            spec = system.spec(rows_on, draw, steps=options.steps, seed=seed)
            row = run_row(system.name, draw, spec, trained_on, keep=options.keep, curve=True)
            kept.keep(row, spec)
            say(f"{bench.name} {system.name} seed {seed}: {row.accuracy:.4f}, {row.seconds:.0f} s, {row.status}")
            write_table(folder, table(options, kept.rows))
        if kept.rows:
            figure(kept.rows, folder / "defect.png")
    return write_table(folder, table(options, kept.rows))


def write_table(folder: Path, text: str) -> str:
    """Write `table.md`; returns it."""
    sums.write(folder, {TABLE: text.encode()})
    return text


def tuned(
    system: System, bench: Bench, data: DataSplits, options: TableOptions, kept: Rows, *, say: Say = print
) -> Trial:
    """Return the best trial of a system's search, running trials that are not stored yet."""

    def score(draw: Draw) -> tuple[float, str]:
        spec = system.spec(bench, draw, steps=options.search_steps, seed=10_000)
        started = time.perf_counter()
        value, note = score_of(spec, data, keep=options.keep)
        say(f"{bench.name} {system.name} trial {draw}: {value:.4f}, {time.perf_counter() - started:.0f} s")
        return value, note

    return best(
        search(
            system.space_on(bench),
            score,
            trials=options.trials,
            before=kept.trials(system.name),
            keep=lambda trial: kept.keep_trial(system.name, trial),
            start=system.start_on(bench),
            sampler=options.sampler,
        )
    )


def solve(spec: RunSpec, data: DataSplits, *, keep: Keep = "last") -> Solution:
    """Solve one spec on data that have been loaded; the solution's model has the weights that are kept."""
    torch.manual_seed(spec.run.seed)
    model = MODELS[spec.model.name](**_args(spec.model.model_dump()))
    inputs, target = as_tensors((data.train_x, data.train_y))
    split = spec.split
    assert not isinstance(split, str)
    lifted = lift(model, inputs[:4], split=split, formulation=spec.formulation, name=spec.name)
    instance = lifted.bind((inputs, target), loss=LOSSES[spec.loss])
    looks = {"look_every": max(1, spec.run.steps // CURVE_POINTS)}
    if keep == "best":
        looks["evaluate_every"] = max(1, spec.run.steps // LOOKS)
    options = spec.run.options().model_copy(update=looks)
    torch.manual_seed(spec.run.seed)
    executor = spec.method.executor(instance, seed=spec.run.seed)
    supervised = Supervised(executor, spec.schedule, total=spec.run.steps)
    if keep == "last":
        return drive(supervised, options, original=model)

    kept: dict[str, Any] = {"accuracy": -math.inf}

    def evaluate(module: nn.Module) -> dict[str, float]:
        accuracy = _accuracy(module, data.validation_x, data.validation_y)
        if accuracy > kept["accuracy"]:
            weights = {n: v.detach().clone() for n, v in module.state_dict().items()}
            kept.update(accuracy=accuracy, weights=weights, step=supervised.steps)
        return {"accuracy": accuracy}

    solution = drive(supervised, options, original=model, evaluate=evaluate)
    if "weights" not in kept:
        return solution
    solution.model.load_state_dict(kept["weights"])
    return replace(solution, details={**solution.details, "returned_step": kept["step"]})


def score_of(spec: RunSpec, data: DataSplits, *, keep: Keep = "last") -> tuple[float, str]:
    """Accuracy of one spec on the validation split (minus infinity where it diverged), and its status."""
    solution = solve(spec, data, keep=keep)
    if solution.status is Status.INTERRUPTED:
        raise KeyboardInterrupt
    value = _accuracy(solution.model, data.validation_x, data.validation_y)
    return -math.inf if solution.status is Status.DIVERGED else value, solution.status.name.lower()


def run_row(
    system: str,
    draw: Draw,
    spec: RunSpec,
    data: DataSplits,
    *,
    keep: Keep = "last",
    depth: int | None = None,
    curve: bool = False,
) -> Row:
    """One row: solve, then look at the test split once.

    Raises:
        KeyboardInterrupt: the run was interrupted; half a run does not make a row.
    """
    started = time.process_time()
    solution = solve(spec, data, keep=keep)
    if solution.status is Status.INTERRUPTED:
        raise KeyboardInterrupt
    seconds = time.process_time() - started
    final = solution.details["final"].get("defect", solution.history.last.get("defect", math.nan))
    return row_of(
        system,
        draw,
        spec,
        depth=depth,
        status=solution.status.name.lower(),
        accuracy=_accuracy(solution.model, data.test_x, data.test_y),
        validation=_accuracy(solution.model, data.validation_x, data.validation_y) if len(data.validation_x) else None,
        step=solution.details["returned_step"] if keep == "best" else None,
        defect=float(final),
        gradient_evaluations=solution.gradient_evaluations,
        seconds=round(seconds, 2),
        bytes=int(solution.details["bytes"]),
        curve=dict(zip(*solution.history.pairs("defect"), strict=True)) if curve else {},
    )


@torch.no_grad()
def _accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    if len(x) == 0:
        return math.nan
    model.eval()
    right = sum(
        int((model(a).argmax(1) == b).sum())
        for a, b in zip(x.split(EVALUATION_BATCH), y.split(EVALUATION_BATCH), strict=True)
    )
    return right / len(x)


def _load(bench: Bench) -> DataSplits:
    return DATA[str(bench.data["name"])](**_args(bench.data))


def _args(entry: Any) -> dict[str, Any]:
    return dict(entry.get("args") or {})


# ---------------------------------------------------------------- the table
def table(options: TableOptions, rows: Sequence[Row]) -> str:
    """The table of a folder's rows as Markdown."""
    bench = options.bench
    decay = f"Weights lose {100 * bench.decay:g} % in each move at full step size. " if bench.decay else ""
    refit = "Rows are trained on that split too. " if options.refit else ""
    lines = [
        f"# {bench.name}: {bench.model['name']}, {options.steps:,} steps, batch {bench.batch_size}",
        "",
        f"Mean and standard deviation over seeds. {_KEPT[options.keep]} Hyper-parameters: best of {options.trials} "
        f"draws of {options.search_steps:,} steps on the validation split, the same for every system. {refit}{decay}"
        "Each row's draw, seed and spec: rows.jsonl. Published: accuracy and defect printed in the DistProp paper "
        "(MNIST: another network, batch 1024).",
        "",
        "| system | seeds | test accuracy | final mean defect | gradient evaluations | processor seconds | state bytes "
        "| published accuracy | published defect |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    names = dict.fromkeys(r.system for r in rows)
    return "\n".join([*lines, *(_line(bench, [r for r in rows if r.system == name]) for name in names)]) + "\n"


def _line(bench: Bench, rows: Sequence[Row]) -> str:
    several, (published, known) = len(rows) > 1, bench.published.get(rows[0].system, (None, None))
    mean, spread = _mean_sd([r.accuracy for r in rows])
    level, width = _mean_sd([r.defect for r in rows])
    diverged = sum(r.status == "diverged" for r in rows)
    cells = (
        system_of(rows[0].system).title,
        f"{len(rows)}" + (f" ({diverged} diverged)" if diverged else ""),
        f"{100 * mean:.2f}" + (f" ± {100 * spread:.2f} %" if several else " %"),
        f"{level:.2e}" + (f" ± {width:.0e}" if several else ""),
        f"{round(statistics.fmean(r.gradient_evaluations for r in rows)):,}",
        f"{statistics.fmean(r.seconds for r in rows):,.0f}",
        f"{rows[0].bytes:,}",
        "" if published is None else f"{100 * published:.2f} %",
        "" if known is None else f"{known:.2e}",
    )
    return f"| {' | '.join(cells)} |"


def _mean_sd(values: Sequence[float]) -> tuple[float, float]:
    if not all(math.isfinite(v) for v in values):
        return math.nan, math.nan
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0


def figure(rows: Sequence[Row], path: Path) -> bool:
    """Mean |defect| against step with a band of one standard deviation (of its logarithm) over seeds.

    Returns:
        False where Matplotlib is not installed: nothing is drawn.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return False
    drawing = Figure(figsize=(10, 5), layout="constrained")
    FigureCanvasAgg(drawing)
    axes = drawing.add_subplot()
    for name in dict.fromkeys(r.system for r in rows):
        curves = [dict(r.curve) for r in rows if r.system == name]
        shared = set.intersection(*(set(c) for c in curves))
        steps = sorted(s for s in shared if all(math.isfinite(c[s]) for c in curves))
        levels = [[math.log10(max(c[s], 1e-12)) for c in curves] for s in steps]
        if not steps or all(v <= -12 for level in levels for v in level):
            continue
        mean = [statistics.fmean(v) for v in levels]
        spread = [statistics.stdev(v) if len(v) > 1 else 0.0 for v in levels]
        style = "--" if len(axes.lines) >= COLOURS else "-"
        (line,) = axes.plot(steps, [10**m for m in mean], style, label=system_of(name).title)
        low = [10 ** (m - s) for m, s in zip(mean, spread, strict=True)]
        high = [10 ** (m + s) for m, s in zip(mean, spread, strict=True)]
        axes.fill_between(steps, low, high, alpha=0.2, color=line.get_color(), linewidth=0)
    axes.set(yscale="log", xlabel="step", ylabel="mean |defect| of the batch")
    if axes.lines:
        drawing.legend(loc="outside right upper", fontsize="small")
    image = io.BytesIO()
    drawing.savefig(image, dpi=110)
    sums.write(path.parent, {path.name: image.getvalue()})
    return True
