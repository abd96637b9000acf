"""The functional form of a graph, node by node.

In: a capture, and what values share memory. Out: `Rewriter`, whose `graph` has no operation that writes into memory
that another one reads. Invariant: autograd sees what it would see in the model: memory behind a `detach()` has its own
history as soon as a write through it gives it one.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import fx, nn

from lagcompile.frontend.capture import Capture
from lagcompile.frontend.graphmodule import StageGraph
from lagcompile.frontend.storage import Form, Sharing, detaches
from lagcompile.frontend.writes import Body, Key, Origins, Value, Write, overlaid
from lagcompile.ir.base import LiftError

_DEFINED: Mapping[str, Any] = {
    "empty": torch.zeros,
    "empty_like": torch.zeros_like,
    "new_empty": "new_zeros",
    "empty.memory_format": torch.ops.aten.zeros.default,
    "empty_like.default": torch.ops.aten.zeros_like.default,
    "new_empty.default": torch.ops.aten.new_zeros.default,
}
"""What is partly filled may be a state, which needs a value everywhere."""


class Rewriter:
    """Copies a graph node by node; a write makes a new version of the memory that it writes into."""

    def __init__(
        self, captured: Capture, modules: Mapping[str, nn.Module], runs: Sequence[Sharing], *, known: bool, pure: bool
    ) -> None:
        self.modules, self.runs, self.known, self.pure = modules, runs, known, pure
        self.old = list(captured.module.graph.nodes)
        self.graph = fx.Graph()
        self.attributes: dict[str, nn.Module] = {}
        self.env: dict[fx.Node, Value] = {}
        self.current: dict[Key, fx.Node] = {}
        """Memory -> the new node that holds all of it."""
        self.origin: dict[Key, fx.Node] = {}
        """Memory -> the old node that first held it."""
        self.version: dict[Key, int] = {}
        self.writer: dict[Key, fx.Node] = {}
        self.uneven: list[Key] = []
        """Memory that is one in some runs only."""
        self.split: dict[fx.Node, tuple[fx.Node, tuple[int, ...]]] = {}
        """Values behind a detach() that were given gradients by a write -> the new node, as of which memory."""
        self.changed = False
        self.made_of: dict[Key, list[fx.Node]] = {}
        self.doubt: dict[Key, tuple[int, fx.Node]] = {}
        """Memory of which a write may have changed a part, or not -> how many nodes there were, and the write."""
        self.place = {n: i for i, n in enumerate(self.old)}
        self.last = {n: max((self.place[u] for u in n.users), default=-1) for n in self.old}
        self.origins = Origins(captured)
        self.influence: dict[fx.Node, frozenset[str]] = {}

    def rewritten(self) -> dict[str, str]:
        """Fill the new graph; new names of the values that the old one gave."""
        for node in self.old:
            if node.op == "output":
                self.graph.output(fx.node.map_arg(node.args[0], self.read))
            elif bases := self._bases(node):
                self._write(node, bases)
            else:
                self._plain(node)
        output = next(n for n in reversed(self.old) if n.op == "output")
        names = {n.name: str(self.read(n).name) for n in output.all_input_nodes}
        self._sweep()
        return names

    def _sweep(self) -> None:
        """Drop views that were taken again and that nothing reads."""
        for node in reversed(list(self.graph.nodes)):
            if not node.users and node.meta.get("again"):
                self.graph.erase_node(node)

    # ------------------------------------------------------------ memory
    def _key(self, node: fx.Node) -> Key:
        return tuple(run.memory[node.name] for run in self.runs)

    def _views(self, node: fx.Node) -> tuple[fx.Node, ...]:
        """Inputs with which a value has memory in common for certain."""
        own = self._key(node)
        return tuple(n for n in node.all_input_nodes if all(a & b for a, b in zip(own, self._key(n), strict=True)))

    def _register(self, node: fx.Node, value: Value) -> None:
        """Note a value and the memory of which it is made."""
        key = self._key(node)
        self.env[node] = value
        value.parents = tuple(p for p in value.parents if self.env[p].roots)
        single = all(len(k) == 1 for k in key) and all(node.name in run.form for run in self.runs)
        if not self.known and any(key):
            single = True
        if single:
            if key not in self.current:
                assert value.now is not None
                self.current[key], self.origin[key], self.version[key] = value.now, node, 0
                if len(set(key)) > 1:
                    self.uneven.append(key)
                value.whole, value.parents = True, ()
            elif not value.parents:
                value.whole = self._form(node) == self._form(self.origin[key])  # an item of a tuple, read once more
            value.roots = (key,)
        else:
            value.roots = tuple(dict.fromkeys(r for p in value.parents for r in self.env[p].roots))
        value.versions = tuple(self.version[r] for r in value.roots)
        for root in value.roots:
            self.made_of.setdefault(root, []).append(node)

    def _form(self, node: fx.Node) -> list[Form | None]:
        return [run.form.get(node.name) for run in self.runs]

    def read(self, node: fx.Node) -> fx.Node:
        """The new node that holds an old one's value now."""
        value = self.env[node]
        for root in value.roots:
            if root in self.doubt and self.place[node] < self.doubt[root][0]:
                self._refuse(self.doubt[root][1], node)
        if value.same is not None:
            return self.read(value.same)
        if value.whole:
            return self.current[value.roots[0]]
        versions = tuple(self.version[r] for r in value.roots)
        if versions != value.versions:
            if not value.parents:
                self._refuse(self.writer[value.roots[0]], node)
            given = {n: self.read(n) if n in value.parents else v for n, v in value.given.items()}
            value.now = self._again(node, given)
            value.versions = versions
        assert value.now is not None
        return self._with_gradients(node, value.now, versions) if node in self.split else value.now

    def _with_gradients(self, node: fx.Node, now: fx.Node, versions: tuple[int, ...]) -> fx.Node:
        """What the memory holds now, with the gradients that writes through this value gave it."""
        own, seen = self.split[node]
        if seen != versions:
            own = self._made(self.graph.call_function(overlaid, (own, now)), node)
            self.split[node] = own, versions
        return own

    def _again(self, node: fx.Node, given: Mapping[fx.Node, Any]) -> fx.Node:
        """A view, taken of the new value."""
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: given[n])
        made = self.graph.create_node(node.op, node.target, args, kwargs, name=f"{node.name}_again")
        return self._made(made, node, again=True)

    def _made(self, made: fx.Node, node: fx.Node, **more: Any) -> fx.Node:
        made.meta = {**node.meta, **more}
        found = frozenset().union(*(self.influence[n] for n in made.all_input_nodes))
        self.influence[made] = found | self.origins.of(made)
        return made

    def _plain(self, node: fx.Node) -> None:
        """An operation that writes nothing, or into a buffer."""
        given = {n: self.read(n) for n in node.all_input_nodes}
        made = self._made(self.graph.node_copy(node, lambda n: given[n]), node)
        if "memory_format" not in node.kwargs:
            made.target = _DEFINED.get(str(getattr(node.target, "__name__", node.target)), made.target)
        self._register(node, Value(made, given, self._views(node)))

    def attribute(self, name: str) -> fx.Node:
        """The new node that reads a parameter."""
        found = next((n for n in self.graph.nodes if n.op == "get_attr" and n.target == name), None)
        if found is None:
            found = self.graph.create_node("get_attr", name)
            self.influence[found] = frozenset({"parameters"})
        return found

    # ------------------------------------------------------------ writes
    def _bases(self, node: fx.Node) -> list[fx.Node]:
        """Inputs that a node writes into, but for buffers."""
        names = {name for run in self.runs for name in run.writes.get(node.name, ())}
        found = [n for n in node.all_input_nodes if n.name in names]
        kept = []
        for base in found:
            value = self.env[base]
            if not self.known and len(set(self._key(base))) > 1:
                self._refuse(node, base)  # not even whose memory it is
            if len(value.roots) != 1 or not (value.whole or value.parents or value.same):
                self._refuse(node, base)
            origin = self.origin[value.roots[0]]
            if self.origins.is_buffer(origin):
                continue
            if self.origins.is_parameter(origin):
                raise LiftError(
                    f"{_named(node)} writes into the parameter '{origin.target}': weights are unknowns of the program "
                    "and cannot be changed by the forward. Compute a new tensor instead"
                )
            if self.origins.is_own(origin):
                raise LiftError(
                    f"{_named(node)} writes into '{origin.target}', which is not a buffer: register it with "
                    "register_buffer, so that what it remembers is part of the model's state"
                )
            kept.append(base)
        if kept and any(node.name in run.bent for run in self.runs):
            raise LiftError(f"{_named(node)} changes the shape of its input in place: use the operation without '_'")
        return kept

    def _write(self, node: fx.Node, bases: list[fx.Node]) -> None:
        roots = list(dict.fromkeys(self.env[b].roots[0] for b in bases))
        back = self._gives_back(node)
        for root in roots:
            self.writer[root] = node
            self._doubts(root, node)
        gained = self._gain(node, bases)
        first = self.env[bases[0]]
        simple = (
            not self.pure
            and len(bases) == 1
            and back is bases[0]
            and self._is_whole(bases[0])
            and node.meta.get("grad", True)
        )
        alone = node.all_input_nodes == bases
        reach = self.influence[self.current[roots[0]]]
        if simple and self._unread(node, roots[0]) and (alone or len(reach) == 2):
            made = self._made(self.graph.node_copy(node, self.read), node)
            self._advance(roots[0], made)
        elif simple and alone and "inputs" in reach:
            self.changed = True
            copied = self.graph.call_method("clone", (self.current[roots[0]],))
            self._made(copied, node)
            made = self._made(self.graph.node_copy(node, lambda _: copied), node)
            self._advance(roots[0], made)
        else:
            self._composite(node, bases, roots, back)
        for cut, now in gained.items():
            self.split[cut] = now, tuple(self.version[r] for r in self.env[cut].roots)
        if back is not None:
            self.env[node] = Value(None, roots=first.roots, same=back)
            self.made_of[roots[0]].append(node)

    def _gain(self, node: fx.Node, bases: list[fx.Node]) -> dict[fx.Node, fx.Node]:
        """New values of the detached tensors through which a write goes, where it gives them gradients, or did before.

        Memory has one history for autograd on either side of a detach(): what is written there has its gradients
        there only.
        """
        made: dict[fx.Node, fx.Node] = {}
        others = [n for n in node.all_input_nodes if n not in bases]
        giving = node.meta.get("grad", True) and any(self._has_gradients(n) for n in others)
        cuts = {self.family(b) for b in bases}
        if len(cuts) > 1:
            raise LiftError(f"{_named(node)} writes into a detached tensor and another one at once: write one by one")
        for cut in [c for c in cuts if c is not None and (giving or c in self.split)]:
            body = Body(self, (), cut)
            body.run(node, bases)
            body.graph.output(body.copies[0])
            made[cut] = self._call(node, body, [self.read(cut)])
        return made

    def _has_gradients(self, node: fx.Node) -> bool:
        value = self.env[node]
        if value.same is not None:
            return self._has_gradients(value.same)
        if (cut := self.family(node)) is not None:
            return cut in self.split
        return value.now is not None and bool(self.influence[value.now])

    def family(self, node: fx.Node) -> fx.Node | None:
        """The detach() behind which a value of some memory lies, None where there is none."""
        value = self.env[node]
        if value.same is not None:
            return self.family(value.same)
        if detaches(node):
            return node
        return next((f for p in value.parents if (f := self.family(p)) is not None), None)

    def _is_whole(self, node: fx.Node) -> bool:
        value = self.env[node]
        return self._is_whole(value.same) if value.same is not None else value.whole

    def _gives_back(self, node: fx.Node) -> fx.Node | None:
        """The input that a write returns, None where it returns something else or nothing."""
        found = {run.same.get(node.name) for run in self.runs}
        name = found.pop()
        return None if found or name is None else next(n for n in node.all_input_nodes if n.name == name)

    def _advance(self, root: Key, made: fx.Node) -> None:
        self.current[root] = made
        self.version[root] += 1

    def _unread(self, node: fx.Node, root: Key) -> bool:
        """Return whether nothing made before a write reads its memory after it, and the memory is the graph's."""
        here = self.place[node]
        return self.origin[root].op.startswith("call") and all(self.last[n] <= here for n in self.made_of[root])

    def _doubts(self, root: Key, node: fx.Node) -> None:
        """Note the values of which it is not certain whether they see a write."""
        for other in self.current if len(set(root)) > 1 else self.uneven:
            if other != root and any(a & b for a, b in zip(root, other, strict=True)):
                self.doubt[other] = (self.place[node], node)

    def _refuse(self, write: fx.Node, reader: fx.Node) -> None:
        if not self.known:
            raise LiftError(
                f"{_named(write)} writes into memory that {_named(reader)} may share: give example_inputs, so that the "
                "model can be looked at"
            )
        raise LiftError(
            f"{_named(write)} writes into memory that {_named(reader)} shares for some batch sizes or modes only, "
            "and that is read again: write into a .clone()"
        )

    # ------------------------------------------------------------ writes through views
    def _composite(self, node: fx.Node, bases: list[fx.Node], roots: list[Key], back: fx.Node | None) -> None:
        """One node that copies the written memory, takes the views again and writes."""
        body = Body(self, roots)
        wanted = [*body.copies]
        result = body.run(node, bases)
        returned = back is None and bool(node.users) and any(run.memory[node.name] for run in self.runs)
        self.changed = True
        if returned:
            wanted.append(result)
        body.graph.output(wanted[0] if len(wanted) == 1 else tuple(wanted))
        made = self._call(node, body, [self.current[r] for r in roots])
        if len(wanted) == 1:
            self._advance(roots[0], made)
        else:
            for i, root in enumerate(roots):
                self._advance(root, self._item(made, i, node))
        if returned:
            self._register(node, Value(self._item(made, len(roots), node)))
        elif back is None:
            self.env[node] = Value(made)

    def _call(self, node: fx.Node, body: Body, copied: Sequence[fx.Node]) -> fx.Node:
        """A node that runs a body on copies."""
        name = f"_write_{len(self.attributes)}"
        self.attributes[name] = Write(StageGraph(body.root, body.graph, "Writes"), len(copied))
        args = (*copied, *body.operands)
        return self._made(self.graph.create_node("call_module", name, args, {}, name=node.name), node)

    def _item(self, made: fx.Node, number: int, node: fx.Node) -> fx.Node:
        return self._made(self.graph.call_function(operator.getitem, (made, number)), node)


def _named(node: fx.Node) -> str:
    source = node.meta.get("source")
    return f"'{node.name}'" + (f" ({source})" if source else "")
