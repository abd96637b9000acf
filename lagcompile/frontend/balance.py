"""Where a graph can be cut in execution order, and the best k - 1 of those places.

In: a `Graph`. Out: positions (a cut after the p-th staged node). Invariant: only places where every crossing value
is a floating tensor are offered; the choice is exact (dynamic programming), not greedy.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from lagcompile.frontend.capture import Capture
from lagcompile.frontend.effects import torn
from lagcompile.frontend.graph import Graph, Node
from lagcompile.frontend.narrow import narrowed
from lagcompile.frontend.partition import Partition, partition, partition_at, together
from lagcompile.ir.base import SplitError

_CARRIED = ("dropout",)  # random operations start the next stage, so that a stored state carries no mask
Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Cuts:
    """Places where a graph may be cut, in execution order.

    Attributes:
        allowed: positions whose crossing values are all floating tensors.
        preferred: those just before a weighted operation (dropout in between goes with the operation).
        work: flops up to and including each staged node (cumulative; work[p] belongs to a cut after p).
        bytes: bytes of one example of the states that cross each position.
    """

    allowed: Ints
    preferred: Ints
    work: Ints
    bytes: Ints


@dataclass(frozen=True)
class Context:
    """What policies that look at data may use: the captured model and example inputs."""

    capture: Capture
    tensors: tuple[Tensor, ...]


def at_positions(graph: Graph, positions: Sequence[int], reason: str) -> Partition:
    """Partition with a cut after each of the positions, in execution order."""
    return partition_at(graph, positions, [f"after {graph.staged[p].name}, {reason}" for p in positions])


def at_narrowed(graph: Graph, cuts: Cuts, positions: Sequence[int], reason: str) -> Partition:
    """Partition at positions, each cut among branches as narrow as it can be within the balance."""
    downs = narrowed(graph, positions, cuts.bytes)
    if downs is None:
        return at_positions(graph, positions, reason)
    reasons = []
    for position, down in zip(positions, downs, strict=True):
        read = {i for n in graph.staged if n.name not in down for i in n.inputs}
        ends = [n.name for n in graph.staged if n.name in down and n.name in read and n.role == "value"]
        plain = all((n.name in down) == (i <= position) for i, n in enumerate(graph.staged))
        named = ends[-1:] if plain else ends
        reasons.append(f"after {' and '.join(named)}, {reason}{'' if plain else ', narrowest by max-flow'}")
    try:
        return partition(graph, downs, reasons)
    except SplitError:  # an operation in place, or an item of a tuple, forbids it
        return at_positions(graph, positions, reason)


def cuts_of(graph: Graph) -> Cuts:
    """Find every place where the graph may be cut in execution order."""
    nodes = graph.staged
    index = {n.name: i for i, n in enumerate(nodes)}
    last = np.arange(len(nodes))
    for i, node in enumerate(nodes):
        for name in node.inputs:
            if name in index:
                last[index[name]] = max(last[index[name]], i)
    crossing, size, refused = (np.zeros(len(nodes) + 1, dtype=np.int64) for _ in range(3))
    for i, node in enumerate(nodes):
        if last[i] == i or node.role == "structure":
            continue
        for array, amount in ((crossing, 1), (size, node.bytes), (refused, not _can_be_state(graph, node))):
            array[i] += amount
            array[last[i]] -= amount
    apart = [(index[v.name], index[w.name]) for v, w in torn(graph.nodes)]
    for start, stop in [*apart, *together(graph)]:
        refused[start] += 1
        refused[stop] -= 1
    crossing, size, refused = (np.cumsum(a)[: len(nodes)] for a in (crossing, size, refused))
    allowed = np.flatnonzero((crossing > 0) & (refused == 0))
    preferred = np.intersect1d(allowed, _ahead_of_weights(graph))
    return Cuts(allowed, preferred, np.cumsum([n.flops for n in nodes], dtype=np.int64), size)


def _can_be_state(graph: Graph, node: Node) -> bool:
    if node.type is not None:
        return node.floating
    return not graph.shapes_known and node.floating


def _ahead_of_weights(graph: Graph) -> Ints:
    nodes = graph.staged
    positions: list[int] = []
    for i, node in enumerate(nodes):
        if not node.parameters and not any(graph.by_name[n].role == "weights" for n in node.inputs):
            continue
        p = i - 1
        while p >= 0 and any(word in f"{nodes[p].target} {nodes[p].name}".lower() for word in _CARRIED):
            p -= 1
        if p >= 0:
            positions.append(p)
    return np.unique(np.array(positions, dtype=np.int64))


def balanced_positions(cuts: Cuts, stages: int) -> list[int]:
    """Positions of the stages - 1 cuts that minimise the largest stage's flops, then the bytes of the states.

    Dynamic programming over the allowed places: best[j, p] is the least total of bytes of j cuts of which the last is
    p, where no stage exceeds the smallest possible bottleneck (found by bisection). O(stages * places * log places).

    Raises:
        SplitError: there are not enough places.
    """
    if stages == 1:
        return []
    places = cuts.preferred if len(cuts.preferred) >= stages - 1 else cuts.allowed
    if len(places) < stages - 1:
        raise too_many(stages, len(cuts.allowed) + 1)
    total = int(cuts.work[-1])
    work = cuts.work[places]
    cap = _smallest_bottleneck(work, total, stages)
    return [int(places[i]) for i in cheapest(work, cuts.bytes[places], total, stages, cap)]


def too_many(stages: int, most: int) -> SplitError:
    """What is said where a model has fewer places to cut than asked for."""
    why = "(one tensor or more must cross each breakpoint)"
    return SplitError(f"split into {stages} stages: the graph allows at most {most} {why}", most)


def why_few(graph: Graph, whole: Mapping[str, str]) -> str:
    """What in a model stands in the way of more breakpoints."""
    found = [f"'{path}' is kept whole: {reason}" for path, reason in whole.items()]
    if any(n.type is not None and n.type.dtype.startswith("complex") for n in graph.staged):
        found.append("complex values are no states: torch.view_as_real makes some that are")
    if not graph.staged:
        found.append("no operation reads a parameter (quantised, packed and plain tensors are none)")
    return "; ".join(found)


def _smallest_bottleneck(work: Ints, total: int, stages: int) -> int:
    """Least possible largest stage with exactly `stages` stages, by bisection on a greedy test."""
    low, high = -(-total // stages), total
    while low < high:
        middle = (low + high) // 2
        if fits(work, total, stages, middle):
            high = middle
        else:
            low = middle + 1
    return low


def fits(work: Ints, total: int, stages: int, cap: int) -> bool:
    """Whether `stages` stages of at most `cap` flops exist; places left over only make stages smaller."""
    start, index = 0, -1
    for used in range(stages):
        if total - start <= cap:
            return len(work) - 1 - index >= stages - 1 - used
        furthest = int(np.searchsorted(work, start + cap, side="right")) - 1
        furthest = min(furthest, len(work) - (stages - 1 - used))
        if furthest <= index:
            return False
        start, index = int(work[furthest]), furthest
    return False


def cheapest(work: Ints, size: Ints, total: int, stages: int, cap: int) -> list[int]:
    """Indices of the cheapest cuts under a cap on every stage."""
    earliest = np.searchsorted(work, work - cap, side="left")
    best = np.where(work <= cap, size.astype(np.float64), np.inf)
    came_from: list[NDArray[np.int64]] = []
    for _ in range(stages - 2):
        arg = _window_argmin(best, earliest)
        came_from.append(arg)
        value = np.where(arg >= 0, best[np.maximum(arg, 0)], np.inf)
        best = value + size
    best = np.where(total - work <= cap, best, np.inf)
    index = int(np.argmin(best))
    chosen = [index]
    for arg in reversed(came_from):
        index = int(arg[index])
        chosen.append(index)
    assert len(chosen) == stages - 1
    return chosen[::-1]


def _window_argmin(values: NDArray[np.float64], earliest: Ints) -> Ints:
    """Index of the least value in [earliest[p], p - 1] for each p; -1 where the window is empty (sparse table)."""
    count = len(values)
    table = [np.arange(count)]
    while 2 ** len(table) <= count:
        half = 2 ** (len(table) - 1)
        previous = table[-1]
        left, right = previous[:-half], previous[half:]
        table.append(np.where(values[left] <= values[right], left, right))
    result = np.full(count, -1, dtype=np.int64)
    lengths = np.arange(count) - earliest
    some = np.flatnonzero(lengths > 0)
    levels = np.log2(np.maximum(lengths[some], 1)).astype(np.int64)
    for level in np.unique(levels):
        here = some[levels == level]
        left = table[level][earliest[here]]
        right = table[level][here - 2**level]
        result[here] = np.where(values[left] <= values[right], left, right)
    return result
