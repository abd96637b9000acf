"""A program bound to stage modules, data and a device.

In: `Program`, `Network`, data tensors, a loss. Out: `Instance`: batches by row, predictions of all units at given
states, forward passes, the user's module with the solved weights. Invariant: the modules here are copies; neither the
lifted model nor the user's is touched.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.func import vmap

from lagcompile.frontend.capture import Sizes
from lagcompile.frontend.copies import copied, renew, unregistered
from lagcompile.frontend.graphmodule import WithWeights
from lagcompile.frontend.stages import Network
from lagcompile.ir.alone import ALONE
from lagcompile.ir.arguments import device_of
from lagcompile.ir.base import BindError
from lagcompile.ir.program import Program, TensorType
from lagcompile.ir.sampling import samples
from lagcompile.runtime.float64 import widened
from lagcompile.runtime.layout import Layout, Unit, layout_of
from lagcompile.runtime.weights import Weights

Loss = Callable[[Any, Any], Tensor]


INTEGERS = frozenset({torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64})
"""Types of class numbers."""

Known: TypeAlias = dict[int, tuple[Tensor, ...]]
"""Unit number -> its results."""


@dataclass(frozen=True)
class Batch:
    """Some rows of the data, on the instance's device.

    Attributes:
        rows: row numbers, of shape (batch,).
        values: inputs and what follows from them, by node name.
        target: what the loss compares with.
        labels: class of each row; None where nothing is kept per class.
        size: number of rows.
    """

    rows: Tensor
    values: dict[str, Any]
    target: Any
    labels: Tensor | None
    size: int


def _reads_only(unit: Unit, values: Mapping[str, Any]) -> bool:
    """Return whether a unit reads given values only: no state, and nothing that follows from one."""
    return all(piece.bank is None and piece.name in values for pieces in unit.inputs for piece in pieces)


class Instance:
    """A bound program."""

    def __init__(
        self,
        program: Program,
        network: Network,
        data: tuple[Sequence[Tensor], Any],
        *,
        loss: Loss,
        device: torch.device | str = "cpu",
        stack: bool = True,
    ) -> None:
        """Copy the network to the device and check the data.

        Args:
            program: the program.
            network: its stage modules; copied.
            data: input tensors with one row for each example, and the target (a tensor with as many rows, or None).
            loss: (output, target) -> scalar.
            device: where to compute; data stay where they are and travel by batch.
            stack: run equal stages as one batched call.

        Raises:
            BindError: rows differ in number, or there are none, or classes do not fit.
        """
        self.program, self.loss, self.device = program, loss, device_of(device)
        self.inputs, self.target = list(data[0]), data[1]
        self.examples = _examples(self.inputs, self.target)
        self.network = convert(network.copy(), self.device)
        self.layout: Layout = layout_of(program, self.network, stack=stack)
        self.weights = Weights(self.network, self.layout, program)
        self.labels = self._labels()
        self._calls = [self._call_of(u, i) for i, u in enumerate(self.layout.units)]
        self._shown = self._states_among_outputs()
        self._sizes: dict[tuple[Any, ...], dict[str, Any]] = {}

    # ---------------------------------------------------------------- data
    def batch(self, rows: Tensor, *, prepared: bool = True) -> Batch:
        """Make the batch of some rows; what follows from inputs alone is computed here, once for both half steps.

        Raises:
            BindError: the network was captured for other sizes.
        """
        tensors = [self._pick(t, rows) for t in self.inputs]
        names = self.network.capture.signature.names
        self.sizes.check(names, tensors)
        values: dict[str, Any] = dict(zip(names, tensors, strict=True))
        if prepared and self.network.prologue.writes:
            values = self.network.run(self.network.prologue, values)
        labels = None if self.labels is None else self._pick(self.labels, rows)
        target = None if self.target is None else self._pick(self.target, rows)
        here = rows.to(self.device, non_blocking=True)
        batch = Batch(here, values, target, labels, int(rows.numel()))
        if self._structural():
            batch.values.update(self._sizes_for(batch))
        return batch

    def _pick(self, tensor: Tensor, rows: Tensor) -> Tensor:
        return tensor.index_select(0, rows.to(tensor.device)).to(self.device, non_blocking=True)

    def _labels(self) -> Tensor | None:
        drawn = [s for s in self.program.states if s.storage.per_class]
        if self.program.classes is None or not (drawn or any(m.laid.rows == "class" for m in self.program.multipliers)):
            return None
        whole = isinstance(self.target, Tensor) and self.target.dtype in INTEGERS
        if not whole or self.target.dim() != 1:
            kept = [f"{s.name} (after {s.node}, {s.module})" for s in drawn]
            what = f"the state {', '.join(kept)}" if kept else "a multiplier"
            raise BindError(
                f"{what} is kept per class: the target must be one class number per example. Without classes write "
                "'storage: {kind: table}', with a multiplier of layout full or example"
            )
        if int(self.target.min()) < 0:
            raise BindError(
                f"the target holds {int(self.target.min())}, but what is kept per class needs classes from 0: number "
                "them from 0, and leave out examples without a class"
            )
        seen = torch.bincount(self.target, minlength=self.program.classes)
        if seen.numel() > self.program.classes:
            raise BindError(
                f"the target holds class {seen.numel() - 1}, the program has classes 0 to {self.program.classes - 1}"
            )
        absent = [i for i, n in enumerate(seen.tolist()) if n == 0]
        if absent:
            raise BindError(f"no example of class {', '.join(map(str, absent))}: a state kept per class needs one")
        return self.target

    def _structural(self) -> bool:
        return any(n.role == "structure" for n in self.network.partition.graph.nodes)

    def _sizes_for(self, batch: Batch) -> dict[str, Any]:
        """Sizes of what crosses breakpoints, from one forward pass for each shape of the inputs."""
        key = tuple(tuple(v.shape) for v in batch.values.values() if isinstance(v, Tensor))
        if key not in self._sizes:
            graph = self.network.partition.graph
            with torch.no_grad(), quiet(self.network.capture.original):
                values = self.network.glue([batch.values[n] for n in self.network.capture.signature.names])
            names = {n.name for n in graph.nodes if n.role == "structure"}
            self._sizes[key] = {n: v for n, v in values.items() if n in names}
        return self._sizes[key]

    # ---------------------------------------------------------------- evaluation
    @cached_property
    def draws(self) -> bool:
        """Whether the network in train mode, or the loss, draws random numbers."""
        from lagcompile.runtime.trial import draws

        return draws(self)

    def quiet(self) -> AbstractContextManager[None]:
        """Leave buffers and the random generators as they were."""
        return quiet(self.module, draws=self.draws)

    def _call_of(self, unit: Unit, number: int) -> Callable[..., tuple[Any, ...]]:
        template = unit.stages[0]
        if not unit.stacked:
            return template.module
        # a leaf once, under the first of its names: a stage may use one weight several times, or under tied names
        slots = dict(reversed([*zip(self.weights.of_unit[number], template.slots, strict=True)]))
        called = WithWeights(template.module, tuple(slots.values()))
        weight_dims = tuple(0 if stacked else None for _, stacked in slots)
        input_dims = tuple(None if shared else 0 for shared in unit.shared)

        def one(weights: tuple[Tensor, ...], inputs: tuple[Any, ...]) -> tuple[Any, ...]:
            result = called(weights, inputs)
            assert isinstance(result, tuple)
            return result

        mapped = vmap(one, in_dims=(weight_dims, input_dims))
        leaves = self.weights.leaves

        def call(*inputs: Any) -> tuple[Any, ...]:
            result = mapped(tuple(leaves[i].tensor for i, _ in slots), inputs)
            assert isinstance(result, tuple)
            return result

        return call

    def _states_among_outputs(self) -> tuple[tuple[str, int, int], ...]:
        """Node, bank and position of each state that is an output, too: the loss reads the state itself."""
        outputs = set(self.network.output_names)
        banks = enumerate(self.layout.banks)
        return tuple((n, b, k) for b, bank in banks for k, n in enumerate(bank.nodes) if n in outputs)

    def predict(
        self, banks: Sequence[Tensor], values: Mapping[str, Any], known: Known | None = None
    ) -> tuple[list[Tensor], dict[str, Any]]:
        """Predictions of every bank's states, and the remaining values (outputs, eliminated states), by name.

        Args:
            banks: values of the states, one tensor (states, rows, ...) for each bank.
            values: data by name.
            known: results, without gradients, of units that read data alone, for callers that hold the weights and
                the data fixed: what is missing is put there, what is there is not run again.

        Returns:
            predictions of the banks, of the shapes of `banks`; all values that the output is made of, and more.
        """
        predictions: list[list[Tensor]] = [[] for _ in self.layout.banks]
        env: dict[str, Any] = dict(values)
        for node, b, k in self._shown:
            env[node] = to_value(banks[b][k : k + 1], self.layout.banks[b].first.type)[0]
        for k, (unit, call) in enumerate(zip(self.layout.units, self._calls, strict=True)):
            if known is not None and k in known:
                results = known[k]
            else:
                results = call(*(self._input(unit, j, banks, env) for j in range(len(unit.inputs))))
                if known is not None and _reads_only(unit, values):
                    results = known[k] = tuple(r.detach() for r in results)
            for j, spans in enumerate(unit.outputs):
                # split, not slices: its backward is one concatenation instead of a zero-filled copy for each span
                parts = results[j].split([b - a for _, a, b in spans]) if unit.stacked else [results[j]]
                for (bank, start, stop), part in zip(spans, parts, strict=True):
                    if bank is not None:
                        value = part if unit.stacked else part.unsqueeze(0)
                        predictions[bank].append(to_rows(value, self.layout.banks[bank].first.type))
                    else:
                        values_out = part.unbind() if unit.stacked else (part,)
                        env.update({unit.stages[start + k].writes[j]: v for k, v in enumerate(values_out)})
                        assert len(values_out) == stop - start
        return [p[0] if len(p) == 1 else torch.cat(p) for p in predictions], env

    def _input(self, unit: Unit, j: int, banks: Sequence[Tensor], env: Mapping[str, Any]) -> Any:
        parts = []
        for piece in unit.inputs[j]:
            if piece.bank is None:
                value = env[piece.name]
                parts.append(value if unit.shared[j] or not unit.stacked else value.unsqueeze(0))
                continue
            whole = banks[piece.bank]
            span = whole if piece.stop - piece.start == whole.shape[0] else whole[piece.start : piece.stop]
            value = to_value(span, self.layout.banks[piece.bank].first.type)
            parts.append(value if unit.stacked else value[0])
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def forward(self, batch: Batch) -> tuple[list[Tensor], dict[str, Any]]:
        """Run the glued network: values of every bank's states in rows, and all values. Publish weights first."""
        values = dict(batch.values)
        for stage in self.network.stages:
            values.update(zip(stage.writes, stage.module(*(values[n] for n in stage.reads)), strict=True))
        rows = []
        for bank in self.layout.banks:
            rows.append(torch.stack([to_rows(values[s.node].unsqueeze(0), s.type)[0] for s in bank.states]))
            s, wanted = bank.first, 1 if batch_axis(bank.first.type)[0] is None else batch.size
            if rows[-1].shape[1] != wanted:
                raise BindError(
                    f"the state {s.name} (after {s.node}, {s.module or 'the model'}) has {rows[-1].shape[1]} rows for "
                    f"{batch.size} examples: how many depends on the values, so cut elsewhere"
                )
        return rows, values

    def output(self, values: Mapping[str, Any]) -> Any:
        """Assemble the model's output from values by name."""
        return self.network.assemble(values)

    def scale(self, batch: Batch) -> float:
        """c: weight of an example in the Lagrangian."""
        return 1.0 / batch.size if self.program.objective.reduction == "mean" else 1.0

    @property
    def module(self) -> nn.Module:
        """Copy of the user's module that holds the weights (call `weights.publish()` first)."""
        return self.network.capture.original

    @property
    def sizes(self) -> Sizes:
        """Batch sizes that the network holds for."""
        return self.network.capture.sizes

    def recover(self, original: nn.Module) -> nn.Module:
        """Make a module of the user's class with this instance's weights and buffers, on the original's device."""
        self.weights.publish()
        result = copied(original)
        result.load_state_dict(self.module.state_dict())
        renew(result)
        return result

    @property
    def samples(self) -> int:
        """Number of synthetic examples; 0 where no state is sampled."""
        return samples(self.program)


