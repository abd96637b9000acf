"""Solutions are certified as what they are, by default and when they are forged."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

import lagcompile as lc
from lagcompile.check.certificate import Certificate
from lagcompile.check.kkt import certify_kkt
from tests.check.genuine import X, Y, lifted
from tests.problems import ZOO


@cache
def solved() -> tuple[lc.Solution, lc.Certificate]:
    problem = ZOO["tanh_2"]
    solution = problem.solve(lc.SQP())
    return solution, certify_kkt(problem.bind(), solution)


def _negated(values: Any) -> Any:
    return {n: -v for n, v in values.items()}


def _nudged(values: Any) -> Any:
    return {n: v + 1e-3 for n, v in values.items()}


FORGED: dict[str, Callable[[lc.Solution], lc.Solution]] = {
    "multipliers negated": lambda s: replace(s, multipliers=_negated(s.multipliers)),
    "multipliers moved": lambda s: replace(s, multipliers=_nudged(s.multipliers)),
    "multipliers zero": lambda s: replace(s, multipliers={n: 0.0 * v for n, v in s.multipliers.items()}),
    "multipliers NaN": lambda s: replace(s, multipliers={n: v * math.nan for n, v in s.multipliers.items()}),
    "states moved": lambda s: replace(s, states=_nudged(s.states)),
    "states NaN": lambda s: replace(s, states={n: v * math.nan for n, v in s.states.items()}),
    "weights moved": lambda s: replace(s, details={**s.details, "weights": _nudged(s.details["weights"])}),
    "weights negated": lambda s: replace(s, details={**s.details, "weights": _negated(s.details["weights"])}),
    "weights infinite": lambda s: replace(
        s, details={**s.details, "weights": {n: v + math.inf for n, v in s.details["weights"].items()}}
    ),
}


@pytest.mark.parametrize("name", FORGED)
def test_a_forged_solution_is_not_certified(name: str) -> None:
    solution, certificate = solved()
    assert certificate.verdict == "ok", str(certificate)
    forged = certify_kkt(ZOO["tanh_2"].bind(), FORGED[name](solution))
    assert forged.verdict == "failed"
    assert forged.values != certificate.values


def test_a_solution_of_a_constant_loss_is_not_assessed() -> None:
    problem = replace(ZOO["tanh_2"], loss=lambda out, y: (out - y).square().mean() * 1e-12, options={})
    solution = problem.solve(lc.Extragradient(), options=lc.RunOptions(steps=0))
    certificate = certify_kkt(problem.bind(), replace(solution, states={}, multipliers={}))
    assert certificate.verdict == "not assessed", str(certificate)
    assert any("scale the loss" in r for r in certificate.reasons)


def test_a_loss_that_stops_gradients_is_not_certified_as_optimal() -> None:
    def loss(output: Tensor, target: Tensor) -> Tensor:
        return F.mse_loss(output.detach() + 0.0 * output, target)

    problem = replace(ZOO["tanh_2"], loss=loss, options={})
    solution = problem.solve(lc.Extragradient(), options=lc.RunOptions(steps=0))
    certificate = certify_kkt(problem.bind(), replace(solution, states={}, multipliers={}))
    assert certificate.verdict == "not assessed", str(certificate)
    assert any("not the derivative" in r for r in certificate.reasons)


# ------------------------------------------------------------------ solve certifies what it gives back
def test_solve_says_whether_the_network_is_the_model() -> None:
    solution = lifted().solve((X, Y), loss=F.cross_entropy, options=lc.RunOptions(steps=3, batch_size=4))
    assert solution.certificate is not None
    assert solution.certificate.ok, str(solution.certificate)
    assert "certificate ok" in repr(solution)
    assert isinstance(solution.certificate, Certificate)
    assert solution.certificate.check(lifted(copy.deepcopy(solution.model))) == []


def test_certifying_changes_no_solution(monkeypatch: pytest.MonkeyPatch) -> None:
    options = lc.RunOptions(steps=3, batch_size=4)
    torch.manual_seed(5)
    first = lifted().solve((X, Y), loss=F.cross_entropy, options=options)
    after = torch.get_rng_state()
    monkeypatch.setattr(lc.Lifted, "_certificate", lambda *_: None)
    torch.manual_seed(5)
    second = lifted().solve((X, Y), loss=F.cross_entropy, options=options)
    assert torch.equal(after, torch.get_rng_state())
    a, b = first.model.state_dict(), second.model.state_dict()
    assert all(torch.equal(a[n], b[n]) for n in a)
    assert first.model.training == second.model.training


def test_a_solution_that_cannot_be_certified_says_why() -> None:
    def loss(output: Tensor, target: Tensor) -> Tensor:
        if output.dtype == torch.float64:
            raise RuntimeError("float32 only")
        return F.cross_entropy(output, target)

    solution = lifted().solve((X, Y), loss=loss, options=lc.RunOptions(steps=2))
    assert solution.certificate is not None
    assert solution.certificate.verdict == "not assessed"
    assert "float32 only" in solution.certificate.reasons[0]


@pytest.mark.parametrize(
    "other",
    [
        lambda out, y: F.mse_loss(out, F.one_hot(y, out.shape[1]).to(out.dtype)),
        lambda out, y: -F.cross_entropy(out, y),
        lambda out, y: F.cross_entropy(out, y) * (1 + 1e-6),
    ],
)
def test_a_loss_of_the_same_name_is_another_loss(other: Any) -> None:
    own = lifted().verify(X, Y, loss=lambda out, y: F.cross_entropy(out, y))
    assert own.check(lifted(), X, Y, loss=lambda out, y: F.cross_entropy(out, y)) == []
    assert any(p.startswith("the loss: in train mode it was") for p in own.check(lifted(), X, Y, loss=other))
