"""The committed studies: every table follows from its rows, and the README's figures from the tables."""

from __future__ import annotations

import json
import re
import statistics
from pathlib import Path

import pytest

from lagcompile.workbench.rows import Row, Rows
from lagcompile.workbench.studies import table_of
from tests import coverage

RESULTS = Path(__file__).parent / "results"
README = (RESULTS.parents[2] / "README.md").read_text()
STUDIES = sorted(p.parent.name for p in RESULTS.glob("*/protocol.json"))


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("|\n").split("|")]


def lines_of(name: str) -> dict[str, list[str]]:
    """Rows of a study's table by the title of their system."""
    text = (RESULTS / name / "table.md").read_text()
    found = [cells(line) for line in text.splitlines() if line.startswith("| ")]
    return {row[0]: row[1:] for row in found[1:]}


def readme_table(header: str) -> dict[str, list[str]]:
    """Rows of the README's table with that header line."""
    (block,) = re.findall(rf"^{re.escape(header)}\n\|[-|]+\|\n((?:\|.*\n)+)", README, re.MULTILINE)
    return {row[0]: row[1:] for row in map(cells, block.splitlines())}


@pytest.mark.parametrize("name", STUDIES)
def test_a_table_follows_from_its_rows_and_every_row_has_its_spec(name: str) -> None:
    assert table_of(RESULTS / name) == (RESULTS / name / "table.md").read_text()
    kept = Rows(RESULTS / name)
    for row in kept.rows:
        spec = kept.spec(row)
        assert (spec.run.seed, spec.name.rpartition("-")[2]) == (row.seed, row.system)


def test_studies_are_committed_as_three_files_each() -> None:
    assert len(STUDIES) == 9
    for name in STUDIES:
        kept = {p.name for p in (RESULTS / name).iterdir()} - {"lagcompile.sums", "defect.png"}  # as a run leaves them
        assert kept == {"protocol.json", "rows.jsonl", "table.md"}


@pytest.mark.parametrize(("name", "published"), [("mnist", "published (batch 1024)"), ("cifar10", "published")])
def test_the_tables_of_systems_in_the_readme_are_the_rows(name: str, published: str) -> None:
    shown = readme_table(f"| system | seeds | test accuracy | mean defect | gradient evaluations | {published} |")
    measured = {
        title: [seeds, accuracy, f"{float(defect.split(' ')[0]):.1e}", gradients, known]
        for title, (seeds, accuracy, defect, gradients, _, _, known, _) in lines_of(name).items()
    }
    assert shown == measured


def test_the_table_of_depths_in_the_readme_is_the_rows() -> None:
    assert readme_table("| system | 10 layers | 30 layers | 100 layers |") == lines_of("depth")


@pytest.mark.parametrize("name", ["digits_extraprop", "mnist_extraprop"])
def test_the_runs_in_the_readme_are_their_reports(name: str) -> None:
    report = json.loads((RESULTS / f"{name}.json").read_text())
    shown = readme_table("| run | stages | test accuracy | backprop, same gradients | mean defect at the end |")
    (row,) = [[title, *row] for title, row in shown.items() if title.startswith(f"{name}, {report['steps']:,} steps")]
    assert row[2] == f"{100 * report['test']['accuracy']:.2f} %"
    beside = report["baseline"]
    assert row[3] == (f"{100 * beside['test']['accuracy']:.2f} %" if beside else "not run beside it")
    assert float(row[4].split(" ")[0]) == float(f"{report['final']['defect']:.1e}")


@pytest.mark.parametrize("family", coverage.FAMILIES)
def test_the_table_of_coverage_in_the_readme_is_the_rows(family: str) -> None:
    path = RESULTS / "coverage" / f"{family}.json"
    rows = coverage.rows_of(path)
    assert coverage.table(rows) == path.with_suffix(".md").read_text()
    shown = readme_table(
        "| models | lifted, equal and certified | bit-equal | captured by torch.fx / torch.export "
        "| seconds to lift, median (largest) |"
    )
    ((good, equal, captured, seconds),) = [row for title, row in shown.items() if title.startswith(f"[{family},")]
    times = [r.seconds or 0.0 for r in rows]
    assert good == f"{sum(r.ok for r in rows)} of {len(rows)}"
    assert equal == str(sum(r.difference == 0 for r in rows))
    assert captured == " / ".join(str(sum(r.front_end == f for r in rows)) for f in ("torch.fx", "torch.export"))
    assert seconds == f"{statistics.median(times):.1f} ({max(times):.1f})"


def test_the_robustness_in_the_readme_is_the_rows() -> None:
    rows = Rows(RESULTS / "robustness").rows
    good = [r for r in rows if r.accuracy >= 0.9 * max(row.accuracy for row in rows)]
    middle = [r for r in rows if 2.5e-3 <= rate(r, "weights") <= 7e-2 and rate(r, "states") > 1.5e-2]
    text = " ".join(README.split())
    assert f"{len(good)} of {len(rows)} within 10 % of the best, published" in text
    assert (
        f"{sum(r in good for r in middle)} of {len(middle)} do well where the weights' step lies in 2.5e-3 to" in text
    )
    steps = [rate(r, "multipliers") for r in good]
    assert f"of those that do well go from {min(steps):.0e} to {max(steps):.0e}".replace("e-0", "e-") in text


def rate(row: Row, group: str) -> float:
    return float(row.draw[f"method.{group}.lr"])
