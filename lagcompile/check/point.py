"""A solution as leaves of autograd, and the program evaluated there, without any backend's code.

In: an `Instance` and a `Solution` of any backend. Out: `CheckPoint`: leaves, loss, defects, the Lagrangian. Invariant:
everything is in float64 and eval mode over all rows, on copies; what a solution does not hold (states that live for one
batch, multipliers of pure sizes) is completed by a forward pass or the exact dual sweep, and said.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from lagcompile.check.kinks import Kink, KinkRecorder
from lagcompile.frontend.graphmodule import WithWeights
from lagcompile.ir import trust
from lagcompile.ir.base import ProgramError
from lagcompile.ir.program import DefectConstraint, Program, StateVariable, ValueConstraint
from lagcompile.ir.solution import Solution
from lagcompile.runtime.float64 import double_on_cpu, in_float64
from lagcompile.runtime.instance import Instance, convert, to_rows, to_value
from lagcompile.runtime.slopes import Slopes
from lagcompile.runtime.weights import not_real

Leaf = tuple[str, str]
"""Role (input, weight, state) and name."""


@dataclass
class CheckPoint:
    """A solution, evaluated.

    Attributes:
        leaves: variables by role and name, requiring gradients; states as (rows, ...features).
        loss: the user's loss.
        smooth: loss, l2 terms, and the quadratic terms of pure penalties and tubes (none for augmented weights).
        defects: constraint name -> r, (rows, ...features), connected.
        forces: constraint name -> d L / d r / c, of the same shape.
        shares: constraint name -> c (over the number of features where the coupling takes their mean).
        values: value constraints -> rows and multipliers: ("==" or "<=", rows, multipliers).
        labels: class of each row; None where nothing is kept per class.
        facts: what was completed.
        kinks: numbers at which stages or loss have no derivative.
        at: the Lagrangian at other values of the leaves, forces and multipliers as they are here.
    """

    program: Program
    leaves: dict[Leaf, Tensor]
    loss: Tensor
    smooth: Tensor
    defects: dict[str, Tensor]
    forces: dict[str, Tensor]
    shares: dict[str, float]
    multipliers: Mapping[str, Tensor]
    values: dict[str, tuple[str, Tensor, Tensor]]
    labels: Tensor | None = None
    facts: list[str] = field(default_factory=list)
    kinks: tuple[Kink, ...] = ()
    at: Callable[[Mapping[Leaf, Tensor]], Tensor] = field(default=lambda leaves: torch.tensor(torch.nan))

    def lagrangian(self) -> Tensor:
        """Smooth part + c <force, r> + multipliers of value constraints, connected to the leaves."""
        total = self.smooth
        for name, r in self.defects.items():
            total = total + self.shares[name] * (self.forces[name] * r).sum()
        for _, rows, mu in self.values.values():
            total = total + (mu * rows).sum()
        return total

    def gradients(self, value: Tensor, *, graph: bool = False) -> dict[Leaf, Tensor]:
        """Gradient of a scalar in every leaf."""
        found = torch.autograd.grad(
            value, list(self.leaves.values()), create_graph=graph, retain_graph=True, materialize_grads=True
        )
        return dict(zip(self.leaves, (g.to_dense() for g in found), strict=True))

    def bounds(self, leaf: Leaf) -> tuple[float, float]:
        """Lower and upper bound of a leaf: its domain and the user's bounds on it."""
        role, name = leaf
        low, high = -torch.inf, torch.inf
        if role == "state":
            low, high = self.program.state(name).domain.bounds
        for d in self.program.data:
            if role == "input" and d.name == name:
                low, high = low if d.lower is None else d.lower, high if d.upper is None else d.upper
        return self.program.narrowed(name, low, high)

    def l1(self, leaf: Leaf) -> float:
        """Weight of |.| of a leaf in the objective."""
        role, total = leaf[0], 0.0
        for term in self.program.objective.regularisers:
            if term.kind == "l1" and term.on == f"{role}s":
                mean = role == "state" and self.program.objective.reduction == "mean"
                total += term.weight / (self.leaves[leaf].shape[0] if mean else 1)
        return total


