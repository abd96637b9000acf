"""Does an exported folder do what the model does? Asked before the folder is handed over.

In: a network, a folder. Out: nothing, or an error that says what differs. Invariant: both are run in train and in eval
mode, on batch sizes that were not exported where the size is free, from one random state; outputs, buffers and the
random state count.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lagcompile.export.examples import BATCH, rows_of
from lagcompile.export.load import load_folder
from lagcompile.frontend.receipt import resized
from lagcompile.frontend.stages import Network
from lagcompile.frontend.structure import leaves
from lagcompile.ir.base import DataError, LiftError
from lagcompile.runtime.instance import quiet

TOLERANCE = 1e-6
SEED = 20211006


def check(network: Network, folder: Path, tensors: Sequence[Tensor], *, weights: nn.Module | None, free: bool) -> None:
    """Compare a folder with the network that it was made of.

    Args:
        network: the network; not changed.
        folder: the folder.
        tensors: example inputs.
        weights: a module whose weights the folder holds instead of the network's.
        free: whether the batch size is free.

    Raises:
        LiftError: they do not do the same.
    """
    try:
        loaded = load_folder(folder).network
    except DataError as error:
        damage = [p.replace(str(folder), "the exported folder") for p in error.problems]
        raise LiftError(["what was written cannot be read again:", *damage]) from error
    original = network.copy()
    if weights is not None:
        original.capture.original.load_state_dict(weights.state_dict())
    problems: list[str] = []
    for training, size in ((False, BATCH - 1), (True, BATCH + 1)):
        batch = resized(tensors, size) if free else tensors
        mode = f"in {'train' if training else 'eval'} mode with {rows_of(batch)} examples"
        expected = _run(original, batch, training)
        for what, whole in (("the stages", False), ("the network", True)):
            try:
                got = _run(loaded, batch, training, whole=whole)
            except Exception as error:  # whatever an operation says
                first = (str(error).strip().splitlines() or [type(error).__name__])[0]
                problems.append(f"{what} as torch.export programs do not run {mode}: {first}")
                continue
            problems += [f"{what} as torch.export programs {d} {mode}" for d in _differences(expected, got)]
    if problems:
        raise LiftError(
            [
                *dict.fromkeys(problems),
                "the model cannot be exported as it is: an operation that hangs on the batch size, or a layer that "
                "keeps state outside of its buffers, must be written as tensor operations",
            ]
        )


def _run(
    network: Network, tensors: Sequence[Tensor], training: bool, *, whole: bool = False
) -> tuple[list[Any], dict[str, Tensor], Tensor]:
    """Output's leaves, buffers and random state after a run; buffers are put back."""
    roots = [network.capture.original, network.capture.module, network.prologue.module]
    for module in (*roots, *(s.module for s in network.stages)):
        module.train(training)
    own = network.capture.original
    with torch.no_grad(), quiet(own):
        torch.manual_seed(SEED)
        copies = [t.clone() for t in tensors]
        output = network.capture.signature.call(own, copies) if whole else network.assemble(network.glue(copies))
        persistent = own.state_dict()
        buffers = {n: b.clone() for n, b in own.named_buffers() if n in persistent}
        return leaves(output), buffers, torch.get_rng_state()


def _differences(expected: tuple[Any, ...], got: tuple[Any, ...]) -> list[str]:
    found = []
    if len(expected[0]) != len(got[0]):
        found.append(f"give {len(got[0])} values instead of {len(expected[0])}")
    elif not all(_near(a, b) for a, b in zip(expected[0], got[0], strict=True)):
        found.append("give another output")
    moved = [n for n, b in expected[1].items() if n not in got[1] or not _near(b, got[1][n])]
    if moved:
        found.append(f"change the buffer '{moved[0]}' differently")
    if not torch.equal(expected[2], got[2]):
        found.append("draw other random numbers")
    return found


def _near(a: Any, b: Any) -> bool:
    """Equal up to rounding: relative to the largest entry, 1e-6 (1e-2 in half precision)."""
    if not isinstance(a, Tensor) or not isinstance(b, Tensor):
        return bool(type(a) is type(b) and a == b)
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    if not a.is_floating_point():
        return torch.equal(a, b)
    x, y = a.double().nan_to_num(1e300), b.double().nan_to_num(1e300)
    tolerance = TOLERANCE if a.dtype.itemsize > 2 else 1e-2
    return not x.numel() or float((x - y).abs().max()) <= tolerance * max(1.0, float(x.abs().max()))
