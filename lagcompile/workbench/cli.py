"""The command line: show, plan, solve, verify, export, spy, diff, trust, schema, bench.

In: arguments. Out: text, files, an exit status (0 fine, 1 a check failed, diverged or worse than at the start, 2 wrong
input or surroundings, 3 a check says nothing, 70 a defect of lagcompile, 130 interrupted). Invariant: wrong input is
printed, one problem a line, to standard error, without a traceback and before any file.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from lagcompile.ir.base import SpecError, printable
from lagcompile.ir.trust import NOTHING, trusting
from lagcompile.workbench import bench, boundary, exporting
from lagcompile.workbench.trusted import Trust

if TYPE_CHECKING:
    from lagcompile.workbench.prepare import Prepared
    from lagcompile.workbench.run import Outcome

app = typer.Typer(
    name="lagcompile",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    help="Compile a PyTorch network into a constrained program, solve it, and check the answer.",
)
app.command()(exporting.export)
app.add_typer(bench.app, name="bench", help="Tables and studies: every method on one network, data and steps.")
MOST = 2**63 - 1
"""Largest number that options take: what fits into a tensor."""
Spec = Annotated[
    Path, typer.Argument(metavar="SPEC", help="YAML file of a run; `lagcompile schema` says what it holds.")
]
Seed = Annotated[
    int | None,
    typer.Option(min=-MOST, max=MOST, help="Seed of weights, order of rows and noise, instead of the spec's."),
]
Device = Annotated[str | None, typer.Option(help="cpu, cuda or cuda:1, instead of the spec's.")]


def _version(value: bool) -> None:
    if value:
        from lagcompile.check.certificate import versions

        typer.echo(", ".join(f"{name} {version}" for name, version in versions().items()))
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print versions and leave.")
    ] = False,
    debug: Annotated[
        bool, typer.Option("--debug", help="Show the traceback of an error, for reports; also LAGCOMPILE_DEBUG=1.")
    ] = False,
) -> None:
    """Compile a PyTorch network into a constrained program, solve it, and check the answer."""


@app.command()
def show(
    spec: Spec,
    as_json: Annotated[bool, typer.Option("--json", help="The program as JSON, which `diff` reads.")] = False,
    receipt: Annotated[bool, typer.Option(help="Also whether the trace does what the model does.")] = False,
    trust: Trust = None,
) -> None:
    """Print the constrained program of a spec or an exported folder."""
    from lagcompile.ir.text import to_json

    if spec.is_dir():
        typer.echo(exporting.show_folder(spec, as_json=as_json, receipt=receipt), nl=False)
        return
    prepared = _prepared(spec, trust).asked()
    if as_json:
        typer.echo(to_json(prepared.program))
        return
    typer.echo(str(prepared.program), nl=False)
    if receipt:
        typer.echo(f"\n{prepared.lifted.receipt}")


@app.command()
def plan(
    spec: Spec,
    examples: Annotated[
        int | None, typer.Option(min=1, max=MOST, help="Rows of the data set; the training part's.")
    ] = None,
    trust: Trust = None,
) -> None:
    """Print stages, states, counts and bytes, before anything is allocated."""
    prepared = _prepared(spec, trust).asked()
    loaded = prepared.loaded.spec
    states, duals = loaded.method.slots()
    found = prepared.lifted.plan(
        examples or len(prepared.data.train_x),
        state_slots=states,
        dual_slots=duals,
        batch_size=loaded.run.batch_size,
    )
    typer.echo(str(found))


@app.command()
def solve(
    spec: Spec,
    out: Annotated[Path | None, typer.Option(help="Run folder; `runs/NAME` of the spec.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace a run folder that is there.")] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the run folder's checkpoint.")] = False,
    steps: Annotated[int | None, typer.Option(min=0, max=MOST, help="Number of steps, instead of the spec's.")] = None,
    seed: Seed = None,
    device: Device = None,
    baseline: Annotated[
        bool | None, typer.Option(help="Train the same network by plain backprop next to it, or do not.")
    ] = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print the table of results only.")] = False,
    trust: Trust = None,
) -> None:
    """Solve for weights, states and multipliers; write a run folder with log, report, figures and certificate."""
    from lagcompile.workbench import run, shooting
    from lagcompile.workbench.prepare import prepare
    from lagcompile.workbench.progress import Display
    from lagcompile.workbench.report import files
    from lagcompile.workbench.spec import default_folder, load

    def notice(text: str) -> None:
        typer.echo(text, err=True)

    if force and resume:
        raise SpecError("--force and --resume cannot be combined: use one to start over, the other to continue")
    if shooting.is_shooting(spec):
        raise typer.Exit(shooting.solve(spec, out, force=force, resume=resume, say=typer.echo, notice=notice))
    loaded = load(spec, trust=trust or (), steps=steps, seed=seed, device=device)
    folder = out or default_folder(loaded.spec.name)
    prepared = prepare(loaded)
    console = Console()
    if not quiet:
        typer.echo(str(prepared.program))
    notes: list[str] = []

    def report(found: Outcome) -> dict[str, bytes]:
        written, said = files(found)
        notes.extend(said)
        return written

    with Display(console, quiet=quiet) as display:
        outcome = run.solve(
            prepared,
            folder=folder,
            force=force,
            resume=resume,
            baseline=baseline,
            look=display.look,
            report=report,
            notice=notice,
        )
    _summary(console, outcome, quiet=quiet)
    for note in [*notes, f"Report: {folder / 'report.md'}"]:
        typer.echo(note)
    raise typer.Exit(outcome.exit_code)


@app.command()
def verify(
    spec: Spec,
    weights: Annotated[Path | None, typer.Option(help="model.pt of a run, instead of fresh weights.")] = None,
    against: Annotated[
        Path | None, typer.Option(help="A certificate to check again, with the model.pt beside it where there is one.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Write the certificate to this file.")] = None,
    examples: Annotated[int, typer.Option(min=1, max=MOST, help="Training examples to measure on.")] = 64,
    exact: Annotated[
        bool, typer.Option("--exact", help="Solve a small program by SQP, IPOPT and the spec's method, side by side.")
    ] = False,
    seed: Seed = None,
    trust: Trust = None,
) -> None:
    """Check the identities that hold at a zero-defect point, in float64, in train and in eval mode.

    An exported folder, given instead of a spec, is checked on made-up inputs, without the model's source.
    """
    if spec.is_dir():
        others = {"--weights": weights, "--against": against, "--exact": exact or None, "--seed": seed}
        exporting.refuse(spec, others)
        raise typer.Exit(exporting.verify_folder(spec, out, examples))
    if exact:
        from lagcompile.workbench.exact import verify_exact
        from lagcompile.workbench.progress import Display

        prepared = _prepared(spec, trust, seed=seed)
        with Display(Console(stderr=True)) as display:
            comparison = verify_exact(prepared, examples=examples, display=display)
        typer.echo(str(comparison))
        raise typer.Exit(0 if comparison.ok else 1)
    from lagcompile.check.certificate import Certificate, differences
    from lagcompile.ir.sums import is_listed
    from lagcompile.workbench.run import certify, load_weights

    saved = Certificate.load(against) if against is not None else None
    prepared = _prepared(spec, trust, seed=seed)
    beside = against.parent / "model.pt" if against is not None else None
    chosen = weights or (beside if beside is not None and (beside.is_file() or is_listed(beside)) else None)
    model = load_weights(prepared, chosen) if chosen is not None else prepared.model
    measured = certify(prepared, model, examples)
    typer.echo(str(measured))
    typer.echo(f"  measured on {'fresh weights' if chosen is None else chosen}")
    if out is not None:
        measured.save(out)
    found = differences(saved, measured) if saved is not None else []
    if saved is not None and not saved.ok:
        found = [f"{against}: {saved.verdict}", *(f"{against}: {reason}" for reason in saved.reasons), *found]
    for difference in found:
        typer.echo(printable(difference), err=True)
    if saved is not None and not found:
        typer.echo(f"{against} holds: same program, inputs and weights, every residual within its tolerance")
    raise typer.Exit(1 if found else measured.exit_code)


@app.command()
def spy(
    spec: Spec,
    out: Annotated[Path, typer.Option(help="PNG to write.")] = Path("spy.png"),
    examples: Annotated[int, typer.Option(min=1, max=MOST, help="Training examples that the program is made of.")] = 4,
    trust: Trust = None,
) -> None:
    """Draw the sparsity of the exact program's Jacobian and Hessian, with the names of stages and states."""
    from lagcompile.workbench import spy as drawing

    drawing.spy(_prepared(spec, trust), out, examples=examples)
    typer.echo(f"wrote {out}")


