"""Comparison of two specs, split specs or programs.

In: paths. Out: a unified diff. Invariant: nothing is measured here.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from lagcompile.frontend.split import SplitFile
from lagcompile.ir.base import SpecError
from lagcompile.ir.jsonfile import validate as validate_json
from lagcompile.ir.program import Program
from lagcompile.ir.text import diff, unfolded
from lagcompile.ir.yamlfile import read, validate
from lagcompile.workbench.prepare import Prepared, prepare
from lagcompile.workbench.spec import RunSpec, load


def described(prepared: Prepared) -> str:
    """Return a spec as text: program and split."""
    lifted = prepared.lifted
    lines = [str(prepared.program).rstrip(), "  split"]
    cuts = lifted.partition.breakpoints
    lines += [f"    {b.number}: {b.reason}, states after {', '.join(b.after)}" for b in cuts] or ["    none: one stage"]
    lines += [f"    {s.name} runs {', '.join(s.modules) or 'functions only'}" for s in lifted.program.stages]
    return "\n".join(lines) + "\n"


def text_of(path: Path, trust: Sequence[str] = ()) -> str:
    """Return a spec's program and split, or the program of a JSON file, as text.

    Raises:
        SpecError: the file is missing or wrong.
    """
    if path.suffix != ".json":
        return described(prepare(load(path, trust=trust)))
    return str(validate_json(path, Program, error=SpecError, unfold=unfolded))


def is_split(path: Path) -> bool:
    """Return whether a YAML file is a split spec, which holds `split:` and nothing else."""
    data = read(path, SplitFile, RunSpec).data if path.suffix != ".json" else None
    return isinstance(data, dict) and set(data) == {"split"}


def text_of_split(path: Path, trust: Sequence[str] = ()) -> str:
    """Print the policy of a split spec, or of a run's spec, one option and one place a line.

    Raises:
        SpecError: the file is missing or wrong.
    """
    policy = validate(path, SplitFile).split if is_split(path) else prepare(load(path, trust=trust)).lifted.policy
    lines = []
    for key, value in policy.model_dump().items():
        if isinstance(value, tuple):
            lines += [f"  {key} {' and '.join(v) if isinstance(v, tuple) else v}" for v in value]
        else:
            lines.append(f"  {key}: {value}")
    return "\n".join(["split", *lines]) + "\n"


def compare_files(a: Path, b: Path, *, trust: Sequence[str] = ()) -> str:
    """Return the unified diff of two specs, split specs or programs; empty where they say the same.

    A split spec next to a run's spec is compared with that spec's split.

    Raises:
        SpecError: a file is missing or wrong; both are read, so all problems come at once.
    """
    texts, problems = [], list[str]()
    try:
        splits = [is_split(path) for path in (a, b)]
    except SpecError:  # reported below, for both files
        splits = []
    if any(splits) and ".json" in (a.suffix, b.suffix):
        raise SpecError("a split spec cannot be compared with a program: give the spec that the program came from")
    read_as = text_of_split if any(splits) else text_of
    for path in (a, b):
        try:
            texts.append(read_as(path, trust))
        except SpecError as error:
            problems += error.problems
    if problems:
        raise SpecError(list(dict.fromkeys(problems)))
    if (a.suffix == ".json") != (b.suffix == ".json"):  # a program's JSON holds no split
        texts = [t.split("\n  split\n")[0].rstrip() + "\n" for t in texts]
    return diff(texts[0], texts[1], (str(a), str(b)))
