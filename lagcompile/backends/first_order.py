"""First-order saddle-point methods: extragradient, from the past, optimistic, and descent-ascent.

In: an `Instance`. Out: an executor. Invariant: both half steps see the same batch, dropout mask and noise; buffers
(BatchNorm statistics) move once a step, on the update; a table is touched only in the batch's rows.

    z = (weights, states, multipliers),  F = (grad_w L, grad_h L, -G(r))
    extragradient (Korpelevich 1976):  z' = z - a F(z),  z <- z - a F(z')
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from lagcompile.backends.base import Executor
from lagcompile.backends.inputs import FreeInputs
from lagcompile.backends.local import NOTHING_MOVES
from lagcompile.backends.method import Method
from lagcompile.backends.store import Store
from lagcompile.backends.tables import portions, unkept
from lagcompile.ir.program import Program
from lagcompile.ir.symbols import Symbols
from lagcompile.ir.tex import display
from lagcompile.runtime.adjoint import dual_sweep
from lagcompile.runtime.instance import Batch, Instance, Known
from lagcompile.runtime.lagrangian import Gradients, Lagrangian, unexecuted
from lagcompile.runtime.rules import SGD, Adagrad, Rule, RuleSpec, Scheme, rules_tex
from lagcompile.runtime.steps import Extra


class FirstOrder(Method):
    """Options that all first-order saddle-point methods share."""

    tables = True
    scheme: ClassVar[Scheme]
    """How gradients are combined."""
    moves: ClassVar[tuple[str, ...]]
    """A step as lines of TeX, with < and > around what is projected."""
    weights: RuleSpec = Adagrad(lr=1e-2)
    """Step rule of the weights."""
    states: RuleSpec = Adagrad(lr=5e-2)
    """Step rule of the states."""
    multipliers: RuleSpec = SGD(lr=1e-2)
    """Step rule of the multipliers (ascent)."""
    dual_sweep: bool = False
    """Compute the multipliers exactly by a backward sweep instead of gradient ascent. State gradients are then zero, so
    with transient states (which start on the forward pass) only the weights move."""
    inner_steps: int = Field(default=0, ge=0)
    """Number of steps on states and multipliers only before each full step; stages that read data alone run once."""

    def problems(self, program: Program) -> Iterator[str]:
        """Say what first-order methods do not execute, keep or start, or that nothing moves."""
        yield from unexecuted(program)
        yield from unkept(program, sweep=self.dual_sweep)
        if not (any(v.trainable for v in program.weights) or program.defects or any(d.free for d in program.data)):
            yield f"{NOTHING_MOVES}: cut the model into stages, or free an input (formulation.inputs)"

    def slots(self) -> tuple[int, int]:
        """Return the rules' numbers, and one more where the last gradient is kept; the sweep keeps none."""
        past = int(self.scheme in {"past", "optimistic"})
        duals = 0 if self.dual_sweep else len(self.multipliers.slots()) + past
        return len(self.states.slots()) + past, duals

    def executor(self, instance: Instance, *, seed: int = 0) -> FirstOrderExecutor:
        """Return an executor of this method on an instance; see `Solver.executor`."""
        return FirstOrderExecutor(instance, self, seed=seed)

    def tex(self, symbols: Symbols) -> list[str]:
        """Return the field, the step along it and the step rules."""
        project, note = symbols.projection()
        duals = bool(symbols.program.multipliers) and not self.dual_sweep
        kept = symbols.moved()
        parts = [(r"\theta", r"\nabla_{\theta} \mathcal{L}")]
        parts += [(kept, rf"\nabla_{{{kept}}} \mathcal{{L}}")] if kept else []
        parts += [(r"\lambda", r"-\nabla_{\lambda} \mathcal{L}")] if duals else []
        z = rf"z = ({', '.join(p for p, _ in parts)})"
        field = r"F(z) = \bigl(" + r",\, ".join(g for _, g in parts) + r"\bigr)"
        close = r"\bigr)" if project else ""
        rules: dict[str, Rule | None] = {r"\theta": self.weights}
        rules |= {kept: self.states} if kept else {}
        rules |= {r"\lambda": self.multipliers} if duals else {}
        own = f"{kept}, \\lambda" if duals else kept
        each = f" Gradients in ${own}$ are those of one example." if kept else ""
        lines = [
            f"With ${z}$ and ${field}$, each step on a batch makes",
            *display(*(line.replace("<", project).replace(">", close) for line in self.moves)),
            rf"$A$ stands for the step rules, which act by entries. {rules_tex(rules)}{each}{note}",
        ]
        if self.dual_sweep:
            lines.append(r"$\lambda$ is set by solving $\nabla_h \mathcal{L} = 0$ from the last stage to the first.")
        if self.inner_steps:
            lines.append(rf"Ahead of each step, {self.inner_steps} such steps are made on $h$ and $\lambda$ alone.")
        return lines


