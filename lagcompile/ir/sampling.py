"""Which stages of a program run on samples of states kept per class, and which values are of samples.

In: a `Program`. Out: names. Invariant: a stage runs on samples where it reads a value of samples; a variable that such
a stage writes must be sampled itself, since no example of the data belongs to its rows.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from lagcompile.ir.program import Program


class Sampled(NamedTuple):
    """Names of the stages that run on samples, and of the values that belong to samples."""

    stages: frozenset[str]
    values: frozenset[str]


def sampled(program: Program) -> Sampled:
    """Follow the samples through the stages."""
    kept = {s.name for s in program.states if s.storage.variable}
    values = {s.name for s in program.states if s.storage.sampled}
    stages = set()
    for stage in program.stages:
        if values.intersection(stage.reads):
            stages.add(stage.name)
            values.update(w for w in stage.writes if w not in kept)
    return Sampled(frozenset(stages), frozenset(values))


def samples(program: Program) -> int:
    """Return the number of synthetic examples; 0 where no state is sampled."""
    sizes = [s.storage.sampling.size for s in program.states if s.storage.sampling is not None]
    return sizes[0] * (program.classes or 0) if sizes else 0


def mixed(program: Program) -> Iterator[str]:
    """Say where samples and examples would meet, or samples of two kinds."""
    drawn = {s.name: s.storage.sampling for s in program.states if s.storage.sampled}
    if len(set(drawn.values())) > 1:
        names = ", ".join(drawn)
        yield f"the class_gaussian states {names} must all have the same number of samples and the same noise"
    found = sampled(program)
    for stage in program.stages:
        other = ", ".join(r for r in stage.reads if r not in found.values)
        if stage.name in found.stages and other:
            yield (
                f"stage {stage.name} reads a class_gaussian state and also {other}, which belongs to real examples: "
                "cut where only the state crosses"
            )
        for s in program.states if stage.name in found.stages else ():
            if s.name in stage.writes and s.storage.variable and not s.storage.sampled:
                what = "a table of examples" if s.storage.per_example else s.storage.kind
                yield (
                    f"the state {s.name} (after {s.node}, {s.module}) lies behind a class_gaussian state and cannot "
                    f"be {what}: make it class_gaussian or eliminated"
                )
    reads = program.objective.reads
    of_samples, of_examples = ([r for r in reads if (r in found.values) == side] for side in (True, False))
    if of_samples and of_examples:
        yield (
            f"the loss reads {', '.join(of_samples)}, of samples of a class_gaussian state, and "
            f"{', '.join(of_examples)}, of real examples: return one kind only, or keep the states in a table"
        )
