"""Search, tables and studies on the digits: same budget for all, resumable, honest rows."""

from __future__ import annotations

import math
import random
import re
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import pytest
import torch

import lagcompile as lc
from lagcompile.workbench.benches import BENCHES, Bench, bench_of
from lagcompile.workbench.references import DATA
from lagcompile.workbench.rows import Row, Rows
from lagcompile.workbench.search import Choice, Draw, Space, Span, Trial, best, drawn, search
from lagcompile.workbench.studies import DepthOptions, RobustnessOptions, depth_study, robustness_study, table_of
from lagcompile.workbench.systems import SYSTEMS, System, system_of
from lagcompile.workbench.tables import TableOptions, figure, solve, table1

SPACE: Space = {"a": Span(low=1e-3, high=1.0), "b": Choice(options=("x", "y")), "c": Span(low=0.0, high=2.0, log=False)}


def rows_of(folder: Path) -> list[Row]:
    return Rows(folder).rows


def test_draws_stay_in_their_space_and_depend_on_the_seed_alone() -> None:
    draws = [drawn(SPACE, random.Random(i)) for i in range(200)]
    assert all(1e-3 <= float(d["a"]) <= 1.0 and 0 <= float(d["c"]) <= 2 for d in draws)
    assert {d["b"] for d in draws} == {"x", "y"}
    assert sum(float(d["a"]) < 0.0316 for d in draws) in range(70, 130)  # even in the logarithm
    assert drawn(SPACE, random.Random(3)) == draws[3]


@pytest.mark.parametrize("sampler", ["random", "tpe"])
def test_a_search_that_was_stopped_is_resumed(sampler: Literal["random", "tpe"]) -> None:
    def score(draw: Draw) -> tuple[float, str]:
        return -abs(math.log10(float(draw["a"])) + 1.5), ""

    start: Draw = {"a": 1.0, "b": "x", "c": 1.0}
    if sampler == "tpe":
        pytest.importorskip("optuna", reason="pip install 'lagcompile[bench]'")
    kept: list[Trial] = []
    whole = search(SPACE, score, trials=6, start=start, sampler=sampler)
    search(SPACE, score, trials=2, keep=kept.append, start=start, sampler=sampler)
    assert len(kept) == 2
    assert search(SPACE, score, trials=6, before=kept, keep=kept.append, start=start, sampler=sampler) == whole == kept
    assert whole[0].draw == start
    assert best(whole).score == max(t.score for t in whole)


@pytest.mark.parametrize("bench", BENCHES, ids=lambda b: b.name)
@pytest.mark.parametrize("system", SYSTEMS, ids=lambda s: s.name)
def test_every_system_has_a_spec_on_every_bench(system: System, bench: Bench) -> None:
    whole, place = system_of(system.name), bench_of(bench.name)
    start = whole.start
    assert set(start) == set(whole.space)
    spec = whole.spec(place, start, steps=10, seed=3)
    assert spec.run.steps == 10
    assert spec.run.seed == 3
    assert spec.run.batch_size == place.batch_size
    for number in range(5):
        whole.spec(place, drawn(whole.space, random.Random(number)), steps=10, seed=0)


@pytest.mark.parametrize("system", SYSTEMS, ids=lambda s: s.name)
def test_weights_decay_by_the_same_share_of_a_move_in_every_system(system: System) -> None:
    bench = bench_of("cifar10")
    for lr in (5e-4, 1e-3):
        method = system.spec(bench, system.start_on(bench) | {"method.weights.lr": lr}, steps=9, seed=0).method
        dumped = method.model_dump()
        assert dumped["weights"]["lr"] * dumped["weights"]["weight_decay"] == pytest.approx(bench.decay)
        others = [rule for key, rule in dumped.items() if key != "weights" and isinstance(rule, dict)]
        assert not any(rule.get("weight_decay") for rule in others)


@pytest.mark.parametrize("system", [s for s in SYSTEMS if s.method["kind"] != "extragradient"], ids=lambda s: s.name)
def test_a_step_takes_the_decay_off_every_weight_once(system: System) -> None:
    data = DATA["digits"]()
    plain, decayed, start = (
        solve(system.spec(bench, system.start, steps=steps, seed=0), data).model.state_dict()
        for bench, steps in (
            (bench_of("digits"), 1),
            (replace(bench_of("digits"), decay=0.01), 1),
            (bench_of("digits"), 0),
        )
    )
    for name, value in start.items():
        torch.testing.assert_close(decayed[name], plain[name] - 0.01 * value, rtol=1e-5, atol=1e-6)


def test_unknown_names_are_said() -> None:
    with pytest.raises(lc.SpecError, match=r"no system 'adam' \(there are: backprop, extraprop"):
        system_of("adam")
    with pytest.raises(lc.SpecError, match=r"no bench 'svhn' \(there are: digits, mnist, cifar10\)"):
        bench_of("svhn")


