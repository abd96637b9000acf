"""The front door: `lift` ties the stages of the compiler together and computes nothing itself.

In: a module, example inputs, a split, the lifting options. Out: `Lifted`. Invariant: the user's module is never
changed; lifting twice gives equal programs; shapes that are not known at lifting are resolved when data are bound.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import fx, nn

from lagcompile.backends.base import RunOptions, Watch, fits
from lagcompile.backends.best import Evaluate
from lagcompile.backends.first_order import Extragradient
from lagcompile.backends.method import Solver
from lagcompile.check.certificate import USUAL, Certificate
from lagcompile.check.verify import certify_solved, verify_network
from lagcompile.frontend.copies import check_model
from lagcompile.frontend.cut import captured_and_cut
from lagcompile.frontend.graph import Graph
from lagcompile.frontend.lower import Formulation, lower
from lagcompile.frontend.partition import Partition
from lagcompile.frontend.places import names_of
from lagcompile.frontend.plan import Plan, plan
from lagcompile.frontend.receipt import Receipt
from lagcompile.frontend.signature import as_args, signature_of
from lagcompile.frontend.split import AtSplit, NoSplit, SplitFile, SplitPolicy, split_of
from lagcompile.frontend.stages import Network
from lagcompile.ir.alone import alone
from lagcompile.ir.arguments import expect, expect_functions, expect_positive, loss_name
from lagcompile.ir.base import Frozen, SpecError
from lagcompile.ir.program import Program
from lagcompile.ir.solution import Solution
from lagcompile.ir.yamlfile import dump, validate
from lagcompile.runtime.dataset import as_rows
from lagcompile.runtime.instance import Instance, Loss
from lagcompile.runtime.trial import check_inputs, try_out, try_receipt

CERTIFIED = 8
"""Rows on which `solve` certifies its solution."""
SplitLike = SplitPolicy | Mapping[str, Any] | int | str | Path | None


@alone
def lift(
    model: nn.Module,
    example_inputs: Any = None,
    split: SplitLike = None,
    formulation: Formulation | None = None,
    *,
    example_kwargs: Mapping[str, Any] | None = None,
    name: str | None = None,
) -> Lifted:
    """Compile a module to a constrained program.

    Args:
        model: any `torch.nn.Module`; it is copied, never changed.
        example_inputs: a tensor or a tuple of the forward's arguments; a few examples of them are run to learn
            shapes and to check the trace. Without them shapes are resolved when data are bound.
        split: number of balanced stages; a policy, as object or mapping; path of a YAML split spec; None for `auto`.
        formulation: the lifting options; None for per-example tables with identity defects and full multipliers.
        example_kwargs: keyword arguments of the forward.
        name: name of the program; None for the model's class.

    Raises:
        LiftError: the model cannot be captured, or the captured graph does something else than the model.
        SplitError: the graph does not have the breakpoints that were asked for.
        SpecError: the split spec is wrong; each problem names a key, and the line where it is a file.
        ProgramError: the lifting options contradict each other.
    """
    expect("formulation", formulation, Formulation, "a lagcompile.Formulation")
    expect("example_kwargs", example_kwargs, Mapping, "a mapping of names to values")
    expect("name", name, str, "a string")
    policy = _policy(split)
    check_model(model)
    args = None if example_inputs is None else as_args(example_inputs)
    signature = signature_of(model.forward, args, example_kwargs)
    known = args is not None or bool(example_kwargs)
    tensors = signature.flatten(args or (), example_kwargs or {}) if known else None
    found = captured_and_cut(model, signature, tensors, policy)
    return Lifted(found.network, found.receipt, policy, formulation or Formulation(), name or type(model).__name__)


def _policy(split: SplitLike) -> SplitPolicy:
    if isinstance(split, str | Path):
        return validate(Path(split), SplitFile).split
    return split_of(split)


@dataclass(frozen=True)
class Lifted:
    """A module that has been compiled to a program.

    Attributes:
        network: captured module, stage modules and their partition.
        receipt: whether the trace does what the model does; None until inputs are known.
        policy: the split policy.
        formulation: the lifting options.
        name: name of the program.
    """

    network: Network
    receipt: Receipt | None
    policy: SplitPolicy
    formulation: Formulation
    name: str

    # ---------------------------------------------------------------- what it is
    @cached_property
    def program(self) -> Program:
        """The constrained program."""
        return lower(self.network, self.formulation, name=self.name)

    @property
    def graph(self) -> Graph:
        """The captured graph."""
        return self.partition.graph

    @property
    def partition(self) -> Partition:
        """Which stage each node belongs to, and what crosses each breakpoint."""
        return self.network.partition

    @property
    def stages(self) -> Mapping[str, fx.GraphModule]:
        """Stage modules by name; they share the lifted copy's parameters."""
        return {s.name: s.module for s in self.network.stages}

    @property
    def module(self) -> nn.Module:
        """Private copy of the user's module."""
        return self.network.capture.original

    @property
    def split(self) -> SplitPolicy:
        """The breakpoints by name: a spec that gives this split again, to be saved, edited and loaded."""
        if self.partition.stages == 1:
            return NoSplit()
        return AtSplit(after=names_of(self.partition))

    def save_split(self, path: str | Path) -> None:
        """Write the split as a YAML file that `lift(model, split=path)` reads."""
        dump(SplitFile(split=self.split), path)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The glued forward pass: equal to the model's own."""
        tensors = self.network.capture.signature.flatten(args, kwargs)
        return self.network.call(tensors)

    def train(self, mode: bool = True) -> Lifted:
        """Switch dropout and batch normalisation, as on a module."""
        self.network.train(mode)
        return self

    def eval(self) -> Lifted:
        """Evaluation mode."""
        return self.train(False)

    def __repr__(self) -> str:
        return f"Lifted({self.name}: {len(self.stages)} stages, {len(self.partition.states)} states)"

    # ---------------------------------------------------------------- out of this process
    @alone
    def save(
        self,
        folder: str | Path,
        example_inputs: Any = None,
        *,
        example_kwargs: Mapping[str, Any] | None = None,
        solution: Solution | None = None,
        replace: bool = False,
    ) -> Path:
        """Write a self-contained folder that `lagcompile.load` reads without the model's source.

        Args:
            folder: the folder to make.
            example_inputs: a tensor or a tuple of the forward's arguments; None makes them up from the known types.
            example_kwargs: keyword arguments of the forward.
            solution: a solution of this program: its weights, states and multipliers are written.
            replace: replace an exported folder that is there.

        Raises:
            LiftError: the model cannot be written; each problem says what to change.
            DataError: something is there already.
        """
        from lagcompile.saved import save

        args = () if example_inputs is None else as_args(example_inputs)
        return save(self, folder, args, example_kwargs or {}, solution=solution, replace=replace)

    def to_latex(self, method: Frozen | None = None) -> str:
        """The mathematics of the program, and of a method's step, as LaTeX for a paper (amsmath)."""
        from lagcompile.export.latex import latex

        return latex(self.program, method)

    def draw(self, path: str | Path) -> Path:
        """Draw stages, breakpoints and costs to an .svg, .png or .pdf file (extra `plots`)."""
        from lagcompile.export.drawing import draw

        return draw(self.program, path)

    # ---------------------------------------------------------------- what to do with it
    @alone
    def resolve(self, *args: Any, **kwargs: Any) -> Lifted:
        """The same lifting with shapes known from inputs; itself where they are known.

        Raises:
            LiftError: the captured graph does something else than the model.
        """
        if self.receipt is not None:
            return self
        original = self.network.capture.original
        signature = signature_of(original.forward, args, kwargs)
        found = captured_and_cut(original, signature, signature.flatten(args, kwargs), self.policy)
        return Lifted(found.network, found.receipt, self.policy, self.formulation, self.name)

    def plan(self, examples: int = 1, *, state_slots: int = 1, dual_slots: int = 0, batch_size: int = 64) -> Plan:
        """Counts and bytes for a data set, before anything is allocated."""
        return plan(
            self.program,
            self.partition,
            examples=examples,
            state_slots=state_slots,
            dual_slots=dual_slots,
            batch_size=batch_size,
        )

    @alone
    def bind(self, dataset: Any, *, loss: Loss, device: torch.device | str = "cpu", stack: bool = True) -> Instance:
        """Bind data, a loss and a device.

        Args:
            dataset: a pair (x, y) of tensors (x may be a tuple of inputs), a `torch.utils.data.Dataset` or a loader.
            loss: (output, target) -> scalar.
            device: where to compute.
            stack: run equal stages as one batched call.

        Raises:
            BindError: the data do not fit the program.
            ProgramError: the loss reduces over examples otherwise than the formulation says.
            DataError: the data are empty or damaged.
        """
        inputs, target = as_rows(dataset)
        args = tuple(t[:8] for t in inputs)
        lifted = self.resolve(*args)
        named = lower(lifted.network, lifted.formulation, loss=loss_name(loss), name=self.name)
        call = lifted.network.capture.signature
        tensors = call.flatten(inputs, {}, kept=True)
        check_inputs(named, call.names, tensors)
        instance = Instance(named, lifted.network, (tensors, target), loss=loss, device=device, stack=stack)
        try_out(instance)
        try_receipt(instance)
        return instance

    @alone
    def verify(
        self,
        inputs: Any,
        target: Any,
        *,
        loss: Loss,
        tolerance: float = USUAL["network"],
        kwargs: Mapping[str, Any] | None = None,
        weights: Mapping[str, torch.Tensor] | None = None,
    ) -> Certificate:
        """Check the identities that hold at a zero-defect point, in float64, in train and eval mode.

        Args:
            inputs: a batch of inputs, as the model takes them.
            target: what the loss compares with.
            loss: (output, target) -> scalar.
            tolerance: largest relative residual.
            kwargs: keyword arguments of the forward.
            weights: what to check in place of the lifted weights, such as `solution.model.state_dict()`.
        """
        expect("kwargs", kwargs, Mapping, "a mapping of names to values")
        expect_positive("tolerance", tolerance)
        loss_name(loss)
        args = as_args(inputs)
        lifted = self.resolve(*args, **(kwargs or {}))
        call = lifted.network.capture.signature
        tensors = call.flatten(args, kwargs or {}, kept=True)
        check_inputs(lifted.program, call.names, tensors, shapes=False)
        return verify_network(
            lifted.network, lifted.program, tensors, target, loss=loss, tolerance=tolerance, weights=weights
        )

    def solve(
        self,
        dataset: Any,
        *,
        loss: Loss,
        method: Solver | None = None,
        options: RunOptions | None = None,
        device: torch.device | str = "cpu",
        evaluate: Evaluate | None = None,
        watch: Watch | None = None,
        start: Solution | None = None,
        folder: str | Path | None = None,
        resume: bool = False,
    ) -> Solution:
        """Solve for weights, states and multipliers together.

        Args:
            dataset: a pair (x, y) of tensors, a `Dataset` or a loader.
            loss: (output, target) -> scalar.
            method: None for extragradient with its default step rules.
            options: steps, batch size, seed, how often to look.
            device: where to compute.
            evaluate: numbers of a module on held-out data, such as {"accuracy": 0.98}.
            watch: called with each row of the history.
            start: a solution of the same program to start from (step-wise methods take its weights, `SQP` everything).
            folder: run folder to make: program, log, weights, and checkpoints every five minutes and at the end.
                Ctrl-C, SIGTERM and SIGHUP then end the run behind the step in hand, with all of it saved.
            resume: resume from that folder's checkpoint, bit for bit; a model of any weights will do.

        Returns:
            What was reached; `solution.model` is of the model's class and on its device, and `solution.certificate`
            says on a few rows whether the network that was solved is the model.

        Raises:
            BindError, SpecError: the data do not fit, or `method` is not a `Solver`.
            ProgramError: the method is not defined on this program.
            DataError: the data are damaged, or the folder exists, is in use, cannot be written, or is of another run.
        """
        chosen = method if method is not None else Extragradient()
        if not isinstance(chosen, Solver):
            raise SpecError(f"method takes an object such as lagcompile.Extragradient(), got {method!r}")
        expect_functions(evaluate=evaluate, watch=watch)
        expect("options", options, RunOptions, "a lagcompile.RunOptions")
        fits(start, self.module)
        instance, given = self.bind(dataset, loss=loss, device=device), options or RunOptions()

        def certified(found: Solution) -> Solution:
            return replace(found, certificate=self._certificate(instance, found))

        if folder is None and not resume:
            found = chosen.solve(instance, given, original=self.module, evaluate=evaluate, watch=watch, start=start)
            return certified(found)
        from lagcompile.backends.keeping import solve_in_folder

        return solve_in_folder(
            chosen,
            instance,
            given,
            folder,
            resume=resume,
            original=self.module,
            evaluate=evaluate,
            watch=watch,
            start=start,
            certified=certified,
        )

    def _certificate(self, instance: Instance, solution: Solution) -> Certificate:
        """Of a solution, on a few of its rows."""
        count = instance.sizes.near(min(CERTIFIED, instance.examples), instance.examples)
        rows = torch.linspace(0, instance.examples - 1, count, dtype=torch.float64).round().long()
        solved: Mapping[str, torch.Tensor] = solution.details.get("inputs") or {}
        given = dict(zip(self.network.capture.signature.names, instance.inputs, strict=True)) | dict(solved)
        tensors = [v[rows.to(v.device)] for v in given.values()]
        target = instance.target if instance.target is None else instance.target[rows.to(instance.target.device)]
        return certify_solved(instance.network, instance.program, solution.model, tensors, target, loss=instance.loss)
