"""Verify a lifted network at any size, by identities alone: no solver is needed.

In: a `Network`, inputs, a loss. Out: a `Certificate`. Invariant: everything runs on a float64 copy, in train and in
eval mode, from the same random state; autograd of the un-split network is the reference.

    glued forward and states == the model's own;  defects after a forward pass == 0;
    with multipliers from the dual sweep: d L / d h == 0, multipliers == adjoints, d L / d w == backprop's gradient
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from lagcompile.check.apart import apart, outputs_apart, relative, top
from lagcompile.check.binding import bindings, label, network_identities
from lagcompile.check.certificate import MODES, USUAL, Certificate, Kind, Residual, digest, largest
from lagcompile.check.derivative import Probe, not_the_derivative, padding_rows
from lagcompile.frontend.capture import reason_of
from lagcompile.frontend.graphmodule import Runner
from lagcompile.frontend.stages import Network
from lagcompile.frontend.structure import fill, opened
from lagcompile.ir.alone import alone
from lagcompile.ir.arguments import expect
from lagcompile.ir.base import BindError
from lagcompile.ir.program import Program
from lagcompile.runtime.adjoint import Sweep, sweep
from lagcompile.runtime.float64 import in_float64, widened
from lagcompile.runtime.instance import convert, quiet
from lagcompile.runtime.trial import one_number

SEED = 0
LARGEST = 2**24
"""Number of weights up to which `solve` certifies a network: a copy of them in float64 is needed."""
FLOOR = 1e-4
"""Share of the largest sensitivity below which a gradient counts as that share: it may be rounding alone."""

Measured = tuple[Kind, str, float, float]
"""Kind, name, value, scale."""


@alone
def verify_network(
    network: Network,
    program: Program,
    tensors: Sequence[Tensor],
    target: Any,
    *,
    loss: Callable[[Any, Any], Tensor],
    tolerance: float = USUAL["network"],
    weights: Mapping[str, Tensor] | None = None,
) -> Certificate:
    """Certificate of a network that was split.

    Args:
        network: its stages; copied, never changed.
        program: the program they were lowered to, for names and digest.
        tensors: inputs in the order of the signature.
        target: what the loss compares with.
        loss: (output, target) -> scalar.
        tolerance: largest relative residual.
        weights: state_dict of the module to certify; None for the network's own.
    """
    copied = network.copy()
    expect("weights", weights, Mapping, "a state_dict")
    if weights is not None:
        try:
            copied.capture.original.load_state_dict(weights)
        except (RuntimeError, TypeError) as error:
            lines = str(error).splitlines()
            raise BindError([f"weights: {line.strip()}" for line in lines[1:] or lines]) from error
    bound = bindings(copied, program)
    rows = min((t.shape[0] for t in tensors if t.dim()), default=1)
    residuals: list[Residual] = []
    unassessed: list[str] = []
    losses: list[float] = []
    if rows:
        copied = convert(copied, torch.device("cpu"), wide=True)
        inputs = [widened(t.detach().cpu()) for t in tensors]
        goal = pytree.tree_map(lambda v: widened(v.detach().cpu()) if isinstance(v, Tensor) else v, target)

        def copied_leaf(value: Any) -> Any:
            return value.clone() if isinstance(value, Tensor) else value

        def fresh(output: Any) -> Any:  # a loss may write into what it is given
            return loss(fill(opened(output), copied_leaf), pytree.tree_map(copied_leaf, goal))

        with in_float64():
            for mode in MODES["network"]:
                run = _Mode(copied, program, inputs, fresh, training=mode == "train")
                residuals += [
                    Residual(kind=kind, name=name, mode=mode, value=value, tolerance=tolerance, scale=scale)
                    for kind, name, value, scale in run.measured()
                ]
                unassessed += [f"in {mode} mode {reason}" for reason in run.doubts]
                losses.append(run.number)
    return Certificate.made(
        network_identities(program),
        **_described(bound, loss, rows, tensors, target),
        losses=tuple(losses),
        residuals=tuple(residuals),
        unassessed=tuple(unassessed),
    )


def certify_solved(
    network: Network,
    program: Program,
    model: nn.Module,
    tensors: Sequence[Tensor],
    target: Any,
    *,
    loss: Callable[[Any, Any], Tensor],
) -> Certificate:
    """Certificate of a solved module on a few rows: what goes wrong here is a reason, not an error.

    Args:
        network: what was solved; never changed.
        program: the program that it was lowered to.
        model: the solved module.
        tensors: inputs in the order of the signature.
        target: what the loss compares with.
        loss: (output, target) -> scalar.
    """
    count = sum(p.numel() for p in model.parameters())
    weights = model.state_dict()
    try:
        if count <= LARGEST:
            return verify_network(network, program, tensors, target, loss=loss, weights=weights)
        reason = f"{count:,} weights are too many to certify in passing: call verify"
    except Exception as error:  # a loss or layer that does not run in float64, or in one of the modes
        reason = f"the network or the loss fails when it is checked in float64: {str(error).strip().split(chr(10))[0]}"
    bound = {**bindings(network, program), "weights": "", "buffers": ""}
    return Certificate.made(
        network_identities(program),
        **_described(bound, loss, min(len(t) for t in tensors if t.dim()), tensors, target),
        residuals=(),
        unassessed=(reason,),
    )


def _described(
    bound: Mapping[str, str], loss: Callable[[Any, Any], Tensor], rows: int, tensors: Sequence[Tensor], target: Any
) -> dict[str, Any]:
    return {
        **bound,
        "claim": "network",
        "loss": str(getattr(loss, "__name__", type(loss).__name__)),
        "rows": rows,
        "inputs": digest([*tensors, *pytree.tree_leaves(target)]),
        "modes": MODES["network"],
    }


class _Mode:
    """The identities in one mode."""

    def __init__(
        self,
        network: Network,
        program: Program,
        inputs: Sequence[Tensor],
        loss: Callable[[Any], Tensor],
        *,
        training: bool,
    ) -> None:
        self.network, self.inputs, self.loss = network, inputs, loss
        original = network.capture.original
        network.train(training)
        moving = {n: p for n, p in original.named_parameters() if p.is_floating_point() or p.is_complex()}
        self.parameters = {n: p.requires_grad_() for n, p in moving.items()}
        self.nodes = [s.node for s in program.states]
        self.by_node = {s.node: s for s in program.states}
        self.doubts: list[str] = []
        self.number = math.nan

    def _output(self) -> Any:
        """What the user's own module gives."""
        call, original = self.network.capture.signature, self.network.capture.original
        try:
            return call.call(original, [t.clone() for t in self.inputs])
        except Exception as error:
            mode = "train" if original.training else "eval"
            raise BindError(f"the model fails on the inputs, in float64 and {mode} mode: {error}") from error

    def _number(self, output: Any) -> Tensor:
        """The user's loss of it."""
        try:
            value = self.loss(output)
        except Exception as error:
            raise BindError(f"the loss fails on the model's output: {error}") from error
        return one_number(value)

    def measured(self) -> Iterator[Measured]:
        """All residuals, with their scales."""
        network, probe = self.network, Probe(self.parameters, padding_rows(self.network.capture.original))
        found: list[_Compared] = []
        for number, names in enumerate(_groups(self.parameters)):
            weights = {n: self.parameters[n] for n in names}
            with _same_start(network):
                output = self._output()
                value = self._number(output)
                self.number, gradients = float(value.detach()), _gradients(value, weights)
            if number == 0:
                with _same_start(network):
                    recorder = _Recorder(network, self.nodes)
                    unsplit = self.loss(network.capture.assemble_flat(recorder.run(*(t.clone() for t in self.inputs))))
                    adjoints = _gradients(unsplit, recorder.found)
                    own = {n: v.detach() for n, v in recorder.found.items()}
                    del recorder, unsplit
                with _same_start(network), torch.no_grad():
                    values = network.glue(self.inputs)
                    yield "forward", "output", *outputs_apart(output, network.assemble(values))
                states = {n: values[n].detach().clone().requires_grad_() for n in self.nodes}
            with _same_start(network):
                data = {**values, **network.prepare(self.inputs)}
                swept = sweep(network, {n: v for n, v in data.items() if n not in states}, states, self.loss)
                # states in each group: PyTorch's group_norm crashes where its input's gradient alone is not asked for
                here = _gradients(_lagrangian(swept, states), {**{f"h:{n}": s for n, s in states.items()}, **weights})
                if number == 0:
                    yield from self._in_states(swept, here, states, adjoints, own)
                for name in names:
                    probe.add(name, gradients[name])
                    found.append(_compared(name, here[name], gradients[name], self.parameters[name]))
        yield from _graded("weight gradient", found)
        if probe.disagreement(self._value):
            with probe.nearby():  # at a kink any slope between the one-sided ones is right
                for names in _groups(self.parameters):
                    with _same_start(network):
                        gradients = _gradients(self._number(self._output()), {n: self.parameters[n] for n in names})
                    for name in names:
                        probe.add(name, gradients[name])
                said = probe.disagreement(self._value)
            if said:
                self.doubts.append(not_the_derivative(network, said))

    def _value(self) -> float:
        """Return the loss of the user's module."""
        with _same_start(self.network), torch.no_grad():
            return float(self.loss(self._output()))

    def _in_states(
        self,
        swept: Sweep,
        found: Mapping[str, Tensor],
        states: Mapping[str, Tensor],
        adjoints: Mapping[str, Tensor],
        own: Mapping[str, Tensor],
    ) -> Iterator[Measured]:
        """Defects against zero, multipliers against adjoints, gradients of L in states ("h:" + name) against zero.

        States are also compared with the values of the un-split network: a wrong factor before a norm changes no
        output and no gradient.
        """
        names = {n: label(self.by_node[n]) for n in states}
        defects = [
            _Compared(
                names[n],
                largest((apart(p.detach(), states[n].detach()), apart(states[n].detach(), own[n]))),
                top(own[n]),
                1.0,
            )
            for n, p in swept.predictions.items()
        ]
        yield from _graded("defect", defects, floor=0.0)
        yield from _graded(
            "adjoint", [_compared(names[n], swept.multipliers[n], adjoints[n], states[n]) for n in states]
        )
        still = [_Compared(names[n], top(found[f"h:{n}"]), top(swept.multipliers[n]), top(states[n])) for n in states]
        yield from _graded("state stationarity", still)


