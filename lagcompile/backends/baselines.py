"""Baselines on the same program: backprop, direct feedback alignment, difference target propagation.

In: an `Instance`. Out: executors. Invariant: each runs the program's own stages and moves the program's own weights, so
that its rows in a table compare with those of the lifted methods: same network, data, batches and step rules.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from lagcompile.backends.local import (
    StageExecutor,
    StageMethod,
    StageNetwork,
    Values,
    gradients_of,
    not_by_stages,
    weight_penalty,
)
from lagcompile.backends.method import Method
from lagcompile.frontend.graph import dtype_of
from lagcompile.ir.base import ProgramError
from lagcompile.ir.program import Program, StateVariable
from lagcompile.ir.symbols import Symbols
from lagcompile.ir.tex import display, number
from lagcompile.runtime.domains import inside
from lagcompile.runtime.instance import Batch, Instance, to_rows, to_value
from lagcompile.runtime.rules import Adam, RuleSpec, rules_tex
from lagcompile.runtime.steps import Extra


class Backprop(Method):
    """Plain backprop through the glued network: single shooting, whatever the program says about states."""

    kind: Literal["backprop"] = "backprop"
    weights: RuleSpec = Adam(lr=1e-3)
    """Step rule of the weights."""

    def problems(self, program: Program) -> Iterator[str]:
        """Say what backprop does not execute."""
        yield from not_by_stages(program, self.name)

    def executor(self, instance: Instance, *, seed: int = 0) -> BackpropExecutor:
        """Return an executor of this method on an instance; see `Solver.executor`."""
        return BackpropExecutor(instance, self, self.weights, seed=seed)

    def tex(self, symbols: Symbols) -> list[str]:
        """Return the step along the gradient."""
        return [
            "All states are eliminated: with $J$ the objective of the network that is not cut,",
            *display(r"\theta^{t+1} = \theta^{t} - A_\theta\, \nabla_\theta J(\theta^{t})"),
            rules_tex({r"\theta": self.weights}),
        ]


class BackpropExecutor(StageExecutor):
    """Runs backprop."""

    def step(self, rows: Tensor) -> None:
        """One forward and backward pass."""
        batch = self.instance.batch(rows)
        with torch.enable_grad():
            _, values = self.instance.forward(batch)
            loss = self.instance.loss(self.instance.output(values), batch.target)
            penalty = weight_penalty(self.instance, self.leaves)
            total = loss if penalty is None else loss + penalty
        self.apply(gradients_of(total, self.leaves))
        self.look(loss=loss, defect=loss.new_zeros(()))
        self.gradient_evaluations += 1
        self.steps += 1


class FeedbackAlignment(StageMethod):
    """Direct feedback alignment (Noekland 2016): fixed random matrices carry the output's error to every state."""

    kind: Literal["dfa"] = "dfa"
    weights: RuleSpec = Adam(lr=1e-3)
    """Step rule of the weights."""
    scale: float = Field(default=1.0, gt=0)
    """Standard deviation of the feedback times the square root of the number of outputs."""

    def executor(self, instance: Instance, *, seed: int = 0) -> FeedbackAlignmentExecutor:
        """Return an executor of this method on an instance; see `Solver.executor`."""
        return FeedbackAlignmentExecutor(instance, self, seed=seed)

    def tex(self, symbols: Symbols) -> list[str]:
        """Return what is fed back, and the local step."""
        return [
            r"With fixed random matrices $B_k$ and the output's error $e^{(i)} = \partial \ell^{(i)} / "
            r"\partial \hat{y}^{(i)}$,",
            *display(
                r"\delta_k^{(i)} &= B_k^{\top} e^{(i)}",
                r"\theta_{k-1} &\leftarrow \theta_{k-1} - A_\theta\, \nabla_{\theta_{k-1}} \sum_i \bigl\langle "
                r"\delta_k^{(i)},\, f_{k-1}(h_{k-1}^{(i)};\, \theta_{k-1}) \bigr\rangle",
            ),
            rf"The entries of $B_k$ have standard deviation ${number(self.scale)} / \sqrt{{d_{{\hat{{y}}}}}}$; the "
            "last stage takes its gradient. " + rules_tex({r"\theta": self.weights}),
        ]


