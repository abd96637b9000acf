"""The policy `conditioning`: cut where the growth of the Jacobian products reaches a bound.

In: a `Graph`, the captured model, example inputs. Out: a `Partition`. Invariant: from one breakpoint to the next the
largest singular value of the stage's Jacobian, as estimated on the examples, lies within [1 / bound, bound], or the
stage holds one place only. This is what multiple shooting asks for (Bock and Plitt 1984; Ascher, Mattheij and Russell,
Numerical Solution of Boundary Value Problems, section 4.3): errors in a state grow within a stage by the bound at most.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, fx

from lagcompile.frontend.balance import Context, cuts_of
from lagcompile.frontend.graph import Graph
from lagcompile.frontend.graphmodule import Runner
from lagcompile.frontend.partition import Partition, partition_at
from lagcompile.frontend.still import as_it_was
from lagcompile.ir.base import Frozen, SplitError


class ConditioningSplit(Frozen):
    """Breakpoints so that no stage's Jacobian blows up or vanishes beyond a bound, as estimated on example data."""

    policy: Literal["conditioning"] = "conditioning"
    bound: float = Field(default=10.0, gt=1.0)
    """A stage's largest singular value may lie between 1 / bound and bound."""
    iterations: int = Field(default=4, ge=1)
    """Power iterations for each estimate."""
    most: int | None = Field(default=None, ge=1)
    """At most so many stages; the bound is not held any more where that is reached."""

    def split(self, graph: Graph, context: Context | None = None) -> Partition:
        """Partition by growth; one stage where the whole network stays within the bound.

        Raises:
            SplitError: no example inputs are known.
        """
        if context is None or not context.tensors:
            raise SplitError("split by conditioning: give example_inputs to lift, the growth is measured on them")
        cuts = cuts_of(graph)
        places = [int(p) for p in (cuts.preferred if len(cuts.preferred) else cuts.allowed)]
        with as_it_was(context.capture.original, False):
            measure = Growth(graph, context)
            positions, reasons = self._walk(graph, places, measure)
        return partition_at(graph, positions, reasons)

    def _walk(self, graph: Graph, places: Sequence[int], measure: Growth) -> tuple[list[int], list[str]]:
        positions: list[int] = []
        reasons: list[str] = []
        order = graph.staged
        start, previous, growth = 0, 0, 1.0
        j = 1
        while j < len(places) and (self.most is None or len(positions) + 1 < self.most):
            now = measure.between(places[start], places[j], self.iterations)
            if 1 / self.bound <= now <= self.bound:
                previous, growth, j = j, now, j + 1
                continue
            cut = previous if previous > start else j
            value = growth if previous > start else now
            positions.append(places[cut])
            reasons.append(f"after {order[places[cut]].name}, growth {value:.2g} since the place before")
            start = previous = cut
            growth, j = 1.0, cut + 1
        return positions, reasons


class Growth:
    """Largest singular values of the parts of a network between two places, on example data."""

    def __init__(self, graph: Graph, context: Context) -> None:
        self.module = context.capture.module
        self.runner = _Runner(self.module)
        self.runner.run(*context.tensors)
        self.nodes = {n.name: n for n in self.module.graph.nodes}
        self.staged = graph.staged
        self.last = {name: i for i, node in enumerate(graph.staged) for name in node.inputs}
        self.outputs = set(graph.outputs)

    def crossing(self, place: int) -> list[str]:
        """Floating tensors that are made up to a place and read behind it."""
        return [
            n.name
            for n in self.staged[: place + 1]
            if n.floating and n.role == "value" and self.last.get(n.name, -1) > place and n.type is not None
        ]

    def between(self, start: int, stop: int, iterations: int) -> float:
        """Estimate of the largest singular value of the map from one place's values to the other's.

        Power iteration on J^T J; J v by reverse mode twice, so that every operation with a second derivative works;
        operations without one give the root mean square of the singular values instead.
        """
        with torch.enable_grad():
            inputs = {n: self.runner.values[n].detach().requires_grad_() for n in self.crossing(start)}
            outputs = self._run(inputs, start, stop)
        outputs = [y for y in outputs if y.requires_grad]
        if not outputs or not inputs:
            return 1.0
        generator = torch.Generator().manual_seed(0)
        leaves = list(inputs.values())
        try:
            return _power(leaves, outputs, iterations, generator)
        except RuntimeError:
            return _mean_square(leaves, outputs, iterations, generator)

    def _run(self, inputs: dict[str, Tensor], start: int, stop: int) -> list[Tensor]:
        env: dict[str, Any] = {**self.runner.values, **inputs}
        for record in self.staged[start + 1 : stop + 1]:
            node = self.nodes[record.name]
            args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: _fresh(env[n.name]))
            env[node.name] = getattr(self.runner, node.op)(node.target, args, kwargs)
        return [env[n] for n in self.crossing(stop)]


def _fresh(value: Any) -> Any:
    """A value that an in-place operation may overwrite."""
    return value.clone() if isinstance(value, Tensor) and value.is_floating_point() else value


class _Runner(Runner):
    """Runs a graph and keeps every value."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module, garbage_collect_values=False)
        self.values: dict[str, Any] = {}

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        self.values[n.name] = value.clone() if isinstance(value, Tensor) else value
        return value


def _random(like: Sequence[Tensor], generator: torch.Generator) -> list[Tensor]:
    return [torch.randn(t.shape, generator=generator, dtype=t.dtype).to(t.device) for t in like]


def _norm(tensors: Sequence[Tensor]) -> float:
    return float(torch.stack([t.double().square().sum() for t in tensors]).sum().sqrt())


def _power(leaves: list[Tensor], outputs: list[Tensor], iterations: int, generator: torch.Generator) -> float:
    with torch.enable_grad():
        cotangents = [torch.zeros_like(y, requires_grad=True) for y in outputs]
        pulled = torch.autograd.grad(outputs, leaves, cotangents, create_graph=True, materialize_grads=True)
    v = _random(leaves, generator)
    sigma = 0.0
    for _ in range(iterations):
        size = _norm(v)
        if size == 0.0:
            return 0.0
        v = [t / size for t in v]
        pushed = torch.autograd.grad(pulled, cotangents, v, retain_graph=True, materialize_grads=True)
        sigma = _norm(pushed)
        v = list(torch.autograd.grad(outputs, leaves, pushed, retain_graph=True, materialize_grads=True))
    return sigma


def _mean_square(leaves: list[Tensor], outputs: list[Tensor], count: int, generator: torch.Generator) -> float:
    """Root mean square singular value: E |J^T u|^2 = |J|_F^2 for u of independent standard normal entries."""
    total = 0.0
    for _ in range(count):
        u = _random(outputs, generator)
        pulled = torch.autograd.grad(outputs, leaves, u, retain_graph=True, materialize_grads=True)
        total += _norm(pulled) ** 2
    entries = min(sum(t.numel() for t in leaves), sum(t.numel() for t in outputs))
    return float((total / count / entries) ** 0.5)
