"""Narrower breakpoints than the execution order offers: minimum cuts by max-flow.

In: a `Graph` and cuts in execution order. Out: for each cut the set of nodes before it. Invariant: no stage becomes
larger than the largest stage was, and no breakpoint wider; a set contains what its nodes read.

Several branches run one after the other, so a cut in execution order crosses the whole output of the branches that are
done. The narrowest cut goes through all of them at once: a minimum cut (Ford and Fulkerson 1956) of the graph in which
each value is an edge of its bytes, since a value crosses a breakpoint once, however many operations read it behind.
Only regions with branches, between two places that a single value crosses, are looked at.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence, Set
from functools import cached_property
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from lagcompile.frontend.effects import torn
from lagcompile.frontend.graph import Graph, Node
from lagcompile.frontend.partition import together

if TYPE_CHECKING:
    import networkx as nx

Ints = NDArray[np.int64]
_AROUND = 200  # nodes on either side of a breakpoint that are looked at
_PRICES = 6  # trials of what a flop on the wrong side costs, where the narrowest cut makes a stage too large


def narrowed(graph: Graph, positions: Sequence[int], size: Ints) -> list[set[str]] | None:
    """Return what lies before each breakpoint, with breakpoints among branches as narrow as balance allows.

    Args:
        graph: the graph.
        positions: a cut after each of these staged nodes.
        size: bytes that cross after each staged node.

    Returns:
        names of the nodes before each breakpoint; None where the positions are as narrow as it gets.
    """
    places = _Places(graph, size)
    ends = [0, *(p + 1 for p in positions), len(graph.staged)]
    cap = max(places.flops(a, b) for a, b in pairwise(ends))
    chosen: list[tuple[int, set[int]]] = []  # everything up to a position, and some nodes after it
    for k, position in enumerate(positions):
        behind = chosen[-1] if chosen else (-1, set[int]())
        low = max(*behind[1], behind[0], position - _AROUND)
        high = min(ends[k + 2] - 1, position + _AROUND)
        room = places.work(behind) + cap, places.flops(0, ends[k + 2]) - cap  # the most and the least before it
        chosen.append(places.narrowest(position, (low, high), room))
    if not any(inside for _, inside in chosen):
        return None
    names = [n.name for n in graph.staged]
    return [{*names[: place + 1], *(names[i] for i in inside)} for place, inside in chosen]


class _Places:
    """The staged nodes by number, with what each reads and who reads it."""

    def __init__(self, graph: Graph, size: Ints) -> None:
        self.graph = graph
        self.nodes = graph.staged
        self.size = size
        self.index = {n.name: i for i, n in enumerate(self.nodes)}
        self.readers: list[list[int]] = [[] for _ in self.nodes]
        for i, node in enumerate(self.nodes):
            for name in node.inputs:
                if name in self.index:
                    self.readers[self.index[name]].append(i)
        self.last = np.array([max(r, default=-1) for r in self.readers], dtype=np.int64)
        self.cumulated = np.cumsum([0, *(n.flops for n in self.nodes)], dtype=np.int64)
        # tensors alive after each node
        change = np.zeros(len(self.nodes) + 1, dtype=np.int64)
        for i, node in enumerate(self.nodes):
            if self.last[i] > i and node.role == "value":
                change[i] += 1
                change[self.last[i]] -= 1
        self.crossing = np.cumsum(change)[: len(self.nodes)]

    def flops(self, start: int, stop: int) -> int:
        """Work of the nodes from a number to another."""
        return int(self.cumulated[stop] - self.cumulated[start])

    def work(self, cut: tuple[int, set[int]]) -> int:
        """Return the work before a cut."""
        return self.flops(0, cut[0] + 1) + sum(self.nodes[i].flops for i in cut[1])

    def narrowest(self, position: int, span: tuple[int, int], room: tuple[int, int]) -> tuple[int, set[int]]:
        """Return the narrowest cut between two places that leaves no stage too large."""
        best: tuple[int, set[int]] = position, set()
        width = int(self.size[position])
        for start, stop in self._regions(*span):
            if self.flops(0, start + 1) > room[0] or self.flops(0, stop) < room[1]:
                continue  # out of balance wherever it is cut
            found = self._in_region(start, stop, width, room)
            if found is not None:
                best, width = (start, found), self._width(start, stop, found)
        return best

    def _regions(self, low: int, high: int) -> Iterator[tuple[int, int]]:
        """Spans with branches between places that one value crosses, besides what crosses all of the span."""
        if low >= high:
            return
        through = int(np.sum(self.last[: max(low, 0)] > high))
        single = [low, *(p for p in range(max(low, 0) + 1, high) if self.crossing[p] <= through + 1), high]
        for a, b in pairwise(single):
            idle = (i for i in range(a + 1, b) if self.readers[i] and self.readers[i][0] > i + 1)
            if b - a > 3 and any(True for _ in idle):
                yield a, b

    def _width(self, start: int, stop: int, inside: Set[int]) -> int:
        """Bytes that cross a cut: everything up to `start`, and some nodes of the region behind it."""
        made = [*np.flatnonzero(self.last[: start + 1] > start).tolist(), *inside]
        return sum(self.nodes[i].bytes for i in made if any(r > start and r not in inside for r in self.readers[i]))

    def _in_region(self, start: int, stop: int, width: int, room: tuple[int, int]) -> set[int] | None:
        """Minimum cut of a region, with a price on flops where that is needed for balance (bisection)."""
        cheap, dear, price = -1.0, 1.0, 0.0
        scale = max(width, 1) / max(self.flops(start + 1, stop), 1)
        for _ in range(_PRICES):
            inside = self._minimum(start, stop, price * scale)
            if inside is None or (price == 0.0 and self._width(start, stop, inside) >= width):
                return None
            ahead = self.work((start, inside))
            if room[1] <= ahead <= room[0]:
                return inside if inside and self._width(start, stop, inside) < width else None
            if ahead < room[1]:
                cheap = price  # too little lies before the cut: a flop must earn more there
            else:
                dear = price
            price = (cheap + dear) / 2
        return None

    def _minimum(self, start: int, stop: int, price: float) -> set[int] | None:
        import networkx as nx

        flow = self._flow(start, stop, price)
        try:
            _, (ahead, _) = nx.minimum_cut(flow, "source", "sink")
        except nx.NetworkXUnbounded:
            return None
        return {i for i in range(start + 1, stop) if i in ahead}

    def _flow(self, start: int, stop: int, price: float) -> nx.DiGraph[object]:
        """Graph whose minimum cut is the narrowest set: node i, and ("out", i) for its value; the rest are the ends.

        An edge without a capacity cannot be cut.
        """
        import networkx as nx

        flow: nx.DiGraph[object] = nx.DiGraph()
        flow.add_nodes_from(("source", "sink"))
        made = [i for i in np.flatnonzero(self.last[: start + 1] > start).tolist() if self.readers[i]]
        free = range(start + 1, stop)

        def end(i: int) -> object:
            return "source" if i <= start else "sink" if i >= stop else i

        for i in (*made, *free):
            users = {end(r) for r in self.readers[i] if r > start}
            if i > start or users != {"sink"}:  # else it crosses in any case
                flow.add_edge(end(i), ("out", i), **_capacity(self.nodes[i]))
                flow.add_edges_from((("out", i), user) for user in users)
        for i in free:
            node = self.nodes[i]
            known = (self.index[n] for n in (*node.inputs, *node.after) if n in self.index)
            flow.add_edges_from((i, j) for j in known if j > start)
            if price:
                ends = ("source", i) if price > 0 else (i, "sink")
                flow.add_edge(*ends, capacity=abs(price) * node.flops)
        for a, b in self._together:
            if start < a < stop or start < b < stop:
                flow.add_edges_from([(end(a), end(b)), (end(b), end(a))])
        return flow

    @cached_property
    def _together(self) -> list[tuple[int, int]]:
        """Nodes that must lie on one side: a tuple and its items, a value and what writes into it."""
        return [*together(self.graph), *((self.index[v.name], self.index[w.name]) for v, w in torn(self.graph.nodes))]


def _capacity(node: Node) -> dict[str, int]:
    """What it costs that a node's value crosses; without an entry it must not."""
    if node.role == "structure":
        return {"capacity": 0}
    return {"capacity": node.bytes} if node.floating else {}
