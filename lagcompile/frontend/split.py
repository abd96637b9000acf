"""Split policies: where to cut a graph. Each policy is one frozen class whose fields are its YAML options.

In: a `Graph`. Out: a `Partition`. Invariant: a policy either gives what its options say or raises `SplitError` with
every problem; `split_of` turns what users write (an int, a dict, a path, None) into a policy.
"""

from __future__ import annotations

import difflib
import fnmatch
from collections.abc import Sequence
from typing import Annotated, Literal

from pydantic import Field, TypeAdapter, model_validator

from lagcompile.frontend.balance import Cuts, balanced_positions, cuts_of
from lagcompile.frontend.graph import Graph, Node
from lagcompile.frontend.partition import Partition, ancestors, partition
from lagcompile.ir.base import Frozen, SplitError

Names = str | tuple[str, ...]


class AtSplit(Frozen):
    """Breakpoints at named places: module paths ("features.3"), globs ("layers.*"), or graph node names ("relu_1").

    Each entry is one breakpoint; a list of names inside the list is one breakpoint that cuts all of them at once. A
    glob gives one breakpoint for each module that it matches.
    """

    policy: Literal["at"] = "at"
    after: tuple[Names, ...] = ()
    """Cut behind the last operation of each."""
    before: tuple[Names, ...] = ()
    """Cut ahead of the first operation of each."""

    @model_validator(mode="after")
    def _some(self) -> AtSplit:
        if not self.after and not self.before:
            raise ValueError("give at least one name under 'after' or 'before'")
        return self

    def split(self, graph: Graph) -> Partition:
        """Partition with a breakpoint at each of the named places.

        Raises:
            SplitError: names that match nothing, with what is near; places that separate nothing.
        """
        problems: list[str] = []
        found: list[tuple[int, set[str], str]] = []
        order = {n.name: i for i, n in enumerate(graph.staged)}
        for side, entries in (("after", self.after), ("before", self.before)):
            for entry in entries:
                for names in _expand(graph, entry, problems):
                    down = _down_set(graph, names, side)
                    last = max((order[n] for n in down), default=-1)
                    found.append((last, down, f"{side} {' and '.join(names)}"))
        if problems:
            raise SplitError(problems)
        found.sort(key=lambda f: (f[0], len(f[1])))
        return partition(graph, [f[1] for f in found], [f[2] for f in found])


class EverySplit(Frozen):
    """A stage for every `n` modules of a type: cut ahead of each n-th further module of that type."""

    policy: Literal["every"] = "every"
    type: str
    """Class name of the modules to count, such as Linear or BasicBlock."""
    n: int = Field(default=1, ge=1)

    def split(self, graph: Graph) -> Partition:
        """Partition with `n` modules of the type in each stage.

        Raises:
            SplitError: fewer than two groups of such modules exist.
        """
        firsts: list[Node] = []
        seen: set[str] = set()
        for node in graph.staged:
            path = _path_of_type(node, self.type)
            if path is not None and path not in seen:
                seen.add(path)
                firsts.append(node)
        cuts = firsts[self.n :: self.n]
        if not cuts:
            types = sorted({t for n in graph.staged for t in n.module_types})
            raise SplitError(
                f"split every {self.n} {self.type}: the model runs {len(firsts)} modules of that type, so there is "
                f"nothing to separate (types in the model: {', '.join(types) or 'none'})"
            )
        order = [n.name for n in graph.staged]
        downs = [set(order[: order.index(n.name)]) for n in cuts]
        return partition(graph, downs, [f"ahead of {n.module or n.name}" for n in cuts])


class BalancedSplit(Frozen):
    """`stages` stages: the largest stage's flops as small as possible, then the total bytes of the states.

    Without example inputs, work is counted in parameter elements.
    """

    policy: Literal["balanced"] = "balanced"
    stages: int = Field(ge=1)

    def split(self, graph: Graph) -> Partition:
        """Partition into exactly `stages` stages.

        Raises:
            SplitError: the graph does not allow so many stages.
        """
        return _at_positions(graph, cuts_of(graph), self.stages)


class NoSplit(Frozen):
    """One stage: single shooting, which is plain backprop."""

    policy: Literal["none"] = "none"

    def split(self, graph: Graph) -> Partition:
        """Partition into one stage."""
        return partition(graph, [], [])