class _Evaluator:
    """Run the stages at given leaves."""

    def __init__(self, instance: Instance) -> None:
        self.instance, self.program = instance, instance.program
        self.network = convert(instance.network.copy(), torch.device("cpu"), wide=True)
        for module in (
            self.network.capture.original,
            self.network.capture.module,
            self.network.prologue.module,
            *(s.module for s in self.network.stages),
        ):
            module.eval().requires_grad_(False)
        batch = instance.batch(torch.arange(instance.examples), prepared=False)
        self.data = {n: double_on_cpu(v) for n, v in batch.values.items()}
        self.target = pytree.tree_map(double_on_cpu, batch.target)
        self.labels = None if batch.labels is None else batch.labels.cpu()
        self.aliases = {a: n for n, others in self.network.capture.ties.items() for a in others}
        self.kept = [s for s in self.program.states if s.storage.variable]

    def run(
        self,
        leaves: Mapping[Leaf, Tensor],
        missing: tuple[StateVariable, ...] = (),
        recorder: KinkRecorder | None = None,
    ) -> tuple[dict[str, Any], dict[str, Tensor], dict[str, Tensor]]:
        """Values by node name, predictions by state name, and the states that were missing, as predicted."""
        env: dict[str, Any] = dict(self.data)
        env.update({n: v for (role, n), v in leaves.items() if role == "input"})
        prologue = self.network.prologue
        with nullcontext() if recorder is None else recorder.at("the part before the first stage"):
            env.update(zip(prologue.writes, prologue.module(*(env[n] for n in prologue.reads)), strict=True))
        by_node = {s.node: s for s in self.kept}
        predictions: dict[str, Tensor] = {}
        completed: dict[str, Tensor] = {}
        for stage in self.network.stages:
            given: dict[str, Tensor] = {}
            for slot, _ in stage.module.named_parameters(remove_duplicate=False):
                value = leaves.get(("weight", self.aliases.get(slot, slot)))
                if value is not None:
                    given[slot] = value
            with nullcontext() if recorder is None else recorder.at(f"stage {stage.name}"):
                called = WithWeights(stage.module, tuple(given))
                written = called(tuple(given.values()), tuple(env[n] for n in stage.reads))
            for node, value in zip(stage.writes, written, strict=True):
                state = by_node.get(node)
                if state is None:
                    env[node] = value
                    continue
                rows = to_rows(value.unsqueeze(0), state.type)[0]
                predictions[state.name] = rows
                if state in missing:
                    completed[state.name] = rows.detach()
                    env[node] = value
                else:
                    env[node] = to_value(leaves["state", state.name].unsqueeze(0), state.type)[0]
        return env, predictions, completed


def check_point(
    instance: Instance, solution: Solution, *, step: int | None = None, slopes: Slopes | None = None
) -> CheckPoint:
    """Evaluate a solution of an instance.

    Args:
        instance: what was solved; copied, never changed.
        solution: of any backend.
        step: step at which scheduled quadratic weights are read; None: the solution's last.
        slopes: slopes at kinks; None takes autograd's.

    Raises:
        ProgramError: states that are kept per class.
    """
    if any(s.storage.sampled for s in instance.program.states):
        raise ProgramError(
            "the KKT conditions of states kept as Gaussians per class are not defined on rows of data: "
            "the certificate of `verify` still applies"
        )
    if complex_ := list(not_real(instance.program, "a check of KKT conditions")):
        raise ProgramError(complex_)
    with in_float64():
        evaluator = _Evaluator(instance)
        leaves, missing = _leaves(evaluator, solution)
        facts: list[str] = []
        if missing:
            with torch.no_grad():
                _, _, completed = evaluator.run(leaves, missing)
            leaves.update({("state", n): v.clone().requires_grad_() for n, v in completed.items()})
            names = ", ".join(s.name for s in missing)
            facts.append(f"{names}: not in the solution; values of a forward pass, multipliers of the dual sweep")
        recorder = KinkRecorder()
        with nullcontext() if slopes is None else slopes:
            env, predictions, _ = evaluator.run(leaves, recorder=recorder)
            with recorder.at("the loss"):
                loss = evaluator.instance.loss(evaluator.network.assemble(env), evaluator.target).reshape(())
            point = _evaluated(evaluator, leaves, env, predictions, solution, step, loss=loss)
        point.kinks = recorder.kinks(leaves) if slopes is None else ()
        point.facts += facts
        unknown = _forces(evaluator, point, solution, {s.name for s in missing})
        _sweep(point, unknown)
    point.at = partial(_lagrangian_at, evaluator, point, solution, step)
    return point


