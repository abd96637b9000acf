"""The trace receipt: is what was captured, and cut, the user's model?

In: a model, its inputs, a `Capture`, and how it is cut. Out: `Receipt` (plain data), what each node gave
(`Observation`), the cut network. Invariant: the runs leave everything as it was; a receipt is good only if every run
agrees, NaN with NaN only.

What runs, with the model and the graph beside each other (m: model, g: captured graph, n: the cut network):

    eval, 2 examples; train, 3         m, g     shapes, work and side effects of the nodes
    the same two, with gradients       m, n     other values, other weights
    eval and train, the user's batch   m, n     the user's values
    2 and 3 examples, large values     m, n
    eval, zeros; eval, 1 example       m, n

So lifting costs about twelve forward passes, two of them with a backward pass, of the model, and the same of the graph;
beside the private copy, one more copy of the weights and one of their gradient are held. Where the user's batch takes
more than `WORK` operations and torch.fx traced a model that does not ask for its mode, in which no decision on sizes or
values can have been lost, the last three lines are left out and gradients are taken on 1 and 2 examples.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Protocol

import torch
from torch import Tensor, nn

from lagcompile.frontend.capture import Capture, Sizes, batch_of
from lagcompile.frontend.compare import Gap, gap, rounded
from lagcompile.frontend.diagnose import mode_reads
from lagcompile.frontend.graph import Observation
from lagcompile.frontend.observe import Recorder, observations
from lagcompile.frontend.signature import Signature
from lagcompile.frontend.stages import Network
from lagcompile.frontend.tensors import identical
from lagcompile.frontend.trials import Known, Outcome, Trial, emptied, grown, negated, resized, run, with_values
from lagcompile.ir.base import Measured

WORK = 1_000_000_000


class Cut(Protocol):
    """Makes the network of a capture."""

    def __call__(
        self,
        captured: Capture,
        observed: Mapping[str, Observation] | None,
        tensors: Sequence[Tensor],
        stages: int | None = None,
    ) -> Network:
        """Cut a capture, of whose nodes is known what they gave, as asked for; or into a number of balanced stages."""


class ModeReceipt(Measured):
    """Comparison of captured graph and model in one mode."""

    mode: str
    difference: float
    """Largest difference of outputs, relative to their size; 0 where they are bit-equal."""
    buffers_equal: bool
    """The same buffers changed, to the same values."""
    buffers_changed: tuple[str, ...]
    random_equal: bool
    """The random generators (torch, Python, NumPy) were left in the same state."""
    random_used: bool
    slopes: float | None = None
    """Largest difference of gradients in parameters and inputs, relative to their size; None: not compared."""
    batches: tuple[int, ...] = ()
    """Batch sizes of the runs that were compared."""
    problems: tuple[str, ...] = ()
    """What differs by more than rounding."""

    @property
    def ok(self) -> bool:
        """Nothing differs."""
        return not self.problems and self.buffers_equal and self.random_equal

    def __str__(self) -> str:
        equal = "bit-equal" if self.difference == 0 else f"equal up to {self.difference:.1e} of their size"
        equal = "DIFFERENT" if self.difference == math.inf else equal
        slopes = "gradients not compared"
        if self.slopes is not None:
            slopes = f"gradients {'bit-equal' if self.slopes == 0 else f'equal up to {self.slopes:.1e}'}"
        changed = f"{len(self.buffers_changed)} buffers changed" if self.buffers_changed else "no buffer changed"
        agree = "equally" if self.buffers_equal else "DIFFERENTLY"
        used = f"random numbers {'used' if self.random_used else 'not used'}"
        sizes = ", ".join(map(str, sorted(set(self.batches))))
        lines = [
            f"  {self.mode:5}  {len(self.batches)} runs with batches of {sizes}: outputs {equal}; {slopes}; "
            f"{changed}, {agree}; {used}{'' if self.random_equal else ', DIFFERENTLY'}"
        ]
        return "\n".join([*lines, *(f"    {p}" for p in self.problems)])


class Receipt(Measured):
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
    sizes: Sizes = Sizes()
    """Batch sizes that the graph holds for."""

    @property
    def ok(self) -> bool:
        """Every mode agrees."""
        return all(m.ok for m in self.modes)

    @property
    def failures(self) -> tuple[str, ...]:
        """What differs, once."""
        by_problem: dict[str, list[str]] = {}
        for m in self.modes:
            for p in m.problems:
                by_problem.setdefault(p, []).append(m.mode)
        return tuple(f"in {' and '.join(modes)} mode {p}" for p, modes in by_problem.items())

    def __str__(self) -> str:
        lines = [f"receipt for {self.model}, captured by {self.front_end} (batch size {self.batch})"]
        lines += [str(m) for m in self.modes]
        if self.sizes != Sizes(shapes=self.sizes.shapes):
            lines.append(f"  holds for {self.sizes}")
        lines += [f"  kept whole: {path} ({reason})" for path, reason in self.whole]
        lines += [f"  tied: {' = '.join(names)}" for names in self.tied]
        return "\n".join(lines)


def first_line(error: BaseException) -> str:
    """First line of an error's message."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


