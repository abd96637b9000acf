"""What a person sees during a run: a live line on a terminal, plain lines elsewhere.

In: rows of a history. Out: text on a console. Invariant: nothing is computed here but speed and remaining time.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TaskID, TextColumn
from rich.text import Text

SHOWN = (
    ("loss", "loss", ".3g"),
    ("validation_accuracy", "val acc", ".2%"),
    ("defect", "defect", ".1e"),
    ("outside", "outside", ".0%"),
    ("dual", "|lambda|", ".1e"),
)
LINES = 10
EVERY = 20
HEADER = ("iter", "objective", "primal inf", "dual inf", "step", "regular.", "kind")


def iteration_cells(row: Mapping[str, Any]) -> tuple[str, ...]:
    """A row of an exact solver's iteration table under `HEADER`."""
    return (
        f"{row['step']:.0f}",
        f"{row['objective']:.8e}",
        f"{row['primal_infeasibility']:.2e}",
        f"{row['dual_infeasibility']:.2e}",
        f"{row['step_length']:.1e}",
        f"{row['regularisation']:.1e}",
        str(row.get("kind", "")),
    )


def iteration_line(row: Mapping[str, Any]) -> str:
    """The same as a line of text, with the header above every 20th."""
    widths = (4, 15, 10, 10, 8, 8, 0)
    texts = ([HEADER] if int(row["step"]) % EVERY == 0 else []) + [iteration_cells(row)]
    return "\n".join("  ".join(c.rjust(w) for c, w in zip(t, widths, strict=True)) for t in texts)


class _Measures(ProgressColumn):
    """The numbers of the last row."""

    def render(self, task: Task) -> Text:
        return Text(str(task.fields.get("numbers", "")))


class Display:
    """Shows one or more runs, one after the other; a context manager."""

    def __init__(self, console: Console, *, quiet: bool = False) -> None:
        self.console, self.quiet = console, quiet
        self.live = console.is_terminal and not quiet
        self._tasks: dict[str, TaskID] = {}
        self._kept: dict[str, dict[str, float]] = {}
        self._before: dict[str, Mapping[str, float]] = {}
        self._printed: dict[str, int] = {}
        self._progress = Progress(
            TextColumn("{task.description:>9}"),
            BarColumn(bar_width=20),
            TextColumn("{task.completed:.0f}/{task.total:.0f}"),
            _Measures(),
            console=console,
            refresh_per_second=4,
        )

    def __enter__(self) -> Display:
        if self.live:
            self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.live:
            self._progress.stop()

    def begin(self, name: str) -> None:
        """Head the rows that follow with the name of a run."""
        if not self.quiet:
            self.console.print(f"{name}:", soft_wrap=True, highlight=False, markup=False)

    def look(self, name: str, total: int, row: Mapping[str, float]) -> None:
        """Show a row of a run of `total` steps."""
        if self.quiet:
            return
        if "dual_infeasibility" in row:  # an exact solver's iteration: all of them, in its own table
            self.console.print(iteration_line(row), soft_wrap=True, highlight=False, markup=False)
            return
        # held-out numbers come less often than the others: the last ones are shown again
        kept = self._kept.setdefault(name, {})
        kept.update(row)
        text = self._text(name, total, row, kept)
        if self.live:
            if name not in self._tasks:
                self._tasks[name] = self._progress.add_task(name, total=total)
            self._progress.update(self._tasks[name], completed=row["step"], numbers=text)
        else:
            part = int(LINES * row["step"] / max(1, total))
            if part > self._printed.get(name, -1) or row["step"] >= total:
                self._printed[name] = part
                self.console.print(
                    f"{name:>9} {row['step']:.0f}/{total}  {text}", soft_wrap=True, highlight=False, markup=False
                )
        self._before[name] = dict(row)

    def _text(self, name: str, total: int, row: Mapping[str, float], kept: Mapping[str, float]) -> str:
        words = [f"{label} {kept[key]:{form}}" for key, label, form in SHOWN if key in kept]
        before = self._before.get(name, {"step": 0.0, "seconds": 0.0})
        steps, seconds = row["step"] - before["step"], row["seconds"] - before["seconds"]
        if steps > 0 and seconds > 0:
            words.append(f"{steps / seconds:.0f} steps/s")
            remaining = int((total - row["step"]) * seconds / steps)
            words.append(f"ETA {remaining // 60}:{remaining % 60:02d}")
        return "  ".join(words)
