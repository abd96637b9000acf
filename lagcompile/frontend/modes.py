"""One graph for train and eval mode, from the two that a front end made.

In: graphs of one model in train and in eval mode. Out: one graph; where they differ in a constant (the flag of a
dropout) a `Flag` is read, where they differ in operations a `ByMode` runs those of the mode. Invariant: the merged
graph does in each mode what that mode's graph does; the `training` flag of the user's sub-module says which mode holds.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import fx, nn

from lagcompile.frontend.align import Pair, Step, align, argument_pairs, outputs_of, path_of, same_structure
from lagcompile.frontend.capture import ModeOutput
from lagcompile.frontend.graphmodule import StageGraph
from lagcompile.frontend.regions import Layer
from lagcompile.frontend.structure import Reference, fill, transform
from lagcompile.frontend.symbolic import Traced
from lagcompile.frontend.tensors import identical
from lagcompile.ir.base import LiftError


class Flag(nn.Module):
    """A constant of each mode."""

    def __init__(self, owner: nn.Module, train: Any, evaluation: Any) -> None:
        super().__init__()
        self.owner = (owner,)  # in a tuple, so that the user's module does not become a child of this one
        self.values = (evaluation, train)

    def forward(self) -> Any:
        """The constant of the mode in which the owner is."""
        return self.values[self.owner[0].training]


class ByMode(nn.Module):
    """Operations of each mode."""

    def __init__(self, owner: nn.Module, train: nn.Module, evaluation: nn.Module) -> None:
        super().__init__()
        self.owner = (owner,)
        self.in_train = train
        self.in_eval = evaluation

    def forward(self, *inputs: Any) -> Any:
        """Run the operations of the mode in which the owner is."""
        return self.in_train(*inputs) if self.owner[0].training else self.in_eval(*inputs)


class Pick(nn.Module):
    """One of its inputs."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number

    def forward(self, *inputs: Any) -> Any:
        """The input of that number."""
        return inputs[self.number]


def merge(model: nn.Module, train: Traced, evaluation: Traced) -> Traced:
    """One graph for both modes.

    Args:
        model: the private copy that both graphs run on.
        train: its graph in train mode.
        evaluation: its graph in eval mode.

    Raises:
        LiftError: an output of one mode alone is made of operations that the other mode replaces by its own.
    """
    return _Merger(model, train, evaluation).merged()


