"""Plots of a multiple-shooting fit: simulation against data, defects along time, parameters along iterations.

In: a `FitResult` and data. Out: a matplotlib figure, which the caller shows or saves. Invariant: matplotlib is
imported here only, when a plot is asked for, and no global state of it is changed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lagcompile.backends.shooting_result import FitResult
from lagcompile.dynamics.trajectories import Trajectories
from lagcompile.ir.base import MissingExtraError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_MOST_LINES = 12


def _figure(rows: int, width: float = 8.0, height: float = 2.2) -> tuple[Figure, list[Any]]:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingExtraError("plots need matplotlib: pip install 'lagcompile[plots]'") from error
    figure = Figure(figsize=(width, height * rows), layout="constrained")
    axes = figure.subplots(rows, 1, sharex=True, squeeze=False)[:, 0]
    return figure, list(axes)


def plot_simulation(
    result: FitResult, data: Trajectories, *, trajectory: int = 0, initial: Tensor | None = None
) -> Figure:
    """Measurements, smoothed outputs and free-run simulation of one trajectory, one panel for each output.

    Args:
        result: the fit.
        data: the data fitted, or held-out data together with `initial`.
        trajectory: which trajectory.
        initial: (trajectories, n) initial states of held-out data; then no smoothed outputs are drawn.
    """
    figure, axes = _figure(data.outputs)
    free = result.simulate(data, initial)[trajectory]
    length = data.lengths[trajectory]
    times = data.times[trajectory, :length]
    with torch.no_grad():
        smooth = result.rollout.readout(result.states[trajectory]) if initial is None else None
    for c, axis in enumerate(axes):
        on = data.mask[trajectory, :length, c]
        axis.plot(times[on], data.observations[trajectory, :length, c][on], ".", ms=3, color="0.6", label="data")
        if smooth is not None:
            axis.plot(times, smooth[:length, c], lw=1, label="smoothed")
        axis.plot(times, free[:length, c], "--", lw=1, label="free run")
        axis.set_ylabel(f"output {c}")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper right", ncols=3, fontsize="small")
    axes[-1].set_xlabel("time")
    return figure


def plot_defects(result: FitResult, data: Trajectories, *, trajectory: int = 0) -> Figure:
    """Absolute defects and multipliers at the breakpoints of one trajectory."""
    figure, axes = _figure(2)
    times = data.times[trajectory, result.breakpoints]
    inside = result.breakpoints < data.lengths[trajectory]
    for component in range(result.defects.shape[-1]):
        values = result.defects[trajectory, inside, component].abs().clamp_min(1e-18)
        axes[0].semilogy(times[inside], values, lw=1, label=f"state {component}")
        axes[1].plot(times[inside], result.multipliers[trajectory, inside, component], lw=1)
    axes[0].set_ylabel("|defect|")
    axes[1].set_ylabel("multiplier")
    axes[1].set_xlabel("time")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles[:_MOST_LINES], labels[:_MOST_LINES], loc="outside upper right", ncols=6, fontsize="small")
    return figure


def plot_parameters(result: FitResult) -> Figure:
    """Parameters from the guesses on along the iterations: the best start heavy, others light."""
    count = min(result.theta.shape[1], _MOST_LINES)
    figure, axes = _figure(count, height=max(1.4, 2.4 / count))
    steps = [0.0, *result.history.column("step")]
    for j, axis in enumerate(axes):
        paths = torch.cat([result.first[None, :, j], result.theta_history[:, :, j]])[: len(steps)]
        others = [i for i in range(paths.shape[1]) if i != result.best][:50]
        axis.plot(steps, paths[:, others], color="0.8", lw=0.7)
        axis.plot(steps, paths[:, result.best], lw=1.5)
        axis.set_ylabel(result.labels[j].rsplit(".", 1)[-1])
    axes[-1].set_xlabel("iteration")
    return figure
