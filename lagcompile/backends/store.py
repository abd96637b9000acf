"""Where a run keeps its states and multipliers: tables, class Gaussians, shared values, transient values of a batch.

In: a `Lagrangian`, step rules, a seed. Out: `Store`. Invariant: between `begin` and the last `update` of a step the
batch's rows are held as small tensors; tables are read once and written once a step, in the batch's rows only.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor

from lagcompile.frontend.graph import dtype_of
from lagcompile.ir.axes import ClassGaussian, NonNegative, NormTube, Shared, Table, Transient
from lagcompile.ir.base import BindError, ProgramError
from lagcompile.runtime import kkt
from lagcompile.runtime.adjoint import dual_sweep
from lagcompile.runtime.instance import Batch, Instance, batch_axis, quiet
from lagcompile.runtime.lagrangian import Gradients, Lagrangian, gaussian
from lagcompile.runtime.layout import Bank
from lagcompile.runtime.rules import SGD, Rule, Scheme
from lagcompile.runtime.steps import ExtraRows

FILL_BATCH = 512


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
            ProgramError: starts or layouts that do not go together.
        """
        self.lagrangian = lagrangian
        self.instance = lagrangian.instance
        self.banks = self.instance.layout.banks
        self.scheme: Scheme = scheme
        self.state_rule, self.dual_rule = states, multipliers or SGD(lr=0.0)
        self.generator = torch.Generator(device=self.instance.device).manual_seed(seed)
        _refuse(self.instance, multipliers is None)
        self._kept = [i for i, b in enumerate(self.banks) if not isinstance(b.first.storage, Transient)]
        self._passing = [i for i, b in enumerate(self.banks) if isinstance(b.first.storage, Transient)]
        self._dual = [i for i in self._kept if self.banks[i].multiplier is not None]
        self.noise = [self._noise(b) for b in self.banks]
        self.rho: list[float] = [0.0 for _ in self.banks]
        self._state_tables = [self._state_table(self.banks[i]) for i in self._kept]
        self._dual_tables = [self._dual_table(i) for i in self._dual]
        self._fill()
        self.optimizers: dict[str, torch.optim.Optimizer] = {}
        if self._state_tables or self._passing:
            self.optimizers["states"] = ExtraRows(self._state_tables or [torch.empty(0, 0)], states, scheme)
            duals = self._dual_tables or [torch.empty(0, 0)]
            self.optimizers["multipliers"] = ExtraRows(duals, self.dual_rule, scheme, ascent=True)
        self._groups: list[tuple[ExtraRows, list[int], bool]] = []
        self.stored: list[Tensor] = [torch.empty(0) for _ in self.banks]
        self.multipliers: list[Tensor | None] = [None for _ in self.banks]

    # ---------------------------------------------------------------- allocation
    def _features(self, bank: Bank) -> tuple[int, ...]:
        kind = bank.first.type
        if kind.features is None:
            raise BindError(f"the shape of the state {bank.first.name} is not known: lift with example_inputs")
        _, factor = batch_axis(kind)
        return (factor, *kind.features) if factor > 1 else kind.features

    def _dtype(self, bank: Bank) -> torch.dtype:
        """Type in which a state is computed."""
        return dtype_of(bank.first.type.dtype)

    def _state_table(self, bank: Bank) -> Tensor:
        storage, features, device = bank.first.storage, self._features(bank), self.instance.device
        dtype = self._dtype(bank)
        if isinstance(storage, ClassGaussian):
            table = torch.zeros((len(bank.states), self._classes(), 2, *features), dtype=dtype, device=device)
            table[:, :, 1] = storage.sigma + math.log(-math.expm1(-storage.sigma))  # softplus's inverse
            return table
        if isinstance(storage, Table) and storage.dtype is not None:
            dtype = dtype_of(storage.dtype)
        rows = 1 if isinstance(storage, Shared) else self.instance.examples
        # filled, not zero-allocated: memory that is only promised would be fetched page by page inside the steps
        return torch.empty((len(bank.states), rows, *features), dtype=dtype, device=device).fill_(0.0)

    def _dual_table(self, index: int) -> Tensor:
        bank = self.banks[index]
        storage = bank.first.storage
        dtype = self._dtype(bank)
        if isinstance(storage, Table) and storage.dtype is not None:
            dtype = dtype_of(storage.dtype)
        shape = self._dual_shape(index, self._rows(index))
        return torch.empty(shape, dtype=dtype, device=self.instance.device).fill_(0.0)

    def _dual_shape(self, index: int, rows: int) -> tuple[int, ...]:
        bank = self.banks[index]
        assert bank.multiplier is not None
        features = self._features(bank)
        ones = tuple(1 for _ in features)
        layout = bank.multiplier.layout
        if layout == "class":
            return (len(bank.states), self._classes(), *features)
        if layout == "scalar":
            return (len(bank.states), 1, *ones)
        return (len(bank.states), rows, *(features if layout == "full" else ones))

    def _rows(self, index: int) -> int:
        """Rows of a bank's defects over the whole data set."""
        if self.lagrangian.populations.produced[index]:
            return self.instance.samples or 0
        return 1 if isinstance(self.banks[index].first.storage, Shared) else self.instance.examples

    def _classes(self) -> int:
        assert self.instance.program.classes is not None
        return self.instance.program.classes

    def _noise(self, bank: Bank) -> Tensor | None:
        if not isinstance(bank.first.storage, ClassGaussian):
            return None
        shape = (len(bank.states), self.instance.samples or 0, *self._features(bank))
        return torch.randn(shape, generator=self.generator, device=self.instance.device, dtype=self._dtype(bank))

    # ---------------------------------------------------------------- starts
    def _fill(self) -> None:
        """Start every state and multiplier that is kept."""
        for table, i in zip(self._state_tables, self._kept, strict=True):
            bank = self.banks[i]
            if bank.first.start.kind == "unit_sphere":
                target = table[:, :, 0] if isinstance(bank.first.storage, ClassGaussian) else table
                drawn = torch.randn(target.shape, generator=self.generator, device=table.device)
                flat = drawn.flatten(2) if drawn.dim() > 2 else drawn.unsqueeze(-1)
                norm = torch.linalg.vector_norm(flat, dim=2).reshape(*drawn.shape[:2], *(1 for _ in drawn.shape[2:]))
                target.copy_((drawn / norm).to(target.dtype))
        forward = [i for i in self._kept if self.banks[i].first.start.kind == "forward"]
        adjoint = [i for i in self._dual if _starts_at_adjoint(self.banks[i])]
        if forward or adjoint:
            self.instance.weights.publish()
            with quiet(self.instance.module):
                self._fill_forward(set(forward), set(adjoint))

    def _fill_forward(self, forward: set[int], adjoint: set[int]) -> None:
        sums: dict[int, Tensor] = {}
        for rows in torch.arange(self.instance.examples).split(FILL_BATCH):
            batch = self.instance.batch(rows)
            with torch.no_grad():
                values, _ = self.instance.forward(batch)
            for table, i in zip(self._state_tables, self._kept, strict=True):
                bank = self.banks[i]
                if i not in forward:
                    continue
                if isinstance(bank.first.storage, ClassGaussian):
                    assert batch.labels is not None
                    sums.setdefault(i, torch.zeros_like(table[:, :, 0])).index_add_(1, batch.labels, values[i])
                else:
                    at = None if isinstance(bank.first.storage, Shared) else batch.rows
                    _write(table, at, kkt.from_domain(values[i], bank.first.domain))
            if adjoint:
                sweep = dual_sweep(self.instance, batch, values)
                for table, i in zip(self._dual_tables, self._dual, strict=True):
                    if i in adjoint:
                        _write(table, batch.rows, sweep[i])
        for i, total in sums.items():
            assert self.instance.labels is not None
            counts = torch.bincount(self.instance.labels, minlength=self._classes()).clamp(min=1).to(total.device)
            mean = total / counts.reshape(1, -1, *(1 for _ in total.shape[2:]))
            self._state_tables[self._kept.index(i)][:, :, 0] = mean

    # ---------------------------------------------------------------- one step
    def begin(self, batch: Batch, step: int) -> None:
        """Take the batch's rows; start what is transient; draw fresh noise; set the quadratic weights."""
        self.batch = batch
        self.rho = [b.constraint.weight.at(step) if b.constraint.weight is not None else 0.0 for b in self.banks]
        for i, bank in enumerate(self.banks):
            storage = bank.first.storage
            if isinstance(storage, ClassGaussian) and storage.noise == "fresh":
                self.noise[i] = self._noise(bank)
        self._groups = []
        if self._kept:
            self._open("states", self._kept, [self._row_index(i, batch) for i in self._kept])
            self._open("multipliers", self._dual, [self._dual_index(i, batch) for i in self._dual])
        if self._passing:
            self._start_transient(batch)
        self._refresh()

    def _open(self, name: str, banks: list[int], rows: list[Tensor | None]) -> None:
        if not banks:
            return
        optimizer = self.optimizers[name]
        assert isinstance(optimizer, ExtraRows)
        optimizer.take(rows, [self._dtype(self.banks[i]) for i in banks])
        self._groups.append((optimizer, banks, name == "multipliers"))

    def _row_index(self, i: int, batch: Batch) -> Tensor | None:
        return batch.rows if isinstance(self.banks[i].first.storage, Table) else None

    def _dual_index(self, i: int, batch: Batch) -> Tensor | None:
        multiplier = self.banks[i].multiplier
        assert multiplier is not None
        whole = multiplier.layout in {"class", "scalar"} or self.lagrangian.populations.produced[i]
        return None if whole or isinstance(self.banks[i].first.storage, Shared) else batch.rows

    def _start_transient(self, batch: Batch) -> None:
        """Fresh states (and multipliers) of a batch, with fresh optimisers at the learning rates of the kept ones."""
        instance = self.instance
        instance.weights.publish()
        with quiet(instance.module):
            with torch.no_grad():
                values, _ = instance.forward(batch)
            adjoint = any(_starts_at_adjoint(self.banks[i]) for i in self._passing)
            sweep = dual_sweep(instance, batch, values) if adjoint else []
        states, duals, dual_banks = [], [], []
        for i in self._passing:
            bank = self.banks[i]
            start = values[i] if bank.first.start.kind == "forward" else torch.zeros_like(values[i])
            states.append(kkt.from_domain(start, bank.first.domain))
            if bank.multiplier is not None:
                shape = self._dual_shape(i, values[i].shape[1])
                duals.append(sweep[i] if _starts_at_adjoint(bank) else values[i].new_zeros(shape))
                dual_banks.append(i)
        for name, banks, tensors, rule in (
            ("states", self._passing, states, self.state_rule),
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
        """End of a step: what was transient goes."""
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
        return kkt.project(value, self.banks[bank].first.domain)

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
    def named(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """States and multipliers by name, on the CPU; a class Gaussian as name.mu and name.sigma."""
        states: dict[str, Tensor] = {}
        for table, i in zip(self._state_tables, self._kept, strict=True):
            bank = self.banks[i]
            for k, state in enumerate(bank.states):
                if isinstance(bank.first.storage, ClassGaussian):
                    mu, sigma = gaussian(table)
                    states |= {f"{state.name}.mu": mu[k].cpu(), f"{state.name}.sigma": sigma[k].cpu()}
                else:
                    states[state.name] = kkt.to_domain(table[k].to(self._dtype(bank)), bank.first.domain).cpu()
        program = self.instance.program
        duals: dict[str, Tensor] = {}
        for table, i in zip(self._dual_tables, self._dual, strict=True):
            for k, state in enumerate(self.banks[i].states):
                constraint = program.defect_of(state.name)
                assert constraint is not None
                multiplier = program.multiplier_of(constraint.name)
                assert multiplier is not None
                duals[multiplier.name] = table[k].to(self._dtype(self.banks[i])).cpu()
        return states, duals

    def bytes(self) -> int:
        """Bytes of tables and their optimiser rows, and of what is transient in the last batch."""
        tensors = [*self._state_tables, *self._dual_tables]
        tensors += [t for i in self._passing for t in (self.stored[i], self.multipliers[i]) if t is not None]
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
            "states": [t.clone() for t in self._state_tables],
            "multipliers": [t.clone() for t in self._dual_tables],
            "noise": [None if n is None else n.clone() for n in self.noise],
            "generator": self.generator.get_state(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state_dict`."""
        for table, value in zip(self._state_tables, state["states"], strict=True):
            table.copy_(value)
        for table, value in zip(self._dual_tables, state["multipliers"], strict=True):
            table.copy_(value)
        self.noise = list(state["noise"])
        self.generator.set_state(state["generator"])


def _starts_at_adjoint(bank: Bank) -> bool:
    return bank.multiplier is not None and bank.multiplier.start == "adjoint"


def _write(table: Tensor, rows: Tensor | None, values: Tensor) -> None:
    if rows is None:
        table.copy_(values)
    else:
        table.index_copy_(1, rows, values.to(table.dtype))


def _refuse(instance: Instance, sweep: bool) -> None:
    problems = list(_problems(instance, sweep))
    if problems:
        raise ProgramError(problems)


def _problems(instance: Instance, sweep: bool) -> Iterator[str]:
    for bank in instance.layout.banks:
        name, storage = bank.first.name, bank.first.storage
        if bank.constraint.weight is None and bank.multiplier is None:
            yield (
                f"the constraint {bank.constraint.name} has neither a multiplier nor a weight: nothing couples the "
                f"stages at {name} (after {bank.first.node}). Give 'multiplier: {{layout: full}}' or a weight"
            )
        if bank.first.start.kind == "observed":
            yield f"the state {name} starts from observed values, which trajectories give (method gauss_newton)"
        domain = bank.first.domain
        if bank.first.start.kind == "zeros" and isinstance(domain, NonNegative) and domain.by == "relu":
            yield (
                f"the state {name} starts from zeros, where relu has no slope, and would never move: "
                "write 'domain: {kind: nonnegative, by: project}', or start from a forward pass"
            )
        if isinstance(storage, Transient) and bank.first.start.kind == "unit_sphere":
            yield f"the state {name} is transient and starts by a forward pass or from zeros, not on the unit sphere"
        full = bank.multiplier is not None and bank.multiplier.layout == "full"
        if (sweep or _starts_at_adjoint(bank)) and (not full or isinstance(storage, ClassGaussian)):
            yield (
                f"the state {name}: adjoints have one number for each example and feature, so its multiplier must be "
                "laid out 'full' and its storage must not be class_gaussian"
            )
        if isinstance(bank.constraint.transform, NormTube) and isinstance(storage, Shared):
            yield f"the state {name} is shared by all examples: norm_tube needs one row for each example"
