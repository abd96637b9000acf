"""Stage by stage on one batch: base of the methods that keep nothing but weights between batches.

In: an `Instance` whose states are transient. Out: `StageNetwork` (who writes and reads each state, single stages run at
given states) and `StageExecutor` (weights, their optimiser, checkpoints). Invariant: every stage runs on the module's
own parameters (no stacking), so that autograd of a stage alone gives gradients of its parameters.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lagcompile.backends.base import Executor
from lagcompile.backends.method import Method
from lagcompile.frontend.stages import StageModule
from lagcompile.frontend.tensors import dense
from lagcompile.ir.program import DefectConstraint, Program, StateVariable, ValueConstraint
from lagcompile.runtime import kkt
from lagcompile.runtime.instance import Batch, Instance
from lagcompile.runtime.rules import Rule
from lagcompile.runtime.steps import Extra

Values = dict[str, Any]
NOTHING_MOVES = (
    "no weight moves: all are frozen (requires_grad, formulation.frozen), or the model has none that its stages read. "
    "There is nothing to solve for"
)


@dataclass(frozen=True)
class Code:
    """One transient state with its stage, its readers and its constraint."""

    state: StateVariable
    constraint: DefectConstraint
    writer: StageModule
    readers: tuple[StageModule, ...]
    to_loss: bool
    """Whether the objective reads it, directly or through the stages that write outputs."""


class StageNetwork:
    """The stages of an instance as a graph of local functions."""

    def __init__(self, instance: Instance) -> None:
        self.instance = instance
        self.stages = instance.network.stages
        nodes = {s.node for s in instance.program.states}
        outputs = set(instance.network.output_names)
        self.last = tuple(s for s in self.stages if any(w in outputs and w not in nodes for w in s.writes))
        self.codes = tuple(self._code(s, outputs) for s in instance.program.states)

    def _code(self, state: StateVariable, outputs: set[str]) -> Code:
        constraint = self.instance.program.defect_of(state.name)
        assert constraint is not None
        writer = next(s for s in self.stages if state.node in s.writes)
        readers = tuple(s for s in self.stages if state.node in s.reads)
        to_loss = state.node in outputs or any(s in self.last for s in readers)
        return Code(state, constraint, writer, readers, to_loss)

    def run(self, stage: StageModule, values: Mapping[str, Any]) -> dict[str, Any]:
        """What one stage writes, by node name."""
        return dict(zip(stage.writes, stage.module(*(values[n] for n in stage.reads)), strict=True))

    def forward(self, batch: Batch) -> Values:
        """Glued forward pass: all values by node name."""
        values = dict(batch.values)
        for stage in self.stages:
            values.update(self.run(stage, values))
        return values

    def loss(self, batch: Batch, values: Mapping[str, Any]) -> Tensor:
        """The user's loss with the output stages run at given states."""
        env = dict(values)
        for stage in self.last:
            env.update({n: v for n, v in self.run(stage, env).items() if n not in self._nodes})
        return self.instance.loss(self.instance.output(env), batch.target)

    @property
    def _nodes(self) -> set[str]:
        return {c.state.node for c in self.codes}


class StageMethod(Method):
    """What methods share whose states live for one batch."""

    codes_move: ClassVar[bool] = False
    """States have an objective of their own, of which regularisers on states are a part."""

    def problems(self, program: Program) -> Iterator[str]:
        """Say which states do not live for one batch, and what else is not executed."""
        for s in program.states:
            where = f"the state {s.name} (after {s.node}, {s.module})"
            if not s.storage.variable:
                yield f"{self.name} works on every state, but {where} is {s.storage.kind}: leave out that breakpoint"
            elif s.storage.kept:
                yield (
                    f"{self.name} starts its states anew in each batch, but {where} is kept as {s.storage.kind}: write "
                    "'storage: {kind: transient}', or use method extragradient, descent_ascent or augmented_lagrangian"
                )
            elif s.domain.map:
                yield (
                    f"{self.name} keeps states in their domain by projection, but {where} is mapped by {s.domain.map}: "
                    "write 'domain: {kind: free}' or 'domain: {kind: nonnegative, by: project}'"
                )
            if s.start.kind != "forward":
                yield (
                    f"{self.name} starts its states by a forward pass, but {where} by {s.start.kind}: leave out 'start'"
                )
        for c in program.defects:
            if not c.transform.identity:
                yield (
                    f"{self.name} works on the defects themselves, but {c.name} has the transform {c.transform.kind}: "
                    "leave out 'transform', or use method extragradient or descent_ascent"
                )
        if not self.codes_move and any(t.on == "states" for t in program.objective.regularisers):
            yield (
                f"{self.name} sets its states without minimising over them, so that regularisers on states would do "
                "nothing: leave them out, or use method altmin, extragradient or augmented_lagrangian"
            )
        for m in program.multipliers:
            yield f"{self.name} has no multipliers, but the program has {m.name}: write 'multiplier: null'"
        yield from not_by_stages(program, self.name)


def not_by_stages(program: Program, method: str) -> Iterator[str]:
    """Say what no stage-wise method executes, or that nothing moves."""
    for c in program.constraints:
        if isinstance(c, ValueConstraint):
            yield f"{method}: the constraint '{c.name}' on {', '.join(c.reads)} needs the exact backend (method sqp)"
    for d in program.data:
        if d.free:
            yield f"{method}: the input '{d.name}' is a variable, which needs the exact backend (method sqp)"
    if not any(w.trainable for w in program.weights):
        yield NOTHING_MOVES


