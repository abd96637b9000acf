"""The choice of a front end: the simplest one whose receipt holds.

In: a model, its signature, example tensors (or none). Out: `Captured`: capture, receipt, observations. Invariant: a
capture without a good receipt is never passed on; the user's model is not touched (a deep copy is worked on).

Order: torch.fx; torch.fx in both modes, merged, where the trace froze something, the modules at fault kept whole;
torch.export; torch.export in both modes, merged; torch.fx with the module that stopped torch.export kept whole; make_fx
where the forward takes derivatives; else one error with every problem. A capture that keeps several layers in one node
is used only if no later one does better. Where a graph is the model but cannot be cut as asked for, the next front
end is tried, whose graph may be finer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn

from lagcompile.frontend.below import Derivatives, record
from lagcompile.frontend.capture import Capture, FrontEnd, batch_of, reason_of, ties_of
from lagcompile.frontend.copies import own_memory, private_copy
from lagcompile.frontend.diagnose import diagnosis
from lagcompile.frontend.export import export
from lagcompile.frontend.functional import functional_form
from lagcompile.frontend.graphmodule import StageGraph
from lagcompile.frontend.modes import merge
from lagcompile.frontend.receipt import Cut, Expectations, Receipt, examine, first_line
from lagcompile.frontend.signature import Signature
from lagcompile.frontend.stages import Network
from lagcompile.frontend.still import Before, as_it_was
from lagcompile.frontend.storage import named_write
from lagcompile.frontend.symbolic import Traced, is_leaf, trace
from lagcompile.frontend.trials import resized
from lagcompile.ir.alone import ALONE
from lagcompile.ir.base import LiftError, SplitError

SHOWN = 4
"""Differences between a graph and the model that are listed."""


@dataclass(frozen=True)
class Captured:
    """A captured and cut model with its receipt; None where no inputs are known."""

    network: Network
    receipt: Receipt | None


def choose(model: nn.Module, signature: Signature, tensors: Sequence[Tensor] | None, cut: Cut) -> Captured:
    """Capture and cut a deep copy of a model with the first front end whose receipt holds.

    Args:
        model: any module; it is not changed.
        signature: its call.
        tensors: example inputs in the order of the signature; None where they are not known yet.
        cut: makes the network of a capture, and of what its nodes gave where that is known.

    Raises:
        LiftError: no front end captures the model; each problem names what to change.
        SplitError: it cannot be cut as asked for; `most` is the largest number of stages that was found to work.
    """
    own_memory(model)
    with ALONE:
        search = _Search(private_copy(model), signature, tensors, cut)
        return search.best() if tensors is not None else Captured(cut(search.unchecked(), None, ()), None)


@dataclass
class _Search:
    model: nn.Module
    signature: Signature
    tensors: Sequence[Tensor] | None
    cut: Cut

    def __post_init__(self) -> None:
        self.problems: list[str] = []
        self.fallback: Captured | None = None
        self.uncut: SplitError | None = None
        self.coarse: set[FrontEnd] = set()
        """Front ends whose graph is the model, but cannot be cut as asked for: their other graphs are no finer."""
        self.expected: Expectations | None = None
        self.faults: Mapping[str, str] = {}
        self.traced: list[Traced] = []
        self.stuck: tuple[str, str] | None = None
        self.exported = False
        self.free = False
        """Whether torch.export made a graph for more than one batch size."""

    # ------------------------------------------------------------ without inputs
    def unchecked(self) -> Capture:
        """The symbolic trace alone."""
        try:
            return self._capture(trace(self.model, self.signature, {}), "torch.fx")
        except Exception as error:
            raise LiftError(
                f"{type(self.model).__name__}.forward cannot be traced by torch.fx: {reason_of(error)}. Give "
                "example_inputs, so that torch.export can capture it"
            ) from error

    # ------------------------------------------------------------ with inputs
    def best(self) -> Captured:
        """The first capture whose receipt holds; one that keeps many layers in one node only as a last resort."""
        assert self.tensors is not None
        empty = [n for n, t in [*self.model.named_parameters(), *self.model.named_buffers()] if t.is_meta]
        if empty:
            raise LiftError(
                f"{', '.join(map(repr, empty[:SHOWN]))}{' and others' if len(empty) > SHOWN else ''}: on the meta "
                "device, without values, so that no run can show that a graph is the model: give them values (to_empty "
                "and load_state_dict), or lift without example inputs"
            )
        sparse = [n for n, t in zip(self.signature.names, self.tensors, strict=True) if t.layout is not torch.strided]
        if sparse:
            raise LiftError([f"the input '{n}' is sparse, and states are dense: give {n}.to_dense()" for n in sparse])
        try:
            self.expected = Expectations(self.model, self.signature, self.tensors)
        except Exception as error:
            raise LiftError(f"the model does not run on the example inputs: {reason_of(error)}") from error
        self.signature = self.expected.signature
        if added := self.expected.added():
            raise LiftError(
                f"the forward registers the buffer {', '.join(map(repr, added))} when it runs for the first time: run "
                "the model once before lifting, or register it in __init__"
            )
        for name, attempt in self._attempts():
            try:
                found = self._tried(attempt())
            except Exception as error:
                self.problems.append(f"{name}: {reason_of(error)}")
                if name.startswith("torch.export"):
                    self.stuck = _stuck(self.model, error)
                continue
            if found is None:
                continue
            if not self._holds_layers(found.network.capture.whole):
                return found
            self.fallback = self.fallback or found
        if self.fallback is not None:
            return self.fallback
        if self.uncut is not None:
            raise self.uncut
        met = diagnosis(self.model, self.signature, self.tensors)
        raise LiftError(
            [
                f"{type(self.model).__name__} cannot be captured; every front end failed:",
                *dict.fromkeys(self.problems),
                *(["What its forward does that a graph cannot hold:", *met] if met else self._writes()),
                "Change the lines named above to tensor operations, or move them into a sub-module that is kept whole",
            ]
        )

    def _writes(self) -> list[str]:
        """Lines that write into a tensor, the likeliest cause where nothing else is known."""
        modules = dict(self.model.named_modules())
        nodes = [n for t in self.traced for n in t.graph.nodes if n.meta.get("source")]
        found = dict.fromkeys(str(n.meta["source"]) for n in nodes if named_write(n, modules))
        return [f"Its forward writes into tensors that others may share at {', '.join(found)}"] if found else []

    def _attempts(self) -> Iterator[tuple[str, Callable[[], Capture]]]:
        yield "torch.fx", self._plain
        faults = dict(self.faults)
        if self.traced and "" not in faults and "torch.fx" not in self.coarse:
            yield "torch.fx in both modes", lambda: self._both("torch.fx", faults)
        asks = self._asks()
        yield "torch.export", self._exported_twice if asks else self._exported_once
        coarse = "torch.export" in self.coarse
        unfolded = self.exported and not asks  # a graph that is not the model: it unfolded a layer that asks
        if unfolded and not coarse:
            yield "torch.export in both modes", self._exported_twice
        if self.stuck is not None and "" not in faults:
            path, why = self.stuck
            yield f"torch.fx with '{path}' kept whole", lambda: self._both("torch.fx", {**faults, path: why})
        if self.free and not coarse:
            yield "torch.export for the example's batch size", self._exported_fixed
        if self._derives():
            yield "make_fx", self._recorded

    def _plain(self) -> Capture:
        (train,) = self.traced = self._traced("torch.fx", {}, (True,))
        self.faults = train.faults
        if not train.faults:
            if self._asks() and not same(train, *self._traced("torch.fx", {}, (False,))):
                raise LiftError("train and eval mode are two graphs")
            return self._capture(train, "torch.fx")
        named = "; ".join(f"{path or 'the model'}: {why}" for path, why in train.faults.items())
        raise LiftError(f"the trace would lack what it did: {named}")

    def _asks(self) -> bool:
        """Whether the model's own Python may do one thing in train mode and another in eval mode."""
        return self.expected is None or bool(self.expected.asked)

    def _exported_once(self) -> Capture:
        (traced,) = self._traced("torch.export", {}, (True,))
        self.exported = True
        return self._capture(traced, "torch.export")

    def _exported_twice(self) -> Capture:
        return self._merged(self._traced("torch.export", {}, (True, False)), "torch.export")

    def _exported_fixed(self) -> Capture:
        assert self.tensors is not None
        both = []
        for training in (True, False):
            with in_mode(self.model, training):
                both.append(export(self.model, self.signature, self.tensors, {}, dynamic=False))
        return self._merged(both, "torch.export")

    def _derives(self) -> bool:
        """Whether the model's forward takes derivatives, or maps a function over examples."""
        assert self.tensors is not None
        derivatives = Derivatives()
        with as_it_was(self.model, False), derivatives:
            self.signature.call(self.model, [t.clone() for t in self.tensors])
        return derivatives.met

    def _recorded(self) -> Capture:
        assert self.tensors is not None
        many = self.tensors if (batch_of(self.tensors) or 1) > 1 else resized(self.tensors, 3)
        both = []
        for training in (True, False):
            with in_mode(self.model, training):
                both.append(record(self.model, self.signature, many))
        return self._merged(both, "make_fx")

    def _both(self, front_end: FrontEnd, whole: Mapping[str, str]) -> Capture:
        return self._merged(self._traced(front_end, whole, (True, False)), front_end)

    def _merged(self, both: Sequence[Traced], front_end: FrontEnd) -> Capture:
        """One graph of both modes; where sharing of memory depends on the mode, of both in functional form."""
        try:
            return self._capture(merge(self.model, *both), front_end)
        except LiftError as error:
            try:
                forms = [self._form(t, front_end, mode) for t, mode in zip(both, (True, False), strict=True)]
                return self._capture(merge(self.model, *forms), front_end)
            except Exception:  # the first error names the user's operations
                raise error from None

    def _form(self, traced: Traced, front_end: FrontEnd, training: bool) -> Traced:
        """The functional form of one mode's graph."""
        found = self._capture(traced, front_end, (training,))
        read = {str(n.target) for n in found.module.graph.nodes if n.op in {"call_module", "get_attr"}}
        own = {n for n in read if "." not in n and not hasattr(self.model, n)}
        attributes = {n: getattr(found.module, n) for n in sorted(own)}
        return replace(traced, graph=found.module.graph, output=found.output, attributes=attributes)

    def _traced(self, front_end: FrontEnd, whole: Mapping[str, str], modes: Sequence[bool]) -> list[Traced]:
        """A graph for each mode; the copy's own modes are put back."""
        found = []
        for training in modes:
            with in_mode(self.model, training):
                if front_end == "torch.fx":
                    found.append(trace(self.model, self.signature, whole))
                else:
                    found.append(self._exported(whole))
        return found

    def _exported(self, whole: Mapping[str, str]) -> Traced:
        assert self.tensors is not None
        # two examples or more: of one, torch.export takes the size for a constant
        many = self.tensors if (batch_of(self.tensors) or 1) > 1 else resized(self.tensors, 3)
        try:
            traced = export(self.model, self.signature, many, whole)
            self.free = self.free or traced.sizes.least != traced.sizes.most
            return traced
        except Exception:
            return export(self.model, self.signature, self.tensors, whole, dynamic=False)

    def _capture(self, traced: Traced, front_end: FrontEnd, modes: Sequence[bool] = (False, True)) -> Capture:
        root: nn.Module = self.model
        if traced.attributes:
            root = nn.Module()
            root.__dict__.update({**vars(self.model), "_modules": dict(self.model._modules)})
            root._buffers = dict(self.model._buffers)
            for name, value in traced.attributes.items():
                if isinstance(value, Tensor):
                    root.register_buffer(name, value, persistent=False)
                else:
                    root.add_module(name, value)
        module = StageGraph(root, traced.graph, type(self.model).__name__)
        names = tuple(n.name for n in traced.graph.nodes if n.op == "placeholder")
        signature = replace(self.signature, names=names)
        ties = ties_of(self.model)
        whole = dict(traced.whole)
        captured = Capture(module, self.model, signature, traced.output, front_end, whole, ties, sizes=traced.sizes)
        return functional_form(captured, self.tensors, modes)

    def _tried(self, captured: Capture) -> Captured | None:
        """A capture, cut; None where that is impossible, or where it is not the model."""
        try:
            return self._checked(captured, self.cut)
        except SplitError as error:
            self._coarser(captured, error)
            return None

    def _coarser(self, captured: Capture, asked: SplitError) -> None:
        """Note how often a graph can be cut that cannot be cut as asked for, if it is the model."""
        most = asked.most or 1
        while most:
            try:
                if self._checked(captured, partial(self.cut, stages=most)) is None:
                    return
                break
            except SplitError as other:
                most = min(most - 1, other.most or most)
        asked.most = asked.most and max(most, 1)
        self.uncut = max(self.uncut or asked, asked, key=lambda e: e.most or 0)
        self.coarse.add(captured.front_end)

    def _checked(self, captured: Capture, cut: Cut) -> Captured | None:
        assert self.expected is not None
        if self.expected.fixed:
            fixed = captured.sizes.with_(self.expected.only(self.expected.fixed))
            captured = replace(captured, sizes=fixed)
        try:
            found = examine(captured, self.expected, cut)
        except SplitError:
            raise
        except Exception as error:
            if self.expected.fixed or captured.sizes.least == captured.sizes.most:
                raise
            why = f"the captured graph does not run on other batch sizes ({first_line(error)})"
            found = examine(replace(captured, sizes=self.expected.only(why)), self.expected, cut)
        if found.network is not None and found.receipt.ok:
            return Captured(found.network, found.receipt)
        if self.expected.differs_from_itself():
            raise LiftError(_NONDETERMINISTIC.format(type(self.model).__name__))
        more = len(found.receipt.failures) - SHOWN
        differs = [*found.receipt.failures[:SHOWN], *([f"and {more} more"] if more > 0 else [])]
        self.problems.append(f"the graph of {captured.front_end} is not the model: {'; '.join(differs)}")
        return None

    def _holds_layers(self, whole: Mapping[str, str]) -> bool:
        """Whether a module that is kept whole could itself be cut: it holds two layers with weights or more."""
        modules = dict(self.model.named_modules())
        return any(
            sum(is_leaf(m) and any(True for _ in m.parameters()) for m in modules[path].modules()) > 1
            for path in whole
            if path in modules and not is_leaf(modules[path])
        )


