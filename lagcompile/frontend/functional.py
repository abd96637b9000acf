"""Functional form: no operation of the graph writes into memory that another one reads.

In: a `Capture` and inputs to run it on (or none). Out: the same capture over another graph, in which a write makes a
new value: a copy of the written memory, on which the views down to the place and the operation itself are run. Readers
of the old names behind it read the new value, through their views again. Invariant: autograd sees what it would see in
the model; buffers keep their writes (they are effects); what cannot be said for every batch size is refused by name.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from lagcompile.frontend.capture import Capture, ModeOutput, batch_of
from lagcompile.frontend.graphmodule import StageGraph
from lagcompile.frontend.rewrite import Rewriter
from lagcompile.frontend.still import as_it_was
from lagcompile.frontend.storage import Sharing, assumed, named_write, unclear, watched
from lagcompile.frontend.structure import Reference, transform
from lagcompile.frontend.trials import resized
from lagcompile.ir.base import LiftError


def functional_form(
    captured: Capture, tensors: Sequence[Tensor] | None, modes: Sequence[bool] = (False, True)
) -> Capture:
    """A capture in functional form; it is run only where the names of its operations leave something open.

    Args:
        captured: any capture.
        tensors: example inputs; None where they are not known.
        modes: the modes for which the graph holds.

    Raises:
        LiftError: what `functional` says.
    """
    modules = dict(captured.module.named_modules(remove_duplicate=False))
    nodes = captured.module.graph.nodes
    open_ = any(unclear(n, modules) for n in nodes)
    if not open_ and not any(named_write(n, modules) for n in nodes):
        return captured
    if tensors is None or not open_:
        try:
            return functional(captured, None, pure=len(modes) == 1)
        except LiftError:
            if tensors is None:
                raise
    return functional(captured, [*_runs(captured, tensors, modes)], pure=len(modes) == 1)


def _runs(captured: Capture, tensors: Sequence[Tensor], modes: Sequence[bool]) -> Iterator[Sharing]:
    """What shares memory in each mode, with several examples and with one."""
    sizes = [2, 3, 1] if captured.sizes.least != captured.sizes.most else [batch_of(tensors) or 1] * 2
    found = 0
    for size, training in zip(sizes, (modes[0], modes[-1], modes[0]), strict=False):
        with as_it_was(captured.original, training, also=[captured.module]):
            try:
                yield watched(captured.module, [t.clone() for t in resized(tensors, size)])
                found += 1
            except Exception:  # the model need not run on every size
                if size == sizes[-1] and not found:
                    raise


def functional(captured: Capture, runs: Sequence[Sharing] | None, *, pure: bool = False) -> Capture:
    """A capture whose graph is in functional form.

    Args:
        captured: any capture.
        runs: what runs of it showed; None to go by what is known of the operations.
        pure: also make values of writes that nobody else sees, so that no part of the graph may hide one.

    Raises:
        LiftError: a write whose readers depend on the batch size or the mode, or that changes a parameter.
    """
    modules = dict(captured.module.named_modules(remove_duplicate=False))
    chosen = list(runs if runs is not None else assumed(captured.module.graph, modules))
    if not any(run.writes for run in chosen):
        return captured
    rewriter = Rewriter(captured, modules, chosen, known=runs is not None, pure=pure)
    names = rewriter.rewritten()
    if not rewriter.changed:
        return captured
    root = nn.Module()
    root.__dict__.update({**vars(captured.module), "_modules": dict(captured.module._modules)})
    for name, value in rewriter.attributes.items():
        root.add_module(name, value)
    module = StageGraph(root, rewriter.graph, type(captured.module).__name__)
    output = captured.output
    if isinstance(output, ModeOutput):
        output = ModeOutput(_renamed(output.train, names), _renamed(output.evaluation, names))
    else:
        output = _renamed(output, names)
    return replace(captured, module=module, output=output)


def _renamed(template: Any, names: Mapping[str, str]) -> Any:
    return transform(template, lambda v: Reference(names[v.name]) if isinstance(v, Reference) else v)
