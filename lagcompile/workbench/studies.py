"""Two studies beside the tables: accuracy by depth and method, and how many random settings of DistProp do well.

In: options and a folder. Out: one JSON file a run, `depth.json`/`depth.md`, `robustness.json`/`robustness.md`.
Invariant: what is in the folder is not run again; the depth study cuts every method's net behind every layer.
"""

from __future__ import annotations

import random
import statistics
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from pydantic import Field

from lagcompile.ir.base import DataError, Frozen, Measured
from lagcompile.ir.disk import held
from lagcompile.workbench.benches import Bench, bench_of
from lagcompile.workbench.protocol import keep_protocol
from lagcompile.workbench.references import DATA
from lagcompile.workbench.rows import Row
from lagcompile.workbench.search import Space, Span, Value, best, drawn, row_of, search, write
from lagcompile.workbench.spec import RunSpec
from lagcompile.workbench.systems import System, system_of
from lagcompile.workbench.tables import run_row, score_of

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

    data: str = "digits"
    """A data set of `benches.BENCHES`; its network is replaced."""
    depths: tuple[int, ...] = (10, 30, 100)
    width: int = Field(default=32, ge=1)
    gain: float | None = 1.1
    """Of orthogonal first weights; with PyTorch's own (None) signals are dead at 30 layers, and few methods train."""
    systems: tuple[str, ...] = DEPTH_SYSTEMS
    steps: int = Field(default=1000, ge=1)
    seeds: int = Field(default=3, ge=1)
    trials: int = Field(default=4, ge=1)
    """Draws of every search, at the first depth; deeper nets take what was found there."""
    search_steps: int = Field(default=500, ge=1)


class RobustnessOptions(Frozen):
    """Random settings of DistProp, drawn evenly in the logarithm from the spaces that its authors swept."""

    data: str = "mnist"
    runs: int = Field(default=60, ge=1)
    steps: int = Field(default=1000, ge=1)


class RobustnessRun(Measured):
    """One random setting and what came of it."""

    draw: dict[str, Value]
    row: Row


SWEPT: Space = {
    "method.weights.lr": Span(low=8.3e-7, high=2.7),
    "method.states.lr": Span(low=1.8e-3, high=0.3),
    "method.multipliers.lr": Span(low=2.1e-9, high=0.37),
    "formulation.transform.epsilon": Span(low=1.8e-2, high=1.0),
}
"""Log-uniform ranges of the DistProp authors' sweeps."""


def depth_bench(options: DepthOptions, depth: int) -> Bench:
    """The bench of one depth: states behind every activation, codes ahead of it."""
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
    """Run what is missing and write `depth.md`; returns it.

    Raises:
        SpecError: an unknown system, or a folder that was begun with other options.
    """
    with held(folder):
        return _depth_study(options, folder, say)


def _depth_study(options: DepthOptions, folder: Path, say: Say) -> str:
    keep_protocol(folder, options.model_dump(exclude={"systems", "seeds"}))
    data = DATA[str(bench_of(options.data).data["name"])]()
    for seed in range(options.seeds):
        for depth in options.depths:
            bench = depth_bench(options, depth)
            for name in options.systems:
                path = folder / "rows" / f"{name}-depth{depth}-seed{seed}.json"
                if path.exists():
                    continue
                system = depth_system(name)
                first = depth_bench(options, options.depths[0])

                def score(draw: dict[str, Any], system: System = system, first: Bench = first) -> tuple[float, str]:
                    spec = system.spec(first, draw, steps=options.search_steps, seed=10_000)
                    return score_of(spec, data)

                store = folder / "search" / f"{name}.json"
                trials = search(system.space, score, trials=options.trials, store=store, start=system.start)
                spec: RunSpec = system.spec(bench, best(trials).draw, steps=options.steps, seed=seed)
                row = run_row(name, spec, data)
                write(path, row.model_dump(mode="json"))
                say(f"depth {depth} {name} seed {seed}: {row.accuracy:.4f}, {row.seconds:.0f} s, {row.status}")
                _write_depth(options, folder)
    return _write_depth(options, folder)


def _write_depth(options: DepthOptions, folder: Path) -> str:
    found: dict[str, dict[int, list[float]]] = {}
    for path in sorted((folder / "rows").glob("*.json")):
        row = row_of(path, Row)
        try:
            depth = int(row.spec["model"]["args"]["depth"])
        except (KeyError, TypeError, ValueError):
            raise DataError(f"{path}: the spec of the row has no model.args.depth: remove the file") from None
        found.setdefault(row.system, {}).setdefault(depth, []).append(row.accuracy)
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
    for name in options.systems:
        if name in found:
            cells = [_cell(found[name].get(d, [])) for d in options.depths]
            lines.append(f"| {system_of(name).title} | " + " | ".join(cells) + " |")
    text = "\n".join(lines) + "\n"
    write(folder / "depth.json", {"options": options.model_dump(mode="json"), "accuracy": found})
    write(folder / "depth.md", text)
    return text


def _cell(values: list[float]) -> str:
    if not values:
        return ""
    spread = f" ± {100 * statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{100 * statistics.fmean(values):.1f}{spread} % ({len(values)})"


def robustness_study(options: RobustnessOptions, folder: Path, *, say: Say = print) -> str:
    """Run what is missing and write `robustness.md`; returns it.

    Raises:
        SpecError: an unknown bench, or a folder that was begun with other options.
    """
    with held(folder):
        return _robustness_study(options, folder, say)


def _robustness_study(options: RobustnessOptions, folder: Path, say: Say) -> str:
    keep_protocol(folder, options.model_dump(exclude={"runs"}))
    bench, system = replace(bench_of(options.data), decay=0.0), system_of("distprop")  # only what the authors swept
    data = None
    for number in range(options.runs):
        path = folder / "runs" / f"{number:03d}.json"
        if path.exists():
            continue
        data = data if data is not None else DATA[str(bench.data["name"])]()
        draw = drawn(SWEPT, random.Random(f"robustness/{number}")) | {"method.weights.kind": "adagrad"}
        row = run_row("distprop", system.spec(bench, draw, steps=options.steps, seed=number), data)
        write(path, {"draw": draw, "row": row.model_dump(mode="json")})
        say(f"robustness {number}: {row.accuracy:.4f}, {row.seconds:.0f} s, {row.status}")
        _write_robustness(options, folder)
    return _write_robustness(options, folder)


def _write_robustness(options: RobustnessOptions, folder: Path) -> str:
    runs = [row_of(p, RobustnessRun) for p in sorted((folder / "runs").glob("*.json"))]
    accuracies = [r.row.accuracy for r in runs]
    top = max(accuracies, default=0.0)
    near = sum(a >= 0.9 * top for a in accuracies)
    text = (
        f"# DistProp's robustness on {options.data}: {len(runs)} random settings, {options.steps:,} steps each\n\n"
        f"Settings are drawn log-uniformly from the ranges that the authors swept ({', '.join(SWEPT)}), Adagrad "
        f"weights. Best test accuracy {100 * top:.2f} %; {near} of {len(runs)} settings "
        f"({100 * near / max(1, len(runs)):.0f} %) lie within 10 % of it. Published: 103 of 170 (61 %), under a "
        "Bayesian search, which draws more often where runs do well.\n"
    )
    found = [{**r.draw, "seed": r.row.seed, "accuracy": r.row.accuracy} for r in runs]
    write(folder / "robustness.json", {"options": options.model_dump(mode="json"), "runs": found})
    write(folder / "robustness.md", text)
    return text