@app.command()
def diff(
    a: Annotated[Path, typer.Argument(metavar="A", help="A spec, or a program that `show --json` printed.")],
    b: Annotated[Path, typer.Argument(metavar="B", help="Another one.")],
    trust: Trust = None,
) -> None:
    """Print how the programs and splits of two specs differ, as a unified diff."""
    from lagcompile.workbench.compare import compare_files

    found = compare_files(a, b, trust=trust or ())
    typer.echo(found or "the programs are equal\n", nl=False)


@app.command("trust")
def remember(
    folder: Annotated[
        Path | None, typer.Argument(metavar="FOLDER", help="The folder; without one, those trusted are listed.")
    ] = None,
    remove: Annotated[bool, typer.Option("--remove", help="Stop trusting the folder.")] = False,
) -> None:
    """Trust a folder: specs in it may name its own modules, in every later call."""
    from lagcompile.workbench import trusted

    if folder is None:
        for place in trusted.folders():
            typer.echo(place)
        typer.echo(f"remembered in {trusted.configuration()}", err=True)
    elif remove:
        typer.echo(f"{trusted.forget(folder)} is not trusted any more")
    else:
        typer.echo(f"{trusted.trust(folder)} is trusted: specs in it may run its own modules")


@app.command()
def schema() -> None:
    """Print the JSON schema of a spec, for editors that complete and check YAML."""
    typer.echo(schema_text(), nl=False)


