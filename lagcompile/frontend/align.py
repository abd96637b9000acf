"""Which nodes of a train and an eval graph correspond.

In: two graphs of one model. Out: `Alignment`: steps, each a pair of equal nodes or a run of nodes of each mode, and for
each run the pairs of values that are used behind it. Invariant: a value that one mode alone makes is used within its
own run, or chosen between at the run's end, or an output of that mode alone.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import fx

from lagcompile.frontend.regions import Region
from lagcompile.frontend.structure import Reference, leaves, transform
from lagcompile.frontend.symbolic import Traced

Pair = tuple[fx.Node, fx.Node]


@dataclass(frozen=True)
class Step:
    """A pair of equal nodes, or a run of nodes of each mode."""

    train: tuple[fx.Node, ...]
    evaluation: tuple[fx.Node, ...]
    equal: bool


@dataclass(frozen=True)
class Alignment:
    """Steps in order, and by number of a run the pairs (train, eval) of values that are used behind it.

    `shared` are the numbers of runs of one mode that make outputs which the other mode does not return: they run in
    both modes, and the other mode's output leaves them out.
    """

    steps: tuple[Step, ...]
    needed: Mapping[int, tuple[Pair, ...]]
    shared: frozenset[int] = frozenset()


def align(train: Traced, evaluation: Traced) -> Alignment:
    """Pair the nodes of two graphs in order, by operation, module path, and the weights and buffers that they read."""
    bodies = [_body(t.graph) for t in (train, evaluation)]
    outputs: list[Pair] = []
    single: list[fx.Node] = []
    if same_structure(train.output, evaluation.output):
        outputs = list(zip(outputs_of(train.graph), outputs_of(evaluation.graph), strict=True))
    else:
        single = [*outputs_of(train.graph), *outputs_of(evaluation.graph)]
    keys = _keys(bodies[0], train.attributes), _keys(bodies[1], evaluation.attributes)
    steps = _separate(_join(_steps(bodies[0], bodies[1], *keys)), outputs)
    place = _places(steps)
    shared = frozenset(place[n] for n in single if n in place and not steps[place[n]].equal)
    return Alignment(tuple(steps), {i: tuple(p) for i, p in _needed(steps, outputs).items()}, shared)


def same_structure(a: Any, b: Any) -> bool:
    """Whether two templates have the same containers, constants, and places for values."""

    def bare(template: Any) -> Any:
        return transform(template, lambda v: Reference("") if isinstance(v, Reference) else v)

    return bool(bare(a) == bare(b))


def path_of(node: fx.Node) -> str:
    """Path of the module that a node runs in."""
    stack = node.meta.get("nn_module_stack") or {}
    return str(list(stack.values())[-1][0]) if stack else ""


def outputs_of(graph: fx.Graph) -> list[fx.Node]:
    """Nodes that a graph returns."""
    node = next(n for n in reversed(graph.nodes) if n.op == "output")
    return list(node.args[0])


def argument_pairs(a: fx.Node, b: fx.Node) -> list[tuple[Any, Any]]:
    """Leaves of two nodes' arguments, side by side."""
    return list(zip(leaves((a.args, a.kwargs)), leaves((b.args, b.kwargs)), strict=True))


def _body(graph: fx.Graph) -> list[fx.Node]:
    return [n for n in graph.nodes if n.op not in {"placeholder", "get_attr", "output"}]


def _keys(nodes: Sequence[fx.Node], attributes: Mapping[str, Any]) -> list[tuple[str, ...]]:
    keys = []
    for node in nodes:
        target = str(node.target)
        if target in attributes:
            target = _same_part(attributes[target])
        read = [str(n.target) for n in node.all_input_nodes if n.op == "get_attr" and n.target not in attributes]
        keys.append((node.op, target, path_of(node), *read))
    return keys


