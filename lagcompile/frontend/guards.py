"""Which sizes an exported graph relies on: the decisions that the model's Python took by the size of the batch.

In: a program of torch.export and the inputs that it was made with. Out: `Sizes`. Invariant: only decisions in the
user's own code count; those inside of torch (how a view is laid out, say) are the operations' own business.
"""

from __future__ import annotations

import linecache
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from lagcompile.frontend.capture import Sizes, batch_of, is_users

FAR = (10**3, 10**4 + 1, 10**6)
"""Sizes at which a decision is tried that holds for all sizes near the example's."""
STEPS = 16


def sizes_of(program: Any, tensors: Sequence[Tensor]) -> Sizes:
    """Sizes that a program holds for.

    Args:
        program: what torch.export made.
        tensors: the inputs that it was made with.
    """
    graph = program.graph_module.graph
    inputs = program.graph_signature.user_inputs
    found = [n.meta["val"].shape for n in graph.nodes if n.op == "placeholder" and n.name in inputs]
    symbols = [s[0] for s in found if s and isinstance(s[0], torch.SymInt)]
    batch = batch_of(tensors)
    shapes = tuple(
        tuple(None if i == 0 and d == batch else int(d) for i, d in enumerate(t.shape)) if t.dim() else ()
        for t in tensors
    )
    if batch is None:
        return Sizes(shapes=shapes)
    guards = symbols[0].node.shape_env.guards if symbols else ()
    if any(not isinstance(s[0], torch.SymInt) or s[0].node.expr.is_number for s in found if s):
        why = next((_line(g) for g in guards if _is_users(g)), "") or "the graph was captured for one batch size"
        return Sizes(least=batch, most=batch, shapes=shapes, why=why)
    own = [g for g in guards if _is_users(g) and len(g.expr.free_symbols) == 1]

    def holds(size: int) -> bool:
        return all(bool(g.expr.subs(dict.fromkeys(g.expr.free_symbols, size))) for g in own)

    if all(holds(n) for n in (*range(1, 2 * batch + STEPS), *FAR)):
        return Sizes(shapes=shapes)
    least, most, step = _range(batch, holds)
    why = "; ".join(dict.fromkeys(_line(g) for g in own))
    return Sizes(least=least, most=most, step=step, shapes=shapes, why=why)


def _range(size: int, holds: Callable[[int], bool]) -> tuple[int, int | None, int]:
    """The widest range around a size in which decisions hold, in steps where they hold for no neighbour."""
    for step in range(1, STEPS):
        least = size
        while least - step >= 1 and holds(least - step):
            least -= step
        most = size
        while most < size + 2 * size + STEPS * step and holds(most + step):
            most += step
        endless = most >= size + 2 * size + STEPS * step and all(holds(n - n % step + size % step) for n in FAR)
        if endless or most > least:
            return least, None if endless else most, step
    return size, size, 1


def _is_users(guard: Any) -> bool:
    place = guard.sloc.framework_loc
    return place is not None and is_users(str(place.filename))


def _line(guard: Any) -> str:
    place = guard.sloc.framework_loc
    return f"{place.filename}:{place.lineno}: `{linecache.getline(place.filename, place.lineno).strip()}`"
