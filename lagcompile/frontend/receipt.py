"""The trace receipt: does the captured graph do what the model does, in train and in eval mode?

In: a `Capture` and example inputs. Out: `Receipt` (plain data) and, from the same runs, what each node gave
(`Observation`: type with the batch axis marked, flops). Invariant: the runs leave parameters, buffers, modes and the
global random state as they were.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree
from torch.utils.flop_counter import FlopCounterMode

from lagcompile.frontend.capture import Capture
from lagcompile.frontend.graph import Observation
from lagcompile.ir.base import Frozen
from lagcompile.ir.program import TensorType

SEED = 20211006


class ModeReceipt(Frozen):
    """Comparison of captured graph and model in one mode."""

    mode: str
    difference: float
    """Largest absolute difference of outputs; 0 where they are bit-equal."""
    buffers_equal: bool
    """The same buffers changed, to the same values."""
    buffers_changed: tuple[str, ...]
    random_equal: bool
    """The global random generator was left in the same state."""
    random_used: bool

    @property
    def ok(self) -> bool:
        """Outputs equal up to rounding, buffers and randomness equal."""
        return self.difference <= 1e-6 and self.buffers_equal and self.random_equal


class Receipt(Frozen):
    """What was captured, and whether it is the user's model. `print(receipt)` shows it."""

    front_end: str
    model: str
    modes: tuple[ModeReceipt, ...]
    whole: tuple[tuple[str, str], ...] = ()
    """Modules kept as one node, with the reason."""
    tied: tuple[tuple[str, ...], ...] = ()
    """Groups of parameter names that are one tensor."""
    batch: str = "dynamic"
    """dynamic, or why the graph holds for the example's batch size only."""

    @property
    def ok(self) -> bool:
        """Every mode agrees."""
        return all(m.ok for m in self.modes)

    def __str__(self) -> str:
        lines = [f"receipt for {self.model}, captured by {self.front_end} (batch size {self.batch})"]
        for m in self.modes:
            equal = "bit-equal" if m.difference == 0 else f"largest difference {m.difference:.1e}"
            changed = f"{len(m.buffers_changed)} buffers changed" if m.buffers_changed else "no buffer changed"
            agree = "equally" if m.buffers_equal else "DIFFERENTLY"
            lines.append(
                f"  {m.mode:5}  outputs {equal}; {changed}, {agree}; "
                f"random numbers {'used' if m.random_used else 'not used'}"
                f"{'' if m.random_equal else ', DIFFERENTLY'}"
            )
        lines += [f"  kept whole: {path} ({reason})" for path, reason in self.whole]
        lines += [f"  tied: {' = '.join(names)}" for names in self.tied]
        return "\n".join(lines)


def examine(captured: Capture, tensors: Sequence[torch.Tensor]) -> tuple[Receipt, dict[str, Observation]]:
    """Run model and graph in both modes on (a few examples of) the inputs.

    Args:
        captured: the captured model.
        tensors: example inputs in the order of the signature; two or three examples of them are run, so the
            cost does not grow with their batch size.

    Raises:
        Exception: whatever the user's own forward raises on these inputs.
    """
    dynamic = "dynamic"
    try:
        first, second = _resized(tensors, 2), _resized(tensors, 3)
        runs = [_compare(captured, "eval", first), _compare(captured, "train", second)]
    except Exception as error:
        first = second = list(tensors)
        runs = [_compare(captured, "eval", first), _compare(captured, "train", second)]
        dynamic = f"fixed: the model does not run on other batch sizes ({str(error).splitlines()[0]})"
    receipt = Receipt(
        front_end=captured.front_end,
        model=type(captured.original).__name__,
        modes=tuple(r[0] for r in runs),
        whole=tuple(captured.whole.items()),
        tied=tuple((name, *others) for name, others in captured.ties.items()),
        batch=dynamic,
    )
    size = _batch(first)
    return receipt, _observations(runs[0][1], runs[1][1], size, _batch(second))


def _batch(tensors: Sequence[torch.Tensor]) -> int | None:
    """Common size of the first axis; None where the inputs have none."""
    sizes = {t.shape[0] for t in tensors if t.dim() > 0}
    return sizes.pop() if len(sizes) == 1 else None


def _resized(tensors: Sequence[torch.Tensor], size: int) -> list[torch.Tensor]:
    """The inputs with `size` examples, repeated where there are fewer; as they are where no axis is common."""
    batch = _batch(tensors)
    if not batch:
        return list(tensors)
    rows = torch.arange(size) % batch
    return [t.index_select(0, rows.to(t.device)) if t.dim() else t for t in tensors]


@contextmanager
def _as_it_was(module: nn.Module, training: bool) -> Iterator[None]:
    """Run in a mode with a seeded generator; modes, buffers and the generator are put back afterwards."""
    modes = [(m, m.training) for m in module.modules()]
    buffers = {n: b.detach().clone() for n, b in module.named_buffers()}
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        module.train(training)
        torch.manual_seed(SEED)
        try:
            yield
        finally:
            for m, mode in modes:
                m.training = mode
            for name, buffer in module.named_buffers():
                buffer.copy_(buffers[name])