class FeedbackAlignmentExecutor(StageExecutor):
    """Runs direct feedback alignment: delta_k = B_k e, and each stage differentiates <delta_k, f(.)> on its own."""

    def __init__(self, instance: Instance, method: FeedbackAlignment, *, seed: int = 0) -> None:
        super().__init__(instance, method, method.weights, seed=seed)
        self.network = StageNetwork(self.instance)
        outputs = _output_features(self.instance)
        self.feedback = {
            c.state.name: torch.randn(
                outputs, _width(c.state, "dfa"), generator=self.generator, device=self.instance.device
            ).to(dtype_of(c.state.type.dtype))
            * (method.scale / math.sqrt(outputs))
            for c in self.network.codes
        }

    def step(self, rows: Tensor) -> None:
        """One forward pass, the error sent to every state at once, one local backward pass for each stage."""
        batch = self.instance.batch(rows)
        with torch.enable_grad():
            values, written = _detached(self.network, batch)
            output = self.instance.output(values)
            loss = self.instance.loss(output, batch.target)
            error = _flat_rows(_slope(loss, output))
            total = loss
            for code in self.network.codes:
                feedback = self.feedback[code.state.name]
                delta = error.to(feedback.dtype) @ feedback
                delta = to_value(delta.reshape(_rows(code.state, written)), code.state.type)[0]
                total = total + (written[code.state.node] * delta).sum()
            penalty = weight_penalty(self.instance, self.leaves)
            total = total if penalty is None else total + penalty
        self.apply(gradients_of(total, self.leaves))
        self.look(loss=loss, defect=loss.new_zeros(()))
        self.gradient_evaluations += 1
        self.steps += 1

    def extra_state(self) -> dict[str, Tensor]:
        """The feedback matrices."""
        return self.feedback


class DifferenceTargetPropagation(StageMethod):
    """Difference target propagation (Lee et al. 2015): learned inverses carry targets down a chain of stages."""

    kind: Literal["dtp"] = "dtp"
    weights: RuleSpec = Adam(lr=1e-3)
    """Step rule of the weights."""
    inverses: RuleSpec = Adam(lr=1e-3)
    """Step rule of the inverses' weights."""
    target_step: float = Field(default=0.3, gt=0)
    """The last state's target is h - target_step * d loss_i / d h (per example)."""
    noise: float = Field(default=0.1, ge=0)
    """Standard deviation of the noise under which the inverses learn to reconstruct."""
    inverse_steps: int = Field(default=1, ge=0)
    """Number of steps on the inverses before each step on the weights."""

    def problems(self, program: Program) -> Iterator[str]:
        """Say which states do not live for one batch, or else where the stages form no chain."""
        yield from list(super().problems(program)) or list(_no_chain(program)) or list(_more_targets(program))

    def executor(self, instance: Instance, *, seed: int = 0) -> TargetPropagationExecutor:
        """Return an executor of this method on an instance; see `Solver.executor`."""
        return TargetPropagationExecutor(instance, self, seed=seed)

    def tex(self, symbols: Symbols) -> list[str]:
        """Return the targets, the local step, and what the inverses learn."""
        eta, noise = number(self.target_step), number(self.noise)
        return [
            r"With $h$ from a forward pass and learned maps $g_k$ from state $k+1$ back to state $k$, the targets are",
            *display(
                rf"\hat{{h}}_K^{{(i)}} &= h_K^{{(i)}} - {eta}\, \partial \ell^{{(i)}} / \partial h_K^{{(i)}}",
                r"\hat{h}_k^{(i)} &= h_k^{(i)} + g_k(\hat{h}_{k+1}^{(i)}) - g_k(h_{k+1}^{(i)}), \qquad k < K",
            ),
            "and each stage moves towards its own, the last one along the loss:",
            *display(
                r"\theta_{k-1} &\leftarrow \theta_{k-1} - A_\theta\, \nabla_{\theta_{k-1}} \sum_i \bigl\lVert "
                r"f_{k-1}(h_{k-1}^{(i)};\, \theta_{k-1}) - \hat{h}_k^{(i)} \bigr\rVert^2"
            ),
            r"Each $g_k$ learns to give back $h_k + \nu$ from $f_k(h_k + \nu)$, $\nu$ of standard deviation "
            f"${noise}$. " + rules_tex({r"\theta": self.weights, "g": self.inverses}),
        ]