class AutoSplit(Frozen):
    """The default: balanced stages, as many as there are places ahead of a weighted layer, at most `most`."""

    policy: Literal["auto"] = "auto"
    most: int = Field(default=4, ge=1)

    def split(self, graph: Graph) -> Partition:
        """Partition into at most `most` balanced stages; one stage where nothing can be cut."""
        cuts = cuts_of(graph)
        return _at_positions(graph, cuts, min(self.most, len(cuts.preferred) + 1))


SplitPolicy = AtSplit | EverySplit | BalancedSplit | NoSplit | AutoSplit
Split = Annotated[SplitPolicy, Field(discriminator="policy")]
_ADAPTER: TypeAdapter[SplitPolicy] = TypeAdapter(Split)


def split_of(value: object) -> SplitPolicy:
    """Policy from what a user writes: None (auto), an int (balanced), a mapping, or a policy.

    Raises:
        pydantic.ValidationError: a mapping that is no policy.
        SplitError: anything else.
    """
    if value is None:
        return AutoSplit()
    if isinstance(value, bool) or not isinstance(value, int | dict | Frozen):
        raise SplitError(f"split must be a number of stages, a mapping, a path or a policy, got {value!r}")
    if isinstance(value, int):
        if value < 1:
            raise SplitError(f"split must be at least 1 stage, got {value}")
        return BalancedSplit(stages=value)
    return _ADAPTER.validate_python(value)


def _at_positions(graph: Graph, cuts: Cuts, stages: int) -> Partition:
    positions = balanced_positions(cuts, stages)
    order = [n.name for n in graph.staged]
    downs = [set(order[: p + 1]) for p in positions]
    return partition(graph, downs, [f"after {order[p]}, balanced" for p in positions])


def _expand(graph: Graph, entry: Names, problems: list[str]) -> list[tuple[str, ...]]:
    """Name tuples that one entry of `after` or `before` stands for."""
    if isinstance(entry, tuple):
        expanded = [_expand(graph, name, problems) for name in entry]
        return [tuple(n for group in expanded for names in group for n in names)]
    modules = dict.fromkeys(m for n in graph.staged for m in _prefixes(n.module))
    nodes = {n.name: n for n in graph.staged}
    if entry in modules or entry in nodes:
        return [(entry,)]
    matches = [m for m in modules if fnmatch.fnmatchcase(m, entry) and m.count(".") == entry.count(".")]
    if not matches:
        matches = [n for n in nodes if fnmatch.fnmatchcase(n, entry)]
    if not matches:
        near = difflib.get_close_matches(entry, list(dict.fromkeys([*modules, *nodes])), n=3, cutoff=0.5)
        hint = f"did you mean {' or '.join(repr(n) for n in near)}?" if near else _known(modules, nodes)
        problems.append(f"the model has no module and no graph node named '{entry}' that a cut could use: {hint}")
    return [(m,) for m in matches]


def _known(modules: Sequence[str] | dict[str, None], nodes: dict[str, Node]) -> str:
    names = list(modules)[:12] or list(nodes)[:12]
    return f"it has {', '.join(names)}"


def _prefixes(path: str) -> list[str]:
    parts = path.split(".") if path else []
    return [".".join(parts[: i + 1]) for i in range(len(parts))]


def _members(graph: Graph, name: str) -> list[Node]:
    """Staged nodes of a module path or the node of that name."""
    inside = [n for n in graph.staged if name in _prefixes(n.module)]
    return inside or [n for n in graph.staged if n.name == name]


def _down_set(graph: Graph, names: tuple[str, ...], side: str) -> set[str]:
    down: set[str] = set()
    for name in names:
        members = _members(graph, name)
        if side == "after":
            down |= ancestors(graph, [members[-1].name])
            continue
        inside = {n.name for n in members}
        sources = [i for n in members for i in n.inputs if i not in inside]
        down |= ancestors(graph, sources)
    return down


def _path_of_type(node: Node, wanted: str) -> str | None:
    """Module path of the outermost module of a type around a node."""
    if wanted not in node.module_types:
        return None
    prefixes = _prefixes(node.module)
    index = node.module_types.index(wanted) - len(node.module_types)
    return prefixes[index] if -len(prefixes) <= index else node.module