class Extragradient(FirstOrder):
    """Extragradient (Korpelevich 1976; Gidel et al. 2019): two gradients a step."""

    scheme = "extragradient"
    moves = (r"z^{t+\frac12} &= <z^{t} - A\, F(z^{t})>", r"z^{t+1} &= <z^{t} - A\, F(z^{t+\frac12})>")
    kind: Literal["extragradient"] = "extragradient"


class ExtragradientFromPast(FirstOrder):
    """Extragradient that extrapolates along the previous gradient (Popov 1980): one gradient a step."""

    scheme = "past"
    moves = (r"z^{t+\frac12} &= <z^{t} - A\, F(z^{t-\frac12})>", r"z^{t+1} &= <z^{t} - A\, F(z^{t+\frac12})>")
    kind: Literal["extragradient_from_past"] = "extragradient_from_past"


class OptimisticGradient(FirstOrder):
    """Optimistic descent-ascent along 2 g_t - g_{t-1} (Daskalakis et al. 2018): one gradient a step."""

    scheme = "optimistic"
    moves = (r"z^{t+1} &= <z^{t} - A\, \bigl(2 F(z^{t}) - F(z^{t-1})\bigr)>",)
    kind: Literal["optimistic"] = "optimistic"


class DescentAscent(FirstOrder):
    """Simultaneous gradient descent-ascent (Arrow, Hurwicz and Uzawa 1958): one gradient a step."""

    scheme = "descent"
    moves = (r"z^{t+1} &= <z^{t} - A\, F(z^{t})>",)
    kind: Literal["descent_ascent"] = "descent_ascent"