class TargetPropagationExecutor(StageExecutor):
    """Runs difference target propagation; the inverse of stage k is affine, then the range of its state."""

    method: DifferenceTargetPropagation

    def __init__(self, instance: Instance, method: DifferenceTargetPropagation, *, seed: int = 0) -> None:
        super().__init__(instance, method, method.weights, seed=seed)
        self.method = method
        self.network = StageNetwork(self.instance)
        self.inverses: list[tuple[Tensor, Tensor]] = []
        states = [c.state for c in self.network.codes]
        for below, above in pairwise(states):
            self.inverses.append(self._inverse(above, below))
        parameters = [p for pair in self.inverses for p in pair]
        self.optimizers["inverses"] = Extra(parameters or [torch.empty(0)], method.inverses, "descent")

    def _inverse(self, above: StateVariable, below: StateVariable) -> tuple[Tensor, Tensor]:
        inputs, outputs = _width(above, "dtp"), _width(below, "dtp")
        weight = torch.randn(outputs, inputs, generator=self.generator, device=self.instance.device)
        weight = (weight / math.sqrt(inputs)).to(dtype_of(below.type.dtype))
        return weight.requires_grad_(), weight.new_zeros(outputs).requires_grad_()

    def back(self, k: int, above: Tensor) -> Tensor:
        """g_k: flattened state k+1 -> flattened state k, inside the range of the state's domain."""
        weight, bias = self.inverses[k]
        value = nn.functional.linear(above.to(weight.dtype), weight, bias)
        return inside(self.network.codes[k].state.domain).squashed(value)

    def step(self, rows: Tensor) -> None:
        """Train the inverses, pass targets down, and move every stage towards its target."""
        batch = self.instance.batch(rows)
        with self.instance.quiet(), torch.no_grad():
            states = self._flat(self.network.forward(batch))
        for _ in range(self.method.inverse_steps if self.inverses else 0):
            self._learn_inverses(batch, states)
        with torch.enable_grad():
            values, written = _detached(self.network, batch)
            loss = self.instance.loss(self.instance.output(values), batch.target)
            targets = self._targets(loss, values, batch)
            flat = self._flat(written)
            scale = self.instance.scale(batch)
            total = loss
            for f, target in zip(flat, targets, strict=True):
                total = total + scale * (f - target).square().sum()
            penalty = weight_penalty(self.instance, self.leaves)
            total = total if penalty is None else total + penalty
        self.apply(gradients_of(total, self.leaves))
        differences = [(f.detach() - t).abs() for f, t in zip(flat, targets, strict=True)]
        defect = sum(d.sum() for d in differences) / max(1, sum(d.numel() for d in differences))
        self.look(loss=loss, defect=torch.as_tensor(defect))
        self.hold([*targets])
        self.gradient_evaluations += 1 + (self.method.inverse_steps if self.inverses else 0)
        self.steps += 1

    def _flat(self, values: Values) -> list[Tensor]:
        return [_flat_rows(to_rows(values[c.state.node].unsqueeze(0), c.state.type)[0]) for c in self.network.codes]

    def _targets(self, loss: Tensor, values: Values, batch: Batch) -> list[Tensor]:
        """h_K - eta d loss / d h_K, then h_k + g(target_{k+1}) - g(h_{k+1}) downwards (Lee et al. 2015, eq. 15)."""
        if not self.network.codes:
            return []
        top = self.network.codes[-1].state
        slope = _slope(loss, values[top.node])
        flat = [v.detach() for v in self._flat(values)]
        slope = _flat_rows(to_rows(slope.unsqueeze(0), top.type)[0]) / self.instance.scale(batch)
        targets = [flat[-1] - self.method.target_step * slope]
        with torch.no_grad():
            for k in reversed(range(len(self.inverses))):
                targets.insert(0, flat[k] + self.back(k, targets[0]) - self.back(k, flat[k + 1]))
        return targets

    def _learn_inverses(self, batch: Batch, states: Sequence[Tensor]) -> None:
        """g_k(f_k(h + noise)) towards h + noise, at the states of the forward pass."""
        total: Tensor | None = None
        for k in range(len(self.inverses)):
            below, above = self.network.codes[k], self.network.codes[k + 1]
            noise = torch.randn(
                states[k].shape, generator=self.generator, device=states[k].device, dtype=states[k].dtype
            )
            h = states[k] + self.method.noise * noise
            value = to_value(h.reshape(1, -1, *_features(below.state)), below.state.type)[0]
            with self.instance.quiet(), torch.no_grad():
                written = self.network.run(above.writer, {**batch.values, below.state.node: value})
                lifted = _flat_rows(to_rows(written[above.state.node].unsqueeze(0), above.state.type)[0])
            with torch.enable_grad():
                own = self.instance.scale(batch) * (self.back(k, lifted) - h).square().sum()
                total = own if total is None else total + own
        if total is not None:
            leaves = [p for pair in self.inverses for p in pair]
            self.apply(gradients_of(total, leaves), "inverses")

    def extra_state(self) -> dict[str, Tensor]:
        """Weights of the inverses."""
        return {f"g{k}.{n}": t for k, pair in enumerate(self.inverses) for n, t in zip(("w", "b"), pair, strict=True)}


