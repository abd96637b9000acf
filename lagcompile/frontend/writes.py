"""A write as a value: what is copied, the views down to the place, the operation.

In: old nodes and what the functional form knows of them (`Versions`). Out: `Write`, a module without side effects.
Invariant: autograd and vmap see the operations that the model ran, on memory that nobody else has.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, fx, nn

from lagcompile.frontend.capture import Capture
from lagcompile.frontend.graphmodule import StageGraph
from lagcompile.frontend.regions import Layer, Region

Key = tuple[frozenset[str], ...]
"""Memory of a value: in each run, the keys of its storages."""


@dataclass
class Value:
    """A node of the old graph in the new one.

    Attributes:
        now: the node that holds it, as of `versions` of the memory of which it is made.
        given: what its inputs were when it was made.
        parents: inputs that it is a view of.
        roots: memory of which it is made.
        whole: whether it is all of its memory.
        same: the node that it is, where it is the result of a write.
    """

    now: fx.Node | None
    given: Mapping[fx.Node, Any] = field(default_factory=dict)
    parents: tuple[fx.Node, ...] = ()
    roots: tuple[Key, ...] = ()
    versions: tuple[int, ...] = ()
    whole: bool = False
    same: fx.Node | None = None


class Versions(Protocol):
    """What is known of the old graph's values while the new one is built."""

    env: dict[fx.Node, Value]
    modules: Mapping[str, nn.Module]
    split: dict[fx.Node, tuple[fx.Node, tuple[int, ...]]]

    def family(self, node: fx.Node) -> fx.Node | None:
        """The detach() behind which a value of some memory lies, None where there is none."""

    def read(self, node: fx.Node) -> fx.Node:
        """The new node that holds an old one's value now."""

    def attribute(self, name: str) -> fx.Node:
        """The new node that reads a parameter."""


class Write(nn.Module):
    """Operations that write, on copies of what they write into.

    Args:
        body: takes the copies and then everything else that is read; gives the copies after the writing.
        copied: how many of the inputs are copied.
    """

    def __init__(self, body: fx.GraphModule, copied: int) -> None:
        super().__init__()
        self.body = body
        self.copied = copied

    def forward(self, *operands: Any) -> Any:
        """The new values."""
        copies = [_copy(t, operands) for t in operands[: self.copied]]
        return self.body(*copies, *operands[self.copied :])

    def extra_repr(self) -> str:
        """What it runs."""
        return str(self.body.graph)


def _copy(base: Tensor, operands: Sequence[Any]) -> Tensor:
    """A copy to write into; under vmap one that has the lanes of everything that may be written."""
    lanes = torch._C._functorch.maybe_get_level
    others = [t for t in operands if isinstance(t, Tensor) and torch._C._functorch.is_batchedtensor(t)]
    deepest = max(others, key=lanes, default=base)
    if (lanes(base) or 0) >= (lanes(deepest) or 0):
        return base.clone()
    return torch.where(torch.zeros_like(deepest.sum(), dtype=torch.bool), base, base)


def overlaid(own: Tensor, now: Tensor) -> Tensor:
    """Numbers of one value with the gradients of another: memory was written where autograd does not look."""
    copy = _copy(own, [now])
    copy.detach().copy_(now.detach())
    return copy