class FirstOrderExecutor(Executor):
    """Runs one of the first-order methods; `optimizers` holds a torch optimiser for each group of variables."""

    def __init__(self, instance: Instance, method: FirstOrder, *, seed: int = 0) -> None:
        method.accept(instance.program)
        self.instance = instance
        self.method = method
        self.steps = 0
        self.gradient_evaluations = 0
        self.lagrangian = Lagrangian(instance)
        self.store = Store(
            self.lagrangian, method.states, None if method.dual_sweep else method.multipliers, method.scheme, seed
        )
        self.inputs = FreeInputs(instance, method.states, method.scheme)
        self.optimizers: dict[str, torch.optim.Optimizer] = {
            "weights": Extra(instance.weights.trainable or [torch.empty(0)], method.weights, method.scheme),
            **self.store.optimizers,
        }
        self._last: Gradients | None = None
        self._batch: Batch | None = None
        self._duals: list[Tensor | None] = []
        self._known: Known | None = None  # during inner steps
        self._buffers = list(dict.fromkeys(b for _, b in instance.module.named_buffers()))
        instance.module.train()

    # ---------------------------------------------------------------- one step
    def step(self, rows: Tensor) -> None:
        """One step on a batch of rows."""
        batch = self.instance.batch(rows)
        self.store.begin(batch, self.steps)
        self.inputs.begin(batch)
        self._known = None if self.inputs.rows else {}
        for _ in range(self.method.inner_steps):
            self._move(batch, weights=False)
        self._known = None
        self._move(batch, weights=True)
        self.store.finish()
        self.steps += 1

    def _move(self, batch: Batch, *, weights: bool) -> None:
        """Extrapolation and update of all variables, or of states and multipliers alone."""
        optimizer = self.optimizers["weights"]
        assert isinstance(optimizer, Extra)
        store, scheme = self.store, self.method.scheme
        if scheme in {"extragradient", "past"}:
            random = self._random_state(batch)
            first = self._look(batch, weights=weights) if scheme == "extragradient" else None
            if weights:
                self._set_gradients(first)
                optimizer.extrapolate()
            store.extrapolate(first)
            self.inputs.extrapolate(None if first is None else first.inputs)
            self._restore_random(batch, random)
        last = self._gradients(batch, weights=True) if weights else self._look(batch, weights=False)
        if weights:
            self._set_gradients(last)
            optimizer.step()
        store.update(last)
        self.inputs.update(last.inputs)
        self._last, self._batch = last, batch

    def _look(self, batch: Batch, *, weights: bool) -> Gradients:
        """Gradients for an extrapolation or an inner step: buffers stay as they were."""
        saved = [b.clone() for b in self._buffers]
        result = self._gradients(batch, weights=weights)
        for buffer, value in zip(self._buffers, saved, strict=True):
            buffer.copy_(value)
        return result

    def _gradients(self, batch: Batch, *, weights: bool) -> Gradients:
        store = self.store
        if self.method.dual_sweep:
            self.instance.weights.publish()
            with self.instance.quiet():
                reading = self.lagrangian.reading(batch, self.inputs.rows)
                store.set_multipliers(dual_sweep(self.instance, reading, store.values()))
        self._duals = store.multipliers
        self.gradient_evaluations += 1
        return self.lagrangian.gradients(
            batch,
            store.stored,
            store.multipliers,
            rho=store.rho,
            noise=store.noise,
            weights=weights,
            inputs=self.inputs.rows,
            known=self._known,
        )

    def _set_gradients(self, gradients: Gradients | None) -> None:
        if gradients is not None:
            for leaf, gradient in zip(self.instance.weights.trainable, gradients.weights, strict=True):
                leaf.grad = gradient

    def _random_state(self, batch: Batch) -> tuple[Tensor, Tensor | None] | None:
        if not self.instance.draws:
            return None
        cuda = torch.cuda.get_rng_state(batch.rows.device) if batch.rows.is_cuda else None
        return torch.get_rng_state(), cuda

    def _restore_random(self, batch: Batch, state: tuple[Tensor, Tensor | None] | None) -> None:
        if state is None:
            return
        torch.set_rng_state(state[0])
        if state[1] is not None:
            torch.cuda.set_rng_state(state[1], batch.rows.device)

    def groups(self) -> Mapping[str, Sequence[torch.optim.Optimizer]]:
        """One optimiser for each group; free inputs move with the states."""
        found = {name: [optimizer] for name, optimizer in self.optimizers.items()}
        if self.inputs.optimizer is not None:
            found.setdefault("states", []).append(self.inputs.optimizer)
        return found

    # ---------------------------------------------------------------- looking
    def measures(self) -> dict[str, float]:
        """Loss, mean absolute defect, fraction outside the tube, mean |lambda|, of the last step's batch."""
        assert self._last is not None
        terms, banks = self._last.terms, self.instance.layout.banks
        result = {"loss": terms.loss.detach()}
        if banks:
            epsilons = [b.constraint.transform.half_width for b in banks]
            count = sum(r.numel() for r in terms.defects)
            absolute = [r.detach().abs() for r in terms.defects]
            result["defect"] = torch.stack([a.sum() for a in absolute]).sum() / count
            outside = [(a > e).sum() for a, e in zip(absolute, epsilons, strict=True)]
            result["outside"] = torch.stack(outside).sum() / count
            duals = [d.abs().sum() for d in self._duals if d is not None]
            if duals:
                size = sum(d.numel() for d in self._duals if d is not None)
                result["dual"] = torch.stack(duals).sum() / size
        names = list(result)
        return dict(zip(names, torch.stack([v.float() for v in result.values()]).tolist(), strict=True))

    @torch.no_grad()
    def final_measures(self) -> dict[str, float]:
        """Mean and largest absolute defect over all rows, at the stored states, in eval mode."""
        if not self.instance.layout.banks or not all(b.first.storage.kept for b in self.instance.layout.banks):
            return {}
        total = largest = torch.zeros((), device=self.instance.device)
        count = 0
        self.instance.module.eval()
        with self.store.looking():
            for rows in portions(self.instance):
                batch = self.instance.batch(rows)
                self.store.begin(batch, self.steps)
                self.inputs.begin(batch)
                terms = self.lagrangian.terms(
                    self.lagrangian.reading(batch, self.inputs.rows),
                    self.store.stored,
                    self.store.multipliers,
                    rho=self.store.rho,
                    noise=self.store.noise,
                )
                for r in terms.defects:
                    total = total + r.abs().sum()
                    largest = torch.maximum(largest, r.abs().max())
                    count += r.numel()
        self.instance.module.train()
        return {"defect": float(total) / max(count, 1), "largest_defect": float(largest)}

    def values(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """States (as stages read them) and multipliers by name, on the CPU."""
        return self.store.tables.named()

    def tensors(self) -> Iterator[Tensor]:
        """Weights, buffers, tables of states and multipliers, free inputs."""
        yield from super().tensors()
        yield from (*self.store.tables.states, *self.store.tables.multipliers, *self.inputs.tables)

    def restarted(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """States and multipliers as the store would start them at the present weights."""
        return self.store.restarted()

    def free_inputs(self) -> dict[str, Tensor]:
        """Values of the inputs that are variables, by name, on the CPU."""
        return self.inputs.named()

    def bytes(self) -> int:
        """Bytes of states, multipliers, free inputs and their optimiser rows."""
        return self.store.bytes() + self.inputs.bytes()

    # ---------------------------------------------------------------- checkpoints
    def state_dict(self) -> dict[str, Any]:
        """Weights, buffers, tables, optimisers, counts and random state."""
        self.instance.weights.publish()
        return {
            "module": self.instance.module.state_dict(),
            "store": self.store.state_dict(),
            "inputs": self.inputs.state_dict(),
            "optimizers": {n: o.state_dict() for n, o in self.optimizers.items()},
            "steps": self.steps,
            "gradient_evaluations": self.gradient_evaluations,
            # a network that draws nothing has none: it would be the caller's
            "random": torch.get_rng_state() if self.instance.draws else None,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Resume from a checkpoint, bit for bit."""
        self.instance.module.load_state_dict(state["module"])
        self.instance.weights.adopt()
        self.store.load_state_dict(state["store"])
        self.inputs.load_state_dict(state["inputs"])
        for name, optimizer in self.optimizers.items():
            optimizer.load_state_dict(state["optimizers"][name])
        self.steps = int(state["steps"])
        self.gradient_evaluations = int(state["gradient_evaluations"])
        if state["random"] is not None:
            torch.set_rng_state(state["random"])
