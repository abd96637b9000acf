"""Split policies: where to cut a graph. Each policy is one frozen class whose fields are its YAML options.

In: a `Graph`, and its `Context` for policies that look at data. Out: a `Partition`. Invariant: a policy either gives
what its options say or raises `SplitError` with every problem; `split_of` turns what users write (an int, a dict, a
policy, None) into a policy.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Literal

from pydantic import Field, ValidationError, model_validator

from lagcompile.frontend.balance import Context, at_narrowed, balanced_positions, cuts_of
from lagcompile.frontend.conditioning import ConditioningSplit
from lagcompile.frontend.graph import Graph, Node
from lagcompile.frontend.memory import MemorySplit
from lagcompile.frontend.partition import Partition, partition
from lagcompile.frontend.places import Names, down_set, expand, prefixes
from lagcompile.frontend.repeats import IsomorphicSplit
from lagcompile.ir.base import Frozen, SpecError, SplitError
from lagcompile.ir.schemaerrors import explain, show_path


class AtSplit(Frozen):
    """Breakpoints at named places.

    A name is a module path ("features.3"), a glob ("layers.*"), a graph node ("relu_1"; "node:relu_1" where a module
    has that path, too) or a source line ("model.py:42"). Each entry is one breakpoint; a list of names
    inside the list is one breakpoint that cuts all of them at once. A glob gives one breakpoint for each module that
    it matches.
    """

    policy: Literal["at"] = "at"
    after: tuple[Names, ...] = ()
    """Cut after the last operation of each."""
    before: tuple[Names, ...] = ()
    """Cut before the first operation of each."""

    @model_validator(mode="after")
    def _some(self) -> AtSplit:
        if not self.after and not self.before:
            raise ValueError("give at least one name under 'after' or 'before'")
        return self

    def split(self, graph: Graph, context: Context | None = None) -> Partition:
        """Partition with a breakpoint at each of the named places.

        Raises:
            SplitError: names that match nothing, with what is near; places that separate nothing.
        """
        problems: list[str] = []
        found: list[tuple[int, set[str], str]] = []
        order = {n.name: i for i, n in enumerate(graph.staged)}
        for side, entries in (("after", self.after), ("before", self.before)):
            for entry in entries:
                for names in expand(graph, entry, problems):
                    down = down_set(graph, names, side)
                    last = max((order[n] for n in down), default=-1)
                    found.append((last, down, f"{side} {' and '.join(names)}"))
        found.sort(key=lambda f: (f[0], len(f[1])))
        try:
            result = partition(graph, [f[1] for f in found], [f[2] for f in found])
        except SplitError as error:  # said together with the names that match nothing
            raise SplitError([*problems, *error.problems]) from None
        if problems:
            raise SplitError(problems)
        return result


class EverySplit(Frozen):
    """A stage for every `n` modules of a type: cut before each n-th further module of that type."""

    policy: Literal["every"] = "every"
    type: str
    """Class name of the modules to count, such as Linear or BasicBlock."""
    n: int = Field(default=1, ge=1)

    def split(self, graph: Graph, context: Context | None = None) -> Partition:
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
        order = {n.name: i for i, n in enumerate(graph.staged)}
        downs = [{m.name for m in graph.staged[: order[n.name]]} for n in cuts]
        return partition(graph, downs, [f"before {n.module or n.name}" for n in cuts])


class BalancedSplit(Frozen):
    """`stages` stages: the largest stage's flops as small as possible, then the total bytes of the states.

    The choice among the places in execution order is exact. A breakpoint that several tensors cross there is then made
    as narrow as it can be without a larger stage, by max-flow (through parallel branches, for one). Without example
    inputs, work is counted in parameter elements.
    """

    policy: Literal["balanced"] = "balanced"
    stages: int = Field(ge=1)

    def split(self, graph: Graph, context: Context | None = None) -> Partition:
        """Partition into exactly `stages` stages.

        Raises:
            SplitError: the graph does not allow so many stages.
        """
        cuts = cuts_of(graph)
        return at_narrowed(graph, cuts, balanced_positions(cuts, self.stages), "balanced")


class NoSplit(Frozen):
    """One stage: single shooting, which is plain backprop."""

    policy: Literal["none"] = "none"

    def split(self, graph: Graph, context: Context | None = None) -> Partition:
        """Partition into one stage."""
        return partition(graph, [], [])


class AutoSplit(Frozen):
    """The default: balanced stages, as many as there are places before a weighted layer, at most `most`.

    It never fails: a model that cannot be cut gives one stage.
    """

    policy: Literal["auto"] = "auto"
    most: int = Field(default=4, ge=1)

    def split(self, graph: Graph, context: Context | None = None) -> Partition:
        """Partition into at most `most` balanced stages; one stage where nothing can be cut."""
        cuts = cuts_of(graph)
        stages = min(self.most, len(cuts.preferred) + 1)
        return at_narrowed(graph, cuts, balanced_positions(cuts, stages), "balanced")


SplitPolicy = (
    AtSplit | EverySplit | BalancedSplit | NoSplit | AutoSplit | MemorySplit | ConditioningSplit | IsomorphicSplit
)
Split = Annotated[SplitPolicy, Field(discriminator="policy")]


class SplitFile(Frozen):
    """Contents of a stand-alone split file: `split:` with one of the policies."""

    FILE = ("split spec", "split")
    split: Split
    """Where to cut."""


def split_of(value: object) -> SplitPolicy:
    """Policy from what a user writes: None (auto), an int (balanced), a mapping, or a policy.

    Raises:
        SpecError: a mapping that is not a policy.
        SplitError: anything else.
    """
    if value is None:
        return AutoSplit()
    if isinstance(value, Mapping):
        given = {"split": dict(value)}
        try:
            return SplitFile.model_validate(given).split
        except ValidationError as error:
            found = explain(error, SplitFile, given)
            raise SpecError([f"{show_path(path)}: {message}" for path, message in found]) from None
    if isinstance(value, SplitPolicy):
        return value
    if isinstance(value, bool) or not isinstance(value, int):
        raise SplitError(f"split must be a number of stages, a mapping, a path or a policy, got {value!r}")
    if value < 1:
        raise SplitError(f"split must be at least 1 stage, got {value}")
    return BalancedSplit(stages=value)


def _path_of_type(node: Node, wanted: str) -> str | None:
    """Module path of the outermost module of a type around a node."""
    if wanted not in node.module_types:
        return None
    paths = prefixes(node.module)
    index = node.module_types.index(wanted) - len(node.module_types)
    return paths[index] if -len(paths) <= index else node.module
