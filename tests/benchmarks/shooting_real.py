"""Real data: Silverbox and the flexible robot arm, by multiple shooting and by backprop with at least the budget.

`python -m tests.benchmarks.shooting_real` reads the folder named by LAGCOMPILE_DATA (sysid/) and writes
results/shooting_real.json and .md. Invariant: the test parts are never used in a fit; errors are those of a free run.
Known from the data's own descriptions: good models of Silverbox reach less than a millivolt.
"""

from __future__ import annotations

import copy
import json
import os
import sys
import time
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lagcompile.backends.shooting import Shooting, fit
from lagcompile.dynamics import RK4, Rollout, Trajectories, read_csv
from lagcompile.dynamics.systems import Duffing
from lagcompile.dynamics.trajectories import Trajectory

RESULTS = Path(__file__).parent / "results"
LEAST_BUDGET = 60.0
"""CPU seconds that backprop has at least: in the time of a multiple-shooting fit it may make a single step."""


class StateSpace(nn.Module):
    """Linear state-space cell plus polynomial terms of the first state or a small tanh network.

    Args:
        size: numbers in the state; the first is the output.
        inputs: columns of the input.
        polynomial: with square and cube of the first state.
        hidden: units of the network, 0 for none.
        seed: of its weights.
    """

    def __init__(self, size: int, inputs: int, *, polynomial: bool = False, hidden: int = 0, seed: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        step = torch.zeros(size, size, dtype=torch.float64)
        for i in range(0, size - 1, 2):  # damped rotations, a neutral guess for an oscillator
            angle = torch.tensor(0.7 / (1 + i // 2))
            turn = torch.stack([torch.stack([angle.cos(), angle.sin()]), torch.stack([-angle.sin(), angle.cos()])])
            step[i : i + 2, i : i + 2] = 0.95 * turn
        if size > 2:
            step[0, 2::2] = 0.5
        self.step = nn.Parameter(step)
        self.gain = nn.Parameter(torch.full((size, inputs), 0.15, dtype=torch.float64))
        self.offset = nn.Parameter(torch.zeros(size, dtype=torch.float64))
        self.polynomial, self.hidden = polynomial, hidden
        if polynomial:
            self.square = nn.Parameter(torch.zeros(size, dtype=torch.float64))
            self.cube = nn.Parameter(torch.zeros(size, dtype=torch.float64))
        if hidden:
            self.inner = nn.Parameter(normal(hidden, size + inputs))
            self.bias = nn.Parameter(torch.zeros(hidden, dtype=torch.float64))
            self.outer = nn.Parameter(0.01 * normal(size, hidden))

    def forward(self, x: Tensor, u: Tensor) -> Tensor:
        """Next state."""
        following = x @ self.step.T + u @ self.gain.T + self.offset
        if self.polynomial:
            first = x[:, :1]
            following = following + first**2 * self.square + first**3 * self.cube
        if self.hidden:
            features = torch.tanh(torch.cat([x, u], dim=1) @ self.inner.T + self.bias)
            following = following + features @ self.outer.T
        return following


@dataclass(frozen=True)
class Task:
    """A model and where it is trained and tested.

    Attributes:
        name: of the row.
        rollout: the model at its guess.
        training: data of the fit.
        test: held-out data.
        unit: factor and name of the error's unit.
        onward: True where the test goes on from the end of the training data.
        skip: samples of the test that do not count.
        options: of the solver, beyond its defaults.
    """

    name: str
    rollout: Rollout
    training: Trajectories
    test: Trajectories
    unit: tuple[float, str]
    onward: bool = False
    skip: int = 0
    options: Shooting = field(default_factory=Shooting)


def _with_next_input(item: Trajectory) -> Trajectory:
    """The same with the input at the end of the interval as a second column."""
    assert item.inputs is not None
    following = torch.cat([item.inputs[1:], item.inputs[-1:]])
    return Trajectory(item.observations, item.times, torch.cat([item.inputs, following], 1), item.mask, item.name)


def tasks(folder: Path, samples: int = 8192) -> list[Task]:
    """The rows of the table."""

    def part(file: str, first: int, last: int, *, pair: bool) -> Trajectories:
        item = read_csv(folder / file, outputs=["y"], inputs=["u"], rows=slice(first, last))
        return Trajectories.stack([_with_next_input(item) if pair else item])

    def silver(first: int, last: int, pair: bool) -> Trajectories:
        return part("silverbox.csv", first, last, pair=pair)

    first, arrow = 41000, 40400
    duffing = Rollout(RK4(Duffing(0.3, 0.05, 0.5, 0.3), hold="linear", substeps=2), 1, state_size=2, readout=[0])
    millivolt = (1e3, "mV")
    found = [
        Task(
            "Silverbox, Duffing equation (4 parameters)",
            duffing,
            silver(first, first + samples, False),
            silver(0, arrow, False),
            millivolt,
        )
    ]
    cells = {
        "Silverbox, linear cell with square and cube (14 parameters)": StateSpace(2, 2, polynomial=True),
        "Silverbox, neural cell of 10 tanh units (80 parameters)": StateSpace(2, 2, hidden=10),
    }
    for name, cell in cells.items():
        rollout = Rollout(cell, 1, state_size=2, readout=[0])
        options = Shooting(iterations=60)
        found.append(
            Task(
                name,
                rollout,
                silver(first, first + samples, True),
                silver(0, arrow, True),
                millivolt,
                options=options,
            )
        )
    arm = Rollout(StateSpace(6, 2), 1, state_size=6, readout=[0])
    training, test = part("robot_arm.csv", 0, 700, pair=True), part("robot_arm.csv", 699, 1024, pair=True)
    found.append(
        Task(
            "Robot arm, linear cell of order 6",
            arm,
            training,
            test,
            (1.0, ""),
            onward=True,
            options=Shooting(iterations=40, lengthen=4),  # chosen by the training error
        )
    )
    return found


def free_run(rollout: Rollout, data: Trajectories, initial: Tensor, skip: int) -> float:
    """Root mean square error of the simulation."""
    model = copy.deepcopy(rollout)
    model.steps = data.samples - 1
    with torch.no_grad():
        error = model(initial.expand(len(data), -1), data.inputs, data.times) - data.observations
    return float(error[:, skip:].square().mean().sqrt())


def backprop(task: Task, budget: float) -> tuple[Rollout, Tensor, int]:
    """Adam through the whole rollout for a number of CPU seconds; the best parameters and initial state are kept."""
    model = copy.deepcopy(task.rollout)
    model.steps = task.training.samples - 1
    x0 = torch.zeros(1, model.state_size, dtype=torch.float64)
    x0[0, 0] = task.training.observations[0, 0, 0]
    x0.requires_grad_(True)
    optimizer = torch.optim.Adam([*model.parameters(), x0], lr=3e-3)
    best, kept, steps = float("inf"), (copy.deepcopy(model), x0.detach().clone()), 0
    begin = time.process_time()
    while time.process_time() - begin < budget:
        optimizer.zero_grad()
        output = model(x0, task.training.inputs, task.training.times)
        loss = (output - task.training.observations).square().mean()
        value = float(loss.detach())
        if value < best:
            best, kept = value, (copy.deepcopy(model), x0.detach().clone())
        loss.backward()
        nn.utils.clip_grad_norm_([*model.parameters(), x0], 1.0, error_if_nonfinite=False)
        optimizer.step()
        steps += 1
    return *kept, steps


def measure(task: Task) -> dict[str, Any]:
    """One row: multiple shooting, and backprop with the same CPU seconds."""
    begin = time.process_time()
    result = fit(task.rollout, task.training, method=task.options)
    seconds = time.process_time() - begin
    rival, x0, steps = backprop(task, max(seconds, LEAST_BUDGET))
    start = result.states[:, -1] if task.onward else torch.zeros(1, result.states.shape[-1], dtype=torch.float64)
    rival_start = start
    if task.onward:
        rival.steps = task.training.samples - 1
        with torch.no_grad():
            rival_start = rival.simulate(x0, task.training.inputs, task.training.times)[:, -1]
    factor, unit = task.unit
    return {
        "unit": unit,
        "training": factor * float(result.simulation_error(task.training)),
        "test": factor * free_run(result.rollout, task.test, start, task.skip),
        "backprop_training": factor * free_run(rival, task.training, x0, 0),
        "backprop_test": factor * free_run(rival, task.test, rival_start, task.skip),
        "output_deviation": factor * float(task.test.observations.std()),
        "status": result.status.name,
        "iterations": int(result.iterations[0]),
        "stage_length": result.stage_length,
        "seconds": seconds,
        "backprop_steps": steps,
        "backprop_seconds": max(seconds, LEAST_BUDGET),
        "samples": task.training.samples,
        "date": date.today().isoformat(),
    }


def table(rows: dict[str, dict[str, Any]]) -> str:
    """Markdown."""
    lines = [
        "| data and cell | training samples | error of the free run: training | test | backprop: training | test | "
        "deviation of the test output | CPU seconds | backprop: CPU seconds | status |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name, r in rows.items():
        figures = " | ".join(
            f"{r[k]:.3g} {r['unit']}".strip()
            for k in ("training", "test", "backprop_training", "backprop_test", "output_deviation")
        )
        spent = f"{r['seconds']:.1f} | {r['backprop_seconds']:.0f}"
        lines.append(f"| {name} | {r['samples']} | {figures} | {spent} | {r['status'].lower()} |")
    known = (
        "Silverbox: training on a part of the multisine signal, test on the arrow-head signal. Of published models the "
        "good ones stay below 1 mV there. Backprop: Adam through the whole rollout, same cells."
    )
    return "\n".join([*lines, "", known]) + "\n"


def main() -> None:
    """Measure every row that is not there yet."""
    root = os.environ.get("LAGCOMPILE_DATA")
    if not root:
        sys.exit("set LAGCOMPILE_DATA to the folder that holds sysid/silverbox.csv and sysid/robot_arm.csv")
    torch.set_num_threads(1)
    file = RESULTS / "shooting_real.json"
    rows: dict[str, dict[str, Any]] = json.loads(file.read_text()) if file.exists() else {}
    for task in tasks(Path(root) / "sysid"):
        if task.name not in rows:
            rows[task.name] = measure(task)
            print(task.name, rows[task.name], flush=True)
            RESULTS.mkdir(exist_ok=True)
            file.write_text(json.dumps(rows, indent=1) + "\n")
            (RESULTS / "shooting_real.md").write_text(table(rows))


if __name__ == "__main__":
    main()
