"""Multiple-shooting specs on the command line: fit, print, draw.

In: the path of a YAML file with `kind: shooting`. Out: text, and a run folder with the result's figures.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable
from pathlib import Path

from lagcompile.backends.keeping import own_version
from lagcompile.backends.shooting_plots import plot_defects, plot_parameters, plot_simulation
from lagcompile.backends.shooting_spec import ShootingSpec, load
from lagcompile.ir.base import BindError, ProgramError
from lagcompile.ir.reading import read_text
from lagcompile.ir.solution import Status
from lagcompile.ir.yamlfile import read
from lagcompile.store.folder import SPEC, Notice
from lagcompile.store.keeping import Keeping
from lagcompile.store.pack import fingerprint
from lagcompile.store.stop import Stop
from lagcompile.workbench.spec import RunSpec, default_folder

SECONDS = 300.0
"""Between two checkpoints."""


def is_shooting(path: Path) -> bool:
    """Whether a YAML file holds a multiple-shooting spec.

    Raises:
        SpecError: the file is missing or is not YAML.
    """
    data = read(path, RunSpec, ShootingSpec).data
    return isinstance(data, dict) and data.get("kind") == "shooting"


def solve(
    path: Path,
    folder: Path | None,
    *,
    force: bool,
    say: Callable[[str], None],
    resume: bool = False,
    notice: Notice = warnings.warn,
) -> int:
    """Fit a spec from all its guesses, print the result, write figures and the text.

    Args:
        path: of the spec.
        folder: the run folder; None for runs/NAME.
        force: replace a run folder that is there.
        say: prints a text.
        resume: go on from the run folder's checkpoint.
        notice: called with a sentence on what is damaged in the folder and does no harm.

    Returns:
        Exit status: 0 where the best start is solved, above 128 after a signal, else 1.

    Raises:
        SpecError: the file is wrong.
        LagcompileError: what it asks for cannot be fitted.
        DataError: the folder exists, is in use, cannot be written, or holds nothing to go on from.
    """
    spec, stop = load(path), Stop()
    place = folder or default_folder(spec.name)
    with Keeping(stop, seconds=SECONDS) as keeping, stop.listening():
        files = {SPEC: read_text(path).encode()}
        keeping.keep_in(place, files, _identity(spec), resume=resume, notice=notice, force=force)
        try:
            result = spec.run(watch=keeping.watch, keeper=keeping)
        except (BindError, ProgramError) as error:
            raise type(error)([f"{path}: {p}" for p in error.problems]) from error
        keeping.ended(Status.INTERRUPTED if stop.asked else result.status)
        share = f"{spec.starts.count} guesses: {spec.recovered(result):.0%} recover every parameter within 2 %"
        text = f"{result}\n{result.message}\n\n{share}"
        say(text)
        files = {"result.txt": f"{text}\n".encode()}
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
        keeping.finish(files, result.history.rows)
    say(f"wrote {place}")
    return stop.exit_status if stop.asked else 0 if result.status is Status.SOLVED else 1


def _identity(spec: ShootingSpec) -> dict[str, str]:
    """Return what may not change when the fit is resumed: all of the spec, which makes the data, but its time limit."""
    kept = spec.model_copy(update={"about": "", "method": spec.method.model_copy(update={"time_limit": None})})
    return {"version": own_version(), "run": fingerprint(kept.model_dump(mode="json")), "program": "", "data": ""}
