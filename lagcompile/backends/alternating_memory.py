"""AltMin-mem: sums over all batches that a linear layer has seen, and its weights by coordinate descent.

In: stages that end in one linear layer, their inputs and codes. Out: the layers' weights. Invariant: a layer's weights
minimise the surrogate of all batches so far, to the accuracy of the sweeps; nothing else moves them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lagcompile.backends.local import StageNetwork, Values, bare_weights, calls, weighted_layers
from lagcompile.frontend.stages import StageModule
from lagcompile.ir.base import ProgramError
from lagcompile.runtime.instance import Instance

if TYPE_CHECKING:
    from lagcompile.backends.alternating import AltMin


def memories_of(instance: Instance, network: StageNetwork, method: AltMin) -> dict[str, Memory]:
    """Make a memory for each hidden stage with weights that move, by the stage's name.

    Raises:
        ProgramError: stages that have none; every one, with its layer's path.
    """
    problems: list[str] = []
    if method.hidden != "squared":
        problems.append("altmin: the memory holds squared errors: write 'hidden: squared', or 'memory: false'")
    found: dict[str, Memory] = {}
    uses = Counter(p for s in network.stages for p in dict.fromkeys(s.module.parameters()))
    terms = [t for t in instance.program.objective.regularisers if t.on == "weights"]
    l1, l2 = (sum(t.weight for t in terms if t.kind == kind) for kind in ("l1", "l2"))
    for stage in dict.fromkeys(c.writer for c in network.codes):
        layers = [(p, m) for p, m in weighted_layers(stage) if any(q.requires_grad for q in m.parameters())]
        if not layers and not bare_weights(stage):
            continue  # all frozen
        wrong = _stage_problems(stage, layers, uses)
        problems += wrong
        if not wrong:
            layer = layers[0][1]
            assert isinstance(layer, nn.Linear)
            found[stage.name] = Memory(stage, layer, method, l1=l1, l2=l2)
    if problems:
        raise ProgramError(problems)
    return found


def _stage_problems(
    stage: StageModule, layers: Sequence[tuple[str, nn.Module]], uses: Mapping[nn.Parameter, int]
) -> list[str]:
    wrong = [
        f"altmin: the memory variant is for real nn.Linear layers, but {name} is a {type(module).__name__}: "
        "set 'memory: false' (steps on the weights), or cut so that it is in the last stage"
        for name, module in layers
        if not isinstance(module, nn.Linear) or module.weight.is_complex()
    ]
    if wrong:
        return wrong
    if len(layers) != 1 or bare_weights(stage) or not _ends_in(stage, layers[0][0]):
        names = ", ".join([p for p, _ in layers] + bare_weights(stage)) or "no weights"
        return [
            f"altmin: the memory variant needs stages that end in one nn.Linear layer, but {stage.name} holds "
            f"{names}: cut after each linear layer, before its activation, or set 'memory: false'"
        ]
    path, layer = layers[0]
    own = list(layer.parameters())
    if calls(stage)[path] > 1 or any(uses[p] > 1 for p in own):
        return [
            f"altmin: the memory variant solves each layer on its own, but the weights of {path} are used in "
            "several places: set 'memory: false' (steps on the weights)"
        ]
    if not all(p.requires_grad for p in own):
        return [f"altmin: weight and bias of {path} must both be solved for, or both frozen, or set 'memory: false'"]
    return []


class Memory:
    """Surrogate of all batches seen by one linear layer: A = sum s s^T, B = sum h s^T, with s its input (and 1).

    The layer minimises tr(W A W^T - 2 B W^T) + p (l1 |W|_1 + l2/2 |W|^2), p the weight that the batches give to the
    regularisers.
    """

    def __init__(self, stage: StageModule, layer: nn.Linear, method: AltMin, *, l1: float, l2: float) -> None:
        self.stage, self.layer, self.method, self.l1, self.l2 = stage, layer, method, l1, l2
        width = layer.in_features + (layer.bias is not None)
        self.a = layer.weight.new_zeros((width, width)).detach()
        self.b = layer.weight.new_zeros((layer.out_features, width)).detach()
        self.p = layer.weight.new_zeros(()).detach()

    def tensors(self) -> dict[str, Tensor]:
        """Tensors that are kept from batch to batch."""
        return {"a": self.a, "b": self.b, "p": self.p}

    @torch.no_grad()
    def learn(self, values: Values, codes: Tensor, instance: Instance, *, unit: float) -> None:
        """Take in a batch and minimise the surrogate by coordinate descent over columns (Mairal et al. 2009).

        Args:
            values: states and data of the batch.
            codes: the states that the layer should give.
            instance: for its module.
            unit: weight of the mean squared error against the regularisers.
        """
        caught: list[Tensor] = []

        def keep(module: nn.Module, inputs: tuple[Any, ...]) -> None:
            caught.append(inputs[0])

        as_before = instance.quiet()  # before the hook is set: this may run the network
        handle = self.layer.register_forward_pre_hook(keep)
        with as_before:
            self.stage.module(*(values[n] for n in self.stage.reads))
        handle.remove()
        s, h = caught[0].reshape(-1, self.layer.in_features), codes.reshape(-1, self.layer.out_features)
        if self.layer.bias is not None:
            s = torch.cat([s, s.new_ones(s.shape[0], 1)], dim=1)
        keep_share, rows = 1.0 - self.method.memory_rate, s.shape[0]
        new_share = self.method.memory_rate or 1.0
        self.a.mul_(keep_share).add_(s.T @ s, alpha=new_share / rows)
        self.b.mul_(keep_share).add_(h.T @ s, alpha=new_share / rows)
        self.p.mul_(keep_share).add_(new_share / unit)
        self._descend()

    def _descend(self) -> None:
        biases = [p[:, None] for n, p in self.layer.named_parameters() if n == "bias"]
        w = torch.cat([self.layer.weight.detach(), *(b.detach() for b in biases)], dim=1)
        diagonal = self.a.diagonal()
        l1, l2 = 0.5 * self.p * self.l1, 0.5 * self.p * self.l2
        curvature = diagonal + self.method.memory_damping * diagonal.mean() + l2
        used = diagonal > 1e-10 * diagonal.max().clamp_min(1e-30)
        columns = used.nonzero().flatten().tolist()
        for _ in range(self.method.memory_sweeps):
            for j in columns:
                step = (self.b[:, j] - w @ self.a[:, j] - l2 * w[:, j]) / curvature[j]
                w[:, j] = _shrunk(w[:, j] + step, l1 / curvature[j])
        self.layer.weight.data.copy_(w[:, : self.layer.in_features])
        if self.layer.bias is not None:
            self.layer.bias.data.copy_(w[:, -1])


def _shrunk(column: Tensor, by: Tensor) -> Tensor:
    return column.sign() * (column.abs() - by).clamp_min(0.0)


def _ends_in(stage: StageModule, path: str) -> bool:
    output = next(n for n in stage.module.graph.nodes if n.op == "output")
    written = list(output.all_input_nodes)
    return len(written) == 1 and written[0].op == "call_module" and str(written[0].target) == path
