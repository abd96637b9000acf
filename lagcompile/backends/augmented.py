"""Augmented Lagrangians and penalties with an inner loop: states first, then multipliers, then weights.

In: an `Instance` whose defects have a quadratic weight. Out: an executor. Invariant: multipliers move by local dual
ascent lambda += rho G(r) alone, after each round of steps on the states; weights move once a step, at the end.

The program decides which relative it is: tables with multipliers are the augmented Lagrangian; transient states with
multipliers are PC-ALM (Seely and Gould 2026); tables without multipliers and with a growing weight are the method of
auxiliary coordinates (Carreira-Perpinan and Wang 2014); a constant weight is the plain quadratic penalty.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Literal

from pydantic import Field
from torch import Tensor

from lagcompile.backends.first_order import DescentAscent, FirstOrderExecutor
from lagcompile.backends.method import Method
from lagcompile.ir.program import Program
from lagcompile.ir.symbols import Symbols
from lagcompile.ir.tex import display, number
from lagcompile.runtime.instance import Batch, Instance
from lagcompile.runtime.lagrangian import Gradients
from lagcompile.runtime.rules import SGD, Adagrad, Adam, RuleSpec, rules_tex


class AugmentedLagrangian(Method):
    """Inner loop over states, local dual ascent, then one step on the weights."""

    tables = True
    kind: Literal["augmented_lagrangian"] = "augmented_lagrangian"
    weights: RuleSpec = Adam(lr=1e-3)
    """Step rule of the weights."""
    states: RuleSpec = Adagrad(lr=5e-2)
    """Step rule of the states."""
    rounds: int = Field(default=1, ge=1)
    """Number of rounds before each weight step; a round is several state steps followed by one dual step."""
    state_steps: int = Field(default=5, ge=1)
    """Steps on the states in each round."""
    dual_step: float | None = Field(default=None, ge=0)
    """Step of the dual ascent; None takes the quadratic weight rho, as the method of multipliers does."""

    @property
    def inner(self) -> DescentAscent:
        """The method of the inner loop; its rate of the multipliers is scaled by the dual step."""
        return DescentAscent(weights=self.weights, states=self.states, multipliers=SGD(lr=1.0))

    def problems(self, program: Program) -> Iterator[str]:
        """Say what the inner loop does not execute, and which multipliers would never move."""
        yield from self.inner.problems(program)
        for c in program.defects:
            if c.weight is None and (self.dual_step is None or program.multiplier_of(c.name) is None):
                yield (
                    f"augmented_lagrangian: the constraint {c.name} has no quadratic weight, so its multiplier would "
                    "never move: give 'weight: {kind: constant, value: 1.0}' or a dual_step"
                )
        for d in program.data:
            if d.free:
                yield (
                    f"augmented_lagrangian moves weights and states, but the input '{d.name}' is a variable: use "
                    "extragradient or the exact backend (method sqp)"
                )
        if not program.defects:
            yield "augmented_lagrangian needs at least one state: split the model, or use method backprop"

    def slots(self) -> tuple[int, int]:
        """Return the rule's numbers; the dual ascent has no memory."""
        return len(self.states.slots()), 0

    def executor(self, instance: Instance, *, seed: int = 0) -> AugmentedExecutor:
        """Return an executor of this method on an instance; see `Solver.executor`."""
        return AugmentedExecutor(instance, self, seed=seed)

    def tex(self, symbols: Symbols) -> list[str]:
        """Return the inner loop and the step on the weights."""
        step = r"\rho" if self.dual_step is None else number(self.dual_step)
        lines = [rf"h &\leftarrow h - A_h\, \nabla_{{h}} \mathcal{{L}} \quad ({self.state_steps}\ \text{{times}})"]
        if symbols.program.multipliers:
            lines.append(rf"\lambda &\leftarrow \lambda + {step}\, \nabla_{{\lambda}} \mathcal{{L}}")
        return [
            f"Each step repeats {'once' if self.rounds == 1 else f'{self.rounds} times'}",
            *display(*lines),
            "and then moves the weights:",
            *display(r"\theta &\leftarrow \theta - A_{\theta}\, \nabla_{\theta} \mathcal{L}"),
            r"The gradients in $h$ and $\lambda$ are those of one example. "
            + rules_tex({r"\theta": self.weights, "h": self.states}),
        ]


class AugmentedExecutor(FirstOrderExecutor):
    """Runs the augmented Lagrangian; each step costs rounds * (state_steps + 1) + 1 gradient evaluations."""

    def __init__(self, instance: Instance, options: AugmentedLagrangian, *, seed: int = 0) -> None:
        options.accept(instance.program)
        super().__init__(instance, options.inner, seed=seed)
        self.options = options
        self._duals_move = any(b.multiplier is not None for b in instance.layout.banks)

    def step(self, rows: Tensor) -> None:
        """Rounds on states and multipliers, then one step on the weights."""
        batch = self.instance.batch(rows)
        self.store.begin(batch, self.steps)
        for _ in range(self.options.rounds):
            for _ in range(self.options.state_steps):
                self.store.update(self._inner(batch), "states")
            if self._duals_move:
                self.store.update(self._scaled(self._inner(batch)), "multipliers")
        last = self._gradients(batch, weights=True)
        self._set_gradients(last)
        self.optimizers["weights"].step()
        self._last, self._batch = last, batch
        self.store.finish()
        self.steps += 1

    def _inner(self, batch: Batch) -> Gradients:
        """Compute the gradients in states and multipliers; buffers and random numbers stay as they were."""
        with self.instance.quiet():
            return self._gradients(batch, weights=False)

    def _scaled(self, gradients: Gradients) -> Gradients:
        """Return the dual gradients times the dual step, for a rule of rate 1."""
        step = self.options.dual_step
        rates = [rho if step is None else step for rho in self.store.rho]
        duals = [None if g is None else rate * g for g, rate in zip(gradients.multipliers, rates, strict=True)]
        return replace(gradients, multipliers=duals)