def _examples(inputs: Sequence[Tensor], target: Any) -> int:
    rows = {t.shape[0] if t.dim() else -1 for t in inputs}
    if isinstance(target, Tensor):
        rows.add(target.shape[0] if target.dim() else -1)
    if len(rows) != 1:
        counts = ", ".join(str(t.shape[0] if t.dim() else "a number") for t in inputs)
        goal = f", the target {target.shape[0]}" if isinstance(target, Tensor) and target.dim() else ""
        raise BindError(f"inputs and target must have one row for each example; the inputs have {counts}{goal}")
    count = rows.pop()
    if count < 1:
        raise BindError("the data are empty: at least one example is needed")
    return count


def convert(network: Network, device: torch.device, *, wide: bool = False) -> Network:
    """Move a network's tensors to a device, in double precision if asked for, in place; shared ones stay shared."""
    moved: dict[Tensor, Tensor] = {}

    def to(t: Tensor) -> Tensor:
        moved = t.to(device)
        return widened(moved) if wide else moved

    modules = [network.capture.original, network.capture.module, network.prologue.module]
    modules += [s.module for s in network.stages]
    for root in modules:
        for module in root.modules():
            for parameter in module.parameters(recurse=False):
                parameter.data = to(parameter.data)
            for name, buffer in module.named_buffers(recurse=False):
                if buffer not in moved:
                    moved[buffer] = to(buffer)
                    moved[moved[buffer]] = moved[buffer]
                module._buffers[name] = moved[buffer]
    for _, tensor in unregistered(network.capture.original):
        tensor.data = to(tensor.data)
    return network


