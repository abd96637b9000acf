"""A picture of a program's sparsity: `lagcompile spy SPEC`.

In: a `Prepared` spec or an instance. Out: `Sparsity`, and a PNG with stage names at the bands. Invariant: a point is
drawn where a derivative is nonzero at one of three random points near the start; nothing is solved.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from lagcompile.backends.sqp_derivatives import ProgramFunctions
from lagcompile.backends.sqp_program import ExactProgram
from lagcompile.backends.sqp_result import spans, start_values
from lagcompile.ir import disk
from lagcompile.ir.base import MissingExtraError
from lagcompile.runtime.instance import Instance
from lagcompile.workbench.prepare import Prepared, placing

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

EXAMPLES = 4
SAMPLES = 3


@dataclass(frozen=True)
class Band:
    """Neighbouring rows or columns with one label."""

    label: str
    start: int
    stop: int


@dataclass(frozen=True)
class Sparsity:
    """Patterns of an exact program.

    Attributes:
        jacobian: (constraints, variables), True where nonzero; equalities, then inequalities.
        hessian: (variables, variables), of the Lagrangian.
        columns: variables by block.
        rows: constraints by stage and state.
    """

    jacobian: NDArray[np.bool_]
    hessian: NDArray[np.bool_]
    columns: tuple[Band, ...]
    rows: tuple[Band, ...]

    def __str__(self) -> str:
        def share(matrix: Any) -> str:
            count = int(matrix.sum())
            return f"{matrix.shape[0]} x {matrix.shape[1]}, {count} nonzero ({count / max(matrix.size, 1):.1%})"

        order = ", ".join(f"{b.label} {b.stop - b.start}" for b in self.columns)
        return f"Jacobian {share(self.jacobian)}\nHessian  {share(self.hessian)}\nvariables in order: {order}"


def sparsity_of(instance: Instance) -> Sparsity:
    """Patterns of an instance's exact program.

    Raises:
        ProgramError: the program has no exact form.
    """
    import numpy as np

    from lagcompile.exact.linear import toarray

    exact = ExactProgram(instance)
    n, m, k = exact.sizes
    generator = torch.Generator().manual_seed(0)
    with exact.default_double():
        z = exact.variables.pack(start_values(exact, None))
        functions = ProgramFunctions(exact.fused, z, exact.sizes, trace=False)
        jacobian, hessian = np.zeros((m + k, n), dtype=bool), np.zeros((n, n), dtype=bool)
        for _ in range(SAMPLES):
            at = z + 0.3 * torch.randn(n, generator=generator, dtype=torch.float64)
            first = functions.first_order(at)
            jacobian |= np.vstack([toarray(first.jacobian_eq), toarray(first.jacobian_ineq)]) != 0
            weights = torch.rand(m + k, generator=generator, dtype=torch.float64) + 0.5
            hessian |= toarray(functions.hessian(at, 1.0, weights[:m], weights[m:])) != 0
    columns = tuple(
        Band(f"{b.stage} {b.name}" if b.role == "weight" else b.name, start, stop)
        for b, start, stop in exact.variables.spans()
    )
    rows = []
    for piece, eq, ineq in spans(exact):
        label = f"{piece.stage}: {piece.state}" if piece.stage else piece.name
        rows += [Band(label, s.start + o, s.stop + o) for s, o in ((eq, 0), (ineq, m)) if s.stop > s.start]
    return Sparsity(jacobian, hessian, columns, tuple(sorted(rows, key=lambda b: b.start)))


def spy(prepared: Prepared, path: Path, *, examples: int = EXAMPLES) -> Sparsity:
    """Draw the sparsity of a spec's program for a few examples.

    Args:
        prepared: the spec, its data and its module.
        path: PNG to write.
        examples: training examples that the program is made of.

    Raises:
        SpecError: data, loss and program do not fit each other.
        MissingExtraError: Matplotlib is not installed.
    """
    loaded, data = prepared.loaded, prepared.data
    with placing(loaded), loaded.importing():
        instance = prepared.lifted.bind((data.train_x[:examples], data.train_y[:examples]), loss=loaded.loss)
        found = sparsity_of(instance)
    draw(found, path, title=f"{loaded.spec.name}, {examples} examples")
    return found


def draw(sparsity: Sparsity, path: Path, *, title: str = "") -> None:
    """Write the picture.

    Raises:
        MissingExtraError: Matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingExtraError("pictures need Matplotlib: pip install 'lagcompile[plots]'") from error
    figure = Figure(figsize=(13, 6.5), layout="constrained")
    FigureCanvasAgg(figure)
    panels = (("Jacobian of the constraints", sparsity.jacobian, sparsity.rows),)
    parts = (*panels, ("Hessian of the Lagrangian", sparsity.hessian, sparsity.columns))
    for place, (name, matrix, rows) in enumerate(parts):
        axes = figure.add_subplot(1, 2, place + 1)
        axes.imshow(matrix, cmap="Greys", interpolation="nearest", aspect="auto", vmin=0, vmax=1)
        axes.set_title(f"{name}: {matrix.shape[0]} x {matrix.shape[1]}")
        _bands(axes.xaxis, axes.axvline, sparsity.columns, rotation=90)
        _bands(axes.yaxis, axes.axhline, rows, rotation=0)
    figure.suptitle(title)
    image = io.BytesIO()
    figure.savefig(image, dpi=110)
    disk.replace(path, image.getvalue())


def _bands(axis: Any, line: Any, bands: tuple[Band, ...], *, rotation: int) -> None:
    axis.set_ticks([(b.start + b.stop - 1) / 2 for b in bands], [b.label for b in bands], rotation=rotation, fontsize=7)
    for band in bands[1:]:
        line(band.start - 0.5, color="tab:red", linewidth=0.4)
