"""The policy `isomorphic`: cut between repetitions, so that the stages are equal and run as one batched call.

In: a `Graph`. Out: a `Partition` whose inner stages compute the same function of their states and weights. Invariant:
a repetition is a run of operations that occurs twice or more in a row with the same operations, types and wiring.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from lagcompile.frontend.balance import Context, Cuts, cuts_of
from lagcompile.frontend.graph import Graph
from lagcompile.frontend.partition import Partition, partition_at
from lagcompile.ir.base import Frozen, SplitError

_PERIODS = 400  # distances between equal operations that are tried, the most frequent first


class IsomorphicSplit(Frozen):
    """The largest run of repeated sub-graphs (layers of a transformer, residual blocks, time steps), one per stage."""

    policy: Literal["isomorphic"] = "isomorphic"
    group: int = Field(default=1, ge=1)
    """Repetitions in each stage."""

    def split(self, graph: Graph, context: Context | None = None) -> Partition:
        """Partition with a breakpoint between (groups of) repetitions.

        Raises:
            SplitError: nothing in the graph repeats, or not often enough for two stages.
        """
        cuts = cuts_of(graph)
        found = best_repeat(graph, cuts)
        if found is None:
            raise SplitError(
                "split isomorphic: nothing repeats in a row at places where the graph can be cut (use `balanced`)"
            )
        places = found.places[:: self.group]
        if len(places) < 2:
            raise SplitError(
                f"split isomorphic: {found.count} repetitions are too few for two stages of {self.group} each"
            )
        order = graph.staged
        reasons = [f"after {order[p].name}, one of {found.count} repetitions of {found.period} nodes" for p in places]
        return partition_at(graph, places, reasons)


@dataclass(frozen=True)
class Repeat:
    """Repetitions in a row.

    Attributes:
        period: nodes of one repetition.
        count: how many there are.
        places: positions to cut at, around and between the repetitions.
    """

    period: int
    count: int
    places: list[int]


def best_repeat(graph: Graph, cuts: Cuts) -> Repeat | None:
    """The repetition in a row that covers the most nodes; of those the one with the shortest period."""
    tokens = _tokens(graph)
    allowed = np.zeros(len(tokens), dtype=bool)
    allowed[cuts.allowed] = True
    preferred = np.zeros(len(tokens), dtype=bool)
    preferred[cuts.preferred] = True
    best: tuple[int, int, Repeat] | None = None
    for period in _periods(tokens):
        for start, stop in _runs(tokens, period):
            repeat = _cut(start, stop, period, allowed, preferred, cuts)
            if repeat is None:
                continue
            key = (repeat.count * period, -period)
            if best is None or key > best[:2]:
                best = (*key, repeat)
    return None if best is None else best[2]


def _tokens(graph: Graph) -> NDArray[np.int64]:
    """A number for each staged node, equal for nodes of the same operation, type and relative wiring."""
    index = {n.name: i for i, n in enumerate(graph.staged)}
    numbers: dict[object, int] = {}
    tokens = []
    for i, node in enumerate(graph.staged):
        wiring = tuple(i - index[name] if name in index else _outside(graph, name) for name in node.inputs)
        kind = (node.op, node.operation, node.type, node.flops, wiring)
        tokens.append(numbers.setdefault(kind, len(numbers)))
    return np.array(tokens, dtype=np.int64)


def _outside(graph: Graph, name: str) -> object:
    node = graph.by_name[name]
    return node.role, node.type, node.operation if node.role in {"attribute", "weights"} else ""


def _periods(tokens: NDArray[np.int64]) -> list[int]:
    """Distances between an operation and its next equal one, and sums of neighbouring ones, by how often they occur."""
    last: dict[int, int] = {}
    counts: Counter[int] = Counter()
    for i, token in enumerate(tokens.tolist()):
        if token in last:
            counts[i - last[token]] += 1
        last[token] = i
    return [p for p, _ in counts.most_common(_PERIODS) if 2 * p <= len(tokens)]


def _runs(tokens: NDArray[np.int64], period: int) -> list[tuple[int, int]]:
    """Maximal spans [start, stop) in which every node equals the one a period later, if two repetitions fit."""
    same = np.concatenate([[False], tokens[:-period] == tokens[period:], [False]])
    edges = np.flatnonzero(np.diff(same.astype(np.int8)))
    return [(int(a), int(b) + period) for a, b in zip(edges[::2], edges[1::2], strict=True) if b - a >= period]


def _cut(
    start: int, stop: int, period: int, allowed: NDArray[np.bool_], preferred: NDArray[np.bool_], cuts: Cuts
) -> Repeat | None:
    """Find the best phase of cuts in a span: before weighted layers where possible, then the fewest bytes."""
    best: tuple[tuple[int, int, int], Repeat] | None = None
    for phase in range(max(start - 1, 0), start + period - 1):
        places = list(range(phase, stop, period))
        if places and places[-1] == len(allowed) - 1:
            places.pop()
        if len(places) < 2 or not allowed[places].all():
            continue
        key = (len(places), int(preferred[places].sum()), -int(cuts.bytes[places].sum()))
        if best is None or key > best[0]:
            whole_tail = stop - 1 - places[-1] >= period
            best = (key, Repeat(period, len(places) - 1 + whole_tail, places))
    return None if best is None else best[1]
