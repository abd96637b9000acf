"""The report of a run: one table for people, one JSON for programs, figures where matplotlib is installed.

In: `Outcome`. Out: texts and files. Invariant: every number comes from the outcome; what was not measured is shown as
a dash and never filled in.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from lagcompile.check.certificate import versions
from lagcompile.export.drawing import drawn
from lagcompile.ir.base import MissingExtraError
from lagcompile.ir.solution import History
from lagcompile.ir.yamlfile import dumps, spec_hash
from lagcompile.workbench.plot import draw_curves
from lagcompile.workbench.progress import HEADER as HEADER_OF_ITERATIONS
from lagcompile.workbench.progress import iteration_cells
from lagcompile.workbench.run import Outcome

REPORT, REPORT_JSON, CURVES, NETWORK = "report.md", "report.json", "curves.png", "network.png"
HEADER = ("", "test accuracy", "test loss", "final defect", "gradients", "time")


def rows(outcome: Outcome) -> list[tuple[str, ...]]:
    """Return the table of results, without its header: the method and, where it ran, backprop."""
    solution = outcome.solution
    table: list[tuple[str, ...]] = [
        (
            outcome.prepared.loaded.spec.method.kind,
            _percent(outcome.test),
            f"{outcome.test['loss']:.4f}",
            "-" if outcome.defect is None else f"{outcome.defect:.1e}",
            f"{solution.gradient_evaluations:,}",
            f"{solution.seconds:.1f} s",
        )
    ]
    if outcome.baseline is not None:
        table.append(
            (
                "backprop",
                _percent(outcome.baseline_test),
                f"{outcome.baseline_test['loss']:.4f}",
                "0",
                f"{outcome.baseline.gradient_evaluations:,}",
                f"{outcome.baseline.seconds:.1f} s",
            )
        )
    return table


def _percent(found: Mapping[str, float]) -> str:
    return f"{100 * found['accuracy']:.2f} %" if "accuracy" in found else "-"


def remarks(outcome: Outcome) -> list[str]:
    """Return what an exact solver adds to its status: its message, and constraints that exclude each other."""
    details = outcome.solution.details
    conflict = details.get("conflict", ())
    lines = [str(details["message"])] if details.get("message") else []
    if conflict:
        lines.append(f"the smallest set found that excludes each other: {'; '.join(conflict)}")
    return lines


def facts(outcome: Outcome) -> dict[str, Any]:
    """Return the content of report.json, for programs."""
    solution, spec = outcome.solution, outcome.prepared.loaded.spec
    worst = outcome.certificate.worst
    baseline = outcome.baseline
    return {
        "name": spec.name,
        "spec": spec_hash(spec),
        "status": solution.status.name.lower(),
        "advice": solution.status.advice,
        "method": spec.method.kind,
        "seed": spec.run.seed,
        "data": {"name": outcome.prepared.data.name, "note": outcome.prepared.data.note},
        "test": dict(outcome.test),
        "last": dict(solution.history.last),
        "final": dict(solution.details.get("final", {})),
        "defects": [d.model_dump() for d in outcome.defects],
        "steps": solution.steps,
        "gradient_evaluations": solution.gradient_evaluations,
        "seconds": solution.seconds,
        "bytes": solution.details.get("bytes"),
        "certificate": {
            "verdict": outcome.certificate.verdict,
            "ok": outcome.certificate.ok,
            "reasons": list(outcome.certificate.reasons),
            "residuals": len(outcome.certificate.residuals),
            "worst": None if worst is None else {"kind": worst.kind, "name": worst.name, "value": worst.value},
        },
        "conditions": None if outcome.conditions is None else outcome.conditions.model_dump(mode="json"),
        "iterations": [dict(r) for r in solution.history.rows if "dual_infeasibility" in r],
        "baseline": None
        if baseline is None
        else {
            "status": baseline.status.name.lower(),
            "test": dict(outcome.baseline_test),
            "gradient_evaluations": baseline.gradient_evaluations,
            "seconds": baseline.seconds,
        },
        "versions": versions(),
    }


def markdown(outcome: Outcome, figures: Sequence[str], notes: Sequence[str]) -> str:
    """Return the text of report.md, for people."""
    solution, spec, data = outcome.solution, outcome.prepared.loaded.spec, outcome.prepared.data
    lines = [f"# {spec.name}", ""]
    lines += [spec.note, ""] if spec.note else []
    lines += [
        f"{solution.status.name.lower().replace('_', ' ')} after {solution.steps:,} steps: {solution.status.advice}.",
        "",
        *_table([HEADER, *rows(outcome)]),
        "",
        "Gradients: forward and backward passes made. Final defect: mean |f(h) - h| over all states of all examples.",
        "",
        f"Data: {data.name}, {len(data.train_x):,} training, {len(data.validation_x):,} validation and "
        f"{len(data.test_x):,} test examples. {data.note}",
        "",
    ]
    returned = solution.details.get("returned_step", solution.steps)
    if returned != solution.steps:
        lines += [
            f"The weights are those of step {returned}, the best ones on a fixed sample of the training data.",
            "",
        ]
    if outcome.defects:
        lines += ["## Final defects", "", "Over all training examples, in eval mode.", ""]
        lines += _table([DEFECT_HEADER, *defect_rows(outcome)])
        lines.append("")
    lines += [f"![{name.removesuffix('.png')}]({name})" for name in figures]
    lines += [*notes, ""] if figures or notes else []
    lines += ["## Program", "", "```", str(outcome.prepared.program).rstrip(), "```", ""]
    lines += ["## Certificate", "", "```", str(outcome.certificate), "```", ""]
    if outcome.conditions is not None:
        lines += ["## KKT conditions at the solution", "", *(f"- {r}" for r in remarks(outcome)), ""]
        lines += ["```", str(outcome.conditions), "```", ""]
        lines += [*(f"- {v}" for v in solution.details.get("violated", ())), ""]
    iterations = [r for r in solution.history.rows if "dual_infeasibility" in r]
    if iterations:
        lines += ["## Iterations", ""]
        lines += [*_table([HEADER_OF_ITERATIONS, *(iteration_cells(r) for r in iterations)]), ""]
    made = ", ".join(f"{name} {version}" for name, version in versions().items())
    lines += ["## Spec", "", "```yaml", dumps(spec).rstrip(), "```", "", f"{made}; spec {spec_hash(spec)}"]
    return "\n".join(lines) + "\n"


DEFECT_HEADER = ("state", "after", "mean", "largest", "outside the tube", "tube")


def defect_rows(outcome: Outcome) -> list[tuple[str, ...]]:
    """Final defects by state."""
    return [
        (d.state, d.module, f"{d.mean:.1e}", f"{d.largest:.1e}", f"{100 * d.outside:.1f} %", f"{d.epsilon:g}")
        for d in outcome.defects
    ]


def _table(table: Sequence[Sequence[str]]) -> list[str]:
    head, *body = ["| " + " | ".join(row) + " |" for row in table]
    return [head, "|" + "---|" * len(table[0]), *body]


def files(outcome: Outcome) -> tuple[dict[str, bytes], list[str]]:
    """Report, its numbers and the figures by file name, and notes, such as that figures were left out."""
    figures, notes = figures_of(outcome)
    text = json.dumps(facts(outcome), indent=2) + "\n"
    return {REPORT_JSON: text.encode(), REPORT: markdown(outcome, list(figures), notes).encode(), **figures}, notes


def figures_of(outcome: Outcome) -> tuple[dict[str, bytes], list[str]]:
    """The figures by file name, and notes on those that cannot be made."""
    solution, kind = outcome.solution, outcome.prepared.loaded.spec.method.kind
    runs: dict[str, tuple[History, float]] = {
        kind: (solution.history, solution.gradient_evaluations / max(1, solution.steps))
    }
    if outcome.baseline is not None:
        runs["backprop"] = (outcome.baseline.history, 1.0)
    try:
        rows = any(history.rows for history, _ in runs.values())
        curves = {CURVES: draw_curves(runs)} if rows else {}
        return {**curves, NETWORK: drawn(solution.program, "png")}, []
    except MissingExtraError as error:
        return {}, [f"No figures: {error}"]
