"""The exact dual sweep: multipliers that make the Lagrangian stationary in every state.

In: an `Instance`, a `Batch`, values of its states. Out: one multiplier per state, per example. Invariant: with G the
identity and rho = 0, d L / d h = 0 holds at the result; after a forward pass they are backprop's adjoints.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lagcompile.frontend.stages import StageModule
from lagcompile.runtime.instance import Batch, Instance, to_rows, to_value


def dual_sweep(instance: Instance, batch: Batch, values: Sequence[Tensor]) -> list[Tensor]:
    """Solve d L / d h_k = 0 for the multipliers, stage by stage from the last to the first.

    lambda_k = 1/c d loss / d h_k + sum over later stages of J^T lambda  (LeCun 1988).

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
    with torch.enable_grad():
        env, predictions = _run(instance, batch, leaves)
        loss = instance.loss(instance.output(env), batch.target)
        sums = _add({}, leaves, torch.autograd.grad(loss, list(leaves.values()), retain_graph=True, allow_unused=True))
        scale = instance.scale(batch)
        multipliers = {n: g / scale for n, g in sums.items()}
        for stage in reversed(instance.network.stages):
            _back(stage, leaves, predictions, multipliers)
    return [
        torch.cat([to_rows(multipliers[s.node].unsqueeze(0), s.type) for s in bank.states])
        for bank in instance.layout.banks
    ]


def _run(
    instance: Instance, batch: Batch, leaves: Mapping[str, Tensor]
) -> tuple[dict[str, Any], dict[str, dict[str, Tensor]]]:
    env: dict[str, Any] = {**batch.values, **leaves}
    predictions: dict[str, dict[str, Tensor]] = {}
    for stage in instance.network.stages:
        written = dict(zip(stage.writes, stage.module(*(env[n] for n in stage.reads)), strict=True))
        predictions[stage.name] = {n: v for n, v in written.items() if n in leaves}
        env.update({n: v for n, v in written.items() if n not in leaves})
    return env, predictions


def _back(
    stage: StageModule,
    leaves: Mapping[str, Tensor],
    predictions: Mapping[str, Mapping[str, Tensor]],
    multipliers: dict[str, Tensor],
) -> None:
    own = {n: p for n, p in predictions[stage.name].items() if p.requires_grad}
    earlier = {n: leaves[n] for n in leaves if n not in predictions[stage.name]}
    if not own or not earlier:
        return
    direct = {n: leaves[n] for n in stage.reads if n in leaves}
    through = any(n not in leaves for n in stage.reads)  # an eliminated state may lead further back
    inputs = earlier if through else direct
    if not inputs:
        return
    found = torch.autograd.grad(
        list(own.values()),
        list(inputs.values()),
        [multipliers[n] for n in own],
        retain_graph=True,
        allow_unused=True,
    )
    _add(multipliers, inputs, found)


def _add(
    sums: dict[str, Tensor], leaves: Mapping[str, Tensor], gradients: Sequence[Tensor | None]
) -> dict[str, Tensor]:
    for (name, leaf), gradient in zip(leaves.items(), gradients, strict=True):
        if name not in sums:
            sums[name] = torch.zeros_like(leaf)
        if gradient is not None:
            sums[name] = sums[name] + gradient
    return sums