def test_the_table_is_resumable_and_has_a_row_for_each_system_and_seed(tmp_path: Path) -> None:
    names = ("backprop", "distprop")
    said: list[str] = []
    options = TableOptions(data="digits", systems=names, steps=30, seeds=2, trials=2, search_steps=5)
    text = table1(options, tmp_path, say=said.append)
    assert sum(" trial " in line for line in said) == 4
    rows = rows_of(tmp_path)
    assert [(r.system, r.seed) for r in rows] == [(n, s) for n in names for s in (0, 1)]
    for row in rows:
        assert row.status == "steps_done"
        assert row.gradient_evaluations == (60 if row.system == "distprop" else 30)
        assert 0.0 <= row.accuracy <= 1.0
        assert row.curve[-1][0] == 30
        spec = Rows(tmp_path).spec(row)
        assert spec.run.seed == row.seed
        assert spec == system_of(row.system).spec(bench_of("digits"), row.draw, steps=30, seed=row.seed)
    assert all(f"| {system_of(n).title} | 2 |" in text for n in names)
    assert (tmp_path / "table.md").read_text() == table_of(tmp_path) == text
    said.clear()
    assert table1(options, tmp_path, say=said.append) == text
    assert said == []
    path = tmp_path / "rows.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    (gone,) = [line for line in lines if '"row", "system": "backprop", "seed": 1' in line]
    path.write_text("".join(line for line in lines if line != gone))
    table1(options, tmp_path, say=said.append)
    assert len(said) == 1
    again = rows_of(tmp_path)
    assert (again[1].accuracy, again[1].curve) == (rows[1].accuracy, rows[1].curve)


def test_a_line_that_was_cut_short_damaged_edited_or_given_twice_is_named(tmp_path: Path) -> None:
    options = TableOptions(systems=("backprop",), steps=4, seeds=1, trials=1, search_steps=2)
    table1(options, tmp_path, say=lambda line: None)
    path = tmp_path / "rows.jsonl"
    text = path.read_text()
    again = "remove this line, and what it held is run again"
    for damaged, problem in (
        (text[:-30], f":3: the last line was cut short: {again}"),
        (text.replace('"seed": 0', '"seed": 1'), f":3: the line is damaged or was changed: {again}"),
        (text.replace('"score": 0', '"score": 1'), f":1: the line is damaged or was changed: {again}"),
        ("\n" + text, f":1: the line is damaged or was changed: {again}"),
        (text + text.splitlines()[2] + "\n", ":4: there is a row of this system and seed before: remove one"),
    ):
        assert damaged != text
        path.write_text(damaged)
        with pytest.raises(lc.DataError, match=f"^{re.escape(f'{path}{problem}')}$"):
            table1(options, tmp_path, say=lambda line: None)
        assert path.read_text() == damaged
    path.write_text(text)
    said: list[str] = []
    table1(options, tmp_path, say=said.append)
    assert said == []


def test_folders_of_one_file_a_row_are_refused(tmp_path: Path) -> None:
    (tmp_path / "rows").mkdir()
    with pytest.raises(lc.SpecError, match=r"holds one file a row, .* give another folder \(--out\)$"):
        table1(TableOptions(), tmp_path, say=lambda line: None)
    assert [p.name for p in tmp_path.iterdir()] == ["rows"]


def test_a_table_at_another_batch_size_and_decay(tmp_path: Path) -> None:
    options = TableOptions(
        data="digits", systems=("backprop",), steps=4, batch_size=7, decay=1e-4, seeds=1, trials=1, search_steps=2
    )
    text = table1(options, tmp_path, say=lambda line: None)
    assert "4 steps, batch 7\n" in text
    assert "Weights lose 0.01 % in each move at full step size." in text
    (row,) = rows_of(tmp_path)
    kept = Rows(tmp_path)
    assert kept.spec(row).run.batch_size == 7
    assert kept.spec(row).method.model_dump()["weights"]["weight_decay"] == pytest.approx(0.1)
    assert [t.draw for t in kept.trials("backprop")] == [{"method.weights.lr": 1e-3}]


def test_rows_can_train_on_the_validation_split_once_it_has_been_searched_on(tmp_path: Path) -> None:
    options = TableOptions(systems=("backprop",), steps=4, seeds=1, trials=2, search_steps=2, refit=True)
    assert "Rows are trained on that split too." in table1(options, tmp_path, say=lambda line: None)
    (row,) = rows_of(tmp_path)
    assert row.validation is None
    assert Rows(tmp_path).spec(row).data.args == {"validation": 0}
    table1(options.model_copy(update={"refit": False}), tmp_path / "held_out", say=lambda line: None)
    (other,) = rows_of(tmp_path / "held_out")
    assert other.validation is not None
    assert Rows(tmp_path).trials("backprop") == Rows(tmp_path / "held_out").trials("backprop")
    with pytest.raises(
        lc.SpecError, match=r"^refit leaves no validation split to look at: keep the weights of the last"
    ):
        TableOptions(refit=True, keep="best")


