"""The trace receipt: does the captured graph do what the model does, in train and in eval mode?

In: a `Capture` and example inputs. Out: `Receipt` (plain data) and, from the same runs, what each node gave
(`Observation`: type with the batch axis marked, flops). Invariant: the runs leave parameters, buffers, modes and the
global random state as they were.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import fx, nn
from torch.utils.flop_counter import FlopCounterMode

from lagcompile.frontend.capture import Capture
from lagcompile.frontend.effects import Watch
from lagcompile.frontend.graph import Observation
from lagcompile.frontend.structure import leaves
from lagcompile.frontend.symbolic import restore_buffers
from lagcompile.ir.base import Frozen
from lagcompile.ir.program import TensorType

SEED = 20211006
Kind = Literal["tensor", "tuple", "other"]


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
        first, second = resized(tensors, 2), resized(tensors, 3)
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


def resized(tensors: Sequence[torch.Tensor], size: int) -> list[torch.Tensor]:
    """The inputs with `size` examples, repeated where there are fewer; as they are where no axis is common."""
    batch = _batch(tensors)
    if not batch:
        return list(tensors)
    rows = torch.arange(size) % batch
    return [t.index_select(0, rows.to(t.device)) if t.dim() else t for t in tensors]


@contextmanager
def as_it_was(module: nn.Module, training: bool) -> Iterator[None]:
    """Run in a mode with a seeded generator; modes, buffers and the generator are put back afterwards."""
    modes = [(m, m.training) for m in module.modules()]
    held = dict(module.named_buffers())
    before = {n: b.detach().clone() for n, b in held.items()}
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        module.train(training)
        torch.manual_seed(SEED)
        try:
            yield
        finally:
            for m, mode in modes:
                m.training = mode
            restore_buffers(module, held, before)


Run = tuple[ModeReceipt, "_Recorder"]


def _compare(captured: Capture, mode: str, tensors: Sequence[torch.Tensor]) -> Run:
    training = mode == "train"
    start = _random_start()
    with as_it_was(captured.original, training):
        before = {n: b.detach().clone() for n, b in captured.original.named_buffers()}
        expected = captured.signature.call(captured.original, [t.clone() for t in tensors])
        buffers = {n: b.detach().clone() for n, b in captured.original.named_buffers()}
        end = torch.get_rng_state()
    with as_it_was(captured.original, training):
        recorder = _Recorder(captured.module)
        captured.module.train(training)
        got = captured.assemble_flat(recorder.run(*(t.clone() for t in tensors)))
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


def _random_start() -> torch.Tensor:
    """State of the generator at the start of each run."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        return torch.get_rng_state()


def _same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.shape == b.shape and torch.equal(torch.nan_to_num(a), torch.nan_to_num(b))


def _difference(expected: Any, got: Any) -> float:
    """Largest absolute difference between two nested outputs; infinite where their structures differ."""
    a, b = leaves(expected), leaves(got)
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
    """Runs a graph and keeps the shape, dtype, flops and side effects of every value."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.seen: dict[str, tuple[Kind, torch.dtype | None, tuple[int, ...], int]] = {}
        self.counter = FlopCounterMode(display=False)
        self.watch = Watch()

    def run(self, *args: Any, **kwargs: Any) -> Any:
        with self.counter:
            return super().run(*args, **kwargs)

    def run_node(self, n: fx.Node) -> Any:
        before = self.counter.get_total_flops()
        self.watch.before(n, self.env)
        value = super().run_node(n)
        self.watch.after(n, value)
        work = self.counter.get_total_flops() - before
        if isinstance(value, torch.Tensor):
            flops = work + (value.numel() if n.op.startswith("call") else 0)
            self.seen[n.name] = ("tensor", value.dtype, tuple(value.shape), flops)
        else:
            found = leaves(value)
            kind: Kind = "tuple" if any(isinstance(v, torch.Tensor) for v in found) else "other"
            self.seen[n.name] = (kind, None, (), work)
        return value


def _observations(first: _Recorder, second: _Recorder, size: int | None, other: int | None) -> dict[str, Observation]:
    """One record per node; the batch axis is the one whose size follows the batch size of the two runs."""
    result: dict[str, Observation] = {}
    for name, (kind, dtype, shape, flops) in first.seen.items():
        marked = None
        if kind == "tensor":
            again = second.seen.get(name, (kind, dtype, shape, flops))[2]
            marked = TensorType(dtype=str(dtype).removeprefix("torch."), shape=_marked(shape, again, size, other))
        result[name] = Observation(
            kind,
            marked,
            flops=flops // (size or 1),
            batch=size or 1,
            writes=tuple(dict.fromkeys([*first.watch.writes.get(name, ()), *second.watch.writes.get(name, ())])),
            aliases=tuple(sorted({*first.watch.aliases.get(name, ()), *second.watch.aliases.get(name, ())})),
            random=name in first.watch.random or name in second.watch.random,
        )
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
