"""How long the exact solver takes for a structured nonconvex program of 2,000 variables and 1,500 constraints.

Out: `run()`, one row a size. The program is a lifted tanh recurrence that tracks a target: states h_1..h_K (K x d) and
inputs u_1..u_K (K x c) are variables, h_k = tanh(W h_{k-1} + U u_k) are the equality constraints, the loss is least
squares in states and inputs, and both are bounded. Invariant: only torch functions are handed over; the solver finds
the sparsity by itself.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lagcompile.exact import Result, minimize


@dataclass(frozen=True)
class Recurrence:
    """Sizes: steps K, states d, inputs c; variables K (d + c), constraints K d."""

    steps: int = 100
    states: int = 15
    inputs: int = 5
    seed: int = 0

    @property
    def variables(self) -> int:
        return self.steps * (self.states + self.inputs)

    @property
    def constraints(self) -> int:
        return self.steps * self.states

    def functions(self) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor], Tensor]:
        """Objective, equalities and a random start that violates every equality."""
        generator = torch.Generator().manual_seed(self.seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, dtype=torch.float64, generator=generator)

        W = 2.0 * normal(self.states, self.states) / self.states**0.5
        U = normal(self.states, self.inputs) / self.inputs**0.5
        first = 0.5 * normal(self.states)
        target = 0.5 * torch.tanh(normal(self.steps, self.states))

        def split(x: Tensor) -> tuple[Tensor, Tensor]:
            grid = x.reshape(self.steps, self.states + self.inputs)
            return grid[:, : self.states], grid[:, self.states :]

        def objective(x: Tensor) -> Tensor:
            h, u = split(x)
            return ((h - target) ** 2).sum() + 1e-2 * (u**2).sum()

        def eq(x: Tensor) -> Tensor:
            h, u = split(x)
            before = torch.cat([first[None], h[:-1]])
            return (h - torch.tanh(before @ W.T + u @ U.T)).reshape(-1)

        return objective, eq, 0.5 * normal(self.variables)


def solve(recurrence: Recurrence, **options: Any) -> Result:
    """States within the range of tanh, inputs within a quarter: many bounds are active at the solution."""
    objective, eq, start = recurrence.functions()
    limit = torch.ones(recurrence.steps, recurrence.states + recurrence.inputs, dtype=torch.float64)
    limit[:, recurrence.states :] = 0.25
    box = limit.reshape(-1)
    return minimize(objective, start, eq, bounds=(-box, box), **options)


def run() -> list[dict[str, Any]]:
    """Seconds and their split for the full size, and for a tenth of it."""
    rows = []
    for recurrence in (Recurrence(steps=10), Recurrence()):
        result = solve(recurrence)
        timings = result.timings
        rows.append(
            {
                "name": f"exact_size_{recurrence.variables}x{recurrence.constraints}",
                "variables": recurrence.variables,
                "constraints": recurrence.constraints,
                "status": result.status.label,
                "iterations": result.iterations.count,
                "kkt": result.kkt.worst,
                "seconds": timings.total,
                "seconds_model": timings.model,
                "seconds_subproblem": timings.subproblem,
                "seconds_compilation": timings.compilation,
                "seconds_facts_and_rest": timings.total - timings.model - timings.subproblem - timings.compilation,
            }
        )
    return rows


if __name__ == "__main__":
    for row in run():
        print(row)
