"""The variables of a program as one flat float64 vector, in block-banded order by stage.

In: an `Instance`. Out: `Variables`: named blocks with bounds, packing and unpacking. Invariant: free inputs come first,
then for each stage its weights and the states that it writes, so that what interacts lies close together; a tied weight
is one block, at its first stage.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from lagcompile.ir.base import ProgramError
from lagcompile.ir.program import Program, StateVariable
from lagcompile.runtime.instance import Instance, quiet, to_rows, to_value
from lagcompile.runtime.weights import not_real

Role = Literal["input", "weight", "state", "slack"]
Key = tuple[Role, str]
Values = dict[Key, Tensor]


@dataclass(frozen=True)
class Block:
    """One named tensor of variables.

    Attributes:
        role: its role; slacks replace |.| in l1 terms and order-1 norm tubes.
        name: the program's name of it (of the constraint or block that a slack serves).
        stage: the stage that gives its place in the order.
        shape: states as (rows, ...features), others as they are.
        lower: smallest value, a number or a tensor that broadcasts.
        upper: largest value.
    """

    role: Role
    name: str
    stage: str
    shape: tuple[int, ...]
    lower: float = -torch.inf
    upper: float = torch.inf

    @property
    def size(self) -> int:
        """Numbers in it."""
        return torch.Size(self.shape).numel()

    @property
    def key(self) -> Key:
        """Role and name."""
        return self.role, self.name


@dataclass(frozen=True)
class Variables:
    """All blocks in order."""

    blocks: tuple[Block, ...]

    @property
    def size(self) -> int:
        """Length of the flat vector."""
        return sum(b.size for b in self.blocks)

    @property
    def keys(self) -> tuple[Key, ...]:
        """Keys of the blocks, in order."""
        return tuple(b.key for b in self.blocks)

    def block(self, key: Key) -> Block | None:
        """Return a block by its key; None where there is no such variable."""
        return next((b for b in self.blocks if b.key == key), None)

    def unpack(self, z: Tensor) -> Values:
        """Named tensors from a flat vector; views of it."""
        parts = z.split([b.size for b in self.blocks])
        return {b.key: p.reshape(b.shape) for b, p in zip(self.blocks, parts, strict=True)}

    def pack(self, values: Mapping[Key, Tensor]) -> Tensor:
        """The flat vector of named tensors."""
        return torch.cat([values[b.key].detach().double().reshape(-1) for b in self.blocks])

    def bounds(self) -> tuple[Tensor, Tensor]:
        """Lower and upper bounds, flat."""
        lower = [torch.full((b.size,), b.lower, dtype=torch.float64) for b in self.blocks]
        upper = [torch.full((b.size,), b.upper, dtype=torch.float64) for b in self.blocks]
        return torch.cat(lower), torch.cat(upper)

    def spans(self) -> Iterator[tuple[Block, int, int]]:
        """Blocks with first and one-behind-last position."""
        start = 0
        for block in self.blocks:
            yield block, start, start + block.size
            start += block.size

    def place(self, position: int) -> tuple[Block, tuple[int, ...]]:
        """Block and index inside it of a position in the flat vector."""
        for block, start, stop in self.spans():
            if position < stop:
                index = torch.unravel_index(torch.tensor(position - start), block.shape or (1,))
                return block, tuple(int(i) for i in index)
        raise IndexError(position)

    def describe(self, position: int) -> str:
        """A variable in the user's words."""
        block, index = self.place(position)
        if block.role == "state":
            return f"state {block.name}, {example_feature(index)}"
        return f"{block.role} {block.name}[{', '.join(map(str, index))}]"


def example_feature(index: Sequence[int]) -> str:
    """Row and feature of an index into (rows, ...features)."""
    rest = index[1:]
    if not rest:
        return f"example {index[0]}"
    return f"example {index[0]}, feature {rest[0] if len(rest) == 1 else tuple(rest)}"


def variables_of(instance: Instance) -> Variables:
    """Blocks of an instance's program.

    Raises:
        ProgramError: states that are kept per class, which have no exact form.
    """
    program = instance.program
    if problems := list(inexact(program)):
        raise ProgramError(problems)
    sizes = {n: tuple(p.shape) for n, p in instance.module.named_parameters()}
    rows = row_shapes(instance)
    l1 = {t.on for t in program.objective.regularisers if t.kind == "l1"}
    blocks: list[Block] = []

    def add(role: Role, name: str, stage: str, shape: tuple[int, ...], bounds: tuple[float, float]) -> None:
        low, high = program.narrowed(name, *bounds)
        blocks.append(Block(role, name, stage, shape, low, high))
        if (role == "weight" and "weights" in l1) or (role == "state" and "states" in l1):
            blocks.append(Block("slack", f"|{name}|", stage, shape, 0.0))

    for data in program.data:
        if data.free:
            bounds = (-torch.inf if data.lower is None else data.lower, torch.inf if data.upper is None else data.upper)
            position = instance.network.capture.signature.names.index(data.name)
            add("input", data.name, "inputs", tuple(instance.inputs[position].shape), bounds)
    states = {s.name: s for s in program.states}
    trainable = {w.name for w in program.weights if w.trainable}
    seen: set[str] = set()
    for stage in program.stages:
        for name in stage.weights:
            if name in trainable and name not in seen:
                seen.add(name)
                add("weight", name, stage.name, sizes[name], (-torch.inf, torch.inf))
        for name in stage.writes:
            state = states.get(name)
            if state is not None and state.storage.variable:
                add("state", name, stage.name, rows[name], state.domain.bounds)
                if _needs_slack(program, state):
                    blocks.append(Block("slack", f"c_{name}", stage.name, rows[name], 0.0))
    if not blocks:
        raise ProgramError(
            "the program has no variables: all weights are frozen, no input is free and no state is kept. Free an "
            "input (formulation.inputs), or let weights move"
        )
    return Variables(tuple(blocks))


def row_shapes(instance: Instance) -> dict[str, tuple[int, ...]]:
    """Shape (rows, ...features) of each state that is kept, from one forward pass."""
    with torch.no_grad(), quiet(instance.module):
        batch = instance.batch(torch.arange(instance.examples))
        banks, _ = instance.forward(batch)
    return {
        state.name: tuple(values.shape[1:])
        for bank, values in zip(instance.layout.banks, banks, strict=True)
        for state in bank.states
    }


def state_rows(state: StateVariable, value: Tensor) -> Tensor:
    """(rows, ...features) of a state's full value."""
    return to_rows(value.unsqueeze(0), state.type)[0]


def state_value(state: StateVariable, rows: Tensor) -> Tensor:
    """Inverse of `state_rows`."""
    return to_value(rows.unsqueeze(0), state.type)[0]


def inexact(program: Program) -> Iterator[str]:
    """Say what has no exact form: states that are read through samples, complex variables."""
    for s in program.states:
        if s.storage.sampled:
            yield (
                f"the state {s.name} (after {s.module or s.node}) is kept as a Gaussian per class, which is read "
                "through random samples and has no exact program: use storage table, transient or shared"
            )
    yield from not_real(program, "the exact backend")


def _needs_slack(program: Program, state: StateVariable) -> bool:
    constraint = program.defect_of(state.name)
    if constraint is None or program.multiplier_of(constraint.name) is None:
        return False
    return constraint.transform.norm == 1 and constraint.transform.half_width > 0
