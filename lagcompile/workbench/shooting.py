"""Multiple-shooting specs on the command line: fit, print, draw.

In: the path of a YAML file with `kind: shooting`. Out: text, and a folder with the result's figures. Invariant: nothing
is written before the fit has ended.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from lagcompile.backends.shooting_plots import plot_defects, plot_parameters, plot_simulation
from lagcompile.backends.shooting_spec import ShootingSpec, load
from lagcompile.ir.base import DataError, LagcompileError
from lagcompile.ir.solution import Status
from lagcompile.ir.yamlfile import read
from lagcompile.workbench.spec import RunSpec, default_folder


def is_shooting(path: Path) -> bool:
    """Whether a YAML file holds a multiple-shooting spec.

    Raises:
        SpecError: the file is missing or no YAML.
    """
    data = read(path, RunSpec, ShootingSpec).data
    return isinstance(data, dict) and data.get("kind") == "shooting"


def solve(path: Path, folder: Path | None, *, force: bool, say: Callable[[str], None]) -> int:
    """Fit a spec from all its guesses, print what was found, write figures and the text.

    Args:
        path: of the spec.
        folder: where to write; None for runs/NAME.
        force: write into a folder that is there.
        say: prints a text.

    Returns:
        Exit status: 0 where the best start is solved, else 1.

    Raises:
        SpecError: the file is wrong.
        LagcompileError: what it asks for cannot be fitted.
        DataError: the folder exists.
    """
    spec = load(path)
    place = folder or default_folder(spec.name)
    if place.exists() and not force:
        raise DataError(f"{place} exists: give another folder with --out, or --force to write into it")
    try:
        result = spec.run()
    except LagcompileError as error:
        raise type(error)([f"{path}: {p}" for p in error.problems]) from error
    share = f"{spec.starts.count} guesses: {spec.recovered(result):.0%} recover every parameter within 2 %"
    text = f"{result}\n{result.message}\n\n{share}"
    say(text)
    place.mkdir(parents=True, exist_ok=True)
    (place / "result.txt").write_text(text + "\n")
    data = spec.system.data(spec.data_seed)
    figures = {
        "simulation": plot_simulation(result, data),
        "defects": plot_defects(result, data),
        "parameters": plot_parameters(result),
    }
    for name, figure in figures.items():
        figure.savefig(place / f"{name}.png", dpi=120)
    say(f"wrote {place}")
    return 0 if result.status is Status.SOLVED else 1
