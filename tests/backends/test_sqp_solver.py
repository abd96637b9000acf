"""What all exact solvers do alike: every row is shown as it is made, and held-out numbers are kept with the last."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import nn

import lagcompile as lc
from lagcompile.backends.convex import Convex
from lagcompile.backends.mip import MixedInteger
from lagcompile.backends.sqp import SQP
from lagcompile.backends.sqp_oracle import Ipopt
from lagcompile.backends.sqp_solver import ExactSolver
from tests.checks import needs_casadi
from tests.problems import ZOO, chain

SOLVERS = [
    SQP(),
    Convex(),
    MixedInteger(),
    pytest.param(Ipopt(), marks=needs_casadi),
]


def solved(solver: ExactSolver, **more: Any) -> lc.Solution:
    """A program that the solver is defined on, solved."""
    if not isinstance(solver, MixedInteger):
        return ZOO["ridge"].solve(solver, **more)
    net = chain(2, 4, 1, act=nn.ReLU, seed=3)().requires_grad_(False)
    x = torch.zeros(1, 2, dtype=torch.float64)
    bounded = {"input_1": lc.InputFormulation(lower=-1.0, upper=1.0)}
    lifted = lc.lift(net, (x,), 2, lc.Formulation(frozen=("*",), inputs=bounded))
    return lifted.solve((x, x), loss=lambda output, target: output.sum(), method=solver, **more)


@pytest.mark.parametrize("solver", SOLVERS, ids=lambda s: s.kind)
def test_rows_are_shown_and_held_out_numbers_kept(solver: ExactSolver) -> None:
    shown: list[Mapping[str, Any]] = []
    solution = solved(solver, evaluate=lambda module: {"training": float(module.training)}, watch=shown.append)
    assert solution.status is lc.Status.SOLVED
    assert [r["step"] for r in shown] == [r["step"] for r in solution.history.rows]
    assert len(shown) >= 1
    assert solution.history.last["training"] == 0.0