def test_rows_of_two_protocols_never_share_a_folder(tmp_path: Path) -> None:
    options = TableOptions(data="digits", systems=("backprop",), steps=4, seeds=1, trials=1, search_steps=2)
    table1(options, tmp_path, say=lambda line: None)
    other = options.model_copy(update={"batch_size": 7, "search_steps": 3})
    expected = (
        f"{tmp_path} was begun with search_steps 2 (now 3), batch_size 64 (now 7): rows with "
        "different settings must not share a table. Give the options that it was begun with, or another folder (--out)"
    )
    with pytest.raises(lc.SpecError, match=f"^{re.escape(expected)}$"):
        table1(other, tmp_path, say=lambda line: None)
    assert len(rows_of(tmp_path)) == 1
    table1(options.model_copy(update={"seeds": 2, "batch_size": 64}), tmp_path, say=lambda line: None)  # as it was
    assert len(rows_of(tmp_path)) == 2
    with pytest.raises(lc.SpecError, match=r"study table1 \(now depth\), .*width None \(now 8\), .*steps 4 \(now 3\)"):
        depth_study(DepthOptions(depths=(2,), width=8, steps=3), tmp_path, say=lambda line: None)


def test_lines_beyond_the_colours_are_dashed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from matplotlib.axes import Axes

    table1(TableOptions(systems=("gda",), steps=4, seeds=1, trials=1, search_steps=2), tmp_path, say=lambda line: None)
    (row,) = rows_of(tmp_path)
    styles: list[str] = []
    plot = Axes.plot

    def watched(axes: Axes, *args: Any, **kwargs: Any) -> Any:
        lines = plot(axes, *args, **kwargs)
        styles.extend(str(line.get_linestyle()) for line in lines)
        return lines

    monkeypatch.setattr(Axes, "plot", watched)
    assert figure([row.model_copy(update={"system": s.name}) for s in SYSTEMS[:12]], tmp_path / "defect.png")
    assert styles == ["-"] * 10 + ["--"] * 2


def test_the_exact_dual_sweep_without_extrapolation_is_backprop() -> None:
    bench, data = bench_of("digits"), DATA["digits"]()
    still: Draw = {"method.weights.kind": "sgd", "method.weights.lr": 0.1}
    swept = system_of("dual_sweep").spec(bench, {**still, "method.kind": "descent_ascent"}, steps=20, seed=0)
    plain = system_of("backprop").spec(bench, still, steps=20, seed=0)
    ours, theirs = (solve(spec, data).model.state_dict() for spec in (swept, plain))
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value, rtol=1e-4, atol=1e-6)


def test_the_weights_that_did_best_on_validation_are_kept(tmp_path: Path) -> None:
    rows = {}
    for keep in ("last", "best"):
        options = TableOptions(data="digits", systems=("backprop",), steps=60, seeds=1, trials=1, search_steps=5)
        text = table1(options.model_copy(update={"keep": keep}), tmp_path / keep, say=lambda line: None)
        assert ("the best of twenty looks" in text) is (keep == "best")
        (rows[keep],) = rows_of(tmp_path / keep)
    assert rows["last"].step is None
    assert rows["best"].step in range(3, 61, 3)
    looks = {keep: row.validation for keep, row in rows.items()}
    assert looks["best"] is not None
    assert looks["last"] is not None
    assert looks["best"] >= looks["last"]
    assert rows["best"].curve == rows["last"].curve  # looking changes nothing


def test_no_search_draws_above_a_ceiling_of_its_bench() -> None:
    bench = bench_of("cifar10")
    for system in SYSTEMS:
        for key, highest in bench.ceilings.items():
            entry = system.space_on(bench).get(key)
            if isinstance(entry, Span):
                assert entry.high <= highest or entry == system.space[key]
    capped = system_of("backprop").space_on(bench)["method.weights.lr"]
    assert capped == Span(low=3e-4, high=1e-3)
    assert system_of("extraprop").start_on(bench)["method.weights.lr"] == 1e-3
    assert system_of("proxprop").start_on(bench) == system_of("proxprop").start
    assert system_of("backprop").space_on(bench_of("mnist")) == system_of("backprop").space


def test_studies_write_their_tables(tmp_path: Path) -> None:
    depth = DepthOptions(
        depths=(3, 5), systems=("backprop", "auglag", "dfa"), steps=8, seeds=1, trials=1, search_steps=3
    )
    text = depth_study(depth, tmp_path / "depth", say=lambda line: None)
    assert "| Backprop |" in text
    assert "3 layers | 5 layers" in text
    assert [(r.system, r.depth) for r in rows_of(tmp_path / "depth")] == [(n, d) for n in depth.systems for d in (3, 5)]
    assert table_of(tmp_path / "depth") == text
    robust = RobustnessOptions(data="digits", runs=3, steps=5)
    text = robustness_study(robust, tmp_path / "robust", say=lambda line: None)
    assert "3 random settings" in text
    assert "of 3 settings" in text
    kept = rows_of(tmp_path / "robust")
    assert [r.seed for r in kept] == [0, 1, 2]
    assert all("method.weights.lr" in r.draw and 0 <= r.accuracy <= 1 for r in kept)
    assert table_of(tmp_path / "robust") == text