@contextmanager
def quiet(module: nn.Module, *, draws: bool = True) -> Iterator[None]:
    """Leave buffers and the random generators as they were.

    Args:
        module: whose buffers.
        draws: whether random numbers may be drawn; torch's generators belong to the process, so that one thread at a
            time may put them back.
    """
    buffers = [(b, b.detach().clone()) for b in module.buffers()]
    held = [(m, name, b) for m in module.modules() for name, b in m._buffers.items()]
    cuda = [b.device for b in module.parameters() if b.is_cuda][:1]
    with ALONE if draws else nullcontext(), torch.random.fork_rng(devices=cuda, enabled=draws):
        try:
            yield
        finally:
            for owner, name, tensor in held:  # a forward may have assigned another tensor to the name
                owner._buffers[name] = tensor
            with torch.no_grad():
                for buffer, value in buffers:
                    if not torch.equal(buffer, value):  # writing would invalidate graphs that read it
                        buffer.copy_(value)


def to_rows(value: Tensor, kind: TensorType) -> Tensor:
    """(states, ...full shape) -> (states, rows, ...features): the batch axis comes right behind the states."""
    axis, factor = batch_axis(kind)
    if axis is None:
        return value.unsqueeze(1)
    if factor > 1:
        value = value.unflatten(axis + 1, (-1, factor))
    return value if axis == 0 else value.movedim(axis + 1, 1)


def to_value(rows: Tensor, kind: TensorType) -> Tensor:
    """Inverse of `to_rows`."""
    axis, factor = batch_axis(kind)
    if axis is None:
        return rows.squeeze(1)
    value = rows if axis == 0 else rows.movedim(1, axis + 1).contiguous()  # the model's own may be: it takes views
    return value.flatten(axis + 1, axis + 2) if factor > 1 else value


def batch_axis(kind: TensorType) -> tuple[int | None, int]:
    """Axis of the batch in a full shape and how many entries of it belong to one example ("16B"); None without one."""
    if kind.shape is None:
        return 0, 1
    for i, d in enumerate(kind.shape):
        if isinstance(d, str):
            factor = d.removesuffix("B")
            return i, int(factor) if factor.isdigit() else 1
    return None, 1
