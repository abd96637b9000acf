"""The texts of a drawing: stages, breakpoints and skip connections, without their places.

In: a `Program`. Out: `Cell`, `Label`, `Skip`. Invariant: everything is in the program; long lists are shortened and
say by how much; of very many stages the first and the last are drawn, and the number between them is said.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lagcompile.frontend.graph import dtype_of
from lagcompile.frontend.plan import size
from lagcompile.ir.program import Program, Stage, StateVariable, TensorType
from lagcompile.ir.symbols import features, shapes_known

MOST, ENDS = 60, 20
"""More stages than MOST are drawn by their first and last ENDS."""
MODULES, STATES, LONGEST = 6, 5, 26


@dataclass(frozen=True)
class Label:
    """A value that leaves a stage: its name, and two lines about it; whether the next stage drawn reads it."""

    name: str
    lines: tuple[str, ...]
    near: bool
    kept: bool
    """A variable of the program; False for outputs and eliminated values."""


@dataclass(frozen=True)
class Cell:
    """One stage, or a number of stages that are not drawn.

    Attributes:
        name: f_k; empty where stages are left out.
        modules: what runs in it.
        facts: weights and cost.
        share: its operations relative to the largest stage's.
        labels: what leaves it.
        breakpoint: number of the breakpoint after it; None after the last stage.
        data: data that it reads, where they are not the network's first stage's.
    """

    name: str
    modules: tuple[str, ...]
    facts: tuple[str, ...]
    share: float
    labels: tuple[Label, ...]
    breakpoint: int | None
    data: tuple[str, ...]


@dataclass(frozen=True)
class Skip:
    """A state that a later stage than the next reads: numbers of the cells."""

    name: str
    start: int
    end: int


@dataclass(frozen=True)
class Picture:
    """All that is drawn."""

    title: str
    cells: tuple[Cell, ...]
    skips: tuple[Skip, ...]
    notes: tuple[str, ...]


def picture(program: Program) -> Picture:
    """Return the texts of a program's drawing."""
    count = len(program.stages)
    hidden = count - 2 * ENDS if count > MOST else 0
    shown = [*range(count)] if not hidden else [*range(ENDS), *range(count - ENDS, count)]
    largest = max((s.flops for s in program.stages), default=0) or 1
    cells = [_cell(program, k, largest) for k in shown]
    place = {k: i if not hidden or i < ENDS else i + 1 for i, k in enumerate(shown)}
    if hidden:
        cells.insert(ENDS, Cell("", (f"{hidden:,} more", "stages"), (), 0.0, (), None, ()))
    weights = sum(w.type.count or 0 for w in program.weights)
    kept = sum(s.storage.variable for s in program.states)
    title = f"{program.name}: {count} stage{_s(count)}, {kept} state{_s(kept)}, {weights:,} weights"
    return Picture(title, tuple(cells), tuple(_skips(program, place)), tuple(_notes(program)))


def _s(count: int) -> str:
    return "" if count == 1 else "s"


def _cell(program: Program, k: int, largest: int) -> Cell:
    stage = program.stages[k]
    used = [w for w in program.weights if w.name in stage.weights]
    total = sum(w.type.count or 0 for w in used)
    held = sum((w.type.count or 0) * dtype_of(w.type.dtype).itemsize for w in used)
    known = shapes_known(program)
    facts = (f"{total:,} weights, {size(held)}", f"{quantity(stage.flops)}flop" if known else "shapes not known")
    last = k + 1 == len(program.stages)
    after = set() if last else set(program.stages[k + 1].reads)
    states = {s.name: s for s in program.states}
    labels = [_label(states[w], w in after) for w in stage.writes if w in states]
    if len(labels) > STATES:
        rest = f"{len(labels) - STATES + 1} more states"
        labels = [*labels[: STATES - 1], Label("...", (rest,), False, True)]
    outputs = [w for w in stage.writes if w in program.objective.reads and w not in states]
    labels += [Label(shortened(w, LONGEST), ("output",), last, False) for w in outputs]
    inputs = {d.name: d.type if known else TensorType() for d in program.data}
    data = [f"{shortened(r, LONGEST)}: {shape(inputs[r])}" for r in stage.reads if r in inputs]
    return Cell(
        stage.name,
        _modules(stage),
        facts,
        stage.flops / largest if known else 0.0,
        tuple(labels),
        None if last else k + 1,
        tuple(data),
    )


def _label(state: StateVariable, near: bool) -> Label:
    within = ", " + state.domain.span.replace(">=", "\u2265") if state.domain.bounded else ""
    found = features(state.type)
    held = 0
    if found is not None:
        held = dtype_of(state.type.dtype).itemsize
        for d in found:
            held *= d
    kind = state.storage.kind.replace("_", " ")
    lines = (shape(state.type) + within, f"{kind}, {size(held)}" if found is not None else kind)
    return Label(shortened(state.name, LONGEST - 6), lines, near, state.storage.variable)


def shape(kind: TensorType) -> str:
    """Shape of one example: 16 x 8 x 8, 1 for a number, ? where it is not known."""
    found = features(kind)
    if found is None:
        return "?"
    return " \u00d7 ".join(map(str, found)) if found else "1"


def quantity(value: float) -> str:
    """Write a count with a prefix, 1.2 M or 840, and a space after it."""
    for power, letter in ((12, "T"), (9, "G"), (6, "M"), (3, "k")):
        if value >= 10**power:
            return f"{value / 10**power:.3g} {letter}"
    return f"{value:.0f} "


def shortened(name: str, longest: int = LONGEST) -> str:
    """Leave out the middle of a long name."""
    if len(name) <= longest:
        return name
    half = (longest - 1) // 2
    return f"{name[:half]}\u2026{name[-(longest - 1 - half) :]}"


def _modules(stage: Stage) -> tuple[str, ...]:
    """Innermost modules that run in a stage, a few of many."""
    names = [m for m in stage.modules if not any(o.startswith(m + ".") for o in stage.modules)]
    if not names:
        return ("functions only",)
    shown = [shortened(n) for n in names]
    if len(shown) <= MODULES:
        return tuple(shown)
    return (*shown[: MODULES - 3], f"\u2026 {len(shown) - MODULES + 2} more", *shown[-1:])


def _skips(program: Program, place: dict[int, int]) -> list[Skip]:
    made = {w: k for k, s in enumerate(program.stages) for w in s.writes}
    states = {s.name for s in program.states}
    return [
        Skip(shortened(r, LONGEST - 6), place[made[r]], place[k])
        for k, stage in enumerate(program.stages)
        for r in stage.reads
        if r in states and k - made[r] > 1 and k in place and made[r] in place
    ]


def _notes(program: Program) -> list[str]:
    found = []
    for w in program.weights:
        readers = [s.name for s in program.stages if w.name in s.weights]
        if len(readers) > 1:
            found.append(f"{w.name} is one variable in {_listed(readers)}")
    if len(found) > 4:
        found = [*found[:3], f"{len(found) - 3} more weights are read by several stages"]
    return found


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names) if len(names) <= 6 else f"{', '.join(names[:3])}, \u2026, {names[-1]} ({len(names)} stages)"
