"""A picture of a network with its cuts: stages as boxes with the modules they run, states on the breakpoints between.

In: a `Program`. Out: the bytes of one PNG. Invariant: everything drawn is in the program; of many stages the first
and the last are drawn, with the number of those between them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lagcompile.ir.program import Program, Stage, StateVariable
from lagcompile.workbench.plot import png, pyplot

MOST, LINES = 8, 7
BOX, SPACE, HEIGHT = 2.3, 1.5, 2.4
STAGE, STATE, SKIP = "#dce8f0", "#c0562f", "#7b4b94"


def draw_network(program: Program) -> bytes:
    """Draw a program's stages and states.

    Args:
        program: the program.

    Returns:
        a PNG.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    plt = pyplot()
    stages = list(program.stages)
    shown = stages if len(stages) <= MOST else [*stages[: MOST // 2], *stages[-MOST // 2 :]]
    hidden = len(stages) - len(shown)
    gap = 2 * SPACE if hidden else 0.0
    left = {s.name: i * (BOX + SPACE) + (gap if i >= MOST // 2 else 0.0) for i, s in enumerate(shown)}
    width = max(left.values()) + BOX
    figure, axis = plt.subplots(figsize=(min(24, 1.2 + 0.85 * width), 3.4))
    for stage in shown:
        _stage(axis, program, stage, left[stage.name])
    for state in program.states:
        _state(axis, program, state, left)
    if hidden:
        middle = left[shown[MOST // 2].name] - SPACE
        axis.text(middle, HEIGHT / 2, f"{hidden} more\nstages", ha="center", va="center", fontsize=9)
    axis.set_xlim(-0.8, width + 0.8)
    axis.set_ylim(-1.35, HEIGHT + (2.2 if _skips(program) else 1.0))
    axis.set_axis_off()
    axis.set_title(f"{program.name}: {len(stages)} stages, {len(program.states)} states", fontsize=10, loc="left")
    return png(figure, bbox_inches="tight")


def _stage(axis: Any, program: Program, stage: Stage, x: float) -> None:
    from matplotlib.patches import FancyBboxPatch

    box = FancyBboxPatch((x, 0), BOX, HEIGHT, boxstyle="round,pad=0.02,rounding_size=0.12", fc=STAGE, ec="#555555")
    axis.add_patch(box)
    names = [m for m in stage.modules if not any(o.startswith(m + ".") for o in stage.modules)]
    sizes = {w.name: w.type.count or 0 for w in program.weights}
    parameters = sum(sizes[w] for w in stage.weights)
    axis.text(x + BOX / 2, HEIGHT - 0.12, stage.name, ha="center", va="top", fontsize=10, weight="bold")
    axis.text(x + BOX / 2, HEIGHT / 2 - 0.1, "\n".join(_some(names)), ha="center", va="center", fontsize=7.5)
    axis.text(x + BOX / 2, -0.12, f"{parameters:,} parameters", ha="center", va="top", fontsize=7.5, color="#555555")


def _some(names: Sequence[str]) -> list[str]:
    if len(names) <= LINES:
        return list(names)
    return [*names[: LINES - 2], f"... {len(names) - LINES + 1} more", names[-1]]


def _state(axis: Any, program: Program, state: StateVariable, left: dict[str, float]) -> None:
    """Arrows from the stage that makes a state to those that read it, with its name and size on the breakpoint."""
    maker = next(s for s in program.stages if state.name in s.writes)
    order = [s.name for s in program.stages]
    if maker.name not in left:
        return
    start = left[maker.name] + BOX
    same = [s for s in program.states if s.breakpoint == state.breakpoint]
    y = HEIGHT * (1 + same.index(state)) / (1 + len(same))
    cut = start + SPACE / 2
    axis.plot([cut, cut], [-0.6, HEIGHT + 0.5], color=STATE, linewidth=1, linestyle=(0, (4, 3)), zorder=0)
    kind = state.storage.kind
    size = "x".join(str(d) for d in state.type.features or ()) or "?"
    axis.text(cut, y + 0.1, state.name, ha="center", va="bottom", fontsize=8, color=STATE, backgroundcolor="white")
    axis.text(cut, -0.62 - 0.3 * same.index(state), f"{state.name}: {size}, {kind}", ha="center", va="top", fontsize=7)
    for reader in (s for s in program.stages if state.name in s.reads and s.name in left):
        near = order.index(reader.name) == order.index(maker.name) + 1
        begin, end = (start, y), (left[reader.name], y)
        if not near:  # over the stages between
            begin, end = (start - 0.3, HEIGHT + 0.04), (left[reader.name] + 0.3, HEIGHT + 0.04)
        bend, colour = ("arc3", STATE) if near else ("arc3,rad=-0.3", SKIP)
        axis.annotate(
            "", xy=end, xytext=begin, arrowprops={"arrowstyle": "-|>", "color": colour, "connectionstyle": bend}
        )
        if not near:
            axis.text(begin[0], begin[1] + 0.25, state.name, ha="right", fontsize=8, color=SKIP)


def _skips(program: Program) -> bool:
    """Return whether some stage reads a state of a stage earlier than the one before it."""
    made = {name: i for i, stage in enumerate(program.stages) for name in stage.writes}
    states = {s.name for s in program.states}
    return any(i - made[r] > 1 for i, s in enumerate(program.stages) for r in s.reads if r in states)
