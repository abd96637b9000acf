"""Two studies beside the tables: accuracy by depth and method, and how many random settings of DistProp do well.

In: options and a folder. Out: trials and rows in `rows.jsonl`, and from them `table.md`. Invariant: what is in the
folder is not run again; the depth study cuts every method's net behind every layer.
"""

from __future__ import annotations

import random
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

from pydantic import Field

from lagcompile.ir.base import DataError, Frozen
from lagcompile.ir.disk import held
from lagcompile.workbench.benches import Bench, bench_of
from lagcompile.workbench.protocol import keep_protocol, protocol_of
from lagcompile.workbench.references import DATA
from lagcompile.workbench.rows import Row, Rows
from lagcompile.workbench.search import Draw, Space, Span, Trial, best, drawn, search
from lagcompile.workbench.systems import System, system_of
from lagcompile.workbench.tables import TableOptions, run_row, score_of, table, write_table

Say = Callable[[str], None]
DEPTH_SYSTEMS = (
    "backprop",
    "dual_sweep",
    "extraprop",
    "gda",
    "auglag",
    "regularized",
    "local_propagation",
    "distprop",
    "proxprop",
    "altmin",
    "dtp",
    "dfa",
    "pc_alm",
)


class DepthOptions(Frozen):
    """Plain tanh networks of several depths, cut behind every hidden layer."""

    STUDY: ClassVar[str] = "depth"
    data: str = "digits"
    """A data set of `benches.BENCHES`; its network is replaced."""
    depths: tuple[int, ...] = (10, 30, 100)
    width: int = Field(default=32, ge=1)
    gain: float | None = 1.1
    """Gain of orthogonal first weights; with PyTorch's own (None) signals die in 30 layers and few methods train."""
    systems: tuple[str, ...] = DEPTH_SYSTEMS
    steps: int = Field(default=1000, ge=1)
    seeds: int = Field(default=3, ge=1)
    trials: int = Field(default=4, ge=1)
    """Draws of every search, at the first depth; deeper nets take what was found there."""
    search_steps: int = Field(default=500, ge=1)


class RobustnessOptions(Frozen):
    """Random settings of DistProp, drawn evenly in the logarithm from the spaces that its authors swept."""

    STUDY: ClassVar[str] = "robustness"
    data: str = "mnist"
    runs: int = Field(default=60, ge=1)
    steps: int = Field(default=1000, ge=1)


SWEPT: Space = {
    "method.weights.lr": Span(low=8.3e-7, high=2.7),
    "method.states.lr": Span(low=1.8e-3, high=0.3),
    "method.multipliers.lr": Span(low=2.1e-9, high=0.37),
    "formulation.transform.epsilon": Span(low=1.8e-2, high=1.0),
}
"""Log-uniform ranges of the DistProp authors' sweeps."""


def depth_bench(options: DepthOptions, depth: int) -> Bench:
    """The bench of one depth: states after every activation, codes before it."""
    base = bench_of(options.data)
    inputs = {"digits": 64, "mnist": 784, "cifar10": 3072}[base.name]
    behind = tuple(f"hidden.{i}" for i in range(depth))
    ahead = tuple(f"hidden.{i}.0" for i in range(depth))
    model: Mapping[str, Any] = {
        "name": "tanh_net",
        "args": {"depth": depth, "width": options.width, "inputs": inputs, "gain": options.gain},
    }
    splits: Any = {"last": behind, "behind": behind, "ahead": ahead}
    return Bench(f"{base.name}-tanh{depth}", model, base.data, splits, batch_size=64)


def depth_system(name: str) -> System:
    """A table's system on tanh: states in [-1, 1] by projection in the place of a ReLU's range."""
    system = system_of(name)
    formulation = dict(system.formulation)
    if "domain" in formulation:
        formulation["domain"] = {"kind": "activation"}
    return System(system.name, system.title, system.where, formulation, system.method, system.space)


def depth_study(options: DepthOptions, folder: Path, *, say: Say = print) -> str:
    """Run what is missing and write `table.md`; returns it.

    Raises:
        SpecError: an unknown system, or a folder that was begun with other options.
    """
    with held(folder):
        return _depth_study(options, folder, say)


