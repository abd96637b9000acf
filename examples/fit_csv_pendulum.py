"""From a CSV file and a cell to parameters with error bars.

You have measured a pendulum: time, motor torque and angle, some rows without an angle. You can write down its equation
of motion, you do not know its numbers, and your first guess may be wrong by a factor of four.
"""

# %% The data: here we write the file ourselves; you have one already.
import csv
import random
import tempfile
from math import sin
from pathlib import Path

import torch
from torch import Tensor, nn

from lagcompile.backends.shooting import fit
from lagcompile.dynamics import RK4, Rollout, Trajectories, read_csv

TRUE = {"stiffness": 9.81, "damping": 0.3, "gain": 2.0}
folder = Path(tempfile.mkdtemp())
noise = random.Random(0)
with (folder / "pendulum.csv").open("w", newline="") as lines:
    writer = csv.writer(lines)
    writer.writerow(["time", "torque", "angle"])
    angle, speed, dt = 0.6, 0.0, 0.02
    for row in range(600):
        torque = sin(1.3 * row * dt) + (1.0 if sin(0.7 * row * dt) > 0 else -1.0)
        missing = row % 50 in range(10, 14)
        measured = "" if missing else f"{angle + noise.gauss(0.0, 0.01):.6f}"
        writer.writerow([f"{row * dt:.4f}", f"{torque:.6f}", measured])
        for _ in range(20):
            push = -TRUE["stiffness"] * sin(angle) - TRUE["damping"] * speed + TRUE["gain"] * torque
            speed += dt / 20 * push
            angle += dt / 20 * speed

# %% The model: an ordinary module for the vector field, an integrator around it, and what is measured.


class Pendulum(nn.Module):
    """State (angle, speed); the parameters hold the first guess."""

    def __init__(self) -> None:
        super().__init__()
        self.stiffness = nn.Parameter(torch.tensor(30.0))
        self.damping = nn.Parameter(torch.tensor(1.0))
        self.gain = nn.Parameter(torch.tensor(0.5))

    def forward(self, state: Tensor, torque: Tensor) -> Tensor:
        angle, speed = state[:, 0], state[:, 1]
        push = -self.stiffness * torch.sin(angle) - self.damping * speed + self.gain * torque[:, 0]
        return torch.stack([speed, push], dim=1)


training = Trajectories.stack(
    [read_csv(folder / "pendulum.csv", outputs=["angle"], inputs=["torque"], time="time", rows=slice(0, 400))]
)
model = Rollout(RK4(Pendulum()), steps=399, state_size=2, readout=[0])

# %% The fit: from the guess above and seven more around it, together.
result = fit(model, training, starts=8, noise=0.01, bounds={"damping": (0.0, None)})
print(result)
print(result.residuals)

# %% Held-out data: start the free run from the last smoothed state, compare with rows 399 to 599.
held_out = Trajectories.stack(
    [read_csv(folder / "pendulum.csv", outputs=["angle"], inputs=["torque"], time="time", rows=slice(399, 600))]
)
error = result.simulation_error(held_out, initial=result.states[:, -1])
print(f"free-run error on held-out data: {float(error):.4f} rad")

# %% Pictures, if matplotlib is there: plot_simulation(result, training).savefig("fit.png")

assert result.status.name == "SOLVED"
for name, row in zip(TRUE, result.rows(), strict=True):
    assert abs(row.value - TRUE[name]) < 0.03 * TRUE[name] + 3 * row.standard_error
assert float(error) < 0.03
assert model.cell.field.stiffness.item() == 30.0  # the module you passed is as you wrote it
