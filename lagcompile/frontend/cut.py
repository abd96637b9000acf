"""A model captured by the simplest front end that does, and cut by a policy.

In: a model, its signature, example tensors (or none), a policy. Out: `Captured`. Invariant: where the model cannot be
cut so often, the error holds the largest number that works, and what stands in the way of more.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

import torch
from torch import nn

from lagcompile.frontend.balance import Context, too_many, why_few
from lagcompile.frontend.capture import Capture
from lagcompile.frontend.choose import Captured, choose
from lagcompile.frontend.copies import unregistered
from lagcompile.frontend.graph import Observation, build_graph
from lagcompile.frontend.signature import Signature
from lagcompile.frontend.split import BalancedSplit, SplitPolicy
from lagcompile.frontend.stages import Network, build_network
from lagcompile.ir.base import SplitError


def captured_and_cut(
    model: nn.Module, signature: Signature, tensors: Sequence[torch.Tensor] | None, policy: SplitPolicy
) -> Captured:
    """The capture, cut; where that is impossible with so many stages, the error holds the largest number that works."""
    try:
        return choose(model, signature, tensors, partial(_cut, policy))
    except SplitError as error:
        if error.most is None or not isinstance(policy, BalancedSplit):
            raise
        hidden = [path for path, t in unregistered(model) if t.requires_grad]
        lost = f"{', '.join(hidden)}: no parameters of the model (hold modules in nn.ModuleList)" if hidden else ""
        said = ". ".join(filter(None, [str(too_many(policy.stages, error.most)), lost, error.why]))
        raise SplitError(said, error.most) from None


def _cut(
    policy: SplitPolicy,
    captured: Capture,
    observed: Mapping[str, Observation] | None,
    tensors: Sequence[torch.Tensor],
    stages: int | None = None,
) -> Network:
    graph = build_graph(captured, observed)
    chosen = policy if stages is None else BalancedSplit(stages=stages)
    try:
        return build_network(captured, chosen.split(graph, Context(captured, tuple(tensors))))
    except SplitError as error:
        error.why = why_few(graph, captured.whole)
        raise
