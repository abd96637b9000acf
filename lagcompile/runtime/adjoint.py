"""The exact dual sweep: multipliers that make the Lagrangian stationary in every state.

In: a `Network` and values of its states. Out: one multiplier per state. Invariant: with G the identity and rho = 0,
d L / d h = 0 holds at the result; after a forward pass they are backprop's adjoints.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lagcompile.frontend.stages import Network, StageModule
from lagcompile.runtime.instance import Batch, Instance, to_rows, to_value


@dataclass(frozen=True)
class Sweep:
    """Result of a backward sweep at given states.

    Attributes:
        loss: the loss at the states, connected to them and to the weights.
        predictions: node name -> f(.) of its stage, connected likewise.
        multipliers: node name -> d loss / d h summed along the chain (not per example: divide by c for that).
    """

    loss: Tensor
    predictions: Mapping[str, Tensor]
    multipliers: Mapping[str, Tensor]


def sweep(
    network: Network, values: Mapping[str, Any], states: Mapping[str, Tensor], loss: Callable[[Any], Tensor]
) -> Sweep:
    """Solve d L / d h_k = 0 for the multipliers, stage by stage from the last to the first.

    lambda_k = d loss / d h_k + sum over later stages of J^T lambda  (LeCun 1988).

    Args:
        network: the network.
        values: data by node name.
        states: node name -> value of the state, a leaf that requires a gradient.
        loss: output -> scalar.
    """
    with torch.enable_grad():
        env: dict[str, Any] = {**values, **states}
        by_stage: dict[str, dict[str, Tensor]] = {}
        for stage in network.stages:
            written = dict(zip(stage.writes, stage.module(*(env[n] for n in stage.reads)), strict=True))
            by_stage[stage.name] = {n: v for n, v in written.items() if n in states}
            env.update({n: v for n, v in written.items() if n not in states})
        value = loss(network.assemble(env))
    multipliers: dict[str, Tensor] = {}
    leaves = list(states.values())
    if leaves:
        reads = value.requires_grad  # otherwise the loss reads nothing that moves
        direct = torch.autograd.grad(value, leaves, retain_graph=True, allow_unused=True) if reads else ()
        _add(multipliers, states, direct or [None for _ in leaves])
    for stage in reversed(network.stages):
        _back(stage, states, by_stage[stage.name], multipliers)
    predictions = {n: v for own in by_stage.values() for n, v in own.items()}
    return Sweep(value, predictions, multipliers)


def dual_sweep(instance: Instance, batch: Batch, values: Sequence[Tensor]) -> list[Tensor]:
    """Compute the multipliers of an instance's banks, per example.

    Args:
        instance: the instance, weights published.
        batch: the batch.
        values: values of the states, one tensor (states, rows, ...) for each bank.

    Returns:
        multipliers of the shapes of `values`.
    """
    leaves: dict[str, Tensor] = {}
    for bank, rows in zip(instance.layout.banks, values, strict=True):
        for k, state in enumerate(bank.states):
            leaves[state.node] = to_value(rows[k : k + 1], state.type)[0].detach().requires_grad_()
    result = sweep(instance.network, batch.values, leaves, lambda out: instance.loss(out, batch.target))
    scale = instance.scale(batch)
    return [
        torch.cat([to_rows(result.multipliers[s.node].unsqueeze(0) / scale, s.type) for s in bank.states])
        for bank in instance.layout.banks
    ]


def _back(
    stage: StageModule,
    states: Mapping[str, Tensor],
    predictions: Mapping[str, Tensor],
    multipliers: dict[str, Tensor],
) -> None:
    own = {n: p for n, p in predictions.items() if p.requires_grad}
    through = any(n not in states for n in stage.reads)  # an eliminated state may lead further back
    inputs = {n: v for n, v in states.items() if n not in predictions and (through or n in stage.reads)}
    if own and inputs:
        found = torch.autograd.grad(
            list(own.values()),
            list(inputs.values()),
            [multipliers[n] for n in own],
            retain_graph=True,
            allow_unused=True,
        )
        _add(multipliers, inputs, found)


def _add(sums: dict[str, Tensor], leaves: Mapping[str, Tensor], gradients: Sequence[Tensor | None]) -> None:
    for (name, leaf), gradient in zip(leaves.items(), gradients, strict=True):
        if name not in sums:
            sums[name] = torch.zeros_like(leaf)
        if gradient is not None:
            sums[name] = sums[name] + gradient
