"""Random modules, outputs, methods and batches: lift, bind, three steps, verify; or one refusal by name.

A solution has a finite model of the user's class and types, and the states and multipliers that its program says.
"""

from __future__ import annotations

import random
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

import lagcompile as lc
from tests.unseen import modules
from tests.unseen._nets import Net, tensors_of

CI, NIGHTLY = 60, 3_000
TRANSIENT = lc.Formulation(storage=lc.Transient(), multiplier=None, weight=lc.ConstantWeight(value=1.0))
METHODS: Mapping[str, tuple[lc.Formulation, Any]] = {
    "extragradient": (lc.Formulation(), None),
    "inner steps": (lc.Formulation(weight=lc.ConstantWeight(value=1.0)), lc.Extragradient(inner_steps=2)),
    "past": (lc.Formulation(), lc.ExtragradientFromPast()),
    "optimistic": (lc.Formulation(), lc.OptimisticGradient()),
    "descent": (lc.Formulation(multiplier=lc.MultiplierOptions(start="adjoint")), lc.DescentAscent()),
    "sweep": (lc.Formulation(storage=lc.Transient()), lc.DescentAscent(dual_sweep=True)),
    "augmented": (lc.Formulation(weight=lc.AugmentedWeight(value=1.0)), lc.AugmentedLagrangian()),
    "eliminated": (lc.Formulation(storage=lc.Eliminated()), None),
    "backprop": (TRANSIENT, lc.Backprop()),
    "altmin": (TRANSIENT, lc.AltMin()),
    "proxprop": (TRANSIENT, lc.ProxProp(explicit=("*",))),
    "dfa": (TRANSIENT, lc.FeedbackAlignment()),
    "dtp": (TRANSIENT, lc.DifferenceTargetPropagation()),
    "sqp": (lc.Formulation(), lc.SQP(max_iterations=5)),
}
SAID = ("'", ".py:", "example", "batch", "layer", "state", "stage", "weight", "loss", "output")
"""A refusal speaks of at least one of these."""


def judge(tally: Mapping[str, int], cases: int) -> None:
    """Most cases are solved: what is refused are methods that are not for every net, and batches of one row."""
    assert tally.get("solved", 0) >= 0.5 * cases, f"{tally.get('solved', 0)} of {cases} cases are solved"


def case(seed: int) -> Mapping[str, int]:
    """Draw, lift, solve, verify."""
    source = random.Random(seed)
    model, examples, drawn = _drawn(source, seed)
    name = source.choice([*METHODS])
    rows = source.choice([1, 2, 5, 9, 12])
    if name == "sqp":
        rows = min(rows, 2)
    batch, stages = source.choice([1, 3, 4, 64]), source.randint(1, 5)
    said = f"{drawn}; method {name}, {rows} rows in batches of {batch}, {stages} stages"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return _solved(model, examples, rows, batch, stages, METHODS[name], seed)
    except lc.LagcompileError as error:
        _named(error, said)
        return {f"refused {type(error).__name__}": 1, f"refused by {name}": 1}
    except Exception as error:
        raise AssertionError(f"{type(error).__name__}: {error}; {said}") from error


def _named(error: lc.LagcompileError, said: str) -> None:
    assert error.problems, f"a refusal without a sentence; {said}"
    assert any(word in str(error) for word in SAID), f"a refusal without a place: {error}; {said}"


def _drawn(source: random.Random, seed: int) -> tuple[nn.Module, Any, str]:
    """A module, its inputs for a number of rows, and what it is."""
    torch.manual_seed(seed)
    if source.random() < 0.4:
        found, model, _ = modules.valid(seed)
        return model, lambda rows: tuple(modules.values_of(rows, seed)), found.source
    model = Net(source)
    dtype = source.choice([torch.float32, torch.float32, torch.float64])
    if dtype is torch.float64:
        model.double()

    def examples(rows: int) -> tuple[Tensor, ...]:
        return (torch.randn(rows, 4, generator=torch.Generator().manual_seed(seed), dtype=dtype),)

    return model, examples, f"{model}, {dtype}"


def loss(output: Any, target: Tensor) -> Tensor:
    """Reads every tensor of an output; a mean over examples where these have rows."""
    found = [t for t in tensors_of(output) if not t.is_complex()]
    terms = [(i + 1) * (t.double() - 0.5).square().mean() for i, t in enumerate(found) if t.numel()]
    return torch.stack([*terms, 0.0 * target.double().mean()]).sum()


def _solved(
    model: nn.Module,
    examples: Any,
    rows: int,
    batch: int,
    stages: int,
    method: tuple[lc.Formulation, Any],
    seed: int,
) -> Mapping[str, int]:
    formulation, solver = method
    inputs = examples(4)
    most = stages
    try:
        lifted = lc.lift(model, inputs, split=stages, formulation=formulation)
    except lc.SplitError as error:
        most = error.most or 0
        lifted = lc.lift(model, inputs, split=most, formulation=formulation)
    assert len(lifted.stages) == most
    assert 1 <= most <= stages
    x, y = examples(rows), torch.zeros(rows)
    options = lc.RunOptions(steps=3, batch_size=batch, seed=seed)
    solution = lifted.solve((x, y), loss=loss, method=solver, options=options)
    _check(solution, model, rows, stepwise=not isinstance(solver, lc.SQP))
    certificate = lifted.verify(examples(max(rows, 2)), torch.zeros(max(rows, 2)), loss=loss)
    wrong = [r for r in certificate.residuals if not r.ok]
    assert not wrong, f"verify: {wrong[0]}"
    return {"solved": 1, f"solved by {solution.status.name}": 1, "assessed": int(certificate.ok)}


def _check(solution: lc.Solution, model: nn.Module, rows: int, *, stepwise: bool) -> None:
    assert type(solution.model) is type(model)
    moved, before = solution.model.state_dict(), model.state_dict()
    assert moved.keys() == before.keys()
    for name, value in moved.items():
        assert value.dtype == before[name].dtype, name
        assert torch.isfinite(value).all(), f"{name} is not finite"
    for name, p in solution.model.named_parameters():
        frozen = not dict(model.named_parameters())[name].requires_grad
        assert not frozen or torch.equal(p, dict(model.named_parameters())[name]), f"{name} is frozen and moved"
    program = solution.program
    kept = {s.name: s for s in program.states if s.storage.kind in {"table", "shared"}}
    assert set(solution.states) == set(kept)
    for name, state in kept.items():
        value = solution.states[name]
        assert len(value) == (rows if state.storage.kind == "table" else 1), name
        assert torch.isfinite(value).all(), f"{name} is not finite"
    if stepwise:
        wanted = {m.name for m in program.multipliers if m.constraint.removeprefix("c_") in kept}
        assert set(solution.multipliers) == wanted
    for name, value in solution.multipliers.items():
        assert torch.isfinite(value).all(), f"{name} is not finite"