Run = tuple[ModeReceipt, "_Recorder"]


def _compare(captured: Capture, mode: str, tensors: Sequence[torch.Tensor]) -> Run:
    training = mode == "train"
    with _as_it_was(captured.original, training):
        before = {n: b.detach().clone() for n, b in captured.original.named_buffers()}
        start = torch.get_rng_state()
        expected = captured.original(**captured.signature.rebuild(list(tensors)))
        buffers = {n: b.detach().clone() for n, b in captured.original.named_buffers()}
        end = torch.get_rng_state()
    with _as_it_was(captured.original, training):
        recorder = _Recorder(captured.module)
        captured.module.train(training)
        got = recorder.run(*tensors)
        own = {n: b.detach().clone() for n, b in captured.original.named_buffers()}
        own_end = torch.get_rng_state()
    changed = tuple(n for n, b in buffers.items() if not _same(b, before[n]))
    receipt = ModeReceipt(
        mode=mode,
        difference=_difference(expected, got),
        buffers_equal=all(_same(b, own[n]) for n, b in buffers.items()),
        buffers_changed=changed,
        random_equal=torch.equal(end, own_end),
        random_used=not torch.equal(start, end),
    )
    return receipt, recorder


def _same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.shape == b.shape and torch.equal(torch.nan_to_num(a), torch.nan_to_num(b))


def _difference(expected: Any, got: Any) -> float:
    """Largest absolute difference between two nested outputs; infinite where their structures differ."""
    a, b = pytree.tree_leaves(expected), pytree.tree_leaves(got)
    if len(a) != len(b):
        return float("inf")
    worst = 0.0
    for x, y in zip(a, b, strict=True):
        if not isinstance(x, torch.Tensor):
            worst = worst if x == y else float("inf")
        elif x.shape != y.shape or x.dtype != y.dtype:
            return float("inf")
        elif x.numel() and not torch.equal(x, y):
            worst = max(worst, float((x.double() - y.double()).abs().nan_to_num(float("inf")).max()))
    return worst


class _Recorder(fx.Interpreter):
    """Runs a graph and keeps the shape, dtype and flops of every value."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.seen: dict[str, tuple[str, torch.dtype | None, tuple[int, ...], int]] = {}
        self.counter = FlopCounterMode(display=False)

    def run(self, *args: Any, **kwargs: Any) -> Any:
        with self.counter:
            return super().run(*args, **kwargs)

    def run_node(self, n: fx.Node) -> Any:
        before = self.counter.get_total_flops()
        value = super().run_node(n)
        if isinstance(value, torch.Tensor):
            work = self.counter.get_total_flops() - before
            flops = work + (value.numel() if n.op.startswith("call") else 0)
            self.seen[n.name] = ("tensor", value.dtype, tuple(value.shape), flops)
        else:
            leaves = pytree.tree_leaves(value)
            kind = "tuple" if leaves and all(isinstance(v, torch.Tensor) for v in leaves) else "other"
            self.seen[n.name] = (kind, None, (), self.counter.get_total_flops() - before)
        return value


def _observations(first: _Recorder, second: _Recorder, size: int | None, other: int | None) -> dict[str, Observation]:
    """One record per node; the batch axis is the one whose size follows the batch size of the two runs."""
    result: dict[str, Observation] = {}
    for name, (kind, dtype, shape, flops) in first.seen.items():
        if kind != "tensor" or dtype is None:
            result[name] = Observation("tuple" if kind == "tuple" else "other", None, flops // (size or 1), size or 1)
            continue
        again = second.seen.get(name, (kind, dtype, shape, flops))[2]
        marked = _marked(shape, again, size, other)
        kind_name = str(dtype).removeprefix("torch.")
        result[name] = Observation("tensor", TensorType(dtype=kind_name, shape=marked), flops // (size or 1), size or 1)
    return result


def _marked(
    shape: tuple[int, ...], again: tuple[int, ...], size: int | None, other: int | None
) -> tuple[int | str, ...]:
    if size is None or len(shape) != len(again):
        return shape
    if size == other:
        return tuple("B" if i == 0 and d == size else d for i, d in enumerate(shape))
    marked: list[int | str] = []
    for d, e in zip(shape, again, strict=True):
        if d == e:
            marked.append(d)
        elif d * (other or 1) == e * size:
            marked.append("B" if d == size else f"{d // size}B")
        else:
            marked.append(f"{d}?")
    return tuple(marked)


def to_mapping(observed: Mapping[str, Observation]) -> dict[str, TensorType]:
    """Types of the tensor-valued nodes."""
    return {n: o.type for n, o in observed.items() if o.type is not None}