class _Merger:
    def __init__(self, model: nn.Module, train: Traced, evaluation: Traced) -> None:
        self.model = model
        self.sides = (train, evaluation)
        self.attributes: dict[str, Any] = {}
        self.graph = fx.Graph()
        self.env: tuple[dict[fx.Node, fx.Node], dict[fx.Node, fx.Node]] = ({}, {})
        self.read: dict[str, fx.Node] = {}
        self.selected: dict[Pair, fx.Node] = {}
        self.flags: dict[tuple[str, str], fx.Node] = {}

    def merged(self) -> Traced:
        """The merged graph."""
        train, evaluation = self.sides
        self._inputs()
        alignment = align(train, evaluation)
        for i, step in enumerate(alignment.steps):
            if step.equal:
                self._equal(step.train[0], step.evaluation[0])
            elif i in alignment.shared:
                self._in_both(step)
            else:
                self._different(step, alignment.needed.get(i, ()))
        output, flat = self._outputs()
        self.graph.output(flat)
        whole = {**evaluation.whole, **train.whole}
        faults = {**evaluation.faults, **train.faults}
        return Traced(self.graph, output, whole, faults, self.attributes, train.sizes.with_(evaluation.sizes))

    def _outputs(self) -> tuple[Any, tuple[fx.Node, ...]]:
        """Template of the output, and the values that it is made of; one template for each mode where they differ."""
        train, evaluation = self.sides
        if same_structure(train.output, evaluation.output):
            flat = [self._value(p, "") for p in zip(outputs_of(train.graph), outputs_of(evaluation.graph), strict=True)]
            return _filled(train.output, flat), tuple(flat)
        both = [[self.env[side][n] for n in outputs_of(t.graph)] for side, t in enumerate(self.sides)]
        templates = [_filled(t.output, flat) for t, flat in zip(self.sides, both, strict=True)]
        return ModeOutput(*templates), tuple(dict.fromkeys([*both[0], *both[1]]))

    # ------------------------------------------------------------ what both modes read
    def _inputs(self) -> None:
        """Inputs and attributes are read once for both modes."""
        inputs: dict[str, fx.Node] = {}
        for side, traced in enumerate(self.sides):
            for node in traced.graph.nodes:
                if node.op == "placeholder":
                    if node.name not in inputs:
                        inputs[node.name] = self.graph.placeholder(node.name)
                    self.env[side][node] = inputs[node.name]
        for side, traced in enumerate(self.sides):
            for node in traced.graph.nodes:
                if node.op == "get_attr":
                    name = str(node.target)
                    if name in traced.attributes:
                        name = self._constant(traced.attributes[name])
                    self.env[side][node] = self._attribute(name)
                    self.env[side][node].meta.update(node.meta)

    def _attribute(self, name: str) -> fx.Node:
        """The one node that reads a parameter, a buffer or a constant."""
        if name not in self.read:
            self.read[name] = self.graph.create_node("get_attr", name)
        return self.read[name]

    def _constant(self, value: torch.Tensor) -> str:
        """Name of a constant in the merged graph; equal constants of both modes are one."""
        for name, other in self.attributes.items():
            if isinstance(other, torch.Tensor) and identical(other, value):
                return name
        return self._named("constant", value)

    def _named(self, kind: str, value: Any) -> str:
        name = f"_{kind}_{len(self.attributes)}"
        self.attributes[name] = value
        return name

    # ------------------------------------------------------------ operations
    def _value(self, pair: Pair, path: str) -> fx.Node:
        """The node that holds one value in train mode and another in eval mode."""
        if pair in self.selected:
            return self.selected[pair]
        both = [self.env[side][node] for side, node in enumerate(pair)]
        if both[0] is both[1]:
            return both[0]
        name = self._named("modes", ByMode(self._owner(path), Pick(0), Pick(1)))
        self.selected[pair] = self.graph.call_module(name, tuple(both))
        return self.selected[pair]

    def _equal(self, a: fx.Node, b: fx.Node) -> None:
        path = path_of(a)
        pairs = iter(argument_pairs(a, b))

        def argument(_: Any) -> Any:
            x, y = next(pairs)
            if isinstance(x, fx.Node):
                return self._value((x, y), path)
            return x if type(x) is type(y) and x == y else self._flag(path, x, y)

        args, kwargs = fill(transform((tuple(a.args), dict(a.kwargs)), argument), lambda v: v)
        target = a.target
        if str(target) in self.sides[0].attributes:
            target = self._named("region", self.sides[0].attributes[str(target)])
        node = self.graph.create_node(a.op, target, args, kwargs, name=a.name)
        node.meta = dict(a.meta)
        self.env[0][a] = self.env[1][b] = node

    def _flag(self, path: str, train: Any, evaluation: Any) -> fx.Node:
        key = (path, repr((train, evaluation)))
        if key not in self.flags:
            name = self._named("flag", Flag(self._owner(path), train, evaluation))
            self.flags[key] = self.graph.call_module(name)
        return self.flags[key]

    def _in_both(self, step: Step) -> None:
        """Operations of one mode that make an output of that mode: they run in both, the other mode drops the result.

        So each value is a tensor in either mode. The receipt tells whether the other mode is disturbed by it.
        """
        if step.train and step.evaluation:
            count = [len(outputs_of(t.graph)) for t in self.sides]
            node = step.train[-1]
            raise LiftError(
                f"the model returns {count[0]} tensors in train mode and {count[1]} in eval mode, and computes them "
                f"by different operations ({node.meta.get('source') or path_of(node) or node.name}): return the same "
                "structure in both modes, or compute the additional outputs in separate operations"
            )
        side = 0 if step.train else 1
        for node in step.train or step.evaluation:
            copied = self.graph.node_copy(node, lambda n: self.env[side][n])
            path = str(node.target)
            if path in self.sides[side].attributes:
                copied.target = self._named("region", self.sides[side].attributes[path])
            copied.meta = dict(node.meta)
            self.env[side][node] = copied

    def _different(self, step: Step, pairs: Sequence[Pair]) -> None:
        """One node that runs the operations of the mode; its items are the values used behind it."""
        runs = (step.train, step.evaluation)
        inputs: dict[fx.Node, int] = {}
        for side, nodes in enumerate(runs):
            for node in self._reads(nodes, [p[side] for p in pairs]):
                inputs.setdefault(self.env[side][node], len(inputs))
            for name in self._weights(side, nodes):
                inputs.setdefault(self._attribute(name), len(inputs))
        modules = [self._module(s, nodes, [p[s] for p in pairs], inputs) for s, nodes in enumerate(runs)]
        owner = self._owner(_common([path_of(n) for n in (*step.train, *step.evaluation)]))
        made = self.graph.call_module(self._named("modes", ByMode(owner, *modules)), tuple(inputs))
        made.meta = dict((step.train or step.evaluation)[0].meta)
        for i, pair in enumerate(pairs):
            self.selected[pair] = self.graph.call_function(operator.getitem, (made, i))
            self.selected[pair].meta = dict(made.meta)

    def _reads(self, nodes: Sequence[fx.Node], wanted: Sequence[fx.Node]) -> list[fx.Node]:
        own = set(nodes)
        return [n for n in (*(i for node in nodes for i in node.all_input_nodes), *wanted) if n not in own]

    def _module(
        self, side: int, nodes: Sequence[fx.Node], wanted: Sequence[fx.Node], inputs: Mapping[fx.Node, int]
    ) -> nn.Module:
        """The operations of one mode as a module of the run's inputs."""
        graph, root = fx.Graph(), nn.Module()
        given = [graph.placeholder(f"v{i}") for i in range(len(inputs))]
        env = {n: given[inputs[self.env[side][n]]] for n in self._reads(nodes, wanted)}
        for node in nodes:
            args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: env[n])
            env[node] = graph.create_node(node.op, node.target, args, kwargs)  # new names, so that equal runs are equal
            if node.op == "call_module":
                path = str(node.target)
                env[node].target = path.replace(".", "__")
                names = tuple(n for n, _ in self._part(side, path).named_parameters(remove_duplicate=False))
                weights = [given[inputs[self._attribute(f"{path}.{n}")]] for n in names]
                env[node].args = (*weights, *env[node].args)
                part = self._part(side, path)
                root.add_module(str(env[node].target), Layer(part, names) if names else part)
        graph.output(tuple(env[n] for n in wanted))
        return StageGraph(root, graph, "Mode")

    def _part(self, side: int, path: str) -> nn.Module:
        own = self.sides[side].attributes
        part: nn.Module = own[path] if path in own else self.model.get_submodule(path)
        return part

    def _weights(self, side: int, nodes: Sequence[fx.Node]) -> list[str]:
        """Names of the parameters of the layers that a run calls."""
        paths = [str(n.target) for n in nodes if n.op == "call_module"]
        return [f"{p}.{n}" for p in paths for n, _ in self._part(side, p).named_parameters(remove_duplicate=False)]

    def _owner(self, path: str) -> nn.Module:
        return self.model.get_submodule(path) if path else self.model


def _filled(template: Any, values: Sequence[fx.Node]) -> Any:
    """A template with the names of its values in the merged graph."""
    names = iter(values)
    return transform(template, lambda v: Reference(next(names).name) if isinstance(v, Reference) else v)


def _common(paths: Sequence[str]) -> str:
    """Longest module path that all the paths lie in."""
    common: list[str] = []
    for parts in zip(*(p.split(".") if p else [] for p in paths), strict=False):
        if len(set(parts)) > 1:
            break
        common.append(parts[0])
    return ".".join(common)