@dataclass(frozen=True)
class _Compared:
    """Difference of two gradients in one variable, size of the reference, size of the variable."""

    name: str
    off: float
    size: float
    variable: float


def _compared(name: str, got: Tensor, expected: Tensor, variable: Tensor) -> _Compared:
    return _Compared(name, apart(got, expected), top(expected), top(variable))


def _graded(kind: Kind, found: Sequence[_Compared], floor: float = FLOOR) -> Iterator[Measured]:
    """Relative differences. A gradient far below all others, by itself and by what it does, counts as rounding there.

    Nothing is compared with a fixed number: a loss or a network on another scale has the same residuals.
    """
    most = largest(c.size for c in found)
    effect = largest(c.size * c.variable for c in found)
    for c in found:
        least = min(most, effect / c.variable) if c.variable > 0.0 else most
        scale = max(c.size, floor * least) if floor else (c.size or most)
        yield kind, c.name, relative(c.off, scale), scale


def _lagrangian(swept: Sweep, states: Mapping[str, Tensor]) -> Tensor:
    """L = loss + <lambda, f - h>."""
    value = swept.loss
    for name, prediction in swept.predictions.items():
        value = value + (swept.multipliers[name] * (prediction - states[name])).sum()
    return value


def _groups(parameters: Mapping[str, Tensor], size: int = 2**27) -> Iterator[list[str]]:
    """Parameter names in groups of about `size` numbers, one group at least.

    Everything is run again for each, so that two gradients of a group are held beside the weights, not of all of them.
    """
    group: list[str] = []
    held = 0
    for name, parameter in parameters.items():
        if group and held + parameter.numel() > size:
            yield group
            group, held = [], 0
        group.append(name)
        held += parameter.numel()
    yield group


