"""Printed forms of a program: stable text, JSON, YAML-ready data, and a diff of two texts.

In: a `Program`. Out: strings. Invariant: equal programs print equal text, on every machine; JSON reads back equal. A
run of equal stages, with their states, weights and constraints, is said once over an index (`ir.families`).
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterator, Sequence
from dataclasses import replace

from lagcompile.ir import families
from lagcompile.ir.base import LagcompileError, ProgramError, SpecError
from lagcompile.ir.program import (
    FORMAT,
    DataVariable,
    DefectConstraint,
    Objective,
    Program,
    StateVariable,
    ValueConstraint,
)


def to_json(program: Program) -> str:
    """Return JSON with two-space indentation; `from_json` reads it back to an equal program."""
    return json.dumps(families.fold_lists(program.model_dump(mode="json")), indent=2, ensure_ascii=False)


def from_json(text: str, source: str = "program.json", *, error: type[LagcompileError] = ProgramError) -> Program:
    """Read a program from the text that `to_json` wrote.

    Args:
        text: what `to_json` wrote.
        source: name that errors show.
        error: class of the problems.

    Raises:
        LagcompileError: of class `error`: the text is not a program, or an inconsistent one; each problem names a
            line and a key.
    """
    from lagcompile.ir.jsonfile import check

    if not isinstance(text, str):
        raise error(f"{source}: expected the text of a program, got an object of type {type(text).__name__}")
    return check(text, source, Program, error=error, unfold=unfolded)


def to_yaml(program: Program) -> str:
    """Return the YAML of a program; `from_yaml` reads it back to an equal program."""
    from lagcompile.ir.yamlfile import dumps

    return dumps(families.fold_lists(program.model_dump(mode="json")))


def from_yaml(text: str, source: str = "program.yaml") -> Program:
    """Read a program from YAML text.

    Args:
        text: what `to_yaml` wrote, perhaps edited.
        source: name that errors show.

    Raises:
        SpecError: the text is not a program; each problem names a line.
        ProgramError: the program is inconsistent.
    """
    from lagcompile.ir.yamlfile import check, read_text

    document = read_text(text, source)
    try:
        data, origin = unfolded(document.data)
    except families.FamilyError as error:
        raise SpecError(f"{source}: {error}") from None
    return check(replace(document, data=data, origin=origin), Program)


def unfolded(data: object) -> tuple[object, families.Origin]:
    """Every entry by itself; a file of format 1 lists them so."""
    if isinstance(data, dict) and data.get("format") == 1:
        data = data | {"format": FORMAT}
    return families.unfold_lists(data)


def to_text(program: Program) -> str:
    """Print the program for a person."""
    return "\n".join(_lines(program)) + "\n"


def diff(a: str, b: str, names: tuple[str, str] = ("a", "b")) -> str:
    """Return the unified diff of two printed programs or specs; empty where they are equal."""
    return "".join(difflib.unified_diff(a.splitlines(True), b.splitlines(True), *names))


def _lines(program: Program) -> Iterator[str]:
    yield f"program {program.name}"
    yield "  data"
    yield from _columns([(d.name, _data(d)) for d in program.data])
    trainable = [w for w in program.weights if w.trainable]
    count = sum(w.type.count or 0 for w in trainable)
    yield f"  weights ({count:,} trainable in {len(trainable)} tensors)"
    readers = {w.name: [s.name for s in program.stages if w.name in s.weights] for w in program.weights}
    yield from _columns(
        [
            (w.name, str(w.type), " ".join(readers[w.name]), _note(w.trainable, w.aliases, readers[w.name]))
            for w in program.weights
        ]
    )
    if program.states:
        yield "  states"
        yield from _columns([(s.name, *_state(s)) for s in program.states])
    yield "  stages"
    yield from _columns([(f"{s.name}({', '.join(s.reads)}) -> {', '.join(s.writes)}",) for s in program.stages])
    yield "  minimise"
    yield from _objective(program.objective)
    if program.constraints:
        yield "  subject to"
        yield from _columns([_constraint(program, c) for c in program.constraints])


def _note(trainable: bool, aliases: Sequence[str], readers: Sequence[str]) -> str:
    notes = [] if trainable else ["frozen"]
    if len(readers) > 1:
        notes.append("shared by stages")
    if aliases:
        notes.append("also " + ", ".join(aliases))
    return "; ".join(notes)


def _columns(rows: Sequence[tuple[str, ...]]) -> Iterator[str]:
    if not rows:
        yield "    none"
        return
    rows = [cells for run in families.runs(rows) for cells in _said(rows, run)]
    widths = [max(len(r[i]) for r in rows) for i in range(len(rows[0]))]
    for row in rows:
        yield ("    " + "  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True))).rstrip()


def _said(rows: Sequence[tuple[str, ...]], run: families.Run | int) -> Iterator[tuple[str, ...]]:
    """The rows of a family, each closed by the range of its index; of a single row, itself."""
    if isinstance(run, int):
        yield (*rows[run], "")
        return
    for cells in run.each:
        yield (*cells, f"k = {run.first} .. {run.last}")


def _data(d: DataVariable) -> str:
    if not d.free:
        return str(d.type)
    bounds = f" in [{d.lower}, {d.upper}]" if d.lower is not None or d.upper is not None else ""
    return f"{d.type} free{bounds}"


def _state(s: StateVariable) -> tuple[str, str, str, str]:
    rows = str(s.type).replace("[B", f"[{s.storage.letter}")
    start = f"start {s.start.kind}, " if s.storage.variable else ""
    return rows, s.storage.text, s.domain.text, f"{start}after {s.node}"


def _objective(o: Objective) -> Iterator[str]:
    yield f"    {o.reduction} over examples of {o.loss}({', '.join(o.reads)}, target)"
    for r in o.regularisers:
        yield f"    + {r.weight:g} {'|' + r.on + '|_1' if r.kind == 'l1' else '/2 |' + r.on + '|_2^2'}"


def _constraint(program: Program, c: DefectConstraint | ValueConstraint) -> tuple[str, str, str]:
    multiplier = program.multiplier_of(c.name)
    dual = "no multiplier"
    if multiplier is not None:
        dual = f"multiplier {multiplier.name} ({multiplier.layout}, start {multiplier.start})"
    if c.weight is not None:
        dual += f", rho {c.weight.text}"
    if isinstance(c, DefectConstraint):
        stage = program.stage(c.stage)
        state = program.state(c.state)
        prediction = f"{stage.name}({', '.join(stage.reads)})" + (f".{state.node}" if len(stage.writes) > 1 else "")
        inner = state.storage.defect_text(prediction, c.state)
        reduction = ", mean over features" if c.features == "mean" else ""
        return f"{c.name}:", f"{c.transform.text(inner)} {c.relation} 0", dual + reduction
    if c.function is None:
        low = "" if c.lower is None else f"{c.lower:g} <= "
        high = "" if c.upper is None else f" <= {c.upper:g}"
        return f"{c.name}:", f"{low}{', '.join(c.reads)}{high}", dual
    return f"{c.name}:", f"{c.function}({', '.join(c.reads)}) {c.relation} 0", dual