def unstacked(instance: Instance) -> Instance:
    """The instance itself where no stages are stacked, else one of the same weights and data without stacking."""
    if not any(u.stacked for u in instance.layout.units):
        return instance
    instance.weights.publish()
    data = (instance.inputs, instance.target)
    return Instance(instance.program, instance.network, data, loss=instance.loss, device=instance.device, stack=False)


def weight_penalty(instance: Instance, weights: Sequence[Tensor]) -> Tensor | None:
    """The regularisers on weights; None where there are none."""
    total: Tensor | None = None
    for term in instance.program.objective.regularisers:
        for w in weights if term.on == "weights" else ():
            size = term.weight * kkt.size(w, term.kind)
            total = size if total is None else total + size
    return total


def gradients_of(value: Tensor, leaves: Sequence[Tensor], *, keep: bool = False) -> list[Tensor | None]:
    """Gradients of a scalar; None where a leaf does not enter. With `keep` its graph can be gone through again."""
    if not value.requires_grad or not leaves:
        return [None for _ in leaves]
    return dense(torch.autograd.grad(value, list(leaves), allow_unused=True, retain_graph=keep))


class StageExecutor(Executor):
    """Owns weights, an optimiser, and counts; `step` is the method's."""

    def __init__(self, instance: Instance, method: Method, weights: Rule, *, seed: int = 0) -> None:
        method.accept(instance.program)
        self.instance = unstacked(instance)
        self.method = method
        self.steps = 0
        self.gradient_evaluations = 0
        self.generator = torch.Generator(device=self.instance.device).manual_seed(seed)
        self.leaves = self.instance.weights.trainable
        self.optimizers: dict[str, torch.optim.Optimizer] = {"weights": Extra(self.leaves, weights, "descent")}
        self._measures: dict[str, Tensor] = {}
        self._held_bytes = 0
        self.instance.module.train()

    def apply(self, gradients: Sequence[Tensor | None], optimizer: str = "weights") -> None:
        """One step of an optimiser along gradients, in the order of its parameters."""
        chosen = self.optimizers[optimizer]
        leaves = [p for group in chosen.param_groups for p in group["params"]]
        for leaf, gradient in zip(leaves, gradients, strict=True):
            leaf.grad = gradient
        chosen.step()
        for leaf in leaves:
            leaf.grad = None

    def groups(self) -> Mapping[str, Sequence[torch.optim.Optimizer]]:
        """All optimisers move weights (of the network, or of what the method learns besides)."""
        return {"weights": tuple(self.optimizers.values())}

    def look(self, **values: Tensor | None) -> None:
        """Keep numbers of this step for `measures`."""
        self._measures = {n: v.detach() for n, v in values.items() if v is not None}

    def measures(self) -> dict[str, float]:
        """Numbers of the last step."""
        names = list(self._measures)
        return dict(zip(names, torch.stack([v.float() for v in self._measures.values()]).tolist(), strict=True))

    def final_measures(self) -> dict[str, float]:
        """Nothing: no state outlives its batch."""
        return {}

    def values(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Nothing: no state outlives its batch."""
        return {}, {}

    def tensors(self) -> Iterator[Tensor]:
        """Weights, buffers, and what the method learns besides."""
        yield from super().tensors()
        yield from self.extra_state().values()

    def bytes(self) -> int:
        """Bytes of the states of the last batch, and of what the method learns besides the weights."""
        extra = sum(t.numel() * t.element_size() for t in self.extra_state().values())
        return self._held_bytes + extra

    def hold(self, tensors: Sequence[Tensor]) -> None:
        """Note the bytes of a batch's states."""
        self._held_bytes = sum(t.numel() * t.element_size() for t in tensors)

    def extra_state(self) -> dict[str, Tensor]:
        """Tensors that the method owns besides weights, for checkpoints; written in place on loading."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """Weights, buffers, optimisers, counts and random states."""
        self.instance.weights.publish()
        return {
            "module": self.instance.module.state_dict(),
            "optimizers": {n: o.state_dict() for n, o in self.optimizers.items()},
            "extra": {n: t.detach().clone() for n, t in self.extra_state().items()},
            "steps": self.steps,
            "gradient_evaluations": self.gradient_evaluations,
            # a network that draws nothing has none: it would be the caller's
            "random": torch.get_rng_state() if self.instance.draws else None,
            "generator": self.generator.get_state(),
        }

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Resume from a checkpoint, bit for bit."""
        self.instance.module.load_state_dict(state["module"])
        self.instance.weights.adopt()
        for name, optimizer in self.optimizers.items():
            optimizer.load_state_dict(state["optimizers"][name])
        for name, tensor in self.extra_state().items():
            tensor.copy_(state["extra"][name])
        self.steps = int(state["steps"])
        self.gradient_evaluations = int(state["gradient_evaluations"])
        if state["random"] is not None:
            torch.set_rng_state(state["random"])
        self.generator.set_state(state["generator"])


def weighted_layers(stage: StageModule) -> list[tuple[str, nn.Module]]:
    """Layers of a stage that hold parameters, by path in the user's model, in the order of their use."""
    modules = dict(stage.module.named_modules())
    found: dict[str, nn.Module] = {}
    for node in stage.module.graph.nodes:
        if node.op == "call_module":
            module = modules[str(node.target)]
            if any(True for _ in module.parameters()):
                found[str(node.target)] = module
    return list(found.items())


def calls(stage: StageModule) -> Counter[str]:
    """How often a stage calls each of its layers."""
    return Counter(str(n.target) for n in stage.module.graph.nodes if n.op == "call_module")


def bare_weights(stage: StageModule) -> list[str]:
    """Parameters that a stage uses outside any layer (read as attributes)."""
    parameters = dict(stage.module.named_parameters())
    return [str(n.target) for n in stage.module.graph.nodes if n.op == "get_attr" and str(n.target) in parameters]
