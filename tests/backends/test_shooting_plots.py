"""Plots draw what the result holds; the example of the README runs."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest
import torch

from lagcompile.backends.shooting import Shooting, fit
from lagcompile.dynamics.systems import Example

ROOT = Path(__file__).parents[2]


def test_plots(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is missing: pip install 'lagcompile[plots]'")
    from lagcompile.backends.shooting_plots import plot_defects, plot_parameters, plot_simulation

    example = Example(name="van_der_pol", samples=60, dt=0.05, noise=0.05, initial=(1.0, 0.0), observed=(0, 1))
    data = example.data()
    result = fit(example.rollout(), data, starts=3, noise=0.05, method=Shooting(stage_length=5))
    simulation = plot_simulation(result, data)
    assert len(simulation.axes) == 2
    line = simulation.axes[0].get_lines()[2].get_ydata()
    assert torch.allclose(torch.as_tensor(line), result.simulate(data)[0, :, 0])
    assert len(plot_defects(result, data).axes) == 2
    figure = plot_parameters(result)
    assert [a.get_ylabel() for a in figure.axes] == ["mu", "omega"]
    figure.savefig(tmp_path / "parameters.png")
    assert (tmp_path / "parameters.png").stat().st_size > 0


def test_the_example_of_an_engineer_with_a_csv_file_runs() -> None:
    runpy.run_path(str(ROOT / "examples" / "fit_csv_pendulum.py"))
