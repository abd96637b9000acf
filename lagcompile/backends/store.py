"""One step on states and multipliers: rows of tables, class Gaussians, shared values, transient values of a batch.

In: a `Lagrangian`, step rules, a seed. Out: `Store`. Invariant: between `begin` and the last `update` of a step the
batch's rows are held as small tensors; tables are read once and written once a step, in the batch's rows only.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor

from lagcompile.backends.tables import Tables, starts_at_adjoint
from lagcompile.ir.base import ProgramError
from lagcompile.runtime.adjoint import dual_sweep
from lagcompile.runtime.allocation import WithinMemory
from lagcompile.runtime.instance import Batch
from lagcompile.runtime.lagrangian import Gradients, Lagrangian
from lagcompile.runtime.rules import SGD, Rule, Scheme
from lagcompile.runtime.starts import started
from lagcompile.runtime.steps import ExtraRows

TOO_LARGE = (
    "that is a table of states or multipliers: keep them per batch ('storage: {kind: transient}'), cut where fewer "
    "numbers cross, or take fewer examples"
)


class Store:
    """States and multipliers of a run, with their optimisers."""

    def __init__(
        self, lagrangian: Lagrangian, states: Rule, multipliers: Rule | None, scheme: Scheme, seed: int
    ) -> None:
        """Allocate and start everything.

        Args:
            lagrangian: of the instance.
            states: step rule of the states.
            multipliers: step rule of the multipliers; None where the exact dual sweep sets them.
            scheme: how gradients are combined.
            seed: of random starts and noise.

        Raises:
            ProgramError: the tables do not fit into memory.
        """
        self.lagrangian = lagrangian
        self.instance = lagrangian.instance
        self.banks = self.instance.layout.banks
        self.scheme: Scheme = scheme
        self.state_rule, self.dual_rule = states, multipliers or SGD(lr=0.0)
        self.generator = torch.Generator(device=self.instance.device).manual_seed(seed)
        self.optimizers: dict[str, torch.optim.Optimizer] = {}
        moving = sum(t.nbytes for t in self.instance.weights.trainable)  # each has a gradient and a row, at least
        with WithinMemory(ProgramError, TOO_LARGE, beside=2 * moving):
            self.tables = Tables(lagrangian, self.generator)
            if self.tables.states or self.tables.passing:
                self.optimizers["states"] = ExtraRows(self.tables.states or [torch.empty(0, 0)], states, scheme)
                duals = self.tables.multipliers or [torch.empty(0, 0)]
                self.optimizers["multipliers"] = ExtraRows(duals, self.dual_rule, scheme, ascent=True)
        self.noise = list(self.tables.first_noise)
        self.rho: list[float] = [0.0 for _ in self.banks]
        self._groups: list[tuple[ExtraRows, list[int], bool]] = []
        self.stored: list[Tensor] = [torch.empty(0) for _ in self.banks]
        self.multipliers: list[Tensor | None] = [None for _ in self.banks]

    # ---------------------------------------------------------------- one step
    def begin(self, batch: Batch, step: int) -> None:
        """Take the batch's rows; start what is transient; draw fresh noise; set the quadratic weights."""
        self.batch = batch
        self.rho = [b.constraint.weight.at(step) if b.constraint.weight is not None else 0.0 for b in self.banks]
        for i, bank in enumerate(self.banks):
            sampling = bank.first.storage.sampling
            if sampling is not None and sampling.fresh:
                self.noise[i] = self.tables.noise(bank)
        self._groups = []
        if self.tables.kept:
            self._open("states", self.tables.kept, [self.tables.keeping[i].at(batch.rows) for i in self.tables.kept])
            self._open("multipliers", self.tables.dual, [self._dual_index(i, batch) for i in self.tables.dual])
        if self.tables.passing:
            self._start_transient(batch)
        self._refresh()

    def _open(self, name: str, banks: list[int], rows: list[Tensor | None]) -> None:
        if not banks:
            return
        optimizer = self.optimizers[name]
        assert isinstance(optimizer, ExtraRows)
        optimizer.take(rows, [self.tables.dtype(self.banks[i]) for i in banks])
        self._groups.append((optimizer, banks, name == "multipliers"))

    def _dual_index(self, i: int, batch: Batch) -> Tensor | None:
        multiplier = self.banks[i].multiplier
        assert multiplier is not None
        whole = multiplier.laid.rows != "example" or self.lagrangian.on_samples[i]
        return None if whole or self.banks[i].first.storage.single else batch.rows

    def _start_transient(self, batch: Batch) -> None:
        """Fresh states (and multipliers) of a batch, with fresh optimisers at the learning rates of the kept ones."""
        instance = self.instance
        instance.weights.publish()
        with instance.quiet():
            with torch.no_grad():
                values, _ = instance.forward(batch)
            adjoint = any(starts_at_adjoint(self.banks[i]) for i in self.tables.passing)
            sweep = dual_sweep(instance, batch, values) if adjoint else []
        states, duals, dual_banks = [], [], []
        for i in self.tables.passing:
            bank = self.banks[i]
            start = started(bank.first.start, values[i], self.generator)
            states.append(self.tables.keeping[i].stored(values[i] if start is None else start))
            if bank.multiplier is not None:
                shape = self.tables.dual_shape(i, values[i].shape[1])
                duals.append(sweep[i] if starts_at_adjoint(bank) else values[i].new_zeros(shape))
                dual_banks.append(i)
        for name, banks, tensors, rule in (
            ("states", self.tables.passing, states, self.state_rule),
            ("multipliers", dual_banks, duals, self.dual_rule),
        ):
            if tensors:
                optimizer = ExtraRows(tensors, rule, self.scheme, ascent=name == "multipliers")
                optimizer.param_groups[0]["lr"] = self.optimizers[name].param_groups[0]["lr"]
                optimizer.take([None for _ in tensors])
                self._groups.append((optimizer, banks, name == "multipliers"))

    def extrapolate(self, gradients: Gradients | None) -> None:
        """First half step of states and multipliers, in the batch's rows only."""
        for optimizer, banks, dual in self._groups:
            moved = optimizer.extrapolated(self._pick(gradients, banks, dual) if gradients is not None else None)
            self._set(banks, [self._inside(i, v, dual) for i, v in zip(banks, moved, strict=True)], dual)

    def update(self, gradients: Gradients, only: Literal["states", "multipliers"] | None = None) -> None:
        """Second half step, written back; of one group alone where `only` says so."""
        for optimizer, banks, dual in self._groups:
            if only is not None and dual != (only == "multipliers"):
                continue

            def inside(k: int, value: Tensor, banks: list[int] = banks, dual: bool = dual) -> Tensor:
                return self._inside(banks[k], value, dual)

            optimizer.update(self._pick(gradients, banks, dual), inside)
        self._refresh()

    def finish(self) -> None:
        """End a step: transient values are dropped."""
        self._groups = [g for g in self._groups if g[0] in self.optimizers.values()]

    def _refresh(self) -> None:
        for optimizer, banks, dual in self._groups:
            self._set(banks, optimizer.held, dual)

    def _set(self, banks: list[int], values: list[Tensor], dual: bool) -> None:
        for i, v in zip(banks, values, strict=True):
            if dual:
                self.multipliers[i] = v
            else:
                self.stored[i] = v

    def _pick(self, gradients: Gradients, banks: list[int], dual: bool) -> list[Tensor]:
        if not dual:
            return [gradients.states[i] for i in banks]
        found = [gradients.multipliers[i] for i in banks]
        return [g for g in found if g is not None]

    def _inside(self, bank: int, value: Tensor, dual: bool) -> Tensor:
        if dual:
            return value.clamp_min(0.0) if self.lagrangian.dual_signed(bank) else value
        return self.tables.keeping[bank].project(value)

    def set_multipliers(self, multipliers: list[Tensor]) -> None:
        """Replace the multipliers of the batch's rows."""
        for optimizer, banks, dual in self._groups:
            if dual:
                for held, i in zip(optimizer.held, banks, strict=True):
                    held.copy_(multipliers[i])
                self._set(banks, optimizer.held, dual)

    def values(self) -> list[Tensor]:
        """Values of the states as the stages read them, at the point where gradients are wanted."""
        return self.lagrangian.values(self.stored, self.noise)

    # ---------------------------------------------------------------- results
    def restarted(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """States and multipliers as they would start at the present weights, by name, on the CPU."""
        generator = torch.Generator(device=self.instance.device).manual_seed(self.generator.initial_seed())
        return Tables(self.lagrangian, generator).named()

    def bytes(self) -> int:
        """Bytes of tables and their optimiser rows, and of what is transient in the last batch."""
        tensors = [*self.tables.states, *self.tables.multipliers]
        tensors += [t for i in self.tables.passing for t in (self.stored[i], self.multipliers[i]) if t is not None]
        slots = [t for o in self.optimizers.values() for s in o.state.values() for t in s.values()]
        return sum(t.numel() * t.element_size() for t in [*tensors, *slots])

    @contextmanager
    def looking(self) -> Iterator[None]:
        """Noise and random numbers that are drawn inside do not count: a look changes no run."""
        noise, generator = list(self.noise), self.generator.get_state()
        try:
            yield
        finally:
            self.noise = noise
            self.generator.set_state(generator)

    def state_dict(self) -> dict[str, Any]:
        """Tables, noise and generator."""
        return {
            "states": [t.clone() for t in self.tables.states],
            "multipliers": [t.clone() for t in self.tables.multipliers],
            "noise": [None if n is None else n.clone() for n in self.noise],
            "generator": self.generator.get_state(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Resume from `state_dict`."""
        for table, value in zip(self.tables.states, state["states"], strict=True):
            table.copy_(value)
        for table, value in zip(self.tables.multipliers, state["multipliers"], strict=True):
            table.copy_(value)
        self.noise = list(state["noise"])
        self.generator.set_state(state["generator"])
