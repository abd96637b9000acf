"""Where a captured graph can be cut: a search that uses nothing of what the package found out about the graph.

In: a graph module and inputs. Out: `Cuts`. Invariant: the graph is run here, on a copy; what each node gave, and what
it hangs on, is read off that run.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn


class _Run(fx.Interpreter):
    """Runs a graph node by node and keeps what each gave."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module, garbage_collect_values=False)
        self.values: dict[str, Any] = {}

    def run_node(self, n: fx.Node) -> Any:
        """Run one node."""
        self.values[n.name] = super().run_node(n)
        return self.values[n.name]


@dataclass(frozen=True)
class Cuts:
    """What a graph gives to cut.

    Attributes:
        values: what each node gave.
        sized: nodes that give another size for other values.
        places: for each place in execution order that a cut could have, names of the tensors that cross it.
    """

    values: Mapping[str, Any]
    sized: frozenset[str]
    places: list[frozenset[str]]

    def floating(self, name: str) -> bool:
        """Whether a node gave a floating-point tensor of a size that values do not change: all that can be a state."""
        value = self.values[name]
        return isinstance(value, Tensor) and value.is_floating_point() and name not in self.sized


def cuts(module: fx.GraphModule, inputs: Sequence[Tensor]) -> Cuts:
    """Look at each place in turn; what inputs or weights alone give is computed anew where it is used.

    Args:
        module: the graph.
        inputs: of a few examples.
    """
    copied = copy.deepcopy(module).eval()
    run = _Run(copied)
    sized = set[str]()
    with torch.random.fork_rng(devices=[]):
        run.run(*(t.clone() for t in inputs))
        for scale in (-1.0, 0.3, -3.0, 9.0):
            other = _Run(copied)
            other.run(*(scale * t if t.is_floating_point() else t.clone() for t in inputs))
            sized |= {n for n, v in other.values.items() if _shape(v) != _shape(run.values[n])}
    from_inputs, from_weights = set[str](), set[str]()
    nodes = [n for n in copied.graph.nodes if n.op != "output"]
    for node in nodes:
        read = {n.name for n in node.all_input_nodes}
        if node.op == "placeholder" or read & from_inputs:
            from_inputs.add(node.name)
        if isinstance(run.values[node.name], nn.Parameter) or read & from_weights or _has_weights(copied, node):
            from_weights.add(node.name)
    staged = [n for n in nodes if n.name in from_inputs & from_weights]
    number = {n: i for i, n in enumerate(staged)}
    last = {n: max((number.get(u, -1) for u in n.users), default=-1) for n in staged}
    found = Cuts(run.values, frozenset(sized), [])
    for i in range(1, len(staged)):
        crossing = [n.name for n in staged[:i] if last[n] >= i]
        tensors = frozenset(n for n in crossing if isinstance(run.values[n], Tensor | tuple | list))
        if tensors and all(map(found.floating, tensors)):
            found.places.append(tensors)
    return found


def _shape(value: Any) -> torch.Size | None:
    return value.shape if isinstance(value, Tensor) else None


def _has_weights(module: fx.GraphModule, node: fx.Node) -> bool:
    return node.op == "call_module" and any(True for _ in module.get_submodule(str(node.target)).parameters())
