"""The asserts that solutions must pass, whatever backend made them; they share no code with the backends."""

from __future__ import annotations

import copy
from dataclasses import replace
from importlib.util import find_spec

import pytest
import torch
from torch import Tensor, nn

import lagcompile as lc
from lagcompile.check.certificate import Certificate
from lagcompile.check.kkt import certify_kkt
from lagcompile.runtime.adjoint import dual_sweep
from lagcompile.runtime.instance import Loss
from tests.problems import Problem

needs_casadi = pytest.mark.skipif(
    find_spec("casadi") is None, reason="IPOPT as oracle needs CasADi: pip install 'lagcompile[oracle]'"
)


def assert_kkt(
    problem: Problem, solution: lc.Solution, *, tolerance: float = 1e-8, rho: float | None = None
) -> Certificate:
    """Every unscaled KKT residual is within the tolerance; returns the certificate."""
    certificate = certify_kkt(problem.bind(rho), solution, tolerance=tolerance)
    assert certificate.residuals
    assert certificate.ok, f"{problem.name}: {certificate.worst}"
    return certificate


def assert_adjoints(problem: Problem, solution: lc.Solution, *, tolerance: float = 1e-7) -> None:
    """Multipliers are the adjoints d objective_i / d h_i of a forward pass with the solution's weights."""
    instance = problem.bind()
    instance.module.load_state_dict(solution.model.state_dict())
    instance.weights.adopt()
    batch = instance.batch(torch.arange(instance.examples))
    values, _ = instance.forward(batch)
    swept = dual_sweep(instance, batch, [v.detach() for v in values])
    for bank, adjoints in zip(instance.layout.banks, swept, strict=True):
        for state, adjoint in zip(bank.states, adjoints, strict=True):
            features = adjoint[0].numel() if problem.options.get("features") == "mean" else 1
            found = solution.multipliers[state.name.replace("h", "lambda")]
            assert float((found - adjoint * features).abs().max()) <= tolerance, (problem.name, state.name)


def backprop_optimum(problem: Problem, start: nn.Module) -> nn.Module:
    """The un-split network at the minimum near a start, by L-BFGS on loss and l2 terms."""
    model = copy.deepcopy(start)
    parameters = list(model.parameters())
    optimiser = torch.optim.LBFGS(
        parameters, max_iter=800, tolerance_grad=1e-11, tolerance_change=0.0, line_search_fn="strong_wolfe"
    )
    weight = sum(t.weight for t in problem.options.get("regularisers", ()) if t.on == "weights")

    def closure() -> Tensor:
        optimiser.zero_grad()
        value = problem.loss(model(*problem.inputs), problem.target)
        value = value + 0.5 * weight * sum((p * p).sum() for p in parameters)
        value.backward()
        return value

    optimiser.step(closure)
    return model


def nearby(solution: lc.Solution, *, states: bool = False, scale: float = 0.05) -> lc.Solution:
    """A start near a solution, and nothing else of it: seeded noise on weights, and on states where asked for."""
    model = copy.deepcopy(solution.model)
    generator = torch.Generator().manual_seed(0)
    moved = {w.name for w in solution.program.weights if w.trainable}

    def noise(value: Tensor) -> Tensor:
        return scale * torch.randn(value.shape, generator=generator, dtype=value.dtype)

    with torch.no_grad():
        for name, p in model.named_parameters():
            if name in moved:
                p += noise(p)
    kept = {n: v + noise(v) for n, v in solution.states.items()} if states else {}
    return replace(solution, model=model, states=kept, multipliers={}, details={})


def assert_descends_as_pytorch(
    lifted: lc.Lifted, model: nn.Module, data: tuple[Tensor, Tensor], loss: Loss, *, steps: int = 3, rate: float = 0.1
) -> None:
    """Transient states with exact multipliers, and backprop on the stages: both are gradient descent of the network.

    The reference is PyTorch alone: steps of the model itself on all rows.
    """
    own = copy.deepcopy(model).train()
    moving = {n: p for n, p in own.named_parameters() if p.requires_grad}
    for _ in range(steps):
        value = loss(own(data[0]), data[1])
        found = torch.autograd.grad(value, list(moving.values()), allow_unused=True) if value.requires_grad else ()
        with torch.no_grad():
            for p, g in zip(moving.values(), found, strict=False):
                if g is not None:
                    p.sub_(rate * g)
    options = lc.RunOptions(steps=steps, batch_size=len(data[0]))
    rule = lc.SGD(lr=rate)
    for method in (lc.DescentAscent(weights=rule, dual_sweep=True), lc.Backprop(weights=rule)):
        solution = lifted.solve(data, loss=loss, method=method, options=options)
        assert type(solution.model) is type(model)
        reached = dict(solution.model.named_parameters())
        for name, p in own.named_parameters():
            torch.testing.assert_close(reached[name], p, rtol=1e-4, atol=1e-6)