def _lagrangian_at(
    evaluator: _Evaluator, point: CheckPoint, solution: Solution, step: int | None, leaves: Mapping[Leaf, Tensor]
) -> Tensor:
    with in_float64():
        env, predictions, _ = evaluator.run(leaves)
        loss = evaluator.instance.loss(evaluator.network.assemble(env), evaluator.target).reshape(())
        moved = _evaluated(evaluator, dict(leaves), env, predictions, solution, step, loss=loss)
        moved.forces = point.forces
        return moved.lagrangian()


def _leaves(evaluator: _Evaluator, solution: Solution) -> tuple[dict[Leaf, Tensor], tuple[StateVariable, ...]]:
    program = evaluator.program
    given: Mapping[str, Tensor] = {
        **dict(solution.model.named_parameters()),
        **solution.details.get("weights", {}),
    }
    inputs: Mapping[str, Tensor] = solution.details.get("inputs", {})
    leaves: dict[Leaf, Tensor] = {}
    for d in program.data:
        if d.free:
            leaves["input", d.name] = _leaf(inputs.get(d.name, evaluator.data[d.name]))
    for w in program.weights:
        if w.trainable:
            leaves["weight", w.name] = _leaf(given[w.name])
    missing = []
    for state in evaluator.kept:
        if state.name in solution.states:
            leaves["state", state.name] = _leaf(solution.states[state.name])
        else:
            missing.append(state)
    return leaves, tuple(missing)


def _leaf(value: Tensor) -> Tensor:
    return value.detach().cpu().double().clone().requires_grad_()


def _evaluated(
    evaluator: _Evaluator,
    leaves: dict[Leaf, Tensor],
    env: Mapping[str, Any],
    predictions: Mapping[str, Tensor],
    solution: Solution,
    step: int | None,
    *,
    loss: Tensor,
) -> CheckPoint:
    program = evaluator.program
    smooth, at = loss, solution.steps if step is None else step
    mean = program.objective.reduction == "mean"
    for term in program.objective.regularisers:
        if term.kind == "l2":
            for (role, _), v in leaves.items():
                if term.on == f"{role}s":
                    share = 1.0 / v.shape[0] if role == "state" and mean else 1.0
                    smooth = smooth + 0.5 * term.weight * share * (v * v).sum()
    defects, shares = {}, {}
    for c in program.defects:
        r = predictions[c.state] - leaves["state", c.state]
        share = 1.0 / r.shape[0] if mean else 1.0
        if c.features == "mean":
            share /= max(1, r[0].numel())
        if c.weight is not None and not c.weight.augmented:
            smooth = smooth + 0.5 * c.weight.at(at) * share * (r * r).sum()
        if program.multiplier_of(c.name) is not None:
            defects[c.name], shares[c.name] = r, share
    names = {s.node: s.name for s in program.states}
    named = {names.get(n, n): v for n, v in env.items() if isinstance(v, Tensor)}
    named = {**dict(evaluator.network.capture.original.named_parameters()), **named}
    named.update({n: v for (role, n), v in leaves.items() if role == "weight"})
    point = CheckPoint(
        program, leaves, loss, smooth, defects, {}, shares, solution.multipliers, {}, labels=evaluator.labels
    )
    for user in program.constraints:
        if isinstance(user, ValueConstraint):
            _value(point, user, named, solution, at)
    return point


