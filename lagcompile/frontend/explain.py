"""Why a breakpoint is where it is: its width, and the three best places it could have been instead.

In: a `Partition`. Out: one `Explanation` per breakpoint. Invariant: alternatives are places between the neighbouring
breakpoints, ranked as the policy `balanced` ranks them: largest of the two stages around, then bytes that cross.
"""

from __future__ import annotations

import numpy as np

from lagcompile.frontend.balance import cuts_of
from lagcompile.frontend.graph import Graph
from lagcompile.frontend.partition import Partition
from lagcompile.ir.base import Frozen

COUNT = 3


class Alternative(Frozen):
    """Another place for a breakpoint."""

    after: str
    width: int
    """Bytes per example that would cross."""
    largest: int
    """Flops of the larger of the two stages around it."""


class Explanation(Frozen):
    """One breakpoint."""

    number: int
    reason: str
    width: int
    """Bytes per example that cross it."""
    largest: int
    """Flops of the larger of the two stages around it."""
    alternatives: tuple[Alternative, ...]


def explain(partition: Partition) -> tuple[Explanation, ...]:
    """Explanation of each breakpoint of a partition."""
    graph = partition.graph
    cuts = cuts_of(graph)
    places = cuts.preferred if len(cuts.preferred) else cuts.allowed
    work = _work(partition)
    ends = _ends(partition)
    result = []
    for k, b in enumerate(partition.breakpoints):
        low = ends[k - 1] if k else -1
        high = ends[k + 1] if k + 1 < len(ends) else len(graph.staged) - 1
        between = places[(places > low) & (places < high) & (places != ends[k])]
        before = int(cuts.work[low]) if low >= 0 else 0
        total = int(cuts.work[high]) - before
        ahead = cuts.work[between] - before
        largest = np.maximum(ahead, total - ahead)
        best = np.lexsort((cuts.bytes[between], largest))[:COUNT]
        result.append(
            Explanation(
                number=b.number,
                reason=b.reason,
                width=sum(graph.by_name[n].bytes for n in b.crossing),
                largest=max(work[k], work[k + 1]),
                alternatives=tuple(
                    Alternative(
                        after=_name(graph, int(between[i])),
                        width=int(cuts.bytes[between[i]]),
                        largest=int(largest[i]),
                    )
                    for i in best
                ),
            )
        )
    return tuple(result)


def _work(partition: Partition) -> list[int]:
    return [sum(n.flops for n in partition.nodes_of(k)) for k in range(partition.stages)]


def _ends(partition: Partition) -> list[int]:
    """Position of the last node before each breakpoint."""
    index = {n.name: i for i, n in enumerate(partition.graph.staged)}
    ends = [max((index[n.name] for n in partition.nodes_of(k)), default=-1) for k in range(partition.stages - 1)]
    return [int(e) for e in np.maximum.accumulate(ends)] if ends else []


def _name(graph: Graph, place: int) -> str:
    node = graph.staged[place]
    return node.module if node.op == "call_module" and node.module else node.name
