"""The trace receipt: does the captured graph do what the model does, in train and in eval mode?

In: a `Capture` and example inputs. Out: `Receipt` (plain data) and, from the same runs, what each node gave
(`Observation`: type with the batch axis marked, flops). Invariant: the runs leave parameters, buffers, modes and the
global random state as they were.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from lagcompile.frontend.capture import Capture
from lagcompile.frontend.graph import Observation
from lagcompile.frontend.observe import Recorder, observations
from lagcompile.frontend.signature import Signature
from lagcompile.frontend.structure import leaves, transform
from lagcompile.frontend.symbolic import restore_buffers
from lagcompile.ir.base import Frozen

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
            if m.difference == math.inf:
                equal = "DIFFERENT in structure, shape or type"
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


@dataclass(frozen=True)
class Expected:
    """What the model itself does in one mode on some inputs.

    Attributes:
        mode: train or eval.
        tensors: the inputs.
        output: leaves of its output.
        structure: the containers around them.
        buffers: its buffers afterwards.
        changed: names of those that changed.
        start: state of the random generator ahead of the run.
        end: and afterwards.
    """

    mode: str
    tensors: tuple[torch.Tensor, ...]
    output: tuple[Any, ...]
    structure: Any
    buffers: Mapping[str, torch.Tensor]
    changed: tuple[str, ...]
    start: torch.Tensor
    end: torch.Tensor

    @property
    def random(self) -> bool:
        """Whether random numbers were drawn."""
        return not torch.equal(self.start, self.end)


@dataclass(frozen=True)
class Expectations:
    """What the model does in eval mode with two examples and in train mode with three; or with those given."""

    evaluation: Expected
    train: Expected
    batch: str = "dynamic"


def expect(model: nn.Module, signature: Signature, tensors: Sequence[torch.Tensor]) -> Expectations:
    """Run the model itself in both modes.

    Args:
        model: the private copy; it is left as it was.
        signature: how it is called.
        tensors: example inputs in the order of the signature; two or three examples of them are run, so that the cost
            does not grow with their number.

    Raises:
        Exception: whatever the user's own forward raises on these inputs.
    """
    try:
        return Expectations(
            _expected(model, signature, "eval", resized(tensors, 2)),
            _expected(model, signature, "train", resized(tensors, 3)),
        )
    except Exception as error:
        return at_given(model, signature, tensors, f"the model does not run on other batch sizes ({first_line(error)})")


def at_given(model: nn.Module, signature: Signature, tensors: Sequence[torch.Tensor], why: str) -> Expectations:
    """Expectations on the example inputs as they are."""
    evaluation, train = (_expected(model, signature, mode, tensors) for mode in ("eval", "train"))
    return Expectations(evaluation, train, f"fixed: {why}")


def first_line(error: BaseException) -> str:
    """First line of an error's message."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _expected(model: nn.Module, signature: Signature, mode: str, tensors: Sequence[torch.Tensor]) -> Expected:
    with as_it_was(model, mode == "train") as before:
        start = torch.get_rng_state()
        output = signature.call(model, [t.clone() for t in tensors])
        buffers = {n: b.detach().clone() for n, b in model.named_buffers()}
        end = torch.get_rng_state()
        changed = tuple(n for n, b in buffers.items() if n not in before or not _same(b, before[n]))
        found = tuple(leaves(output))
        return Expected(mode, tuple(tensors), found, _containers(output), buffers, changed, start, end)


def examine(captured: Capture, expected: Expectations) -> tuple[Receipt, dict[str, Observation]]:
    """Run a graph as the model was run, and compare.

    Args:
        captured: the captured model.
        expected: what the model itself does.

    Raises:
        Exception: the graph does not run (on this batch size, for one).
    """
    evaluation, first = _compare(captured, expected.evaluation, count=True)
    train, second = _compare(captured, expected.train, count=False)
    receipt = Receipt(
        front_end=captured.front_end,
        model=type(captured.original).__name__,
        modes=(evaluation, train),
        whole=tuple(captured.whole.items()),
        tied=tuple((name, *others) for name, others in captured.ties.items()),
        batch=expected.batch,
    )
    sizes = [_batch(e.tensors) for e in (expected.evaluation, expected.train)]
    return receipt, observations(first, second, *sizes)


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
def as_it_was(module: nn.Module, training: bool) -> Iterator[Mapping[str, torch.Tensor]]:
    """Run in a mode with a seeded generator; modes, buffers and the generator are put back afterwards."""
    modes = [(m, m.training) for m in module.modules()]
    held = dict(module.named_buffers())
    before = {n: b.detach().clone() for n, b in held.items()}
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        module.train(training)
        torch.manual_seed(SEED)
        try:
            yield before
        finally:
            for m, mode in modes:
                m.training = mode
            restore_buffers(module, held, before)


def _compare(captured: Capture, expected: Expected, *, count: bool) -> tuple[ModeReceipt, Recorder]:
    training = expected.mode == "train"
    recorder = Recorder(captured.module, random=expected.random, count=count)
    with as_it_was(captured.original, training):
        captured.module.train(training)
        got = captured.assemble_flat(recorder.run(*(t.clone() for t in expected.tensors)))
        own = dict(captured.original.named_buffers())
        equal = own.keys() == expected.buffers.keys() and all(_same(b, own[n]) for n, b in expected.buffers.items())
        end = torch.get_rng_state()
    receipt = ModeReceipt(
        mode=expected.mode,
        difference=_difference(expected.output, leaves(got)) if _containers(got) == expected.structure else math.inf,
        buffers_equal=equal,
        buffers_changed=expected.changed,
        random_equal=torch.equal(end, expected.end),
        random_used=expected.random,
    )
    return receipt, recorder


def _containers(output: Any) -> Any:
    return transform(output, lambda v: None)


def _same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.shape == b.shape and (torch.equal(a, b) or torch.equal(torch.nan_to_num(a), torch.nan_to_num(b)))


def _difference(a: Sequence[Any], b: Sequence[Any]) -> float:
    """Largest absolute difference between the leaves of two outputs; infinite where their structures differ."""
    if len(a) != len(b):
        return float("inf")
    worst = 0.0
    for x, y in zip(a, b, strict=True):
        if not isinstance(x, torch.Tensor):
            worst = worst if x == y else float("inf")
        elif x.shape != y.shape or x.dtype != y.dtype:
            return float("inf")
        elif x.numel() and not _same(x, y):
            worst = max(worst, float((x.double() - y.double()).abs().nan_to_num(float("inf")).max()))
    return worst
