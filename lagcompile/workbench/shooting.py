"""Multiple-shooting specs on the command line: fit, print, draw.

In: the path of a YAML file with `kind: shooting`. Out: text, and a folder with the result's figures. Invariant: nothing
is written before the fit has ended.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

from lagcompile.backends.shooting_plots import plot_defects, plot_parameters, plot_simulation
from lagcompile.backends.shooting_spec import ShootingSpec, load
from lagcompile.ir.base import DataError, LagcompileError
from lagcompile.ir.reading import read_text
from lagcompile.ir.solution import Status
from lagcompile.ir.yamlfile import read
from lagcompile.store.folder import SPEC, RunFolder, check_free
from lagcompile.workbench.spec import RunSpec, default_folder


def is_shooting(path: Path) -> bool:
    """Whether a YAML file holds a multiple-shooting spec.

    Raises:
        SpecError: the file is missing or is not YAML.
    """
    data = read(path, RunSpec, ShootingSpec).data
    return isinstance(data, dict) and data.get("kind") == "shooting"


def solve(path: Path, folder: Path | None, *, force: bool, say: Callable[[str], None], resume: bool = False) -> int:
    """Fit a spec from all its guesses, print the result, write figures and the text.

    Args:
        path: of the spec.
        folder: where to write; None for runs/NAME.
        force: replace a run folder that is there.
        say: prints a text.
        resume: refused: a fit has no checkpoint.

    Returns:
        Exit status: 0 where the best start is solved, else 1.

    Raises:
        SpecError: the file is wrong.
        LagcompileError: what it asks for cannot be fitted.
        DataError: the folder exists, cannot be written, or was to be resumed.
    """
    spec = load(path)
    place = folder or default_folder(spec.name)
    if resume:
        raise DataError("a shooting fit has no checkpoint to resume: run it again with --force")
    check_free(place, force=force)
    try:
        result = spec.run()
    except LagcompileError as error:
        raise type(error)([f"{path}: {p}" for p in error.problems]) from error
    share = f"{spec.starts.count} guesses: {spec.recovered(result):.0%} recover every parameter within 2 %"
    text = f"{result}\n{result.message}\n\n{share}"
    say(text)
    files = {SPEC: read_text(path).encode(), "result.txt": f"{text}\n".encode()}
    data = spec.system.data(spec.data_seed)
    figures = {
        "simulation": plot_simulation(result, data),
        "defects": plot_defects(result, data),
        "parameters": plot_parameters(result),
    }
    for name, figure in figures.items():
        image = io.BytesIO()
        figure.savefig(image, format="png", dpi=120)
        files[f"{name}.png"] = image.getvalue()
    RunFolder.create(place, files, {}, force=force).close()
    say(f"wrote {place}")
    return 0 if result.status is Status.SOLVED else 1
