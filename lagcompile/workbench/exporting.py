"""The commands on exported folders: write a spec's program as folder, LaTeX or drawing; look at a folder and check it.

In: a spec or an exported folder. Out: files and text. Invariant: nothing of a folder needs the model's source; a folder
is checked on inputs made up from its types, as the identities hold for any inputs and any loss.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated

import torch
import typer
from torch import Tensor

from lagcompile.ir import disk
from lagcompile.ir.base import DataError, Frozen, SpecError, printable
from lagcompile.ir.program import Program
from lagcompile.workbench.trusted import Trust

Source = Annotated[
    Path, typer.Argument(metavar="SPEC", help="YAML file of a run, or an exported folder (for --latex and --draw).")
]


def export(
    spec: Source,
    to: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="Write a self-contained folder: `lagcompile.load` reads it.")
    ] = None,
    latex: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write the mathematics of program and method as LaTeX.")
    ] = None,
    draw: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Draw the stages to an .svg, .png or .pdf file.")
    ] = None,
    weights: Annotated[Path | None, typer.Option(help="model.pt of a run for --to, instead of fresh weights.")] = None,
    document: Annotated[bool, typer.Option("--document", help="LaTeX that compiles as it is.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace an exported folder that is there.")] = False,
    trust: Trust = None,
) -> None:
    """Write a program as a self-contained folder, as LaTeX for a paper, as a drawing of its stages."""
    problems = _problems(spec, to, latex, draw)
    if weights is not None and to is None:
        problems.append("--weights goes with --to: LaTeX and drawings hold no weights")
    if problems:
        raise SpecError(problems)
    program, method = _program(spec, to, weights, force=force, trust=trust or ())
    if latex is not None:
        from lagcompile.export.latex import latex as written

        disk.replace(latex, written(program, method, document=document).encode())
    if draw is not None:
        from lagcompile.export.drawing import draw as drawn

        drawn(program, draw)
    for path in (to, latex, draw):
        if path is not None:
            typer.echo(f"wrote {path}")


def _problems(spec: Path, to: Path | None, latex: Path | None, draw: Path | None) -> list[str]:
    """List what is wrong with the options, before anything is done."""
    from lagcompile.export.drawing import KINDS

    found = []
    if to is None and latex is None and draw is None:
        found.append("nothing to write: give --to FOLDER, --latex FILE or --draw FILE")
    if draw is not None and draw.suffix.lower() not in KINDS:
        found.append(f"--draw {draw}: a drawing is an .svg, .png or .pdf file")
    if to is not None and spec.is_dir():
        found.append(f"--to {to}: {spec} is a folder already, copy it")
    if latex is not None and latex.is_dir():
        found.append(f"--latex {latex} is a folder")
    for name, path in (("--latex", latex), ("--draw", draw)):
        if path is not None and not path.parent.is_dir():
            found.append(f"{name} {path}: there is no folder {path.parent}")
        elif path is not None and not os.access(path.parent, os.W_OK):
            found.append(f"{name} {path}: the folder {path.parent} cannot be written to")
    return found


def _program(
    spec: Path, to: Path | None, weights: Path | None, *, force: bool, trust: Sequence[str]
) -> tuple[Program, Frozen | None]:
    """Program and method; the folder is written on the way, while the user's modules are importable."""
    if spec.is_dir():
        from lagcompile.saved import load as load_exported

        return load_exported(spec).program, None
    from lagcompile.workbench.prepare import placing, prepare
    from lagcompile.workbench.run import load_weights, relift
    from lagcompile.workbench.spec import load

    loaded = load(spec, trust=trust)
    prepared = prepare(loaded)
    if to is not None:
        with loaded.importing(), placing(loaded):
            try:
                lifted = prepared.lifted if weights is None else relift(prepared, load_weights(prepared, weights))
                lifted.save(to, (prepared.data.train_x[:4],), replace=force)
            except DataError as error:  # of the folder or the weights, not of the spec's data
                raise SpecError(error.problems) from error
    return prepared.program, loaded.spec.method


def show_folder(folder: Path, *, as_json: bool = False, receipt: bool = False) -> str:
    """Program and versions of an exported folder.

    Args:
        folder: the folder.
        as_json: the program alone, as JSON.
        receipt: also whether the trace did what the model did, when it was lifted.

    Raises:
        DataError: it is not an exported folder, or it is damaged.
    """
    from lagcompile.export.load import load_folder
    from lagcompile.ir.text import to_json

    parts = load_folder(folder)
    if as_json:
        return to_json(parts.program) + "\n"
    manifest = parts.manifest
    made = f"lagcompile {manifest.lagcompile}, torch {manifest.torch}, batch size {manifest.batch}"
    shown = f"{parts.program}exported from {manifest.model} by {made}\n"
    return printable(f"{shown}\n{parts.receipt}\n" if receipt else shown)


def refuse(folder: Path, options: Mapping[str, object]) -> None:
    """Refuse options that apply only to a spec.

    Raises:
        SpecError: some were.
    """
    given = [name for name, value in options.items() if value is not None]
    if given:
        raise SpecError(f"{', '.join(given)} applies only to a spec: {folder} is an exported folder")


def verify_folder(folder: Path, out: Path | None, examples: int) -> int:
    """Check an exported folder on made-up inputs; returns the exit status.

    Args:
        folder: the folder.
        out: file for the certificate.
        examples: number of examples.

    Raises:
        DataError: it is not an exported folder, or it is damaged.
    """
    from lagcompile.check.verify import verify_network
    from lagcompile.export.examples import examples_of
    from lagcompile.export.load import read_manifest
    from lagcompile.saved import load

    lifted, manifest = load(folder), read_manifest(folder)
    if manifest.batch != "dynamic":
        examples = manifest.rows
    tensors = examples_of(lifted.network, examples)
    certificate = verify_network(lifted.network, lifted.program, tensors, None, loss=measure)
    typer.echo(str(certificate))
    typer.echo(f"  measured on {examples} made-up examples, with a loss that reads every output")
    if out is not None:
        certificate.save(out)
    return certificate.exit_code


def measure(output: object, target: object) -> Tensor:
    """A loss of any output: its squares, and its entries with weights that all differ."""
    from lagcompile.frontend.structure import leaves

    del target
    total = torch.zeros(())
    for value in leaves(output):
        if isinstance(value, Tensor) and value.is_floating_point():
            weights = torch.arange(value.numel(), dtype=value.dtype, device=value.device).cos().reshape(value.shape)
            total = total + (weights * value).mean() + 0.1 * value.square().mean()
    return total
