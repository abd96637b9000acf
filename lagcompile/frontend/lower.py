"""Lowering: a partition and the lifting options become a program.

In: `Network` (stage modules and their partition) and `Formulation`. Out: `Program`, plain data. Invariant: the same
partition and options always give the same program; nothing here looks at tensors.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping

from pydantic import Field, model_validator

from lagcompile.frontend.graph import Graph, Node
from lagcompile.frontend.stages import Network, StageModule
from lagcompile.ir.axes import (
    Forward,
    MultiplierOptions,
    Start,
    Weight,
)
from lagcompile.ir.base import Frozen, ProgramError
from lagcompile.ir.domains import Domain, Free, NonNegative, Range
from lagcompile.ir.program import (
    DataVariable,
    DefectConstraint,
    Multiplier,
    Objective,
    Program,
    Regulariser,
    Stage,
    StateVariable,
    TensorType,
    ValueConstraint,
    WeightVariable,
)
from lagcompile.ir.storages import Shared, Storage, Table
from lagcompile.ir.transforms import Identity, Transform


class StateFormulation(Frozen):
    """How one breakpoint's states and defects are written."""

    storage: Storage = Table()
    domain: Domain = Free()
    start: Start = Forward()
    transform: Transform = Identity()
    """G, applied to the defect."""
    multiplier: MultiplierOptions | None = MultiplierOptions()
    """None: no multiplier, a pure penalty."""
    weight: Weight | None = None
    """rho: weight of the quadratic term."""
    features: str = Field(default="sum", pattern="^(sum|mean)$")
    """Reduction of the coupling over features."""


class InputFormulation(Frozen):
    """An input as a variable, within bounds."""

    lower: float | None = None
    upper: float | None = None

    @model_validator(mode="after")
    def _ordered(self) -> InputFormulation:
        if self.lower is not None and self.upper is not None and not self.lower <= self.upper:
            raise ValueError(f"lower ({self.lower:g}) must not be above upper ({self.upper:g})")
        return self


class Formulation(StateFormulation):
    """The lifting options: what the program says about every state, with exceptions by breakpoint."""

    at: Mapping[str, StateFormulation] = Field(default_factory=dict)
    """Options for single states: node name, module path or glob of the state -> its own options."""
    reduction: str = Field(default="mean", pattern="^(mean|sum)$")
    """How the loss reduces over the batch; the coupling follows it."""
    inputs: Mapping[str, InputFormulation] = Field(default_factory=dict)
    """Inputs that are solved for instead of being data, by name (state estimation, adversarial change)."""
    frozen: tuple[str, ...] = ()
    """Globs of parameter names that are not solved for (besides those with requires_grad=False)."""
    regularisers: tuple[Regulariser, ...] = ()
    """Terms of the objective on weights or states."""
    constraints: tuple[ValueConstraint, ...] = ()
    """Further constraints on named values."""
    classes: int | None = Field(default=None, ge=1)
    """Number of classes; needed where a state or a multiplier is kept per class."""


_RANGES: Mapping[str, Domain] = {
    "relu": NonNegative(),
    "relu6": Range(lower=0.0, upper=6.0),
    "hardtanh": Range(lower=-1.0, upper=1.0),
    "tanh": Range(lower=-1.0, upper=1.0),
    "sigmoid": Range(lower=0.0, upper=1.0),
    "softmax": Range(lower=0.0, upper=1.0),
    "softplus": NonNegative(),
}
_KEEPS_RANGE = frozenset(
    {
        "max_pool1d",
        "max_pool2d",
        "avg_pool2d",
        "flatten",
        "view",
        "reshape",
        "adaptive_avg_pool2d",
        "squeeze",
        "dropout",
    }
)


