"""Check that an exported folder does what the model does, before the folder appears.

In: a network, a folder. Out: nothing, or an error that says what differs. Invariant: both are run in train and in eval
mode, on batch sizes that were not exported where the size is free, from one random state; outputs, buffers, the random
state and the gradients of weights and inputs count.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import BackwardCFunction

from lagcompile.export.examples import batch_sizes, rows_of
from lagcompile.export.load import load_folder
from lagcompile.frontend.stages import Network
from lagcompile.frontend.structure import leaves, opened
from lagcompile.frontend.trials import resized
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
    own, *others = batch_sizes(network.capture.sizes)
    for training, size in zip((False, True, False), others if free else (own, own), strict=False):
        batch = resized(tensors, size) if free else tensors
        mode = f"in {'train' if training else 'eval'} mode with {rows_of(batch)} examples"
        expected = _run(original, batch, training)
        for what, whole in (("the stages", False), ("the network", True)):
            try:
                got = _run(loaded, batch, training, whole=whole)
            except Exception as error:  # an operation may raise anything
                first = (str(error).strip().splitlines() or [type(error).__name__])[0]
                problems.append(f"{what} as written do not run {mode}: {first}")
                continue
            problems += [f"{what} as written {d} {mode}" for d in _differences(expected, got)]
    if problems:
        raise LiftError(
            [
                *dict.fromkeys(problems),
                "the model cannot be exported as it is: an operation that depends on the batch size, a custom "
                "backward, or a layer that keeps state outside of its buffers, must be written as tensor operations",
            ]
        )


@dataclass(frozen=True)
class _Found:
    """Results of a run, or what was wrong with its gradients."""

    output: list[Any]
    buffers: Mapping[str, Tensor]
    random: Tensor
    gradients: Mapping[str, Tensor] | None
    """None where they cannot be computed."""
    own: tuple[str, ...] = ()
    """Operations whose backward the user wrote."""


def _run(network: Network, tensors: Sequence[Tensor], training: bool, *, whole: bool = False) -> _Found:
    """Run once without gradients and once for gradients; buffers are put back."""
    network.train(training)
    own = network.capture.original

    def output(inputs: Sequence[Tensor]) -> list[Any]:
        torch.manual_seed(SEED)
        got = network.capture.signature.call(own, inputs) if whole else network.assemble(network.glue(inputs))
        return leaves(opened(got))

    with torch.no_grad(), quiet(own):
        values = output([t.clone() for t in tensors])
        persistent = own.state_dict()
        buffers = {n: b.clone() for n, b in own.named_buffers() if n in persistent}
        random = torch.get_rng_state()
    inputs = [t.detach().clone().requires_grad_(t.is_floating_point()) for t in tensors]
    variables = dict(zip(network.capture.signature.names, inputs, strict=True)) | dict(own.named_parameters())
    try:
        with torch.enable_grad(), quiet(own):
            results = output([t.clone() for t in inputs])
            gradients = _gradients(results, {n: t for n, t in variables.items() if t.requires_grad})
    except Exception:  # such as a model that overwrites what its backward needs
        return _Found(values, buffers, random, None)
    return _Found(values, buffers, random, gradients, _functions(results))


def _gradients(output: Sequence[Any], of: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the gradients of a sum of the outputs in which each entry has a different weight."""
    total = torch.zeros((), dtype=torch.float64)
    for value in output:
        if isinstance(value, Tensor) and value.requires_grad and value.is_floating_point():
            weights = torch.arange(value.numel(), dtype=torch.float64).cos().reshape(value.shape)
            total = total + (weights * value.double().nan_to_num()).sum()
    if not total.requires_grad:
        return {}
    found: Sequence[Tensor | None] = torch.autograd.grad(total, tuple(of.values()), allow_unused=True)
    return {n: g for n, g in zip(of, found, strict=True) if g is not None}


def _functions(output: Sequence[Any]) -> tuple[str, ...]:
    """Names of the operations in a graph of gradients whose backward was written in Python."""
    todo = [v.grad_fn for v in output if isinstance(v, Tensor) and v.grad_fn is not None]
    seen: dict[Any, None] = {}
    while todo:
        function: Any = todo.pop()
        if function not in seen:
            seen[function] = None
            todo += [f for f, _ in function.next_functions if f]
    names = [type(f).__name__.removesuffix("Backward") for f in seen if isinstance(f, BackwardCFunction)]
    return tuple(dict.fromkeys(names))


def _differences(expected: _Found, got: _Found) -> list[str]:
    found = []
    if len(expected.output) != len(got.output):
        found.append(f"give {len(got.output)} values instead of {len(expected.output)}")
    elif not all(_near(a, b) for a, b in zip(expected.output, got.output, strict=True)):
        found.append("give another output")
    moved = [n for n, b in expected.buffers.items() if n not in got.buffers or not _near(b, got.buffers[n])]
    if moved:
        found.append(f"change the buffer '{moved[0]}' differently")
    if not torch.equal(expected.random, got.random):
        found.append("draw other random numbers")
    if not found and expected.gradients is not None:
        found += _other_gradients(expected.gradients, got.gradients, [n for n in expected.own if n not in got.own])
    return found


def _other_gradients(
    expected: Mapping[str, Tensor], got: Mapping[str, Tensor] | None, lost: Sequence[str]
) -> Iterator[str]:
    own = f" ({', '.join(lost)}: a custom backward cannot be written)" if lost else ""
    if got is None:
        yield f"have no gradients{own}"
        return
    scale = max((float(g.double().abs().max()) for g in expected.values() if g.numel()), default=0.0)
    for name in sorted(expected.keys() | got.keys()):
        like = expected.get(name, got.get(name))
        assert like is not None
        zero = torch.zeros_like(like)
        if not _near(expected.get(name, zero), got.get(name, zero), 10 * TOLERANCE, scale):
            yield f"give another gradient of '{name}'{own}"
            return


def _near(a: Any, b: Any, tolerance: float = TOLERANCE, scale: float = 1.0) -> bool:
    """Return whether values are equal up to rounding, relative to the largest entry; NaN only where NaN is."""
    if not isinstance(a, Tensor) or not isinstance(b, Tensor):
        return bool(type(a) is type(b) and a == b)
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    if not a.is_floating_point():
        return torch.equal(a, b)
    odd, other = (t.masked_fill(t.isfinite(), 0.0) for t in (a, b))
    if not torch.allclose(odd, other, equal_nan=True):
        return False
    x, y = (t.double().masked_fill(~t.isfinite(), 0.0) for t in (a, b))
    tolerance = tolerance if a.dtype.itemsize > 2 else 1e-2
    return not x.numel() or float((x - y).abs().max()) <= tolerance * max(scale, float(x.abs().max()))
