"""Numbers of a module on held-out data, and of a solution's states: nothing here knows a backend.

In: modules, data parts, states by name. Out: plain numbers. Invariant: modules are left in the mode they came in; the
test part is read once, at the end.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lagcompile.frontend.graph import dtype_of
from lagcompile.ir.base import Measured
from lagcompile.lift import Lifted
from lagcompile.runtime import kkt
from lagcompile.runtime.instance import to_value
from lagcompile.workbench.data import DataSplits

Loss = Callable[[Any, Any], Tensor]
CHUNK = 1000


class StateDefect(Measured):
    """r = f(.) - h of one state, over all training examples."""

    state: str
    module: str
    """Module path at which it is cut."""
    mean: float
    """Mean absolute defect."""
    largest: float
    outside: float
    """Fraction of entries outside the tube |r| <= epsilon."""
    epsilon: float


def outcome(module: nn.Module, x: Tensor, y: Tensor, *, loss: Loss) -> dict[str, float]:
    """Loss, and accuracy where the targets are class numbers.

    Args:
        module: runs on one input.
        x: inputs, one row an example.
        y: targets.
        loss: (output, target) -> scalar, a mean over examples.
    """
    device = next((p.device for p in module.parameters()), torch.device("cpu"))
    labels = y.dim() == 1 and not y.is_floating_point()
    total, right = 0.0, 0
    training = module.training
    module.eval()
    try:
        with torch.no_grad():
            for part, goal in zip(x.split(CHUNK), y.split(CHUNK), strict=True):
                output, target = module(part.to(device)), goal.to(device)
                total += float(loss(output, target)) * len(part)
                right += int((output.argmax(1) == target).sum()) if labels else 0
    finally:
        module.train(training)
    result = {"loss": total / len(x)}
    return result | {"accuracy": right / len(x)} if labels else result


def evaluator(data: DataSplits, loss: Loss) -> Callable[[nn.Module], Mapping[str, float]] | None:
    """Return what evaluates a run on the way: on the validation part, never the test part; None where it is empty."""
    if not len(data.validation_x):
        return None

    def evaluate(module: nn.Module) -> Mapping[str, float]:
        found = outcome(module, data.validation_x, data.validation_y, loss=loss)
        return {f"validation_{name}": value for name, value in found.items()}

    return evaluate


@torch.no_grad()
def state_defects(lifted: Lifted, states: Mapping[str, Tensor], x: Tensor) -> tuple[StateDefect, ...]:
    """Defects of stored states, by running each stage on them.

    Args:
        lifted: with the weights to measure at; put in eval mode.
        states: state name -> values, one row an example.
        x: the training inputs, in the order of the rows.

    Returns:
        One entry for each state kept in a table; none where some state has no value for each example (transient
        or kept per class), because later stages could not be run on it.
    """
    program, network = lifted.program, lifted.network
    kept = [s for s in program.states if s.storage.variable]
    if not all(s.storage.kept and not s.storage.sampled for s in kept):
        return ()
    lifted.eval()
    sums = {s.name: torch.zeros(3, dtype=torch.float64) for s in kept}
    counts = dict.fromkeys(sums, 0)
    epsilons = {c.state: c.transform.half_width for c in program.defects}
    for rows in torch.arange(len(x)).split(CHUNK):
        values: dict[str, Any] = network.prepare([x[rows]])
        held = {}
        for s in kept:
            index = rows if s.storage.per_example else torch.zeros(1, dtype=torch.int64)
            value = to_value(states[s.name][index].unsqueeze(0), s.type)[0]
            held[s.node] = value.to(dtype_of(s.type.dtype))  # an exact backend gives float64
        predictions: dict[str, Any] = {}
        for stage in network.stages:
            env = values | predictions | held
            predictions.update(zip(stage.writes, stage.module(*(env[n] for n in stage.reads)), strict=True))
        for s in kept:
            r = kkt.defect(predictions[s.node], held[s.node]).abs().double()
            found = torch.stack([r.sum(), r.max(), (r > epsilons[s.name]).sum().double()])
            worst = torch.maximum(sums[s.name][1], found[1])
            sums[s.name] += found
            sums[s.name][1] = worst
            counts[s.name] += r.numel()
    return tuple(
        StateDefect(
            state=s.name,
            module=s.module or s.node,
            mean=float(sums[s.name][0]) / counts[s.name],
            largest=float(sums[s.name][1]),
            outside=float(sums[s.name][2]) / counts[s.name],
            epsilon=epsilons[s.name],
        )
        for s in kept
    )