def _function(constraint: str, name: str) -> Callable[..., Tensor]:
    try:
        return trust.resolve(name)
    except trust.Refused as error:
        raise ProgramError(f"the constraint '{constraint}': {error}") from error


def _value(point: CheckPoint, c: ValueConstraint, named: Mapping[str, Tensor], solution: Solution, step: int) -> None:
    """Rows of a user's constraint with their multipliers, or its penalty."""
    rows: dict[str, tuple[str, Tensor]] = {}
    variables = {name for _, name in point.leaves}
    if c.function is not None:
        rows[c.name] = (c.relation, _function(c.name, c.function)(*(named[n] for n in c.reads)))
    else:
        for name in c.reads:
            label = c.name if len(c.reads) == 1 else f"{c.name}[{name}]"
            if name not in variables or not point.program.requires(c):
                v = named[name]
                if c.upper is not None:
                    rows[f"{label} (upper)"] = ("<=", v - c.upper)
                if c.lower is not None:
                    rows[f"{label} (lower)"] = ("<=", c.lower - v)
    for label, (relation, value) in rows.items():
        if not point.program.requires(c):
            assert c.weight is not None
            excess = value if relation == "==" else value.clamp_min(0.0)
            point.smooth = point.smooth + 0.5 * c.weight.at(step) * (excess * excess).sum()
            continue
        plain = label.removesuffix(" (upper)").removesuffix(" (lower)")
        found = point.program.multiplier_of(c.name)
        given = solution.multipliers.get(f"lambda({plain})" if found is None else found.name)
        mu = torch.zeros_like(value) if given is None else given.detach().double().reshape(value.shape)
        if label.endswith(" (upper)"):
            mu = mu.clamp_min(0.0)
        elif label.endswith(" (lower)"):
            mu = (-mu).clamp_min(0.0)
        point.values[label] = (relation, value, mu.detach())


def _forces(evaluator: _Evaluator, point: CheckPoint, solution: Solution, missing: set[str]) -> list[DefectConstraint]:
    """Forces that follow from multipliers or witnesses; the constraints whose forces do not."""
    witnesses: Mapping[str, Tensor] = solution.details.get("forces", {})
    unknown = []
    for c in point.program.defects:
        if c.name not in point.defects:
            continue
        r = point.defects[c.name].detach()
        multiplier = point.program.multiplier_of(c.name)
        assert multiplier is not None
        given = solution.multipliers.get(multiplier.name)
        point.forces[c.name] = torch.zeros_like(r)
        if given is None or c.state in missing:
            unknown.append(c)
            continue
        mu = given.detach().cpu().double()
        if multiplier.laid.rows == "class":
            assert evaluator.labels is not None
            mu = mu.index_select(0, evaluator.labels)
        mu = mu.expand_as(r)
        if c.transform.signed:
            point.forces[c.name] = mu
        elif c.name in witnesses:
            point.forces[c.name] = witnesses[c.name].detach().double()
        elif multiplier.layout != "example" and c.transform.per_row:
            unknown.append(c)
        elif c.transform.norm == 2 and c.transform.half_width > 0:
            norm = torch.linalg.vector_norm(r.flatten(1), dim=1).reshape(-1, *(1 for _ in r.shape[1:]))
            point.forces[c.name] = mu * r / norm.clamp_min(1e-300)
        elif c.transform.half_width > 0:
            sure = r.abs() > 0.5 * c.transform.half_width
            point.forces[c.name] = torch.where(sure, mu * r.sign(), torch.zeros_like(r))
        else:
            unknown.append(c)
    return unknown


def _sweep(point: CheckPoint, unknown: list[DefectConstraint]) -> None:
    """Forces that make the Lagrangian stationary in the states whose multipliers are sizes, last state first."""
    for c in reversed(unknown):
        gradient = point.gradients(point.lagrangian())["state", c.state]
        point.forces[c.name] = gradient.detach() / point.shares[c.name]