_NONDETERMINISTIC = (
    "{} gives two results for the same inputs, weights and random seed: what it computes depends on something outside "
    "of it, and no graph can be compared with it"
)


@contextmanager
def in_mode(model: nn.Module, training: bool) -> Iterator[None]:
    """A model in a mode while it is traced; it is put back as it was."""
    before, modes = Before(model), [(m, m.training) for m in model.modules()]
    model.train(training)
    try:
        yield
    finally:
        before.put_back()
        for module, mode in modes:
            module.training = mode


def same(a: Traced, b: Traced) -> bool:
    """Whether two graphs are the same operations on the same values, and give the same output."""
    ours, theirs = list(a.graph.nodes), list(b.graph.nodes)
    return (
        len(ours) == len(theirs)
        and a.output == b.output
        and a.faults == b.faults
        and dict(a.whole).keys() == dict(b.whole).keys()
        and all(
            (n.op, n.target, n.name) == (m.op, m.target, m.name)
            and repr((n.args, n.kwargs)) == repr((m.args, m.kwargs))
            for n, m in zip(ours, theirs, strict=True)
        )
    )


def _stuck(model: nn.Module, error: BaseException) -> tuple[str, str] | None:
    """Innermost sub-module in whose forward an error was raised, and the reason."""
    paths = {m: n for n, m in model.named_modules() if n and not is_leaf(m)}
    found = None
    entry = error.__traceback__
    while entry is not None:
        here = entry.tb_frame.f_locals.get("self")
        if isinstance(here, nn.Module) and here in paths:
            found = paths[here]
        entry = entry.tb_next
    return None if found is None else (found, reason_of(error))
