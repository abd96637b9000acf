"""A partition: which stage each node belongs to, and what crosses each breakpoint.

In: a `Graph` and the down-sets that a policy chose. Out: `Partition`. Invariant: stage numbers never fall along an
edge; every stage holds at least one value; a state is one tensor, however many breakpoints it crosses.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass
from functools import cached_property

from lagcompile.frontend.effects import torn
from lagcompile.frontend.graph import Graph, Node
from lagcompile.ir.base import SplitError


@dataclass(frozen=True)
class Breakpoint:
    """One place where the network is cut.

    Attributes:
        number: from 1.
        after: names of the nodes whose values leave at this breakpoint for the first time (the new states).
        crossing: names of all tensors that cross it, those of earlier breakpoints included.
        reason: why it is here, in the words of the policy.
    """

    number: int
    after: tuple[str, ...]
    crossing: tuple[str, ...]
    reason: str


@dataclass(frozen=True)
class Partition:
    """Stage numbers of a graph's staged nodes."""

    graph: Graph
    stage_of: Mapping[str, int]
    reasons: tuple[str, ...]

    @property
    def stages(self) -> int:
        """Number of stages."""
        return len(self.reasons) + 1

    @cached_property
    def last_use(self) -> Mapping[str, int]:
        """Last stage that reads a staged node; outputs of the network do not count."""
        last: dict[str, int] = {}
        for node in self.graph.staged:
            for name in node.inputs:
                if name in self.stage_of:
                    last[name] = max(last.get(name, -1), self.stage_of[node.name])
        return last

    @cached_property
    def states(self) -> tuple[Node, ...]:
        """Nodes whose values are states, in the order of their breakpoints."""
        crossing = [
            n for n in self.graph.staged if n.role == "value" and self.last_use.get(n.name, -1) > self.stage_of[n.name]
        ]
        return tuple(sorted(crossing, key=lambda n: self.stage_of[n.name]))

    @cached_property
    def breakpoints(self) -> tuple[Breakpoint, ...]:
        """The breakpoints, with what crosses them."""
        new: list[list[str]] = [[] for _ in self.reasons]
        crossing: list[list[str]] = [[] for _ in self.reasons]
        for node in self.states:
            first = self.stage_of[node.name]
            new[first].append(node.name)
            for k in range(first, self.last_use[node.name]):
                crossing[k].append(node.name)
        return tuple(
            Breakpoint(k + 1, tuple(new[k]), tuple(crossing[k]), reason) for k, reason in enumerate(self.reasons)
        )

    def nodes_of(self, stage: int) -> tuple[Node, ...]:
        """Staged nodes of one stage, in execution order."""
        return self._members[stage]

    @cached_property
    def _members(self) -> tuple[tuple[Node, ...], ...]:
        members: list[list[Node]] = [[] for _ in range(self.stages)]
        for node in self.graph.staged:
            members[self.stage_of[node.name]].append(node)
        return tuple(map(tuple, members))


def ancestors(graph: Graph, names: Iterable[str]) -> set[str]:
    """The staged nodes that the named nodes depend on, themselves included."""
    staged = {n.name for n in graph.staged}
    todo = [n for n in names if n in staged]
    found = set(todo)
    while todo:
        node = graph.by_name[todo.pop()]
        for name in (*node.inputs, *node.after):
            if name in staged and name not in found:
                found.add(name)
                todo.append(name)
    return found


def partition(graph: Graph, down_sets: Sequence[Set[str]], reasons: Sequence[str]) -> Partition:
    """Partition from a growing sequence of down-sets of staged nodes (what lies before each breakpoint).

    Down-sets that add nothing to the one before, or leave nothing after them, separate nothing and are errors.

    Raises:
        SplitError: each breakpoint that separates nothing, or that would cut a value that cannot be a state.
    """
    names = [n.name for n in graph.staged]
    stage_of = dict.fromkeys(names, len(down_sets))
    before: set[str] = set()
    problems: list[str] = []
    for k, down in enumerate(down_sets):
        total = before | down
        fresh = total - before
        if not fresh or len(total) == len(names):
            problems.append(f"the breakpoint {reasons[k]} separates nothing: no stage would be left on one side of it")
        for name in fresh:
            stage_of[name] = k
        before = total
    if problems:
        raise SplitError(problems)
    return _checked(graph, stage_of, reasons)


def partition_at(graph: Graph, positions: Sequence[int], reasons: Sequence[str]) -> Partition:
    """Partition with a cut behind each of the positions among the staged nodes, in execution order.

    Raises:
        SplitError: each breakpoint that cannot be.
    """
    stage_of: dict[str, int] = {}
    k = 0
    for i, node in enumerate(graph.staged):
        stage_of[node.name] = k
        if k < len(positions) and i == positions[k]:
            k += 1
    return _checked(graph, stage_of, reasons)


def _checked(graph: Graph, stage_of: dict[str, int], reasons: Sequence[str]) -> Partition:
    """The partition, if each of its breakpoints is one."""
    _keep_together(graph, stage_of)
    result = Partition(graph, stage_of, tuple(reasons))
    problems = [p for node in result.states if (p := _not_a_state(node))]
    problems += [
        f"a breakpoint lies between '{value.name}' ({where(value)}) and the in-place operation '{writer.name}' "
        f"({where(writer)}) on its memory, which is read again afterwards: cut elsewhere, or write it out of place"
        for value, writer in torn(graph.nodes)
        if stage_of[value.name] != stage_of[writer.name]
    ]
    problems += [
        f"the breakpoint {b.reason} separates nothing: no value crosses it"
        for b in result.breakpoints
        if not b.crossing
    ]
    if problems:
        raise SplitError(problems)
    return result


def _keep_together(graph: Graph, stage_of: dict[str, int]) -> None:
    """Items of a tuple stay in the stage that makes the tuple; so a state is a tensor."""
    for source, item in together(graph):
        stage_of[graph.staged[item].name] = stage_of[graph.staged[source].name]


def together(graph: Graph) -> list[tuple[int, int]]:
    """Numbers of the staged nodes that make, or may make, a tuple, with those of its items."""
    index = {n.name: i for i, n in enumerate(graph.staged)}
    pairs = []
    for i, node in enumerate(graph.staged):
        source = index.get(node.inputs[0]) if node.target == "getitem" and node.inputs else None
        if source is not None and graph.staged[source].type is None and graph.staged[source].role == "value":
            pairs.append((source, i))
    return pairs


def _not_a_state(node: Node) -> str | None:
    if node.type is not None and not node.floating:
        sized = "?" in (node.type.shape or ())
        why = "how many rows it has depends on values" if sized else "only floating-point tensors can"
        return f"'{node.name}' ({where(node)}) is {node.type} and cannot be a state: {why}. Cut elsewhere"
    return None


def where(node: Node) -> str:
    """Module path and source line of a node, as errors and plans show it."""
    parts = [p for p in (node.module, node.source) if p]
    return ", ".join(parts) or node.target
