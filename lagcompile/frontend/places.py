"""Places by name: what `after` and `before` of a split spec mean in a graph, and names for a partition's breakpoints.

In: a `Graph` and names (module paths, globs, node names, source lines). Out: down-sets; or a partition's breakpoints as
names that give the same partition again. Invariant: a name that matches nothing is a problem that says what is near.
"""

from __future__ import annotations

import difflib
import fnmatch
import re
from collections.abc import Iterable, Sequence

from lagcompile.frontend.graph import Graph, Node
from lagcompile.frontend.partition import Partition, ancestors

Names = str | tuple[str, ...]
NODE = "node:"
_LINE = re.compile(r"^(?P<file>.+\.py):(?P<line>\d+)$")


def expand(graph: Graph, entry: Names, problems: list[str]) -> list[tuple[str, ...]]:
    """Return the name tuples that one entry of `after` or `before` means."""
    if isinstance(entry, tuple):
        expanded = [expand(graph, name, problems) for name in entry]
        return [tuple(n for group in expanded for names in group for n in names)]
    modules = dict.fromkeys(m for n in graph.staged for m in prefixes(n.module))
    nodes = {n.name: n for n in graph.staged}
    if entry in modules or entry in nodes or (entry.startswith(NODE) and entry.removeprefix(NODE) in nodes):
        return [(entry,)]
    if (line := _LINE.match(entry)) is not None:
        return _line(graph, entry, line["file"], int(line["line"]), problems)
    matches = [m for m in modules if fnmatch.fnmatchcase(m, entry) and m.count(".") == entry.count(".")]
    if not matches:
        matches = [n for n in nodes if fnmatch.fnmatchcase(n, entry)]
    if not matches:
        near = difflib.get_close_matches(entry, list(dict.fromkeys([*modules, *nodes])), n=3, cutoff=0.5)
        hint = f"did you mean {' or '.join(repr(n) for n in near)}?" if near else _known(modules, nodes)
        problems.append(f"the model has no module and no graph node named '{entry}' that a cut could use: {hint}")
    return [(m,) for m in matches]


def _line(graph: Graph, entry: str, file: str, line: int, problems: list[str]) -> list[tuple[str, ...]]:
    """A source line, which means the operations that it made, where it was run once."""
    lines: dict[int, list[str]] = {}
    for node in graph.staged:
        path, _, number = node.source.rpartition(":")
        if number and (path == file or path.endswith("/" + file)):
            lines.setdefault(int(number), []).append(node.name)
    if line in lines:
        runs = _runs(graph, lines[line])
        if len(runs) == 1:
            return [(runs[0][-1],)]
        named = ", ".join(r[-1] for r in runs[:6])
        problems.append(f"the line {entry} runs {len(runs)} times: name one of its graph nodes instead ({named})")
        return []
    near = sorted(lines, key=lambda n: abs(n - line))[:3]
    hint = f"near lines: {', '.join(map(str, sorted(near)))}" if near else "no operation comes from that file"
    problems.append(f"no operation comes from the line {entry}: {hint}")
    return []


def _runs(graph: Graph, names: Sequence[str]) -> list[list[str]]:
    """Nodes of one line, grouped by the call of the module whose forward holds it."""
    runs: dict[str, list[str]] = {}
    for name in names:
        runs.setdefault(graph.by_name[name].caller, []).append(name)
    return list(runs.values())


def _known(modules: Iterable[str], nodes: Iterable[str]) -> str:
    names = list(modules)[:12] or list(nodes)[:12]
    return f"it has {', '.join(names)}"


def prefixes(path: str) -> list[str]:
    """Return a module path and its ancestors, outermost first."""
    parts = path.split(".") if path else []
    return [".".join(parts[: i + 1]) for i in range(len(parts))]


def members(graph: Graph, name: str) -> list[Node]:
    """Staged nodes of a module path or the node of that name ("node:a" where a module has the name, too)."""
    if name.startswith(NODE):
        return [n for n in graph.staged if n.name == name.removeprefix(NODE)]
    inside = [n for n in graph.staged if name in prefixes(n.module)]
    return inside or [n for n in graph.staged if n.name == name]


def down_set(graph: Graph, names: Iterable[str], side: str) -> set[str]:
    """What lies before a breakpoint at named places."""
    down: set[str] = set()
    for name in names:
        found = members(graph, name)
        if side == "after":
            down |= ancestors(graph, [found[-1].name])
            continue
        inside = {n.name for n in found}
        down |= ancestors(graph, [i for n in found for i in n.inputs if i not in inside])
    return down


def names_of(partition: Partition) -> tuple[Names, ...]:
    """Each breakpoint by name: a module path where that says it, else the nodes that nothing before it reads."""
    graph = partition.graph
    result: list[Names] = []
    down: set[str] = set()
    for k in range(partition.stages - 1):
        down |= {n.name for n in partition.nodes_of(k)}
        read = {i for n in graph.staged if n.name in down for i in (*n.inputs, *n.after)}
        ends = tuple(n.name for n in graph.staged if n.name in down and n.name not in read)
        module = graph.by_name[ends[-1]].module
        path = next((p for p in prefixes(module) if down_set(graph, (p,), "after") == down), None)
        modules = {m for n in graph.staged for m in prefixes(n.module)}
        named = tuple(f"{NODE}{n}" if n in modules else n for n in ends)
        result.append(path or (named[0] if len(named) == 1 else named))
    return tuple(result)
