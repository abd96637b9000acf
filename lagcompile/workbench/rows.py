"""One row of a bench: what one run of one system gave.

In: a folder of rows. Out: `Row`, sorted. Invariant: a row that is read is whole: its system is known, its spec is
one of a run.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import model_validator

from lagcompile.ir.base import Measured
from lagcompile.workbench.search import row_of
from lagcompile.workbench.systems import SYSTEMS, system_of


class Row(Measured):
    """One run."""

    system: str
    seed: int
    spec: dict[str, Any]
    """The run spec, which `lagcompile solve` reads."""
    status: str
    accuracy: float
    """On the test split, with the weights of `step`."""
    validation: float | None
    """None: all of it was trained on."""
    step: int | None = None
    """Step whose weights were kept; None: the last one (the best one before it where the run diverged)."""
    defect: float
    """Mean |defect|: over all training rows where states are kept, else over the last batch."""
    gradient_evaluations: int
    seconds: float
    """Processor seconds of the run's threads: what else the machine does is not counted."""
    bytes: int
    curve: tuple[tuple[float, float], ...]
    """(step, mean |defect| of the batch)."""

    @model_validator(mode="after")
    def _of_a_run(self) -> Row:
        system_of(self.system)
        if not isinstance(self.spec.get("run"), dict) or not isinstance(self.spec["run"].get("steps"), int):
            raise ValueError("the spec of the row has no run.steps")
        return self


def rows_of(folder: Path) -> list[Row]:
    """All rows of a folder, by system and seed.

    Raises:
        DataError: a row is damaged.
    """
    rows = [row_of(p, Row) for p in sorted((folder / "rows").glob("*.json"))]
    order = {s.name: i for i, s in enumerate(SYSTEMS)}
    return sorted(rows, key=lambda r: (order.get(r.system, len(order)), r.seed))
