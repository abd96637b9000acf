"""The iteration table: its header, its lines, and the table on the screen.

In: rows as they are written. Out: lines through rich. Invariant: nothing is printed unless asked for.
"""

from __future__ import annotations

from collections.abc import Callable

from lagcompile.exact.result import IterationRow

HEADER = (
    f"{'iter':>4}  {'objective':>15}  {'primal':>9}  {'dual':>9}  {'step':>8}  {'|step|':>9}  {'regular.':>9}  kind"
)


def format_row(row: IterationRow) -> str:
    """One line of the table."""
    return (
        f"{row.index:>4}  {row.objective:>15.8e}  {row.primal:>9.2e}  {row.dual:>9.2e}  {row.step:>8.1e}  "
        f"{row.step_norm:>9.2e}  {row.regularisation:>9.1e}  {row.mode}"
    )


def screen(verbose: bool, watch: Callable[[IterationRow], None] | None = None) -> Callable[[IterationRow], None]:
    """A function that shows one row, with the header again every 20 rows; without verbose it only calls `watch`."""
    if not verbose:
        return watch or (lambda row: None)
    from rich.console import Console

    console = Console(highlight=False)

    def show(row: IterationRow) -> None:
        if row.index % 20 == 0:
            console.print(HEADER, style="bold", no_wrap=True, crop=False)
        console.print(format_row(row), no_wrap=True, crop=False)
        if watch is not None:
            watch(row)

    return show
