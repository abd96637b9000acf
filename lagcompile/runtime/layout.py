"""How a program's states and stages are laid out in memory: banks of equal states, units of equal stages.

In: `Program` and `Network`. Out: `Layout`. Invariant: stages that compute the same function, and are independent once
states are given, form one unit that runs as one batched call; their states form one bank, one tensor of shape
(states, rows, ...).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby

from torch import nn

from lagcompile.frontend.stages import Network, StageModule
from lagcompile.ir.program import DefectConstraint, Multiplier, Program, StateVariable
from lagcompile.ir.sampling import sampled


@dataclass(frozen=True)
class Bank:
    """States of one type and one formulation, written by one unit at one of its outputs."""

    states: tuple[StateVariable, ...]
    constraint: DefectConstraint
    """Constraint of the first state; those of the others differ in names only."""
    multiplier: Multiplier | None

    @property
    def augmented(self) -> bool:
        """Whether the weight is that of an augmented Lagrangian."""
        return self.constraint.weight is not None and self.constraint.weight.augmented

    @property
    def nodes(self) -> tuple[str, ...]:
        """Graph nodes of the states."""
        return tuple(s.node for s in self.states)

    @property
    def first(self) -> StateVariable:
        """The first state, for what all have in common."""
        return self.states[0]


@dataclass(frozen=True)
class Piece:
    """Source of some of a unit's inputs: a span of a bank, or one named value (bank is None)."""

    bank: int | None
    start: int
    stop: int
    name: str


@dataclass(frozen=True)
class Unit:
    """One call: a single stage, or equal stages run as one batched call.

    Attributes:
        stages: the stage modules, in order.
        inputs: for each input of a stage, the pieces that give it to all stages of the unit.
        shared: for each input, whether all stages read the same value.
        outputs: for each output of a stage, (bank or None, first stage, one behind the last stage) spans.
    """

    stages: tuple[StageModule, ...]
    inputs: tuple[tuple[Piece, ...], ...]
    shared: tuple[bool, ...]
    outputs: tuple[tuple[tuple[int | None, int, int], ...], ...]

    @property
    def stacked(self) -> bool:
        """Whether several stages run as one call."""
        return len(self.stages) > 1


@dataclass(frozen=True)
class Layout:
    """Banks and units of a program."""

    banks: tuple[Bank, ...]
    units: tuple[Unit, ...]


def layout_of(program: Program, network: Network, *, stack: bool = True) -> Layout:
    """Lay out a program in banks and units; with `stack=False` every stage is a separate unit."""
    states = {s.node: s for s in program.states if s.storage.variable}
    ties = _ties(network)
    groups = list(_groups(network, program, states, ties)) if stack else [(s,) for s in network.stages]
    banks: list[Bank] = []
    place: dict[str, tuple[int, int]] = {}
    outputs = []
    for group in groups:
        spans = [list(_spans(program, states, [s.writes[j] for s in group])) for j in range(len(group[0].writes))]
        numbered = []
        for role in spans:
            row: list[tuple[int | None, int, int]] = []
            for bank, start, stop in role:
                if bank is None:
                    row.append((None, start, stop))
                    continue
                place.update({node: (len(banks), i) for i, node in enumerate(bank.nodes)})
                row.append((len(banks), start, stop))
                banks.append(bank)
            numbered.append(tuple(row))
        outputs.append(tuple(numbered))
    units = []
    for group, out in zip(groups, outputs, strict=True):
        inputs, shared = [], []
        for j in range(len(group[0].reads)):
            names = [s.reads[j] for s in group]
            same = len(set(names)) == 1 and (len(group) > 1 or names[0] not in place)
            shared.append(same)
            inputs.append(tuple(_pieces(names[:1] if same else names, place)))
        units.append(Unit(tuple(group), tuple(inputs), tuple(shared), out))
    return Layout(tuple(banks), tuple(units))


def _ties(network: Network) -> Mapping[str, str]:
    return {alias: name for name, others in network.capture.ties.items() for alias in others}


