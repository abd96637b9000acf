"""The command line's `bench`: tables of all systems, depth study, robustness study.

In: arguments. Out: a folder of rows and the table. Invariant: a bench that was stopped is resumed where it stopped,
given the same folder.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from lagcompile.ir.base import SpecError

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
Out = Annotated[
    Path | None,
    typer.Option(help="Folder of the bench; what is in it is not run again, and other options need another folder."),
]
Systems = Annotated[str | None, typer.Option(help="Names of the rows, with commas between; all by default.")]


@app.callback()
def _bench() -> None:
    """Compare systems: every method on one network, data set, number of steps and seeds."""


@app.command()
def table1(
    data: Annotated[str, typer.Option(help="mnist, cifar10 or digits.")] = "digits",
    steps: Annotated[int, typer.Option(min=1, help="Steps of every row.")] = 1000,
    seeds: Annotated[int, typer.Option(min=1, help="Seeds of every row.")] = 5,
    trials: Annotated[int, typer.Option(min=1, help="Draws of every system's search.")] = 8,
    search_steps: Annotated[int, typer.Option(min=1, help="Steps of each draw.")] = 300,
    batch_size: Annotated[int | None, typer.Option(min=1, help="Examples of every step.")] = None,
    decay: Annotated[
        float | None, typer.Option(min=0, max=0.99, help="Share of itself that a weight loses in each move.")
    ] = None,
    keep: Annotated[
        Literal["last", "best"], typer.Option(help="Weights: of the last step, or by validation.")
    ] = "last",
    refit: Annotated[
        bool, typer.Option("--refit", help="Train rows on the validation split too, once searched.")
    ] = False,
    systems: Systems = None,
    out: Out = None,
) -> None:
    """Search step sizes on the validation split, train every system, and write the table beside the published one."""
    from lagcompile.workbench.tables import TableOptions
    from lagcompile.workbench.tables import table1 as run

    options = TableOptions(
        data=data,
        steps=steps,
        batch_size=batch_size,
        decay=decay,
        seeds=seeds,
        trials=trials,
        search_steps=search_steps,
        keep=keep,
        refit=refit,
    )
    if systems is not None:
        options = options.model_copy(update={"systems": _names(systems)})
    typer.echo(run(options, out or Path("runs") / f"table1-{data}", say=_say))


@app.command()
def depth(
    steps: Annotated[int, typer.Option(min=1, help="Steps of every row.")] = 1000,
    seeds: Annotated[int, typer.Option(min=1, help="Seeds of every row.")] = 3,
    depths: Annotated[str, typer.Option(help="Numbers of hidden layers, with commas between.")] = "10,30,100",
    trials: Annotated[int, typer.Option(min=1, help="Draws of every system's search, at the first depth.")] = 4,
    search_steps: Annotated[int, typer.Option(min=1, help="Steps of each draw.")] = 500,
    systems: Systems = None,
    out: Out = None,
) -> None:
    """Accuracy by depth and system, on plain tanh networks that are cut behind every layer."""
    from lagcompile.workbench.studies import DepthOptions, depth_study

    try:
        numbers = tuple(int(d) for d in depths.split(","))
    except ValueError:
        raise SpecError(f"--depths takes whole numbers with commas between, got '{depths}'") from None
    options = DepthOptions(depths=numbers, steps=steps, seeds=seeds, trials=trials, search_steps=search_steps)
    if systems is not None:
        options = options.model_copy(update={"systems": _names(systems)})
    typer.echo(depth_study(options, out or Path("runs") / "depth", say=_say))


@app.command()
def robustness(
    data: Annotated[str, typer.Option(help="mnist, cifar10 or digits.")] = "mnist",
    runs: Annotated[int, typer.Option(min=1, help="Random settings.")] = 60,
    steps: Annotated[int, typer.Option(min=1, help="Steps of each.")] = 1000,
    out: Out = None,
) -> None:
    """How many random settings of DistProp come within 10 % of the best."""
    from lagcompile.workbench.studies import RobustnessOptions, robustness_study

    options = RobustnessOptions(data=data, runs=runs, steps=steps)
    typer.echo(robustness_study(options, out or Path("runs") / f"robustness-{data}", say=_say))


def _names(systems: str) -> tuple[str, ...]:
    from lagcompile.workbench.systems import system_of

    return tuple(system_of(name.strip()).name for name in systems.split(","))


def _say(line: str) -> None:
    typer.echo(line, err=True)