class Body:
    """What a write does, as a separate graph.

    Args:
        owner: what is known of the old graph's values.
        roots: the memory that is copied.
        cut: a detached value that is copied in its place, as autograd sees it.
    """

    def __init__(self, owner: Versions, roots: Sequence[Key], cut: fx.Node | None = None) -> None:
        self.owner = owner
        self.cut = cut
        self.graph, self.root = fx.Graph(), nn.Module()
        self.copies = [self.graph.placeholder(f"copy_{i}") for i in range(len(roots) if cut is None else 1)]
        self.of_root = dict(zip(roots, self.copies, strict=False))
        self.operands: list[fx.Node] = []
        self.through: set[fx.Node | None] = set()
        self.inner: dict[fx.Node, fx.Node] = {}
        self.views: dict[fx.Node, fx.Node] = {}

    def _operand(self, outer: fx.Node) -> fx.Node:
        if outer not in self.inner:
            self.inner[outer] = self.graph.placeholder(f"v{len(self.operands)}")
            self.operands.append(outer)
        return self.inner[outer]

    def _view(self, node: fx.Node) -> fx.Node:
        """A value that is written into, as a view of the copy."""
        value = self.owner.env[node]
        if value.same is not None:
            return self._view(value.same)
        if node is self.cut:
            return self.copies[0]
        if value.whole:
            return self.of_root[value.roots[0]]
        if node not in self.views:
            given = {
                n: self._view(n) if n in value.parents else self._operand(outer) for n, outer in value.given.items()
            }
            args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: given[n])
            self.views[node] = self._copied(node, args, kwargs)
        return self.views[node]

    def _shares(self, node: fx.Node) -> bool:
        """Whether a value is part of the memory that is written into: the operation may read it after it wrote."""
        value, family = self.owner.env[node], self.owner.family(node)
        if self.cut is not None:
            return family is self.cut
        if family in self.owner.split and family not in self.through:
            return False  # its gradients are not those of the memory
        return any(root in self.of_root for root in value.roots) and bool(value.whole or value.parents or value.same)

    def _copied(self, node: fx.Node, args: Any, kwargs: Any) -> fx.Node:
        target = node.target
        if node.op == "call_module":
            path = str(target)
            layer = self.owner.modules[path]
            names = tuple(n for n, _ in layer.named_parameters(remove_duplicate=False))
            weights = [self._operand(self.owner.attribute(f"{path}.{n}")) for n in names]
            target = f"layer_{len(list(self.root.children()))}"
            self.root.add_module(target, Layer(layer, names))
            args = (*weights, *args)
        return self.graph.create_node(node.op, target, args, kwargs)

    def run(self, node: fx.Node, bases: Sequence[fx.Node]) -> fx.Node:
        """The operation itself, which writes into the bases."""
        self.through = {self.owner.family(b) for b in bases}
        given = {
            n: self._view(n) if self._shares(n) else self._operand(self.owner.read(n)) for n in node.all_input_nodes
        }
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: given[n])
        out = kwargs.get("out")
        if isinstance(out, fx.Node):  # it refuses operands with gradients, which states have
            plain = self._copied(node, args, {k: v for k, v in kwargs.items() if k != "out"})
            return self.graph.call_method("copy_", (out, plain))
        if node.meta.get("grad", True):
            return self._copied(node, args, kwargs)
        return self._quiet(node, args, kwargs)

    def _quiet(self, node: fx.Node, args: Any, kwargs: Any) -> fx.Node:
        """The operation without gradients, as in a `torch.no_grad()` block."""
        inner = Body(self.owner, ())
        nodes: list[fx.Node] = []

        def given(n: fx.Node) -> fx.Node:
            if n not in inner.inner:
                inner.inner[n] = inner.graph.placeholder(f"v{len(nodes)}")
                nodes.append(n)
            return inner.inner[n]

        args, kwargs = fx.node.map_arg((args, kwargs), given)
        inner.graph.output(inner._copied(node, args, kwargs))
        name = f"region_{len(list(self.root.children()))}"
        self.root.add_module(name, Region(StageGraph(inner.root, inner.graph, "Region"), ("grad", (False,))))
        return self.graph.create_node("call_module", name, tuple(nodes), {})


class Origins:
    """What a model's attributes are."""

    def __init__(self, captured: Capture) -> None:
        self.buffers = dict(captured.original.named_buffers(remove_duplicate=False))
        self.parameters = dict(captured.module.named_parameters(remove_duplicate=False))
        self.modules = dict(captured.module.named_modules(remove_duplicate=False))

    def is_buffer(self, node: fx.Node) -> bool:
        """Whether a node reads a buffer of the model's."""
        return node.op == "get_attr" and node.target in self.buffers

    def is_parameter(self, node: fx.Node) -> bool:
        """Whether a node reads a parameter."""
        return node.op == "get_attr" and node.target in self.parameters

    def is_own(self, node: fx.Node) -> bool:
        """Whether a node reads a tensor that the model keeps without saying so."""
        return node.op == "get_attr" and not str(node.target).startswith(("_tensor_constant", "_constant"))

    def of(self, node: fx.Node) -> frozenset[str]:
        """What a node brings into the graph: inputs, parameters."""
        if node.op == "placeholder":
            return frozenset({"inputs"})
        weighted = self.is_parameter(node) or (
            node.op == "call_module"
            and str(node.target) in self.modules
            and any(True for _ in self.modules[str(node.target)].parameters())
        )
        return frozenset({"parameters"}) if weighted else frozenset()