def _no_chain(program: Program) -> Iterator[str]:
    """Say where a stage does not read the one state before it and write one."""
    for k, state in enumerate(program.states):
        own, following = (
            program.stages[k : k + 1],
            program.stages[k + 1 : k + 2],
        )  # there may be more states than stages
        writer = tuple(s for s in program.stages if state.name in s.writes)
        readers = tuple(s for s in program.stages if state.name in s.reads)
        where = f"{state.name} (after {state.node}, {state.module})"
        if writer != own or readers != following:
            yield (
                f"dtp needs a chain, in which each stage reads the one state before it, but {where} goes from "
                f"{writer[0].name} to {', '.join(s.name for s in readers)}: cut where a single tensor crosses, or use "
                "method dfa, altmin or extragradient"
            )


def _more_targets(program: Program) -> Iterator[str]:
    """Say which states besides the last lead to the loss: its target is the only one that comes from there."""
    names, outputs = {s.name for s in program.states}, set(program.objective.reads)
    last = [s for s in program.stages if any(w in outputs and w not in names for w in s.writes)]
    for s in program.states[:-1]:
        if s.name in outputs or any(s.name in stage.reads for stage in last):
            yield (
                f"dtp takes its targets from the last state, but the loss also reads {s.name} (after {s.node}, "
                f"{s.module}): leave that out of the loss, or use method backprop, altmin or extragradient"
            )


def _slope(loss: Tensor, value: Tensor) -> Tensor:
    """dloss/dvalue; zero where the loss does not read the value, or where it follows from data alone."""
    found = gradients_of(loss, [value], keep=True)[0] if value.requires_grad else None
    return torch.zeros_like(value) if found is None else found


def _detached(network: StageNetwork, batch: Batch) -> tuple[Values, Values]:
    """A forward pass in which each stage reads leaves: values for the loss, and what the stages wrote, connected."""
    nodes = {c.state.node for c in network.codes}
    values: Values = dict(batch.values)
    written: Values = {}
    for stage in network.stages:
        for n, v in network.run(stage, values).items():
            written[n] = v
            values[n] = v.detach().requires_grad_() if n in nodes else v
    return values, written


def _flat_rows(rows: Tensor) -> Tensor:
    """(rows, ...) -> (rows, numbers of a row), also where a row is one number."""
    return rows.reshape(rows.shape[0], -1)


def _features(state: StateVariable) -> tuple[int, ...]:
    assert state.type.features is not None
    return state.type.features


def _rows(state: StateVariable, written: Values) -> tuple[int, ...]:
    return tuple(to_rows(written[state.node].unsqueeze(0), state.type).shape)


def _width(state: StateVariable, method: str) -> int:
    count = state.type.count
    if count is None or not any(isinstance(d, str) for d in state.type.shape or ()):
        raise ProgramError(
            f"{method}: the state {state.name} (after {state.node}, {state.module}) must have a batch axis and a known "
            "shape: cut elsewhere, or lift with example_inputs"
        )
    return count


def _output_features(instance: Instance) -> int:
    """Numbers in one example's output, from a forward pass of two (normalisation may need more than one)."""
    with instance.quiet(), torch.no_grad():
        batch = instance.batch(torch.arange(min(2, instance.examples)))
        _, values = instance.forward(batch)
        output = instance.output(values)
    if not isinstance(output, Tensor) or not output.dim():
        raise ProgramError(
            "dfa needs a model whose output is one tensor with a row for each example; use method backprop or "
            "extragradient"
        )
    return output[0].numel()