def lower(network: Network, formulation: Formulation, *, loss: str = "loss", name: str = "program") -> Program:
    """Program of a network that has been split.

    Args:
        network: stage modules with their partition.
        formulation: the lifting options.
        loss: name of the loss, for the printed form.
        name: name of the program.

    Raises:
        ProgramError: the options contradict each other, or name states that do not exist.
    """
    graph = network.partition.graph
    nodes = network.partition.states
    names = _state_names(network)
    options = _options(nodes, formulation)
    states = tuple(_state(network, n, names[n.name], options[n.name]) for n in nodes)
    stage_of = {w: s.name for s in network.stages for w in s.writes}
    kept = [n for n in nodes if options[n.name].storage.variable]
    constraints = [_defect(names[n.name], stage_of[n.name], options[n.name]) for n in kept]
    multipliers = [
        Multiplier(name=names[n.name].replace("h", "lambda", 1), constraint=f"c_{names[n.name]}", **m.model_dump())
        for n in kept
        if (m := options[n.name].multiplier) is not None
    ]
    reduction = "mean" if formulation.reduction == "mean" else "sum"
    return Program(
        name=name,
        data=_data(network, graph, formulation),
        weights=_weights(network, formulation),
        states=states,
        stages=tuple(_stage(network, s, names) for s in network.stages),
        constraints=(*constraints, *formulation.constraints),
        multipliers=tuple(multipliers),
        objective=Objective(
            loss=loss,
            reads=tuple(names.get(n, n) for n in network.output_names),
            reduction=reduction,
            regularisers=formulation.regularisers,
        ),
        classes=formulation.classes,
    )


def _state_names(network: Network) -> dict[str, str]:
    """Node name -> state name: h1, or h1.node where several tensors leave at one breakpoint."""
    names: dict[str, str] = {}
    for b in network.partition.breakpoints:
        for node in b.after:
            names[node] = f"h{b.number}" if len(b.after) == 1 else f"h{b.number}.{node}"
    return names


def _options(nodes: tuple[Node, ...], formulation: Formulation) -> dict[str, StateFormulation]:
    own = StateFormulation(**{f: getattr(formulation, f) for f in StateFormulation.model_fields})
    result: dict[str, StateFormulation] = dict.fromkeys((n.name for n in nodes), own)
    problems = []
    for pattern, option in formulation.at.items():
        hits = [n.name for n in nodes if any(fnmatch.fnmatchcase(t, pattern) for t in (n.name, n.module))]
        if not hits:
            known = ", ".join(n.name for n in nodes) or "none"
            problems.append(f"formulation.at: no state is called '{pattern}' (states come after: {known})")
        result.update(dict.fromkeys(hits, option))
    if problems:
        raise ProgramError(problems)
    return result


def _state(network: Network, node: Node, name: str, option: StateFormulation) -> StateVariable:
    storage = option.storage
    kind = node.type or TensorType(dtype="float32")
    if kind.shape is not None and not any(isinstance(d, str) for d in kind.shape):
        if storage.per_class:
            raise ProgramError(
                f"the state after {node.name} ({node.module}) has no batch axis and cannot be kept per class"
            )
        storage = Shared() if storage.per_example else storage
    if storage.single and any(isinstance(d, str) for d in kind.shape or ()):
        raise ProgramError(
            f"the state after {node.name} ({node.module}) has a batch axis and cannot be one value for all examples: "
            "write 'storage: {kind: table}' (or transient, class_gaussian)"
        )
    return StateVariable(
        name=name,
        breakpoint=network.partition.stage_of[node.name] + 1,
        node=node.name,
        module=node.module,
        type=kind,
        storage=storage,
        domain=_domain(network.partition.graph, node, option.domain),
        start=option.start,
    )


def _domain(graph: Graph, node: Node, domain: Domain) -> Domain:
    if not domain.inferred:
        return domain
    current: Node | None = node
    while current is not None:
        word = _operation(current)
        if word in _RANGES:
            return _RANGES[word]
        values = [graph.by_name[n] for n in current.inputs if graph.by_name[n].role == "value"]
        current = values[0] if word in _KEEPS_RANGE and len(values) == 1 else None
    return Free()


