"""Solutions as files: states and multipliers in safetensors, the rest as JSON.

In: a `Solution`. Out: two files of an exported folder, and the solution again. Invariant: details that are not plain
data (a backend's own objects) are left out, and said to be.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from pydantic import JsonValue
from torch import nn

from lagcompile.export import plain
from lagcompile.export.record import SOLUTION, SOLUTION_TENSORS
from lagcompile.export.strict import record, tensors_of
from lagcompile.ir.base import DataError, Frozen
from lagcompile.ir.program import Program
from lagcompile.ir.solution import History, Solution, Status

_KINDS = ("state/", "multiplier/")


class SolutionFile(Frozen):
    """`solution.json`."""

    status: str
    history: JsonValue
    steps: int
    gradient_evaluations: int
    seconds: float
    details: JsonValue
    left_out: tuple[str, ...]
    """Details that are not plain data."""
    program: Program


def solution_files(solution: Solution) -> dict[str, bytes]:
    """The files of a solution by name; its weights are the folder's tensors."""
    from safetensors.torch import save

    details = {k: v for k, v in solution.details.items() if _plain(v)}
    data = SolutionFile(
        status=solution.status.name,
        history=plain.nested([dict(r) for r in solution.history.rows]),
        steps=solution.steps,
        gradient_evaluations=solution.gradient_evaluations,
        seconds=solution.seconds,
        details=plain.nested(details),
        left_out=tuple(sorted(set(solution.details) - set(details))),
        program=solution.program,
    )
    tensors = {f"state/{n}": t for n, t in solution.states.items()}
    tensors |= {f"multiplier/{n}": t for n, t in solution.multipliers.items()}
    kept = {n: t.detach().cpu().clone(memory_format=torch.contiguous_format) for n, t in tensors.items()}
    return {SOLUTION: (data.model_dump_json(indent=2) + "\n").encode(), SOLUTION_TENSORS: bytes(save(kept))}


def solution_from(files: Mapping[str, bytes], model: nn.Module, program: Program) -> Solution:
    """The solution of a folder.

    Args:
        files: the folder's files.
        model: the loaded model, which holds the solution's weights.
        program: the folder's program, for its states' names.

    Raises:
        DataError: the folder was exported without a solution, or it is damaged.
    """
    if SOLUTION not in files or SOLUTION_TENSORS not in files:
        raise DataError(f"the folder holds no solution ({SOLUTION}): export with solution=..., or take the model alone")
    tensors = tensors_of(files[SOLUTION_TENSORS], SOLUTION_TENSORS)
    data = record(files[SOLUTION], SOLUTION, SolutionFile)
    if [s.name for s in data.program.states] != [s.name for s in program.states]:
        raise DataError(f"{SOLUTION} is of a program with other states than {program.name}")
    states, multipliers = (
        {n.removeprefix(kind): t for n, t in tensors.items() if n.startswith(kind)}
        for kind in ("state/", "multiplier/")
    )
    known = states.keys() <= {s.name for s in program.states}
    known &= multipliers.keys() <= {m.name for m in data.program.multipliers}
    rows = plain.unnested(data.history)
    numbers = isinstance(rows, list) and all(
        isinstance(r, dict) and all(type(v) in (int, float) for v in r.values()) for r in rows
    )
    details = plain.unnested(data.details)
    if not known or not numbers or data.status not in Status.__members__ or not isinstance(details, dict):
        raise DataError(f"{SOLUTION} or {SOLUTION_TENSORS} is not what this lagcompile writes")
    return Solution(
        model=model,
        status=Status[data.status],
        history=History(tuple(rows)),
        states=states,
        multipliers=multipliers,
        program=data.program,
        steps=data.steps,
        gradient_evaluations=data.gradient_evaluations,
        seconds=data.seconds,
        details=details,
    )


def _plain(value: Any) -> bool:
    if isinstance(value, Mapping):
        return all(isinstance(k, str) and _plain(v) for k, v in value.items())
    if isinstance(value, list | tuple):
        return all(map(_plain, value))
    return value is None or type(value) in (bool, int, float, str)
