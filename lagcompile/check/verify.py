"""Verify a lifted network at any size, by identities alone: no solver is needed.

In: a `Network`, inputs, a loss. Out: a `Certificate`. Invariant: everything runs on a float64 copy, in train and in
eval mode, from the same random state; autograd of the un-split network is the reference.

    glued forward == the model's own;  defects after a forward pass == 0;
    with multipliers from the dual sweep: d L / d h == 0, multipliers == adjoints, d L / d w == backprop's gradient
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from lagcompile.check.certificate import Certificate, Kind, Residual, digest, versions
from lagcompile.frontend.graphmodule import Runner
from lagcompile.frontend.stages import Network
from lagcompile.frontend.structure import leaves
from lagcompile.ir.program import Program, StateVariable
from lagcompile.runtime.adjoint import Sweep, sweep
from lagcompile.runtime.float64 import in_float64
from lagcompile.runtime.instance import convert, quiet

TOLERANCE = 1e-10
SEED = 0


def verify_network(
    network: Network,
    program: Program,
    tensors: Sequence[Tensor],
    target: Any,
    *,
    loss: Callable[[Any, Any], Tensor],
    tolerance: float = TOLERANCE,
) -> Certificate:
    """Certificate of a network that was split.

    Args:
        network: its stages; copied, never changed.
        program: the program they were lowered to, for names and digest.
        tensors: inputs in the order of the signature.
        target: what the loss compares with.
        loss: (output, target) -> scalar.
        tolerance: largest relative residual.
    """
    copied = convert(network.copy(), torch.device("cpu"), torch.float64)
    inputs = [_double(t.detach().cpu()) for t in tensors]
    goal = pytree.tree_map(lambda v: _double(v.detach().cpu()) if isinstance(v, Tensor) else v, target)
    residuals: list[Residual] = []
    with in_float64():
        for mode in ("train", "eval"):
            found = _mode(copied, program, inputs, lambda out: loss(out, goal), training=mode == "train")
            residuals += [
                Residual(kind=kind, name=name, mode=mode, value=value, tolerance=tolerance)
                for kind, name, value in found
            ]
    return Certificate(
        model=type(network.capture.original).__name__,
        program=digest([program.model_dump_json()]),
        inputs=digest([*tensors, *pytree.tree_leaves(target)]),
        dtype="float64",
        seed=SEED,
        residuals=tuple(residuals),
        versions=versions(),
    )


def _double(value: Tensor) -> Tensor:
    return value.double() if value.is_floating_point() else value


def _mode(
    network: Network,
    program: Program,
    inputs: Sequence[Tensor],
    loss: Callable[[Any], Tensor],
    *,
    training: bool,
) -> Iterator[tuple[Kind, str, float]]:
    original = network.capture.original
    for module in (original, network.capture.module, network.prologue.module, *(s.module for s in network.stages)):
        module.train(training)
    parameters = {n: p.requires_grad_(p.is_floating_point()) for n, p in original.named_parameters()}
    nodes = [s.node for s in program.states]
    by_node = {s.node: s for s in program.states}
    for number, names in enumerate(_groups(parameters)):
        weights = {n: parameters[n] for n in names}
        with _same_start(network):
            output = network.capture.signature.call(original, [t.clone() for t in inputs])
            gradients = _gradients(loss(output), weights)
        if number == 0:
            with _same_start(network):
                recorder = _Recorder(network, nodes)
                unsplit = loss(network.capture.assemble_flat(recorder.run(*(t.clone() for t in inputs))))
                adjoints = _gradients(unsplit, recorder.found)
                del recorder, unsplit
            with _same_start(network), torch.no_grad():
                values = network.glue(inputs)
                yield "forward", "output", _output_difference(output, network.assemble(values))
            states = {n: values[n].detach().clone().requires_grad_() for n in nodes}
        with _same_start(network):
            data = {**values, **network.prepare(inputs)}
            swept = sweep(network, {n: v for n, v in data.items() if n not in states}, states, loss)
            # states in each group: PyTorch's group_norm crashes where its input's gradient alone is not asked for
            found = _gradients(_lagrangian(swept, states), {**{f"h:{n}": s for n, s in states.items()}, **weights})
            if number == 0:
                yield from _in_states(swept, found, states, adjoints, by_node)
            for name in names:
                yield "weight gradient", name, ratio(found[name] - gradients[name], gradients[name])


def _lagrangian(swept: Sweep, states: Mapping[str, Tensor]) -> Tensor:
    """L = loss + <lambda, f - h>."""
    value = swept.loss
    for name, prediction in swept.predictions.items():
        value = value + (swept.multipliers[name] * (prediction - states[name])).sum()
    return value


def _in_states(
    swept: Sweep,
    found: Mapping[str, Tensor],
    states: Mapping[str, Tensor],
    adjoints: Mapping[str, Tensor],
    by_node: Mapping[str, StateVariable],
) -> Iterator[tuple[Kind, str, float]]:
    """Defects against zero, multipliers against adjoints, gradients of L in states ("h:" and the name) against zero."""
    for name, prediction in swept.predictions.items():
        label = _label(by_node[name].name, by_node[name].module or name)
        yield "defect", label, ratio(prediction.detach() - states[name].detach(), states[name])
        yield "adjoint", label, ratio(swept.multipliers[name] - adjoints[name], adjoints[name])
    for name in states:
        label = _label(by_node[name].name, by_node[name].module or name)
        yield "state stationarity", label, ratio(found[f"h:{name}"], swept.multipliers[name])


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


def _label(state: str, module: str) -> str:
    return f"{state} (after {module})"


def ratio(residual: Tensor, scale: Tensor) -> float:
    """Max |residual| / max |scale|; the residual itself where the scale is zero."""
    if residual.numel() == 0:
        return 0.0
    top, size = float(residual.detach().abs().max()), float(scale.detach().abs().max())
    return top / size if size > 1e-12 else top


def _gradients(value: Tensor, variables: Mapping[str, Tensor]) -> dict[str, Tensor]:
    names = [n for n, v in variables.items() if v.requires_grad]
    found: Sequence[Tensor | None] = [None for _ in names]
    if names and value.requires_grad:
        found = torch.autograd.grad(value, [variables[n] for n in names], retain_graph=True, allow_unused=True)
    known = {n: g for n, g in zip(names, found, strict=True) if g is not None}
    return {n: known[n] if n in known else torch.zeros_like(v) for n, v in variables.items()}


@contextmanager
def _same_start(network: Network) -> Iterator[None]:
    """The same random numbers and buffers for each run."""
    with quiet(network.capture.original):
        torch.manual_seed(SEED)
        yield


class _Recorder(Runner):
    """Runs the un-split graph and keeps, connected, what later stages read of some nodes.

    A value is passed on to later stages as an identity copy, so that its adjoint is that of the breakpoint's state:
    uses within its own stage lie ahead of the breakpoint and do not count. The copy is taken when its stage is done
    with it (operations in place), and each later stage has a copy of its own.
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


def _output_difference(expected: Any, got: Any) -> float:
    a, b = leaves(expected), leaves(got)
    if len(a) != len(b):
        return float("inf")
    pairs = [(x, y) for x, y in zip(a, b, strict=True) if isinstance(x, Tensor)]
    if any(x.shape != y.shape for x, y in pairs):
        return float("inf")
    return max((ratio(x.detach().double() - y.detach().double(), x.double()) for x, y in pairs), default=0.0)