def _operation(node: Node) -> str:
    """Operation's name in lower case with underscores, whether module, function or method."""
    word = node.module_types[-1] if node.op == "call_module" and node.module_types else node.target
    word = word.rstrip("_")
    snake = "".join(f"_{c.lower()}" if c.isupper() else c for c in word).lstrip("_")
    aliases = {"re_l_u": "relu", "re_l_u6": "relu6", "max_pool2d": "max_pool2d"}
    return aliases.get(snake, snake)


def _defect(state: str, stage: str, option: StateFormulation) -> DefectConstraint:
    return DefectConstraint(
        name=f"c_{state}",
        state=state,
        stage=stage,
        transform=option.transform,
        scaled=option.storage.scaled,
        weight=option.weight,
        features="mean" if option.features == "mean" else "sum",
    )


def _data(network: Network, graph: Graph, formulation: Formulation) -> tuple[DataVariable, ...]:
    read = {r for s in network.stages for r in s.reads} | set(network.output_names)
    names = [n for n in graph.nodes if n.role == "input" or (n.role in {"data", "structure"} and n.name in read)]
    inputs = [n.name for n in graph.nodes if n.role == "input"]
    unknown = [n for n in formulation.inputs if n not in inputs]
    if unknown:
        known = ", ".join(inputs)
        raise ProgramError([f"formulation.inputs: the model has no input '{n}' (it has: {known})" for n in unknown])
    variables = []
    for node in names:
        free = formulation.inputs.get(node.name)
        bounds = {} if free is None else {"free": True, "lower": free.lower, "upper": free.upper}
        variables.append(DataVariable(name=node.name, type=node.type or TensorType(dtype="int64", shape=()), **bounds))
    return tuple(variables)


def _weights(network: Network, formulation: Formulation) -> tuple[WeightVariable, ...]:
    ties = network.capture.ties
    used = {w for s in network.stages for w in s.weights}
    aliases = {alias: name for name, others in ties.items() for alias in others}
    named = [name for name, _ in network.capture.original.named_parameters(remove_duplicate=False)]
    unknown = [p for p in formulation.frozen if named and not fnmatch.filter(named, p)]
    if unknown:
        known = ", ".join(named[:8]) + (", ..." if len(named) > 8 else "")
        raise ProgramError([f"formulation.frozen: no weight is called '{p}' (weights: {known})" for p in unknown])
    variables: dict[str, WeightVariable] = {}
    for name, parameter in network.capture.original.named_parameters():
        if name in used or any(aliases.get(u) == name for u in used):
            words = (name, *ties.get(name, ()))
            frozen = any(fnmatch.fnmatchcase(w, pattern) for w in words for pattern in formulation.frozen)
            variables[name] = WeightVariable(
                name=name,
                type=TensorType(dtype=str(parameter.dtype).removeprefix("torch."), shape=tuple(parameter.shape)),
                trainable=parameter.requires_grad and not frozen,
                aliases=ties.get(name, ()),
            )
    return tuple(variables.values())


def _stage(network: Network, stage: StageModule, names: Mapping[str, str]) -> Stage:
    ties = {alias: name for name, others in network.capture.ties.items() for alias in others}
    members = network.partition.nodes_of(int(stage.name[1:]))
    return Stage(
        name=stage.name,
        reads=tuple(names.get(r, r) for r in stage.reads),
        writes=tuple(names.get(w, w) for w in stage.writes),
        weights=tuple(dict.fromkeys(ties.get(w, w) for w in stage.weights)),
        modules=tuple(dict.fromkeys(m.module for m in members if m.module)),
        flops=sum(m.flops for m in members),
        signature=_digest(stage.signature),
    )


def _digest(text: str) -> str:
    import hashlib

    return hashlib.sha256(text.encode()).hexdigest()[:12]