@dataclass(frozen=True)
class Expected:
    """A run of the model itself."""

    trial: Trial
    outcome: Outcome


class Expectations:
    """What the model itself does, run when it is asked for, each run once.

    Args:
        model: the private copy; it is left as it was.
        signature: how it is called.
        tensors: example inputs in the order of the signature.

    Attributes:
        fixed: why the model runs on the example's batch size only; '' where it runs on others.
        asked: paths of the modules that asked for their mode.

    Raises:
        Exception: whatever the user's own forward raises on these inputs.
    """

    def __init__(self, model: nn.Module, signature: Signature, tensors: Sequence[Tensor]) -> None:
        self.model, self.signature, self.tensors = model, signature, tuple(tensors)
        self.own = batch_of(tensors) or 1
        self.fixed = ""
        self.asked: set[str] = set()
        self.known = Known()
        self._done: dict[tuple[str, bool, int, bool, bool], Expected | None] = {}
        problems: list[Exception] = []
        for fixed, graded in product((False, True), (False, True)):
            self.signature, self._done = replace(signature, graded=graded), {}
            if fixed:
                self.fixed = f"the model does not run on other batch sizes ({first_line(problems[0])})"
            try:
                self.base(Sizes())
            except Exception as error:
                problems.append(error)
                continue
            return
        raise problems[2]

    def only(self, why: str) -> Sizes:
        """The example's batch size alone."""
        return Sizes(least=self.own, most=self.own, why=why)

    def base(self, sizes: Sizes) -> tuple[Expected, Expected]:
        """In eval mode and in train mode, on two batch sizes where two are allowed."""
        found = [n for n in range(2, 2 + 4 * sizes.step + sizes.least) if sizes.allow(n)][:2]
        if self.fixed or len(found) < 2 or batch_of(self.tensors) is None:
            found = [self.own, self.own]
        return self._run("", False, found[0]), self._run("", True, found[1])

    def further(self, sizes: Sizes, *, thorough: bool) -> Iterator[Expected]:
        """With other values and other weights, with gradients; `thorough`: the user's batch size and zeros, too."""
        base = self.base(sizes)
        kinds = (("negated", True, True), ("", True, True), ("", False, True), ("negated", True, False))
        for start, few in zip(base, (1, 2), strict=True):
            least = not thorough and not self.fixed and sizes.allow(few)
            yield from self._first(start, kinds, few if least else start.trial.size)
        if thorough:
            for start in base:
                yield from self._first(start, (("", False, False),), self.own)
                yield from self._first(start, (("grown", False, False),), start.trial.size)
            yield from self._first(base[0], (("emptied", False, False),), base[0].trial.size)

    def alone(self, sizes: Sizes) -> Expected | None:
        """One example in eval mode."""
        if self.fixed or not sizes.allow(1) or batch_of(self.tensors) is None:
            return None
        return next(iter(self._first(self.base(sizes)[0], (("", False, False),), 1)), None)

    def added(self) -> list[str]:
        """Names of the buffers that the model has after a run only."""
        held = dict(self.model.named_buffers())
        return list(dict.fromkeys(n for e in self.base(Sizes()) for n in e.outcome.changed if n not in held))

    def rounded(self, expected: Expected) -> Outcome:
        """The same run with weights and inputs moved in their last place."""
        return rounded(self.model, self._call, expected.trial, expected.outcome, self.known)

    def differs_from_itself(self) -> bool:
        """Whether two runs from one seed differ."""
        for expected in self.base(Sizes()):
            again = run(self.model, self._call, expected.trial, known=self.known)
            for name, value in expected.outcome.numbers.items():
                other = again.numbers.get(name)
                if (value is None) != (other is None) or (
                    value is not None and other is not None and not identical(value, other)
                ):
                    return True
        return False

    def _call(self, tensors: list[Tensor]) -> object:
        return self.signature.call(self.model, tensors)

    def _watched(self, tensors: list[Tensor]) -> object:
        with mode_reads(self.model) as asked:
            output = self._call(tensors)
        self.asked |= asked
        return output

    def _first(self, start: Expected, kinds: Sequence[tuple[str, bool, bool]], size: int) -> Iterator[Expected]:
        """The first kind of run that the model does, and that gives numbers where the model gives any."""
        for kind, varied, slopes in kinds:
            try:
                found = self._run(kind, start.trial.training, size, varied, slopes)
            except Exception:  # the user's own code, on values that it does not expect
                continue
            if _finite(found.outcome) or not _finite(start.outcome):
                yield found
                return

    def _run(self, kind: str, training: bool, size: int, varied: bool = False, slopes: bool = False) -> Expected:
        key = (kind, training, size, varied, slopes)
        if key not in self._done:
            tensors = self.tensors if size == self.own else resized(self.tensors, size)
            trial = Trial(training, tuple(tensors), varied, slopes)
            if kind:
                trial = with_values(trial, {"negated": negated, "grown": grown, "emptied": emptied}[kind])
            self._done[key] = None
            call = self._call if varied or slopes or kind else self._watched
            self._done[key] = Expected(trial, run(self.model, call, trial, known=self.known))
        found = self._done[key]
        if found is None:
            raise RuntimeError("this run failed before")
        return found


