"""Steps per second against Cooper on the same lifted program: 60,000 x 256 per-example states, batch 256.

Cooper gets what suits it best: sparse gradients for states and multipliers, and its ExtraSGD, the one of its
extrapolating optimisers that takes them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

import lagcompile as lc
from tests.benchmarks.timing import Row, at_least, ms, side_by_side

EXAMPLES, WIDTH, BATCH = 60_000, 256, 256


def _cooper(first: nn.Module, head: nn.Module, x: Tensor, y: Tensor) -> Any:
    """A function that makes one extragradient step by Cooper."""
    import cooper
    from cooper.multipliers import IndexedMultiplier
    from cooper.optim import ExtrapolationConstrainedOptimizer, ExtraSGD

    states = nn.Embedding(EXAMPLES, WIDTH, sparse=True)
    columns = torch.arange(WIDTH)

    class Problem(cooper.ConstrainedMinimizationProblem):
        def __init__(self) -> None:
            super().__init__()
            self.defects = cooper.Constraint(
                constraint_type=cooper.ConstraintType.EQUALITY,
                formulation_type=cooper.formulations.Lagrangian,
                multiplier=IndexedMultiplier(num_constraints=EXAMPLES * WIDTH),
            )

        def compute_cmp_state(self, rows: Tensor) -> Any:
            h = torch.relu(states(rows))
            g = F.softshrink(first(x[rows]) - h, 0.1)
            index = (rows[:, None] * WIDTH + columns).flatten()
            constraint = cooper.ConstraintState(violation=g.flatten(), constraint_features=index)
            loss = F.cross_entropy(head(h), y[rows])
            return cooper.CMPState(loss=loss, observed_constraints={self.defects: constraint})

    problem = Problem()
    weights = [*first.parameters(), *head.parameters()]
    optimizer = ExtrapolationConstrainedOptimizer(
        cmp=problem,
        primal_optimizers=[ExtraSGD(weights, lr=1e-2), ExtraSGD(states.parameters(), lr=1e-2)],
        dual_optimizers=ExtraSGD(problem.dual_parameters(), lr=1e-3, maximize=True),
    )
    return lambda rows: optimizer.roll(compute_cmp_state_kwargs={"rows": rows})


def run() -> list[Row]:
    """The one comparison."""
    torch.manual_seed(0)
    x, y = torch.randn(EXAMPLES, 784), torch.randint(0, 10, (EXAMPLES,))
    model = nn.Sequential(nn.Linear(784, WIDTH), nn.ReLU(), nn.Linear(WIDTH, 10))
    lifted = lc.lift(
        model,
        x[:2],
        split={"policy": "at", "after": ["1"]},
        formulation=lc.Formulation(domain=lc.NonNegative(), transform=lc.Softshrink(epsilon=0.1)),
    )
    method = lc.Extragradient(weights=lc.SGD(lr=1e-2), states=lc.SGD(lr=1e-2), multipliers=lc.SGD(lr=1e-3))
    executor = method.executor(lifted.bind((x, y), loss=F.cross_entropy))
    theirs = _cooper(nn.Sequential(nn.Linear(784, WIDTH), nn.ReLU()), nn.Linear(WIDTH, 10), x, y)
    order = torch.randperm(EXAMPLES)
    batches = iter(order.split(BATCH))
    others = iter(order.split(BATCH))
    ours, cooper = side_by_side(
        lambda: executor.step(next(batches)), lambda: theirs(next(others)), rounds=15, warm_up=3
    )
    return [
        at_least(
            "steps per second / Cooper's, 60,000 x 256 states",
            cooper / ours,
            10,
            f"{ms(ours)} against {ms(cooper)} a step",
        )
    ]
