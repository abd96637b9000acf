"""The plan preview: what a program would cost, before anything is allocated.

In: a `Program` and its `Partition`, the number of examples, the methods' slots. Out: `Plan`, plain data that prints
as a table. Invariant: counting only; a plan for 14 million examples costs what one for 10 costs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from lagcompile.frontend.explain import Explanation, explain
from lagcompile.frontend.graph import dtype_of
from lagcompile.frontend.partition import Partition
from lagcompile.ir.arguments import expect_count
from lagcompile.ir.base import Measured
from lagcompile.ir.program import Program, StateVariable
from lagcompile.ir.sampling import sampled, samples


class StagePlan(Measured):
    """One stage."""

    name: str
    modules: str
    parameters: int
    flops: int


class StatePlan(Measured):
    """One state: where it is cut, and how many numbers it adds."""

    name: str
    after: str
    type: str
    why: str
    crossing: tuple[str, ...]
    variables: int
    constraints: int
    multipliers: int
    bytes: int
    """States, multipliers and their optimiser rows."""


class Plan(Measured):
    """Counts and bytes of a program for a data set of `examples` rows. `print(plan)` shows the tables."""

    program: str
    examples: int
    stages: tuple[StagePlan, ...]
    states: tuple[StatePlan, ...]
    weights: int
    breakpoints: tuple[Explanation, ...] = ()
    """Why each breakpoint is where it is, and the best other places."""
    notes: tuple[str, ...] = ()

    @property
    def variables(self) -> int:
        """Weights and states."""
        return self.weights + sum(s.variables for s in self.states)

    @property
    def constraints(self) -> int:
        """Scalar constraints."""
        return sum(s.constraints for s in self.states)

    @property
    def multipliers(self) -> int:
        """Scalar multipliers."""
        return sum(s.multipliers for s in self.states)

    @property
    def bytes(self) -> int:
        """Bytes of states, multipliers and their optimiser rows."""
        return sum(s.bytes for s in self.states)

    def __str__(self) -> str:
        stage_rows = [("stage", "parameters", "flops/example", "modules")]
        stage_rows += [(s.name, f"{s.parameters:,}", f"{s.flops:,}", s.modules) for s in self.stages]
        lines = [f"plan for {self.program}, {self.examples:,} examples", *_table(stage_rows, "lrrl")]
        if self.states:
            rows = [("state", "type", "variables", "constraints", "multipliers", "bytes", "cut")]
            rows += [
                (
                    s.name,
                    s.type,
                    f"{s.variables:,}",
                    f"{s.constraints:,}",
                    f"{s.multipliers:,}",
                    size(s.bytes),
                    f"{s.why}" + (f" (crossing: {', '.join(s.crossing)})" if len(s.crossing) > 1 else ""),
                )
                for s in self.states
            ]
            lines += ["", *_table(rows, "llrrrrl"), "", *_explained(self.breakpoints)]
        lines += [
            "",
            f"  {self.variables:,} variables ({self.weights:,} weights), {self.constraints:,} constraints, "
            f"{self.multipliers:,} multipliers",
            f"  {size(self.bytes)} for states, multipliers and their optimiser rows",
            *(f"  {n}" for n in self.notes),
        ]
        return "\n".join(lines)


def plan(
    program: Program,
    partition: Partition,
    *,
    examples: int,
    state_slots: int = 1,
    dual_slots: int = 0,
    batch_size: int = 64,
) -> Plan:
    """Count a program.

    Args:
        program: the program; shapes must be known for bytes.
        partition: where it was cut, and why.
        examples: rows of the data set.
        state_slots: optimiser numbers for each state number (1 for Adagrad, 2 for Adam).
        dual_slots: optimiser numbers for each multiplier.
        batch_size: rows of a batch, for transient states.

    Raises:
        SpecError: a number is none, or negative.
    """
    for name, value, least in (
        ("examples", examples, 1),
        ("state_slots", state_slots, 0),
        ("dual_slots", dual_slots, 0),
        ("batch_size", batch_size, 1),
    ):
        expect_count(name, value, least)
    crossing = {b.number: b for b in partition.breakpoints}
    reason = {b.number: b.reason for b in partition.breakpoints}
    used: set[str] = set()
    stages = []
    sizes = {w.name: w.type.count or 0 for w in program.weights}
    for stage in program.stages:
        own = [w for w in stage.weights if w not in used]
        used.update(own)
        stages.append(
            StagePlan(
                name=stage.name,
                modules=_short(stage.modules),
                parameters=sum(sizes.get(w, 0) for w in own),
                flops=stage.flops,
            )
        )
    states = []
    for s in program.states:
        counts = _counts(program, s, examples, batch_size)
        width = _width(s)
        states.append(
            StatePlan(
                name=s.name,
                after=s.node,
                type=str(s.type),
                why=reason.get(s.breakpoint, ""),
                crossing=crossing[s.breakpoint].crossing if s.breakpoint in crossing else (),
                variables=counts[0],
                constraints=counts[1],
                multipliers=counts[2],
                bytes=counts[0] * (width + state_slots * max(width, 4)) + counts[2] * (width + dual_slots * 4),
            )
        )
    known = all(s.type.shape is not None for s in program.states)
    return Plan(
        program=program.name,
        examples=examples,
        stages=tuple(stages),
        states=tuple(states),
        weights=sum(w.type.count or 0 for w in program.weights if w.trainable),
        breakpoints=explain(partition),
        notes=() if known else ("shapes are not known yet: lift with example_inputs to count states",),
    )


def _explained(breakpoints: Sequence[Explanation]) -> list[str]:
    rows = [("breakpoint", "width/example", "larger stage", "why", "else")]
    for b in breakpoints:
        others = "; ".join(f"{a.after} ({size(a.width)}, {a.largest:,} flops)" for a in b.alternatives)
        rows.append((str(b.number), size(b.width), f"{b.largest:,} flops", b.reason, others or "nowhere else"))
    return _table(rows, "lrrll")


def _width(s: StateVariable) -> int:
    return dtype_of(s.storage.keeps(s.type.dtype)).itemsize


def _counts(program: Program, s: StateVariable, examples: int, batch: int) -> tuple[int, int, int]:
    """Variables, scalar constraints and multipliers of one state."""
    features = s.type.count or 0
    constraint = program.defect_of(s.name)
    if constraint is None:
        return 0, 0, 0
    rows = s.storage.rows(examples, batch, program.classes or 0)
    variables = rows * features * max(1, len(s.storage.parts))
    if s.storage.sampled:
        rows = samples(program) if constraint.stage in sampled(program).stages else examples
    scalars = rows * (1 if constraint.transform.per_row else features)
    multiplier = program.multiplier_of(constraint.name)
    if multiplier is None:
        return variables, scalars, 0
    return variables, scalars, math.prod(multiplier.laid.shape(rows, program.classes or 0, (features,)))


def _short(modules: Sequence[str]) -> str:
    return ", ".join(modules) if len(modules) <= 4 else f"{modules[0]} .. {modules[-1]} ({len(modules)} modules)"


def _table(rows: Sequence[tuple[str, ...]], align: str) -> list[str]:
    widths = [max(len(r[i]) for r in rows) for i in range(len(rows[0]))]
    return [
        "  "
        + "  ".join(c.rjust(w) if a == "r" else c.ljust(w) for c, w, a in zip(row, widths, align, strict=True)).rstrip()
        for row in rows
    ]


def size(count: float) -> str:
    """Bytes in a unit that a person reads."""
    if count < 1024:
        return f"{count:.0f} B"
    power = min(int(math.log(count, 1024)), 4)
    return f"{count / 1024**power:.1f} {('KiB', 'MiB', 'GiB', 'TiB')[power - 1]}"