def _same_part(part: Any) -> str:
    """Text that is equal for parts that do the same: regions under a setting, custom functions."""
    if isinstance(part, Region):
        return f"{part.settings} {part.body.graph}"
    return f"{type(part).__name__} {getattr(part, 'function', part)}"


def _steps(
    a: Sequence[fx.Node], b: Sequence[fx.Node], left: list[tuple[str, ...]], right: list[tuple[str, ...]]
) -> list[Step]:
    if left == right:
        return [Step((x,), (y,), _alike(x, y)) for x, y in zip(a, b, strict=True)]
    steps: list[Step] = []
    for tag, i, j, k, m in difflib.SequenceMatcher(None, left, right, autojunk=False).get_opcodes():
        if tag == "equal":
            steps += [Step((x,), (y,), _alike(x, y)) for x, y in zip(a[i:j], b[k:m], strict=True)]
        else:
            steps.append(Step(tuple(a[i:j]), tuple(b[k:m]), False))
    return steps


def _alike(a: fx.Node, b: fx.Node) -> bool:
    """Whether two nodes' arguments have one structure."""
    x, y = leaves((a.args, a.kwargs)), leaves((b.args, b.kwargs))
    return len(x) == len(y) and all(isinstance(p, fx.Node) == isinstance(q, fx.Node) for p, q in zip(x, y, strict=True))


def _join(steps: Sequence[Step]) -> list[Step]:
    """Adjacent runs as one."""
    result: list[Step] = []
    for step in steps:
        if result and not step.equal and not result[-1].equal:
            last = result.pop()
            result.append(Step(last.train + step.train, last.evaluation + step.evaluation, False))
        else:
            result.append(step)
    return result


def _places(steps: Sequence[Step]) -> dict[fx.Node, int]:
    return {n: i for i, step in enumerate(steps) for n in (*step.train, *step.evaluation)}


def _separate(steps: list[Step], outputs: Sequence[Pair]) -> list[Step]:
    """Join runs that use each other's values, with all that lies between them, until none do."""
    while True:
        span = _dependent(steps, outputs)
        if span is None:
            return steps
        low, high = span
        between = steps[low : high + 1]
        joined = Step(
            tuple(n for s in between for n in s.train), tuple(n for s in between for n in s.evaluation), False
        )
        steps = _join([*steps[:low], joined, *steps[high + 1 :]])


def _dependent(steps: Sequence[Step], outputs: Sequence[Pair]) -> tuple[int, int] | None:
    place = _places(steps)

    def runs(*nodes: fx.Node) -> set[int]:
        return {place[n] for n in nodes if n in place and not steps[place[n]].equal}

    def torn(*pair: fx.Node) -> tuple[int, int] | None:
        """Steps that make two values to choose between: at the end of one run both must be known."""
        spots = runs(*pair)
        if spots and (last := max(place.get(n, -1) for n in pair)) > min(spots):
            return min(spots), last
        return None

    for i, step in enumerate(steps):
        if step.equal:
            for a, b in argument_pairs(step.train[0], step.evaluation[0]):
                if isinstance(a, fx.Node) and (span := torn(a, b)):
                    return span
            continue
        for node in (*step.train, *step.evaluation):
            spots = runs(*node.all_input_nodes) - {i}
            if spots:
                return min(*spots, i), max(*spots, i)
    for pair in outputs:
        if span := torn(*pair):
            return span
    return None


def _needed(steps: Sequence[Step], outputs: Sequence[Pair]) -> dict[int, list[Pair]]:
    place = _places(steps)
    pairs = [
        pair
        for step in steps
        if step.equal
        for pair in argument_pairs(step.train[0], step.evaluation[0])
        if isinstance(pair[0], fx.Node)
    ]
    needed: dict[int, list[Pair]] = {}
    for pair in dict.fromkeys([*pairs, *outputs]):
        spots = {place[n] for n in pair if n in place and not steps[place[n]].equal}
        if spots:
            needed.setdefault(max(spots), []).append(pair)
    return needed