def schema_text() -> str:
    """The JSON schema of a spec."""
    from lagcompile.workbench.spec import RunSpec

    return json.dumps(RunSpec.model_json_schema(), indent=2) + "\n"


def _prepared(spec: Path, trust: list[str] | None, *, seed: int | None = None) -> Prepared:
    from lagcompile.workbench.prepare import prepare
    from lagcompile.workbench.spec import load

    return prepare(load(spec, trust=trust or (), seed=seed))


def _summary(console: Console, outcome: Outcome, *, quiet: bool) -> None:
    from lagcompile.workbench import report

    if not quiet:
        typer.echo(f"\n{outcome.certificate}\n")
        if outcome.conditions is not None:
            typer.echo(f"KKT conditions at the solution\n{outcome.conditions}\n")
    shown = [(outcome.prepared.loaded.spec.name, report.HEADER, report.rows(outcome))]
    if outcome.defects and not quiet:
        shown.append(("final defects over all training examples", report.DEFECT_HEADER, report.defect_rows(outcome)))
    for title, header, rows in shown:
        table = Table(title=title, title_justify="left")
        for index, name in enumerate(header):
            table.add_column(name, justify="left" if index == 0 else "right", no_wrap=index == 0)
        for row in rows:
            table.add_row(*row)
        console.print(table)
    for name, found in (("certificate", outcome.certificate), ("KKT conditions", outcome.conditions)):
        if found is not None and not found.ok:
            typer.echo(f"warning: {name} {found.verdict}: {'; '.join(found.reasons) or found.worst}", err=True)
    status = outcome.solution.status
    typer.echo(f"{status.name.lower().replace('_', ' ')}: {status.advice}")
    for line in report.remarks(outcome):
        typer.echo(f"  {line}")


@contextmanager
def _without_here() -> Iterator[None]:
    """Take the working folder, which `python -m` adds, off the import path."""
    before, here = list(sys.path), Path.cwd().resolve()
    sys.path[:] = [entry for entry in before if entry and Path(entry).resolve() != here]
    try:
        yield
    finally:
        sys.path[:] = before


def main() -> None:
    """Entry point of the command."""
    arguments = [a for a in sys.argv[1:] if a != boundary.OPTION]
    sys.exit(boundary.guarded(lambda: _run(arguments)))


def _run(arguments: list[str]) -> None:
    with trusting(NOTHING), _without_here():
        _command()(arguments)


@cache
def _command() -> Callable[[list[str]], object]:
    """The tree of commands, which takes longer to build than most of them take in a process that calls many."""
    return typer.main.get_command(app)


if __name__ == "__main__":
    main()