def _finite(outcome: Outcome) -> bool:
    outputs = (v for n, v in outcome.numbers.items() if n.startswith("output") and v is not None)
    return all(bool(torch.isfinite(v).all()) for v in outputs)


@dataclass(frozen=True)
class Examined:
    """What a comparison showed; the network is None where the graph itself is not the model."""

    receipt: Receipt
    observed: Mapping[str, Observation]
    network: Network | None


def examine(captured: Capture, expected: Expectations, cut: Cut) -> Examined:
    """Run a graph, and the network cut out of it, as the model was run, and compare.

    Args:
        captured: the captured model.
        expected: what the model itself does.
        cut: makes the network.

    Raises:
        SplitError: it cannot be cut as asked for.
        Exception: the graph does not run (on this batch size, for one).
    """
    gaps: list[tuple[Expected, Gap]] = []
    recorders = []
    for wanted in expected.base(captured.sizes):
        recorder = Recorder(captured.module, random=wanted.outcome.random, count=not wanted.trial.training)
        gaps.append((wanted, _gap(captured.original, _Observed(captured, recorder), wanted, expected, captured)))
        recorders.append(recorder)
    sizes = [batch_of(e.trial.tensors) for e, _ in gaps]
    observed = observations(recorders[0], recorders[1], *sizes)
    if any(g.problems for _, g in gaps):
        return Examined(_receipt(captured, gaps, expected), observed, None)
    network = cut(captured, observed, resized(expected.tensors, 8))
    work = sum(o.flops for o in observed.values()) * expected.own
    thorough = captured.front_end != "torch.fx" or bool(expected.asked) or bool(captured.whole) or work <= WORK
    gaps += [(e, _gap_of(network, e, expected)) for e in expected.further(captured.sizes, thorough=thorough)]
    alone = expected.alone(captured.sizes) if thorough else None
    if alone is not None:
        try:
            found = _gap_of(network, alone, expected)
        except Exception as error:  # whatever an operation says that was captured for several examples
            found = Gap(math.inf, 0.0, True, True, (first_line(error),))
        if found.problems and expected.own > 1:
            why = f"the graph does something else than the model on one example: {found.problems[0]}"
            captured = replace(captured, sizes=captured.sizes.with_(Sizes(least=2, why=why)))
            network = replace(network, capture=captured)
        else:
            gaps.append((alone, found))
    return Examined(_receipt(captured, gaps, expected), observed, network)


class _Observed:
    """A call of a captured graph that is recorded, once."""

    def __init__(self, captured: Capture, recorder: Recorder) -> None:
        self.captured, self.recorder, self.done = captured, recorder, False

    def __call__(self, tensors: list[Tensor]) -> object:
        runs = self.captured.module if self.done else self.recorder.run
        self.done = True
        return self.captured.assemble_flat(runs(*tensors))


def _gap_of(network: Network, wanted: Expected, expected: Expectations) -> Gap:
    captured = network.capture
    return _gap(
        captured.original,
        network.call,
        wanted,
        expected,
        captured,
        network.graphs,
    )


def _gap(
    model: nn.Module,
    call: Callable[[list[Tensor]], object],
    wanted: Expected,
    expected: Expectations,
    captured: Capture,
    graphs: Sequence[nn.Module] = (),
) -> Gap:
    graphs = (captured.module, *graphs)
    got = run(model, call, wanted.trial, graphs=graphs, calls=wanted.outcome.calls, known=expected.known)
    return gap(wanted.outcome, got, lambda: expected.rounded(wanted))


def _receipt(captured: Capture, gaps: Sequence[tuple[Expected, Gap]], expected: Expectations) -> Receipt:
    sizes = captured.sizes
    fixed = expected.fixed or (sizes.why if sizes.least == sizes.most else "")
    return Receipt(
        front_end=captured.front_end,
        model=type(captured.original).__name__,
        modes=tuple(_mode(m, [(e, g) for e, g in gaps if e.trial.mode == m]) for m in ("eval", "train")),
        whole=tuple(captured.whole.items()),
        tied=tuple((name, *others) for name, others in captured.ties.items()),
        batch=f"fixed: {fixed}" if fixed else "dynamic",
        sizes=sizes,
    )


def _mode(mode: str, found: Sequence[tuple[Expected, Gap]]) -> ModeReceipt:
    slopes = [g.slopes for e, g in found if e.trial.slopes]
    outcomes = [e.outcome for e, _ in found]
    return ModeReceipt(
        mode=mode,
        difference=max(g.outputs for _, g in found),
        slopes=max(slopes) if slopes else None,
        buffers_equal=all(g.buffers for _, g in found),
        buffers_changed=tuple(dict.fromkeys(n for o in outcomes for n in o.changed)),
        random_equal=all(g.random for _, g in found),
        random_used=any(o.random for o in outcomes),
        batches=tuple(e.trial.size for e, _ in found),
        problems=tuple(dict.fromkeys(p for _, g in found for p in g.problems)),
    )
