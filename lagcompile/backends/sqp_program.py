"""A program as functions of one flat vector: objective, equalities, inequalities, over all rows of the data.

In: an `Instance`. Out: `ExactProgram`, in float64 and eval mode, on copies of the instance's modules. Invariant: the
objective is the loss with its regularisers, the quadratic terms of constraints without a multiplier, and those inside
tubes (where r = 0 holds they vanish); everything else is a constraint.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from lagcompile.backends.sqp_constraints import Piece, Point
from lagcompile.backends.sqp_form import Form
from lagcompile.backends.sqp_observe import Observer
from lagcompile.backends.sqp_values import violation
from lagcompile.backends.sqp_variables import Values, Variables, state_rows, state_value, variables_of
from lagcompile.frontend.graphmodule import WithWeights
from lagcompile.frontend.stages import StageModule
from lagcompile.runtime.float64 import double_on_cpu, in_float64, leaves_float64
from lagcompile.runtime.instance import Instance, convert
from lagcompile.runtime.starts import started


class ExactProgram:
    """Objective and constraints of an instance as torch functions of a flat float64 vector.

    Args:
        instance: the bound program; its weights are published and copied.
        step: step at which scheduled quadratic weights are read.

    Raises:
        ProgramError: the program has features without an exact form; every problem at once.
    """

    def __init__(self, instance: Instance, *, step: int = 0) -> None:
        instance.weights.publish()
        self.instance, self.program = instance, instance.program
        self.variables: Variables = variables_of(instance)
        self.network = convert(instance.network.copy(), torch.device("cpu"), wide=True)
        self._modules = [self.network.capture.original, *(s.module for s in self.network.stages)]
        for module in (*self._modules, self.network.capture.module, self.network.prologue.module):
            module.eval().requires_grad_(False)
        rows = torch.arange(instance.examples)
        batch = instance.batch(rows, prepared=False)
        self.data = {n: double_on_cpu(v) for n, v in batch.values.items()}
        self.target = pytree.tree_map(double_on_cpu, batch.target)
        self.labels = None if batch.labels is None else batch.labels.cpu()
        self._aliases = {a: n for n, others in self.network.capture.ties.items() for a in others}
        self._slots = {
            s.name: [(p, self._aliases.get(p, p)) for p, _ in s.module.named_parameters(remove_duplicate=False)]
            for s in (self.network.prologue, *self.network.stages)
        }
        self._frozen = {n: p.detach() for n, p in self.network.capture.original.named_parameters()}
        self._states = [s for s in self.program.states if s.storage.variable]
        self._names = {s.node: s.name for s in self.program.states}
        self._widen = False
        with torch.no_grad(), self.default_double():  # a mode costs time in every operation: only where it is needed
            self._widen = leaves_float64(lambda: self.loss(self.at(self._initial())))
        with torch.no_grad(), self.default_double():
            start = self._initial()
            form = Form(self.program, self.variables, self.labels, step).build(lambda: self.at(start))
            self.form = form
            self.pieces: tuple[Piece, ...] = tuple(form.pieces)
            at = self.at(start)
            found = [(p.name, *p.rows(at)) for p in self.pieces]
        self.spans = {n: (0 if e is None else e.numel(), 0 if i is None else i.numel()) for n, e, i in found}

    # ---------------------------------------------------------------- evaluation
    def point(self, z: Tensor) -> Point:
        """Everything at one vector of variables, connected to it."""
        values = self.variables.unpack(z)
        return self.at(values)

    def at(self, values: Values, observer: Observer | None = None) -> Point:
        """Everything at named values; an observer sees the operations of the stages."""
        env: dict[str, Any] = dict(self.data)
        env.update({name: v for (role, name), v in values.items() if role == "input"})
        prologue = self.network.prologue
        if prologue.writes:
            env.update(zip(prologue.writes, self._call(prologue, {}, env, observer), strict=True))
        weights = {name: v for (role, name), v in values.items() if role == "weight"}
        states = {s.node: values["state", s.name] for s in self._states}
        full = {s.node: state_value(s, states[s.node]) for s in self._states}
        predictions: dict[str, Any] = {}
        for stage in self.network.stages:
            written = self._call(stage, weights, env, observer)
            for name, value in zip(stage.writes, written, strict=True):
                if name in full:
                    predictions[name] = value
                    env[name] = full[name]
                else:
                    env[name] = value
        output = self.network.assemble(env)
        named = {self._names.get(n, n): v for n, v in env.items() if isinstance(v, Tensor)}
        return Point(
            variables=values,
            states={s.name: states[s.node] for s in self._states},
            predictions={s.name: state_rows(s, predictions[s.node]) for s in self._states},
            named={**self._frozen, **weights, **named},
            output=output,
        )

    def _call(
        self, stage: StageModule, weights: Mapping[str, Tensor], env: Mapping[str, Any], observer: Observer | None
    ) -> Any:
        inputs = tuple(env[n] for n in stage.reads)
        given = {slot: weights[name] for slot, name in self._slots[stage.name] if name in weights}
        if observer is None:
            return WithWeights(stage.module, tuple(given))(tuple(given.values()), inputs)
        paths = {n: r.module for n, r in self.network.partition.graph.by_name.items()}
        return observer.run_stage(stage.module, stage.name, paths, inputs)

    def loss(self, at: Point) -> Tensor:
        """The user's loss alone."""
        return self.instance.loss(at.output, self.target)

    def objective(self, at: Point) -> Tensor:
        """Loss, regularisers, penalties."""
        total = self.loss(at).reshape(())
        for penalty in self.form.penalties:
            r = at.defect(penalty.state)
            total = total + 0.5 * penalty.weight * (r * r).sum()
        for constraint, function, weight in self.form.soft:
            total = total + 0.5 * weight * violation(constraint, function, at)
        return total + self._regularisers(at)

    def _regularisers(self, at: Point) -> Tensor:
        total = torch.zeros((), dtype=torch.float64)
        mean = self.program.objective.reduction == "mean"
        for term in self.program.objective.regularisers:
            role = "weight" if term.on == "weights" else "state"
            for key, value in at.variables.items():
                if key[0] != role:
                    continue
                size = at.variables["slack", f"|{key[1]}|"].sum() if term.kind == "l1" else 0.5 * (value * value).sum()
                total = total + term.weight * (size / value.shape[0] if role == "state" and mean else size)
        return total

    def constraints(self, at: Point) -> tuple[Tensor, Tensor]:
        """All equalities and all inequalities, flat, in the order of the pieces."""
        eq, ineq = [], []
        for piece in self.pieces:
            e, i = piece.rows(at)
            if e is not None:
                eq.append(e.reshape(-1))
            if i is not None:
                ineq.append(i.reshape(-1))
        empty = torch.zeros(0, dtype=torch.float64)
        return torch.cat(eq) if eq else empty, torch.cat(ineq) if ineq else empty

    def fused(self, z: Tensor) -> Tensor:
        """Objective, equalities, inequalities as one vector."""
        at = self.point(z)
        eq, ineq = self.constraints(at)
        return torch.cat([self.objective(at).reshape(1), eq, ineq])

    @property
    def sizes(self) -> tuple[int, int, int]:
        """Variables, equalities, inequalities."""
        return self.variables.size, sum(e for e, _ in self.spans.values()), sum(i for _, i in self.spans.values())

    @contextmanager
    def default_double(self) -> Iterator[None]:
        """Float64 as torch's default type, and in place of casts, where modules or the loss make lower precisions."""
        with in_float64() if self._widen else nullcontext():
            yield

    def observe(self, z: Tensor, constant: frozenset[str] = frozenset()) -> Observer:
        """The operations of stages and loss at a point.

        Args:
            z: the point.
            constant: states that count as data.
        """
        observer = Observer()
        values = {k: v.detach().clone().requires_grad_() for k, v in self.variables.unpack(z).items()}
        for name in constant:
            values["state", name] = values["state", name].detach()
        originals = dict(self.network.capture.original.named_parameters())
        moved = {name: originals[name] for role, name in values if role == "weight"}
        before = {name: p.detach().clone() for name, p in moved.items()}
        for name, p in moved.items():  # the stages are run with their own parameters
            p.data.copy_(values["weight", name])
            p.requires_grad_()
        try:
            at = self.at(values, observer)
            observer.run_loss(lambda: self.loss(at))
        finally:
            for name, p in moved.items():
                p.requires_grad_(False)
                p.data.copy_(before[name])
        return observer

    # ---------------------------------------------------------------- values
    def _initial(self) -> Values:
        """A forward pass at the instance's weights and inputs; slacks as large as they must be."""
        result: Values = {}
        inputs = [self.data[n] for n in self.network.capture.signature.names]
        values = self.network.glue(inputs)
        for block in self.variables.blocks:
            if block.role == "weight":
                result[block.key] = self._frozen[block.name].clone()
            elif block.role == "input":
                result[block.key] = self.data[block.name].clone()
            elif block.role == "slack":
                result[block.key] = torch.zeros(block.shape, dtype=torch.float64)
        for state in self._states:
            result["state", state.name] = state_rows(state, values[state.node])
        return result

    def initial(self) -> Values:
        """The start that the program asks for, as named values."""
        with torch.no_grad(), self.default_double():
            result = self._initial()
        generator = torch.Generator().manual_seed(0)
        for state in self._states:
            value = started(state.start, result["state", state.name].unsqueeze(0), generator)
            if value is not None:
                result["state", state.name] = value[0]
        return result
