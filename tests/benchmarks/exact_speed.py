"""How fast exact solutions are: a large program through SQP, and the zoo against CasADi and IPOPT.

Out: `run()`. Both solvers get the same traced torch functions and derivatives; compilation (tracing, cvxpy's
canonicalisation, CasADi's set-up) is excluded on both sides, what is measured is the solve. The large program is a
network lifted with frozen weights whose states and inputs are variables: 2,000 variables, 1,500 constraints.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from importlib.util import find_spec

import torch
from torch import Tensor, nn

import lagcompile as lc
from lagcompile.backends.sqp import SQP
from lagcompile.backends.sqp_derivatives import ProgramFunctions
from lagcompile.backends.sqp_oracle import Ipopt
from lagcompile.backends.sqp_program import ExactProgram
from lagcompile.backends.sqp_result import start_values
from tests.benchmarks.timing import Row, at_most
from tests.problems import SUM, ZOO, Problem, normal

ROUNDS = 3


class Chain(nn.Module):
    """A tanh recurrence with an input at every step, read through its states: x is (rows, steps, inputs)."""

    def __init__(self, steps: int, states: int, inputs: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inner, self.outer = nn.Linear(states, states), nn.Linear(inputs, states)
        self.cells = nn.ModuleList(nn.Identity() for _ in range(steps))

    def forward(self, u: Tensor) -> Tensor:
        h, seen = torch.zeros(u.shape[0], self.inner.in_features, dtype=u.dtype), []
        for k, cell in enumerate(self.cells):
            h = cell(torch.tanh(self.inner(h) + self.outer(u[:, k])))
            seen.append(h)
        return torch.cat(seen, dim=1)


def large() -> Problem:
    """10 rows of 10 steps: 1,500 states (all constrained) and 500 bounded inputs."""
    rows, steps, states, inputs = 10, 11, 15, 5
    start = torch.zeros(rows, steps, inputs, dtype=torch.float64)
    target = normal(1, rows, steps * states, scale=0.5)
    options = {
        "reduction": "sum",
        "frozen": ("*",),
        "inputs": {"u": lc.InputFormulation(lower=-1.0, upper=1.0)},
        "regularisers": (lc.Regulariser(kind="l2", on="states", weight=0.01),),
    }
    split = lc.AtSplit(after=tuple(f"cells.{k}" for k in range(steps - 1)))
    return Problem("large", lambda: Chain(steps, states, inputs).double(), (start,), target, SUM, split, options)


def run() -> list[Row]:
    """One row for the large program, one for the zoo (where CasADi is installed)."""
    rows = [_large()]
    if find_spec("casadi") is not None:
        rows += list(_zoo())
    return rows


def _large() -> Row:
    solution = large().solve(SQP())
    assert solution.status is lc.Status.SOLVED, solution.details["message"]
    timings = solution.details["timings"]
    variables = sum(b.numel() for b in solution.details["bounds"].values())
    constraints = sum(v.numel() for v in solution.multipliers.values())
    return at_most(
        f"SQP on a lifted network, {variables} variables and {constraints} constraints, seconds",
        solution.seconds,
        60.0,
        f"{solution.steps} iterations, model {timings['model']:.1f} s, subproblems {timings['subproblem']:.1f} s, "
        f"compilation {timings['compilation']:.1f} s, KKT {max(solution.details['kkt'].values()):.0e}",
    )


def _zoo() -> Iterator[Row]:
    ratios, model, subproblem, ours, theirs = [], [], [], [], []
    for problem in ZOO.values():
        exact = ExactProgram(problem.bind())
        with exact.default_double():
            z = exact.variables.pack(start_values(exact, None))
            functions = ProgramFunctions(exact.fused, z, exact.sizes, trace=True)
            first, second = [], []
            for _ in range(ROUNDS):
                result = SQP().minimized(exact, functions, z)
                timings = result.timings
                first.append(timings.total - timings.compilation)
                model.append(timings.model)
                subproblem.append(timings.subproblem)
                second.append(Ipopt(tolerance=1e-8).minimized(exact, functions, z, 60.0).timings.total)
        ours.append(statistics.median(first))
        theirs.append(statistics.median(second))
        ratios.append(ours[-1] / theirs[-1])
    yield at_most(
        f"median over {len(ratios)} programs of SQP / CasADi+IPOPT time, compilation excluded",
        statistics.median(ratios),
        3.0,
        f"medians {statistics.median(ours) * 1e3:.0f} ms (model {statistics.median(model) * 1e3:.0f}, subproblems "
        f"{statistics.median(subproblem) * 1e3:.0f}) and {statistics.median(theirs) * 1e3:.0f} ms; ratios "
        f"{min(ratios):.2f} to {max(ratios):.2f}; both on the same traced torch functions",
    )


if __name__ == "__main__":
    for row in run():
        print(row)
