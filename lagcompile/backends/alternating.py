"""Online alternating minimisation: codes by a backward sweep, then all weights (Choromanska et al., ICML 2019).

In: an `Instance` with transient states and a quadratic weight. Out: an executor. Invariant: every step, on codes and on
weights, goes down the program's own energy, divided by mu = rho/2 and with the downstream codes already moved:

    E = loss + mu sum_k |f_{k-1}(h_{k-1}) - h_k|^2 (+ regularisers)
    code k:  (1/mu) loss + readers' |.|^2 + |h_k - f(.)|^2

The proximity target f(.) is the prediction at the codes ahead, a constant while h_k moves (the released code leaves it
attached to h_k, which makes the term inert). Cut ahead of the activations, so that states are pre-activation codes.
"""

from __future__ import annotations

from collections import Counter
from contextlib import nullcontext
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from lagcompile.backends.base import Method
from lagcompile.backends.local import (
    Code,
    StageExecutor,
    StageNetwork,
    Values,
    bare_weights,
    calls,
    gradients_of,
    weight_penalty,
    weighted_layers,
)
from lagcompile.frontend.stages import StageModule
from lagcompile.ir.base import ProgramError
from lagcompile.runtime import kkt
from lagcompile.runtime.instance import Batch, Instance, quiet
from lagcompile.runtime.rules import SGD, Adam, RuleSpec
from lagcompile.runtime.steps import Extra


class AltMin(Method):
    """Online alternating minimisation over codes and weights."""

    kind: Literal["altmin"] = "altmin"
    weights: RuleSpec = Adam(lr=8e-3)
    """Step rule of the weights of all stages but the last: Adam for AltMin-Adam, SGD for AltMin-SGD."""
    output: RuleSpec | None = None
    """Step rule of the weights of the stages that the loss sees; None: the same as `weights`."""
    codes: RuleSpec = SGD(lr=1.5e-3, momentum=0.9, nesterov=True)
    """Step rule of the codes, started afresh for each code and batch; it sees gradients of one example's E/mu (the
    released lr of 0.3 is for the mean over a batch of 200: 0.3/200)."""
    code_steps: int = Field(default=5, ge=0)
    """Steps on each code, downstream first."""
    weight_steps: int = Field(default=1, ge=1)
    """Steps on the weights of each stage, all stages independently."""
    hidden: Literal["squared", "sign_hinge"] = "squared"
    """Local objective of hidden weights: the defect squared, or relu(-f(.) * sign(h)), which only asks for the codes'
    signs (networks of sign units)."""
    memory: bool = False
    """AltMin-mem: hidden weights of linear layers from accumulated sums of s s^T and h s^T, by coordinate descent."""
    memory_rate: float = Field(default=0.0, ge=0, lt=1)
    """Exponential forgetting of the memory; 0 accumulates."""
    memory_damping: float = Field(default=0.1, ge=0)
    """Added to a column's curvature, relative to the mean of A's diagonal: columns that are rarely active move little,
    minimisers stay where they are."""
    memory_sweeps: int = Field(default=1, ge=1)
    """Sweeps of coordinate descent over a layer's columns in each batch."""

    def executor(self, instance: Instance, *, seed: int = 0) -> AltMinExecutor:
        """Executor of this method on an instance.

        Raises:
            ProgramError: states that are not transient, defects without a quadratic weight, or layers without memory.
        """
        return AltMinExecutor(instance, self, seed=seed)


