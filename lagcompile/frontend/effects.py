"""Side effects of operations: what they write into, which values share memory, which draw random numbers.

In: nodes and values while a graph runs (`Watch`), or node records (`order`, `torn`). Out: order dependencies between
nodes that the flow of values does not show, and the cuts that would tear an in-place operation from its tensor.
Invariant: a partition that respects both computes what the un-split network computes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx

from lagcompile.frontend.structure import leaves
from lagcompile.frontend.tensors import memory_of

if TYPE_CHECKING:
    from lagcompile.frontend.graph import Node


class Watch:
    """Note the side effects of each node of a graph that runs.

    Args:
        random: watch the random generator, too.

    Attributes:
        writes: node -> names of the inputs whose memory it wrote into.
        aliases: node -> names of the nodes that first made the memory that it shares, where it shares any.
        random: nodes that drew random numbers.
    """

    def __init__(self, *, random: bool = True) -> None:
        self._watched = random
        self.writes: dict[str, tuple[str, ...]] = {}
        self.aliases: dict[str, tuple[str, ...]] = {}
        self.random: set[str] = set()
        self._owner: dict[str, dict[int, str]] = {}
        self._versions: list[tuple[str, Tensor, int]] = []
        self._state: Tensor | None = None

    def before(self, node: fx.Node, env: Mapping[fx.Node, Any]) -> None:
        """Note the inputs' versions and the generator's state."""
        self._versions = [
            (source.name, tensor, tensor._version)
            for source in node.all_input_nodes
            if isinstance(tensor := env[source], Tensor)
        ]
        self._state = torch.get_rng_state() if self._watched and node.op.startswith("call") else None

    def after(self, node: fx.Node, value: Any) -> None:
        """Compare with what was noted."""
        written = tuple(name for name, tensor, version in self._versions if tensor._version != version)
        if written:
            self.writes[node.name] = written
        if self._state is not None and not torch.equal(self._state, torch.get_rng_state()):
            self.random.add(node.name)
        found = [value] if isinstance(value, Tensor) else [v for v in leaves(value) if isinstance(v, Tensor)]
        inherited: dict[int, str] = {}
        for source in node.all_input_nodes:
            inherited |= self._owner.get(source.name, {})
        own: dict[int, str] = {}
        for tensor in found:
            key = memory_of(tensor)
            own[key] = inherited.get(key, node.name)
        self._owner[node.name] = own
        shared = tuple(dict.fromkeys(o for o in own.values() if o != node.name))
        if shared:
            self.aliases[node.name] = shared


def ordered(nodes: Sequence[Node]) -> tuple[Node, ...]:
    """Nodes with `after` set: what must run before them although they do not read it.

    Two kinds: operations that draw random numbers keep their order; an operation that writes into memory runs after
    the earlier readers, and before the later ones.
    """
    staged = {n.name for n in nodes if n.role in {"value", "structure"}}
    known = {n.name: n for n in nodes}
    written = {memory for n in nodes if n.writes for memory in _memory_written(n, known)}
    if not written and not any(n.random for n in nodes):
        return tuple(nodes)
    last_random: str | None = None
    last_write: dict[str, str] = {}
    readers: dict[str, list[str]] = {}
    result = []
    for node in nodes:
        before: list[str] = []
        if node.name in staged:
            if node.random and last_random is not None:
                before.append(last_random)
            touched = {m for i in node.inputs for m in _memory(known[i])} & written
            before += [last_write[m] for m in touched if m in last_write]
            for memory in _memory_written(node, known):
                before += readers.pop(memory, [])
                last_write[memory] = node.name
            for memory in touched:
                readers.setdefault(memory, []).append(node.name)
            if node.random:
                last_random = node.name
        own = tuple(dict.fromkeys(b for b in before if b != node.name and b not in node.inputs))
        result.append(replace(node, after=own) if own else node)
    return tuple(result)


def _memory(node: Node) -> tuple[str, ...]:
    """Names of the nodes whose memory a value is."""
    return node.aliases or (node.name,)


def _memory_written(node: Node, known: Mapping[str, Node]) -> set[str]:
    return {m for name in node.writes for m in _memory(known[name])}


def torn(nodes: Sequence[Node]) -> Iterator[tuple[Node, Node]]:
    """Pairs (value, in-place operation) that must lie in one stage.

    A state that crosses a breakpoint is a copy. That is right for a value that an operation overwrites and nobody
    else reads afterwards; where the overwritten memory is read again under another name, a cut before the operation
    would pass on the old value.
    """
    writers = [(i, n) for i, n in enumerate(nodes) if n.writes]
    if not writers:
        return
    known = {n.name: n for n in nodes}
    place = {n.name: i for i, n in enumerate(nodes)}
    staged = {n.name for n in nodes if n.role in {"value", "structure"}}
    last = {}
    for i, node in enumerate(nodes):
        for name in node.inputs:
            last[name] = i
    sharing: dict[str, list[str]] = {}
    for node in nodes:
        for memory in _memory(node):
            sharing.setdefault(memory, []).append(node.name)
    for i, writer in writers:
        if writer.name not in staged:
            continue
        for memory in _memory_written(writer, known):
            for name in sharing[memory]:
                if name in staged and place[name] < i and last.get(name, -1) > i:
                    yield known[name], writer