def _gradients(value: Tensor, variables: Mapping[str, Tensor]) -> dict[str, Tensor]:
    names = [n for n, v in variables.items() if v.requires_grad]
    found: Sequence[Tensor | None] = [None for _ in names]
    if names and value.requires_grad:
        try:
            found = torch.autograd.grad(value, [variables[n] for n in names], retain_graph=True, allow_unused=True)
        except Exception as error:
            raise BindError(
                f"the backward pass of the model or the loss fails in float64: {reason_of(error)}"
            ) from error
    known = {n: g.to_dense() for n, g in zip(names, found, strict=True) if g is not None}
    return {n: known[n] if n in known else torch.zeros_like(v) for n, v in variables.items()}


@contextmanager
def _same_start(network: Network) -> Iterator[None]:
    """Give each run the same random numbers and buffers."""
    with quiet(network.capture.original):
        torch.manual_seed(SEED)
        yield


class _Recorder(Runner):
    """Run the un-split graph and keep, connected, what later stages read of some nodes.

    A value is passed on to later stages as an identity copy, so that its adjoint is that of the breakpoint's state:
    uses within its own stage come before the breakpoint and do not count. The copy is taken when its stage is done
    with it (operations in place), and each later stage has a separate copy.
    """

    def __init__(self, network: Network, names: Sequence[str]) -> None:
        super().__init__(network.capture.module)
        self.names = set(names)
        self.stage_of = network.partition.stage_of
        self.last = network.partition.stages
        self.found: dict[str, Tensor] = {}
        self.copies: dict[tuple[str, int], Tensor] = {}

    def fetch_args_kwargs_from_env(self, n: fx.Node) -> tuple[Any, Any]:
        stage = self.last if n.op == "output" else self.stage_of.get(n.name, 0)

        def read(source: fx.Node) -> Any:
            if source.name not in self.names or stage <= self.stage_of.get(source.name, 0):
                return self.env[source]
            if source.name not in self.found:
                copied = self.env[source].clone()
                self.found[source.name] = copied if copied.requires_grad else copied.requires_grad_()
            if (source.name, stage) not in self.copies:
                self.copies[source.name, stage] = self.found[source.name].clone()
            return self.copies[source.name, stage]

        return fx.node.map_arg(n.args, read), fx.node.map_arg(n.kwargs, read)