class AltMinExecutor(StageExecutor):
    """Runs online AltMin."""

    method: AltMin

    def __init__(self, instance: Instance, method: AltMin, *, seed: int = 0) -> None:
        super().__init__(instance, method, method.weights, seed=seed)
        self.method = method
        self.network = StageNetwork(self.instance, "altmin")
        _check(self.network)
        self.memories: dict[str, Memory] = self._memories() if method.memory else {}
        last = {p for s in self.network.last for p in s.module.parameters()}
        remembered = {p for m in self.memories.values() for p in m.layer.parameters()}
        stepped = [p for p in self.leaves if p not in remembered]
        self.hidden = [p for p in stepped if p not in last]
        self.seen = [p for p in stepped if p in last]
        self._owners: dict[Tensor, Code] = {}
        for code in self.network.codes:
            for p in code.writer.module.parameters():
                self._owners.setdefault(p, code)
        self.optimizers = {
            "weights": Extra(self.hidden or [torch.empty(0)], method.weights, "descent"),
            "output": Extra(self.seen or [torch.empty(0)], method.output or method.weights, "descent"),
        }

    # ---------------------------------------------------------------- one step
    def step(self, rows: Tensor) -> None:
        """Forward pass, backward sweep over codes, then weights."""
        batch = self.instance.batch(rows)
        with quiet(self.instance.module):
            with torch.no_grad():
                values = self.network.forward(batch)
            codes = self.sweep(batch, values)
        self._weights(batch, values | codes)
        self.hold(list(codes.values()))
        self.gradient_evaluations += self.method.code_steps + self.method.weight_steps
        self.steps += 1

    def sweep(self, batch: Batch, values: Values) -> dict[str, Tensor]:
        """Codes after a Gauss-Seidel sweep from the last state to the first.

        Args:
            batch: the batch.
            values: a forward pass; its states are the codes' starts and proximity targets.
        """
        moved: dict[str, Tensor] = {}
        for code in reversed(self.network.codes):
            moved[code.state.node] = self._code(batch, values | moved, code)
        return moved

    def _code(self, batch: Batch, values: Values, code: Code) -> Tensor:
        node, domain = code.state.node, code.state.domain
        start: Tensor = values[node].detach()
        h = kkt.project(start.clone(), domain).requires_grad_()
        optimizer = Extra([h], self.method.codes, "descent")
        for _ in range(self.method.code_steps):
            with torch.enable_grad():
                value = self.local(batch, values | {node: h}, code, start)
            (h.grad,) = torch.autograd.grad(value, [h])
            if self.instance.program.objective.reduction == "mean":
                h.grad = h.grad * batch.size  # gradients in states are per example
            optimizer.step()
            h.data = kkt.project(h.data, domain)
        return h.detach()

    def local(self, batch: Batch, values: Values, code: Code, target: Tensor) -> Tensor:
        """The part of E/mu that one code sees: loss, readers' defects, proximity to its prediction, regularisers."""
        node = code.state.node
        h = values[node]
        mu = self._mu(code)
        total = self._squared(code, target - h, batch)
        if code.to_loss:
            total = total + self.network.loss(batch, values) / mu
        for stage in code.readers:
            others = [c for c in self.network.codes if c.writer is stage]
            written = self.network.run(stage, values) if others else {}
            for other in others:
                weight = self._mu(other) / mu
                r = written[other.state.node] - values[other.state.node].detach()
                total = total + weight * self._squared(other, r, batch)
        for term in self.instance.program.objective.regularisers:
            if term.on == "states":
                size = h.abs().sum() if term.kind == "l1" else 0.5 * (h * h).sum()
                total = total + term.weight * self.instance.scale(batch) * size / mu
        return total

    def _squared(self, code: Code, r: Tensor, batch: Batch) -> Tensor:
        """|r|^2 with the program's reductions over examples and features."""
        total = (r * r).sum() * self.instance.scale(batch)
        return total * batch.size / max(1, r.numel()) if code.constraint.features == "mean" else total

    def _mu(self, code: Code) -> float:
        assert code.constraint.weight is not None
        return max(0.5 * code.constraint.weight.at(self.steps), 1e-12)

    # ---------------------------------------------------------------- weights
    def _weights(self, batch: Batch, values: Values) -> None:
        """Steps on all weights at the new codes; stages do not see each other."""
        for i in range(self.method.weight_steps):
            last = i + 1 == self.method.weight_steps
            with (
                nullcontext() if last else quiet(self.instance.module),
                torch.enable_grad(),
            ):  # buffers move once a step
                loss, coupling, defect = self.energies(batch, values)
                penalties = [self._penalty(), weight_penalty(self.instance, self.seen)]
                total = sum((p for p in penalties if p is not None), loss + coupling)
                found = gradients_of(total, [*self.hidden, *self.seen])
            if self.hidden:
                self.apply(found[: len(self.hidden)])
            if self.seen:
                self.apply(found[len(self.hidden) :], "output")
        for name, memory in self.memories.items():
            code = next(c for c in self.network.codes if c.writer.name == name)
            memory.learn(values, values[code.state.node], self.instance, unit=self._unit(code, batch, values))
        self.look(loss=loss, defect=defect)

    def _penalty(self) -> Tensor | None:
        """Regularisers of the hidden weights, over the mu of the stage that holds them."""
        total: Tensor | None = None
        for p in self.hidden:
            own = weight_penalty(self.instance, [p])
            if own is not None:
                own = own / self._mu(self._owners[p])
                total = own if total is None else total + own
        return total

    def _unit(self, code: Code, batch: Batch, values: Values) -> float:
        """What E multiplies the mean over rows of one code's squared error by."""
        h = values[code.state.node]
        features = h.shape[-1]
        rows = h.numel() / features
        each = batch.size / features if code.constraint.features == "mean" else rows
        return self._mu(code) * each * self.instance.scale(batch)

    def energies(self, batch: Batch, values: Values) -> tuple[Tensor, Tensor, Tensor]:
        """Loss, sum of the local objectives of the stages that write codes, mean absolute defect, at given codes.

        A hidden stage's part is of E/mu, with the mu of its first code; that of a stage which the loss sees, of E.
        """
        loss = self.network.loss(batch, values)
        coupling, absolute, count = loss.new_zeros(()), loss.new_zeros(()), 0
        for stage in dict.fromkeys(c.writer for c in self.network.codes):
            written = self.network.run(stage, values)
            for code in self.network.codes:
                if code.writer is not stage:
                    continue
                h, f = values[code.state.node], written[code.state.node]
                r = f - h
                share = self._mu(code) / (1.0 if stage in self.network.last else self._mu(self._first(stage)))
                absolute, count = absolute + r.detach().abs().sum(), count + r.numel()
                if self.method.hidden == "squared":
                    coupling = coupling + share * self._squared(code, r, batch)
                else:
                    hinge = F.relu(-f * h.sign()).sum() * self.instance.scale(batch)
                    coupling = coupling + share * (
                        hinge * batch.size / h.numel() if code.constraint.features == "mean" else hinge
                    )
        return loss, coupling, absolute / max(count, 1)

    def _first(self, stage: StageModule) -> Code:
        return next(c for c in self.network.codes if c.writer is stage)

    def _memories(self) -> dict[str, Memory]:
        problems: list[str] = []
        if self.method.hidden != "squared":
            problems.append("altmin: the memory holds squared errors: write 'hidden: squared', or 'memory: false'")
        found: dict[str, Memory] = {}
        users = Counter(p for s in self.network.stages for p in dict.fromkeys(s.module.parameters()))
        for stage in dict.fromkeys(c.writer for c in self.network.codes):
            layers = [(p, m) for p, m in weighted_layers(stage) if any(q.requires_grad for q in m.parameters())]
            if not layers and not bare_weights(stage):
                continue  # all frozen
            path, layer = layers[0] if layers else ("", None)
            wrong = [(p, m) for p, m in layers if not isinstance(m, nn.Linear)]
            for name, module in wrong:
                problems.append(
                    f"altmin: the memory variant is for nn.Linear layers, but {name} is a {type(module).__name__}: "
                    "set 'memory: false' (steps on the weights), or cut so that it is in the last stage"
                )
            if wrong:
                continue
            if len(layers) != 1 or bare_weights(stage) or not _ends_in(stage, path):
                names = ", ".join([p for p, _ in layers] + bare_weights(stage)) or "no weights"
                problems.append(
                    f"altmin: the memory variant needs stages that end in one nn.Linear layer, but {stage.name} holds "
                    f"{names}: cut after each linear layer, ahead of its activation, or set 'memory: false'"
                )
                continue
            assert isinstance(layer, nn.Linear)
            own = list(layer.parameters())
            if calls(stage)[path] > 1 or any(users[p] > 1 for p in own):
                problems.append(
                    f"altmin: the memory variant solves each layer on its own, but the weights of {path} are used in "
                    "several places: set 'memory: false' (steps on the weights)"
                )
            elif not all(p.requires_grad for p in own):
                problems.append(
                    f"altmin: weight and bias of {path} must both be solved for, or both frozen, or set 'memory: false'"
                )
            else:
                terms = [t for t in self.instance.program.objective.regularisers if t.on == "weights"]
                l1, l2 = (sum(t.weight for t in terms if t.kind == kind) for kind in ("l1", "l2"))
                found[stage.name] = Memory(stage, layer, self.method, l1=l1, l2=l2)
        if problems:
            raise ProgramError(problems)
        return found

    def extra_state(self) -> dict[str, Tensor]:
        """The memories."""
        return {f"{n}.{k}": t for n, m in self.memories.items() for k, t in m.tensors().items()}


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
        """What is kept from batch to batch."""
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

        handle = self.layer.register_forward_pre_hook(keep)
        with quiet(instance.module):
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


def _check(network: StageNetwork) -> None:
    problems = []
    for code in network.codes:
        c = code.constraint
        if c.weight is None:
            problems.append(
                f"altmin couples by a quadratic penalty, but {c.name} has no weight: give 'weight: {{kind: constant, "
                "value: 2*mu}}'"
            )
        elif c.weight.at(0) == 0:
            problems.append(f"altmin divides by mu, but the weight 2*mu of {c.name} starts at 0: give a value above 0")
    if not network.codes:
        problems.append("altmin needs at least one state: cut ahead of each activation (split at, before: [...])")
    if problems:
        raise ProgramError(problems)
