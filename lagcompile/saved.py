"""Lifted models in folders: written with everything they need, and read again without the model's source.

In: a `Lifted`, a folder. Out: the folder; a `Lifted`. Invariant: what is read does what was written: the folder is
loaded and run next to the original before it appears, and its program is compared with the stages when it is read.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from lagcompile.export.folder import Contents, write_folder
from lagcompile.export.load import load_folder, read_files
from lagcompile.export.record import SPLIT
from lagcompile.export.solutions import solution_from
from lagcompile.export.strict import record
from lagcompile.frontend.split import SplitFile
from lagcompile.ir.alone import alone
from lagcompile.ir.arguments import expect
from lagcompile.ir.base import DataError, LagcompileError, LiftError
from lagcompile.ir.disk import naming
from lagcompile.ir.places import path_of
from lagcompile.ir.solution import Solution
from lagcompile.lift import Lifted


@alone
def save(
    lifted: Lifted,
    folder: str | Path,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    solution: Solution | None = None,
    replace: bool = False,
) -> Path:
    """Write a lifted model as a self-contained folder.

    It holds the program, the split, each stage as a graph of PyTorch's operators and the tensors as safetensors. Before
    it appears, it is loaded and run next to the lifted model in train and in eval mode.

    Args:
        lifted: what is written; its shapes must be known, or arguments given.
        folder: the folder to make.
        args: arguments of the forward; none makes them up from the known types.
        kwargs: keyword arguments of the forward.
        solution: a solution of the program: its weights, states and multipliers are written.
        replace: replace an exported folder that is there.

    Raises:
        LiftError: the model cannot be written; each problem says what to change.
        DataError: something is there already.
    """
    folder = path_of("folder", folder)
    expect("example_kwargs", kwargs, Mapping, "a mapping of names to values")
    expect("solution", solution, Solution, "a lagcompile.Solution")
    tensors = None
    if args or kwargs:
        lifted = lifted.resolve(*args, **(kwargs or {}))
        tensors = lifted.network.capture.signature.flatten(args, kwargs or {})
    if lifted.receipt is None:
        raise LiftError("the shapes of this lifting are not known yet: give example_inputs")
    split = SplitFile(split=lifted.split)
    contents = Contents(lifted.network, lifted.program, split, lifted.formulation, lifted.receipt, lifted.name)
    with naming(folder, "written"):
        return write_folder(contents, folder, tensors=tensors, solution=solution, replace=replace)


@alone
def load(folder: str | Path) -> Lifted:
    """The lifted model of a folder that `Lifted.save` wrote; the model's source is not needed.

    It is called, bound, solved and verified as the model that was lifted; `solution.model` is then a
    `lagcompile.export.model.ExportedModel` with the state_dict keys of the original.

    Raises:
        DataError: a file is missing, was changed or is of another version; each is named.
    """
    parts = load_folder(path_of("folder", folder))
    policy = record(parts.split, f"{folder}: {SPLIT}", SplitFile).split
    return Lifted(parts.network, parts.receipt, policy, parts.formulation, parts.manifest.name)


@alone
def load_model(folder: str | Path) -> nn.Module:
    """The model of an exported folder, to be lifted anew: with another split, or from a spec.

    In a spec: `model: {name: exported, args: {folder: out}}`, the folder beside the spec or below. Values are then
    called by the names of torch.export's operations.

    Raises:
        DataError: a file is missing, was changed or is of another version; each is named.
    """
    return load_folder(folder).network.capture.original


@alone
def load_solution(folder: str | Path) -> Solution:
    """The solution that a folder was exported with (`Lifted.save(folder, solution=...)`).

    Raises:
        DataError: the folder holds no solution, or a file is missing or damaged.
    """
    parts = load_folder(path_of("folder", folder))
    try:
        return solution_from(read_files(folder, parts.manifest), parts.network.capture.original, parts.program)
    except LagcompileError as error:
        raise DataError([p if str(folder) in p else f"{folder}: {p}" for p in error.problems]) from error
