"""A drawing of a program's stage graph: stages with their cost, breakpoints with their states, skip connections.

In: a `Program`, the path of an .svg, .png or .pdf file. Out: the file. Invariant: what is drawn and where is
decided by `cells` and `layout`; here it is only painted.
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lagcompile.export.cells import picture
from lagcompile.export.layout import BAR, Box, Layout, Line, Text, layout
from lagcompile.ir import disk
from lagcompile.ir.base import DataError, MissingExtraError
from lagcompile.ir.places import path_of
from lagcompile.ir.program import Program

KINDS = (".svg", ".png", ".pdf")
DPI = 150
INK, GREY, BLUE, ORANGE, PURPLE = "#1d2b36", "#5a6872", "#1f5f8b", "#b5491f", "#6b3f87"
FILL, EDGE, BAR_BACK = "#e9f1f7", "#7d96a8", "#cfdde8"
COLOURS: Mapping[str, str] = {
    "title": INK,
    "name": INK,
    "module": INK,
    "fact": GREY,
    "data": GREY,
    "cut": ORANGE,
    "state": ORANGE,
    "state name": ORANGE,
    "on cut": GREY,
    "plain": GREY,
    "plain name": INK,
    "skip": PURPLE,
    "skip name": PURPLE,
}
COVERING = frozenset({"state name", "plain name", "on cut", "skip name"})
"""Texts that are drawn over lines and hide them."""


def draw(program: Program, path: str | Path) -> Path:
    """Draw a program.

    Args:
        program: the program.
        path: an .svg, .png or .pdf file; its folder must exist.

    Returns:
        the path.

    Raises:
        DataError: another kind of file, or its folder does not exist.
        MissingExtraError: matplotlib is not installed.
    """
    target = path_of("path", path)
    if target.suffix.lower() not in KINDS:
        raise DataError(f"{target}: a drawing is an .svg, .png or .pdf file, not '{target.suffix or target.name}'")
    if not target.parent.is_dir():
        raise DataError(f"{target}: there is no folder {target.parent}")
    disk.replace(target, drawn(program, target.suffix[1:].lower()))
    return target


def drawn(program: Program, kind: str) -> bytes:
    """Draw a program as the bytes of an svg, png or pdf.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    figure_class = _figure_class()
    with _settings():
        figure = figure_class(figsize=(1, 1), dpi=DPI)
        placed = layout(picture(program), _Ruler(figure))
        figure.set_size_inches(placed.width, placed.height)
        _paint(figure, placed)
        metadata = {"Date": None} if kind == "svg" else {}
        image = io.BytesIO()
        figure.savefig(image, format=kind, dpi=DPI, facecolor="white", metadata=metadata)
    return image.getvalue()


def _figure_class() -> Any:
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise MissingExtraError("drawings need matplotlib: pip install 'lagcompile[plots]'") from None

    def make(**options: Any) -> Any:
        figure = Figure(**options)
        FigureCanvasAgg(figure)
        return figure

    return make


def _settings() -> Any:
    import matplotlib as mpl

    return mpl.rc_context({"font.family": "DejaVu Sans", "svg.hashsalt": "lagcompile", "text.usetex": False})


class _Ruler:
    """Measure texts as they will be painted."""

    def __init__(self, figure: Any) -> None:
        self.figure = figure
        self.renderer = figure.canvas.get_renderer()
        self.known: dict[tuple[str, float, bool], tuple[float, float]] = {}

    def __call__(self, text: str, size: float, bold: bool) -> tuple[float, float]:
        key = (text, size, bold)
        if key not in self.known:
            drawn = self.figure.text(0, 0, _plain(text), fontsize=size, fontweight="bold" if bold else "normal")
            box = drawn.get_window_extent(self.renderer)
            drawn.remove()
            self.known[key] = (box.width / DPI, box.height / DPI)
        return self.known[key]


def _plain(text: str) -> str:
    """Escape dollar signs, so that they do not begin a formula."""
    return text.replace("$", r"\$")


def _paint(figure: Any, placed: Layout) -> None:
    axis = figure.add_axes((0, 0, 1, 1))
    axis.set_xlim(0, placed.width)
    axis.set_ylim(0, placed.height)
    axis.set_axis_off()
    for line in placed.lines:
        _line(axis, line)
    for box in placed.boxes:
        _box(axis, box)
    for text in placed.texts:
        _text(axis, text)


def _line(axis: Any, line: Line) -> None:
    painted = line.points[:-1] if line.arrow else line.points
    xs, ys = zip(*painted, strict=True)
    colour = COLOURS[line.role]
    style = (0, (4, 3)) if line.role == "cut" else "-"
    axis.plot(
        xs, ys, color=colour, linewidth=1.0 if line.role == "cut" else 1.2, linestyle=style, solid_joinstyle="round"
    )
    if line.arrow:
        axis.annotate(
            "",
            xy=line.points[-1],
            xytext=line.points[-2],
            arrowprops={"arrowstyle": "-|>", "color": colour, "linewidth": 1.2, "shrinkA": 0, "shrinkB": 0},
        )


def _box(axis: Any, box: Box) -> None:
    from matplotlib.patches import FancyBboxPatch, Rectangle

    if not box.drawn:
        return
    rounded = "round,pad=0,rounding_size=0.08"
    axis.add_patch(
        FancyBboxPatch(
            (box.x, box.y),
            box.width,
            box.height,
            boxstyle=rounded,
            facecolor=FILL,
            edgecolor=EDGE,
            linewidth=1,
            zorder=3,
        )
    )
    inner = box.width - 0.2
    axis.add_patch(Rectangle((box.x + 0.1, box.y + 0.07), inner, BAR, facecolor=BAR_BACK, zorder=4))
    axis.add_patch(Rectangle((box.x + 0.1, box.y + 0.07), inner * box.share, BAR, facecolor=BLUE, zorder=5))


def _text(axis: Any, text: Text) -> None:
    patch = {"facecolor": "white", "edgecolor": "none", "pad": 0.8} if text.role in COVERING else None
    axis.text(
        text.x,
        text.y,
        _plain(text.text),
        fontsize=text.size,
        fontweight="bold" if text.bold else "normal",
        color=COLOURS[text.role],
        ha=text.horizontal,
        va=text.vertical,
        bbox=patch,
        zorder=6,
    )