def _depth_study(options: DepthOptions, folder: Path, say: Say) -> str:
    keep_protocol(folder, options.STUDY, options.model_dump(exclude={"systems", "seeds"}))
    kept = Rows(folder)
    data = DATA[str(bench_of(options.data).data["name"])]()
    first = depth_bench(options, options.depths[0])
    for seed in range(options.seeds):
        for depth in options.depths:
            bench = depth_bench(options, depth)
            for name in options.systems:
                if kept.has(name, seed, depth):
                    continue
                system = depth_system(name)

                def score(draw: Draw, system: System = system) -> tuple[float, str]:
                    return score_of(system.spec(first, draw, steps=options.search_steps, seed=10_000), data)

                def keep(trial: Trial, name: str = name) -> None:
                    kept.keep_trial(name, trial)

                before = kept.trials(name)
                trials = search(
                    system.space, score, trials=options.trials, before=before, keep=keep, start=system.start
                )
                draw = best(trials).draw
                spec = system.spec(bench, draw, steps=options.steps, seed=seed)
                row = run_row(name, draw, spec, data, depth=depth)
                kept.keep(row, spec)
                say(f"depth {depth} {name} seed {seed}: {row.accuracy:.4f}, {row.seconds:.0f} s, {row.status}")
                write_table(folder, depth_table(options, kept.rows))
    return write_table(folder, depth_table(options, kept.rows))


def depth_table(options: DepthOptions, rows: Sequence[Row]) -> str:
    """Accuracy by system and depth as Markdown."""
    weights = "PyTorch's own" if options.gain is None else f"orthogonal, gain {options.gain:g}, biases zero"
    lines = [
        f"# {options.data}: plain tanh nets of width {options.width}, cut behind every layer, {options.steps:,} steps",
        "",
        f"First weights: {weights}. Test accuracy, mean ± standard deviation (seeds). Step sizes: best of "
        f"{options.trials} draws of {options.search_steps:,} steps on the validation split at depth "
        f"{options.depths[0]}.",
        "",
        "| system | " + " | ".join(f"{d} layers" for d in options.depths) + " |",
        "|---" * (len(options.depths) + 1) + "|",
    ]
    for name in dict.fromkeys([*DEPTH_SYSTEMS, *(r.system for r in rows)]):
        found = [r for r in rows if r.system == name]
        if found:
            cells = [_cell([r.accuracy for r in found if r.depth == d]) for d in options.depths]
            lines.append(f"| {system_of(name).title} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _cell(values: list[float]) -> str:
    if not values:
        return ""
    spread = f" ± {100 * statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{100 * statistics.fmean(values):.1f}{spread} % ({len(values)})"


def robustness_study(options: RobustnessOptions, folder: Path, *, say: Say = print) -> str:
    """Run what is missing and write `table.md`; returns it.

    Raises:
        SpecError: an unknown bench, or a folder that was begun with other options.
    """
    with held(folder):
        return _robustness_study(options, folder, say)


def _robustness_study(options: RobustnessOptions, folder: Path, say: Say) -> str:
    keep_protocol(folder, options.STUDY, options.model_dump(exclude={"runs"}))
    kept = Rows(folder)
    bench, system = replace(bench_of(options.data), decay=0.0), system_of("distprop")  # only what the authors swept
    data = None
    for number in range(options.runs):
        if kept.has(system.name, number):
            continue
        data = data if data is not None else DATA[str(bench.data["name"])]()
        draw = drawn(SWEPT, random.Random(f"robustness/{number}")) | {"method.weights.kind": "adagrad"}
        spec = system.spec(bench, draw, steps=options.steps, seed=number)
        row = run_row(system.name, draw, spec, data)
        kept.keep(row, spec)
        say(f"robustness {number}: {row.accuracy:.4f}, {row.seconds:.0f} s, {row.status}")
        write_table(folder, robustness_table(options, kept.rows))
    return write_table(folder, robustness_table(options, kept.rows))


def robustness_table(options: RobustnessOptions, rows: Sequence[Row]) -> str:
    """Say how many settings do well."""
    accuracies = [r.accuracy for r in rows]
    top = max(accuracies, default=0.0)
    near = sum(a >= 0.9 * top for a in accuracies)
    return (
        f"# DistProp's robustness on {options.data}: {len(rows)} random settings, {options.steps:,} steps each\n\n"
        f"Settings are drawn log-uniformly from the ranges that the authors swept ({', '.join(SWEPT)}), Adagrad "
        f"weights. Best test accuracy {100 * top:.2f} %; {near} of {len(rows)} settings "
        f"({100 * near / max(1, len(rows)):.0f} %) lie within 10 % of it. Published: 103 of 170 (61 %), under a "
        "Bayesian search, which draws more often where runs do well.\n"
    )


def table_of(folder: Path) -> str:
    """Make the table of any study's folder from its protocol and rows alone.

    Raises:
        DataError: a file is missing or damaged, or the study is not known.
    """
    options, rows = protocol_of(folder), Rows(folder).rows
    study = options.pop("study", None)
    if study == TableOptions.STUDY:
        return table(TableOptions.model_validate(options), rows)
    if study == DepthOptions.STUDY:
        return depth_table(DepthOptions.model_validate(options), rows)
    if study == RobustnessOptions.STUDY:
        return robustness_table(RobustnessOptions.model_validate(options), rows)
    raise DataError(f"{folder}: there is no study '{study}'")