def _groups(
    network: Network, program: Program, states: Mapping[str, StateVariable], ties: Mapping[str, str]
) -> Iterator[tuple[StageModule, ...]]:
    """Group consecutive stages that can be one call."""
    uses: dict[str, int] = {}
    for stage in network.stages:
        for slot in {ties.get(s, s) for s in stage.slots}:
            uses[slot] = uses.get(slot, 0) + 1
    stored = {s.node for s in program.states if s.node in states}
    moving = {w.name for w in program.weights if w.trainable}
    synthetic = sampled(program).stages  # another number of rows than the data's
    for _, run in groupby(network.stages, key=lambda s: (s.signature, s.name in synthetic)):
        group = list(run)
        if len(group) > 1 and _stackable(group, stored, moving, uses, ties):
            yield tuple(group)
        else:
            yield from ((s,) for s in group)


def _stackable(
    group: Sequence[StageModule],
    stored: set[str],
    moving: set[str],
    uses: Mapping[str, int],
    ties: Mapping[str, str],
) -> bool:
    written = {w for s in group for w in s.writes}
    if any(r in written and r not in stored for s in group for r in s.reads):
        return False  # an eliminated state: the stages depend on each other
    if any(True for s in group for _ in s.module.buffers()):
        return False  # buffers that move (batch normalisation) are kept out of batched calls
    for j in range(len(group[0].slots)):
        names = [ties.get(s.slots[j], s.slots[j]) for s in group]
        tied = len(set(names)) == 1
        own = len(set(names)) == len(names) and all(uses[n] == 1 for n in names)
        if (not tied and not own) or len({n in moving for n in names}) > 1:
            return False
    return not any(_random(s) or _recurrent(s) for s in group)


_RECURRENT = ("gru", "lstm", "rnn_tanh", "rnn_relu")
"""Functions of PyTorch's recurrent layers, for which torch.func has no batching rule."""


def _recurrent(stage: StageModule) -> bool:
    modules = dict(stage.module.named_modules())
    return any(
        isinstance(modules[str(n.target)], nn.RNNBase | nn.RNNCellBase)
        if n.op == "call_module"
        else n.op == "call_function" and any(w in str(n.target) for w in _RECURRENT)
        for n in stage.module.graph.nodes
    )


_RANDOM = ("dropout", "rand", "bernoulli", "normal", "multinomial")


def _random(stage: StageModule) -> bool:
    modules = dict(stage.module.named_modules())
    words = [
        f"{n.target} {type(modules[str(n.target)]).__name__ if n.op == 'call_module' else ''}"
        for n in stage.module.graph.nodes
    ]
    return any(r in w.lower() for w in words for r in _RANDOM)


def _spans(
    program: Program, states: Mapping[str, StateVariable], names: Sequence[str]
) -> Iterator[tuple[Bank | None, int, int]]:
    """Group written values that are states of one formulation, or outputs."""
    start = 0
    while start < len(names):
        state = states.get(names[start])
        stop = start + 1
        if state is None:
            while stop < len(names) and names[stop] not in states:
                stop += 1
            yield None, start, stop
        else:
            first = program.formulation_of(state)
            while stop < len(names) and (s := states.get(names[stop])) and program.formulation_of(s) == first:
                stop += 1
            constraint = program.defect_of(state.name)
            assert constraint is not None
            members = tuple(states[n] for n in names[start:stop])
            yield Bank(members, constraint, program.multiplier_of(constraint.name)), start, stop
        start = stop


def _pieces(names: Sequence[str], place: Mapping[str, tuple[int, int]]) -> Iterator[Piece]:
    start = 0
    while start < len(names):
        spot = place.get(names[start])
        stop = start + 1
        if spot is None:
            yield Piece(None, 0, 1, names[start])
        else:
            while stop < len(names) and place.get(names[stop]) == (spot[0], spot[1] + stop - start):
                stop += 1
            yield Piece(spot[0], spot[1], spot[1] + stop - start, names[start])
        start = stop
