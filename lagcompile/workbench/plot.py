"""Curves of a run: loss, held-out accuracy, mean absolute defect, mean absolute multiplier.

In: histories. Out: the bytes of one PNG. Invariant: the horizontal axis counts gradient evaluations, so that methods
with one and with two of them a step can be compared; a panel appears only where some history has its numbers.
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import Any

from lagcompile.ir.base import MissingExtraError
from lagcompile.ir.solution import History

PANELS = (
    ("loss", "training loss of the batch", "log"),
    ("validation_accuracy", "validation accuracy", "linear"),
    ("defect", "mean |defect| of the batch", "log"),
    ("dual", "mean |multiplier| of the batch", "linear"),
    ("objective", "objective of the program", "linear"),
    ("primal_infeasibility", "largest constraint violation", "log"),
    ("dual_infeasibility", "largest dual residual", "log"),
)
COLOURS = ("#1f5f8b", "#c0562f", "#4d7c3a", "#7b4b94")


def pyplot() -> Any:
    """matplotlib.pyplot, drawing to files.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    try:
        import matplotlib as mpl
        from matplotlib import pyplot as plt
    except ImportError:
        raise MissingExtraError("figures need matplotlib: pip install 'lagcompile[plots]'") from None
    mpl.use("Agg")
    return plt


def png(figure: Any, **options: Any) -> bytes:
    """A figure of pyplot as the bytes of a PNG; the figure is closed."""
    image = io.BytesIO()
    figure.savefig(image, format="png", dpi=120, **options)
    pyplot().close(figure)
    return image.getvalue()


def draw_curves(runs: Mapping[str, tuple[History, float]]) -> bytes:
    """Draw the curves of one or more runs.

    Args:
        runs: name of the run -> its history and its gradient evaluations for each step.

    Returns:
        a PNG.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    plt = pyplot()
    panels = [p for p in PANELS if any(history.column(p[0]) for history, _ in runs.values())]
    columns = min(2, len(panels))
    lines = -(-len(panels) // columns)
    figure, axes = plt.subplots(lines, columns, figsize=(4.6 * columns, 3.1 * lines), squeeze=False)
    for axis, (name, title, scale) in zip(axes.flat, panels, strict=False):
        for colour, (label, (history, each)) in zip(COLOURS, runs.items(), strict=False):
            steps, values = history.pairs(name)
            kept = [(s * each, v) for s, v in zip(steps, values, strict=True) if scale == "linear" or v > 0]
            if kept:
                axis.plot(*zip(*kept, strict=True), color=colour, label=label, linewidth=1.4, marker=".", markersize=3)
        axis.set_yscale(scale)
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("gradient evaluations", fontsize=9)
        axis.tick_params(labelsize=8)
        axis.grid(visible=True, alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    for axis in axes.flat[len(panels) :]:
        axis.set_axis_off()
    if len(runs) > 1:
        axes.flat[0].legend(fontsize=8, frameon=False)
    figure.tight_layout()
    return png(figure)
