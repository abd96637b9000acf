"""Solutions as files: states and multipliers in safetensors, the rest as JSON.

In: a `Solution`. Out: two files of an exported folder, and the solution again. Invariant: details that are no plain
data (a backend's own objects) are left out, and said to be.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lagcompile.export.record import SOLUTION, SOLUTION_TENSORS
from lagcompile.ir.base import DataError
from lagcompile.ir.program import Program
from lagcompile.ir.solution import History, Solution, Status
from lagcompile.ir.text import from_json, to_json


def solution_files(solution: Solution) -> dict[str, bytes]:
    """The files of a solution by name; its weights are the folder's tensors."""
    from safetensors.torch import save

    details = {k: v for k, v in solution.details.items() if _plain(v)}
    data = {
        "status": solution.status.name,
        "history": [dict(r) for r in solution.history.rows],
        "steps": solution.steps,
        "gradient_evaluations": solution.gradient_evaluations,
        "seconds": solution.seconds,
        "details": details,
        "left_out": sorted(set(solution.details) - set(details)),
        "program": json.loads(to_json(solution.program)),
    }
    tensors = {f"state/{n}": t for n, t in solution.states.items()}
    tensors |= {f"multiplier/{n}": t for n, t in solution.multipliers.items()}
    kept = {n: t.detach().cpu().clone(memory_format=torch.contiguous_format) for n, t in tensors.items()}
    return {SOLUTION: (json.dumps(data, indent=2) + "\n").encode(), SOLUTION_TENSORS: bytes(save(kept))}


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
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        tensors: dict[str, Tensor] = load(files[SOLUTION_TENSORS])
        data = json.loads(files[SOLUTION])
        solved = from_json(json.dumps(data["program"]))
        status = Status[data["status"]]
    except (SafetensorError, KeyError, ValueError) as error:
        raise DataError(f"{SOLUTION} or {SOLUTION_TENSORS} is damaged: {str(error).splitlines()[0]}") from error
    if [s.name for s in solved.states] != [s.name for s in program.states]:
        raise DataError(f"{SOLUTION} is of a program with other states than {program.name}")
    return Solution(
        model=model,
        status=status,
        history=History(tuple(data["history"])),
        states={n.removeprefix("state/"): t for n, t in tensors.items() if n.startswith("state/")},
        multipliers={n.removeprefix("multiplier/"): t for n, t in tensors.items() if n.startswith("multiplier/")},
        program=solved,
        steps=data["steps"],
        gradient_evaluations=data["gradient_evaluations"],
        seconds=data["seconds"],
        details=data["details"],
    )


def _plain(value: Any) -> bool:
    if isinstance(value, Mapping):
        return all(isinstance(k, str) and _plain(v) for k, v in value.items())
    if isinstance(value, list | tuple):
        return all(map(_plain, value))
    return value is None or isinstance(value, bool | int | float | str)
