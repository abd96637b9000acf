"""Online alternating minimisation: codes by a backward sweep, then all weights (Choromanska et al., ICML 2019).

In: an `Instance` with transient states and a quadratic weight. Out: an executor. Invariant: every step, on codes and on
weights, goes down the program's own energy, divided by mu = rho/2 and with the downstream codes already moved:

    E = loss + mu sum_k |f_{k-1}(h_{k-1}) - h_k|^2 (+ regularisers)
    code k:  (1/mu) loss + readers' |.|^2 + |h_k - f(.)|^2

The proximity target f(.) is the prediction at the codes upstream, a constant while h_k moves (the released code leaves
it attached to h_k, which makes the term inert). Cut before the activations, so that states are pre-activation codes.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from lagcompile.backends.alternating_memory import memories_of
from lagcompile.backends.local import (
    Code,
    StageExecutor,
    StageMethod,
    StageNetwork,
    Values,
    gradients_of,
    weight_penalty,
)
from lagcompile.frontend.stages import StageModule
from lagcompile.ir.program import Program
from lagcompile.ir.symbols import Symbols
from lagcompile.ir.tex import display
from lagcompile.runtime import kkt
from lagcompile.runtime.domains import inside
from lagcompile.runtime.instance import Batch, Instance
from lagcompile.runtime.rules import SGD, Adam, RuleSpec, rules_tex
from lagcompile.runtime.steps import Extra


class AltMin(StageMethod):
    """Online alternating minimisation over codes and weights."""

    codes_move = True
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
    """AltMin-mem: hidden weights of linear layers from accumulated sums of s s^T and h s^T, by coordinate descent;
    `weights`, its lr and weight_decay, serves layers without one."""
    memory_rate: float = Field(default=0.0, ge=0, lt=1)
    """Exponential forgetting of the memory; 0 accumulates."""
    memory_damping: float = Field(default=0.1, ge=0)
    """Added to a column's curvature, relative to the mean of A's diagonal: columns that are rarely active move little,
    minimisers stay where they are."""
    memory_sweeps: int = Field(default=1, ge=1)
    """Sweeps of coordinate descent over a layer's columns in each batch."""

    def problems(self, program: Program) -> Iterator[str]:
        """Say which states do not live for one batch, or have no mu."""
        yield from super().problems(program)
        for c in program.defects:
            if c.weight is None:
                yield (
                    f"altmin couples by a quadratic penalty, but {c.name} has no weight: give 'weight: {{kind: "
                    "constant, value: 2*mu}'"
                )
            elif c.weight.at(0) == 0:
                yield f"altmin divides by mu, but the weight 2*mu of {c.name} starts at 0: give a value above 0"
        if not program.defects:
            yield "altmin needs at least one state: cut before each activation (split at, before: [...])"

    def executor(self, instance: Instance, *, seed: int = 0) -> AltMinExecutor:
        """Return an executor of this method on an instance; see `Solver.executor`."""
        return AltMinExecutor(instance, self, seed=seed)

    def tex(self, symbols: Symbols) -> list[str]:
        """Return the sweep over codes and the local steps on weights."""
        lines = [
            r"States start at a forward pass. With $E^{(i)}$ the loss and the quadratic terms of one example and "
            r"$\mu = \rho / 2$, for $k = K, \dots, 1$",
            *display(
                r"h_k^{(i)} &\leftarrow h_k^{(i)} - A_h\, \nabla_{h_k} E^{(i)} / \mu "
                rf"\quad ({self.code_steps}\ \text{{times}})"
            ),
            r"where $f_{k-1}(h_{k-1}^{(i)})$ is held at its value ahead; then, each stage on its own "
            "and the last along the loss,",
        ]
        if self.hidden == "sign_hinge":
            local = r"\sum_i \mathbf{1}^{\top} \max\bigl(-f_{k-1}(h_{k-1}^{(i)};\, \theta_{k-1}) \odot "
            local += r"\operatorname{sign}(h_k^{(i)}),\, 0\bigr)"
        else:
            local = r"\sum_i \bigl\lVert f_{k-1}(h_{k-1}^{(i)};\, \theta_{k-1}) - h_k^{(i)} \bigr\rVert^2"
        lines += display(rf"\theta_{{k-1}} &\leftarrow \theta_{{k-1}} - A_\theta\, \nabla_{{\theta_{{k-1}}}} {local}")
        if self.memory:
            lines.append(
                "Hidden linear layers are instead fitted by coordinate descent to the accumulated second moments of "
                "their inputs and codes."
            )
        return [*lines, rules_tex({r"\theta": self.weights, r"\theta_K": self.output, "h": self.codes})]


class AltMinExecutor(StageExecutor):
    """Runs online AltMin."""

    method: AltMin

    def __init__(self, instance: Instance, method: AltMin, *, seed: int = 0) -> None:
        super().__init__(instance, method, method.weights, seed=seed)
        self.method = method
        self.network = StageNetwork(self.instance)
        self.memories = memories_of(self.instance, self.network, method) if method.memory else {}
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
        """Run the network forward, sweep backward over the codes, then move the weights."""
        batch = self.instance.batch(rows)
        with self.instance.quiet():
            with torch.no_grad():
                values = self.network.forward(batch)
            codes = self.sweep(batch, values)
        self._weights(batch, values | codes)
        self.hold(list(codes.values()))
        self.gradient_evaluations += self.method.code_steps + self.method.weight_steps
        self.steps += 1

    def sweep(self, batch: Batch, values: Values) -> dict[str, Tensor]:
        """Return the codes after a Gauss-Seidel sweep from the last state to the first.

        Args:
            batch: the batch.
            values: a forward pass; its states are the codes' starts and proximity targets.
        """
        moved: dict[str, Tensor] = {}
        for code in reversed(self.network.codes):
            moved[code.state.node] = self._code(batch, values | moved, code)
        return moved

    def _code(self, batch: Batch, values: Values, code: Code) -> Tensor:
        node, domain = code.state.node, inside(code.state.domain)
        start: Tensor = values[node].detach()
        h = domain.project(start.clone()).requires_grad_()
        optimizer = Extra([h], self.method.codes, "descent")
        for _ in range(self.method.code_steps):
            with torch.enable_grad():
                value = self.local(batch, values | {node: h}, code, start)
            (h.grad,) = torch.autograd.grad(value, [h])
            if self.instance.program.objective.reduction == "mean":
                h.grad = h.grad * batch.size  # gradients in states are per example
            optimizer.step()
            h.data = domain.project(h.data)
        return h.detach()

    def local(self, batch: Batch, values: Values, code: Code, target: Tensor) -> Tensor:
        """Compute what one code sees of E/mu: loss, readers' defects, proximity to its prediction, regularisers."""
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
                size = kkt.size(h, term.kind)
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
        """Move all weights at the new codes; stages do not see each other."""
        for i in range(self.method.weight_steps):
            last = i + 1 == self.method.weight_steps
            with (
                nullcontext() if last else self.instance.quiet(),
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
        """Factor in E of the mean over rows of one code's squared error."""
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

    def extra_state(self) -> dict[str, Tensor]:
        """The memories."""
        return {f"{n}.{k}": t for n, m in self.memories.items() for k, t in m.tensors().items()}
