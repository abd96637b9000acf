"""What a study has run: `rows.jsonl`, with a line for each trial of a search, each row, and each spec that rows share.

In: a folder. Out: `Rows`. Invariant: every line carries its digest, so that one that was cut short, damaged or edited
is named with its number; the file is replaced whole when a line is added, so that no crash leaves half of one.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, TypeAlias

from pydantic import model_validator

from lagcompile.ir import disk, jsonfile
from lagcompile.ir.base import DataError, Measured
from lagcompile.ir.reading import read_text
from lagcompile.workbench.search import Draw, Trial, Value
from lagcompile.workbench.spec import RunSpec
from lagcompile.workbench.systems import SYSTEMS, system_of

FILE = "rows.jsonl"
_SEALED = re.compile(r'(\{.*), "sha256": "([0-9a-f]{16})"\}')


class Tried(Trial):
    """A trial of one system's search."""

    kind: Literal["trial"] = "trial"
    system: str


class SpecLine(Measured):
    """A run spec without its seed, which several rows share."""

    kind: Literal["spec"] = "spec"
    name: str
    """Digest of the spec: rows refer to it by this."""
    spec: dict[str, Any]


class Row(Measured):
    """Result of one run of one system."""

    kind: Literal["row"] = "row"
    system: str
    depth: int | None = None
    """Number of hidden layers, in a study of depth."""
    seed: int
    draw: dict[str, Value]
    spec: str
    """Digest of the run spec, which `Rows.spec` finds."""
    status: str
    accuracy: float
    """Accuracy on the test split, with the weights of `step`."""
    validation: float | None = None
    """Accuracy on the validation split; None where the run trained on it."""
    step: int | None = None
    """Step whose weights were kept; None: the last one (the best one before it where the run diverged)."""
    defect: float
    """Mean |defect|: over all training rows where states are kept, else over the last batch."""
    gradient_evaluations: int
    seconds: float
    """Processor seconds of the run's threads: what else the machine does is not counted."""
    bytes: int
    curve: tuple[tuple[int, float], ...]
    """(step, mean |defect| of the batch), to four digits; empty in studies, which draw no curves."""

    @model_validator(mode="after")
    def _of_a_system(self) -> Row:
        system_of(self.system)
        return self


Line: TypeAlias = Tried | SpecLine | Row
_KINDS: Mapping[object, type[Line]] = {"trial": Tried, "spec": SpecLine, "row": Row}


class Rows:
    """Lines of a folder.

    Args:
        folder: where `rows.jsonl` is, or will be.

    Raises:
        DataError: a line is damaged, or it repeats another.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / FILE
        self._text, self._lines = "", list[Line]()
        if self.path.exists():
            self._text = read_text(self.path, kind="JSON lines")
            self._lines = list(self._read())
        self._check_once()

    def _read(self) -> Iterator[Line]:
        remedy = "remove this line, and what it held is run again"
        *lines, rest = self._text.split("\n")
        if rest:
            raise DataError(f"{self.path}:{len(lines) + 1}: the last line was cut short: {remedy}")
        for number, line in enumerate(lines, 1):
            place, sealed = f"{self.path}:{number}", _SEALED.fullmatch(line)
            if sealed is None or _digest(sealed[1] + "}") != sealed[2]:
                raise DataError(f"{place}: the line is damaged or was changed: {remedy}")
            # Empty lines in front give problems of its content the line's number.
            text, source = "\n" * (number - 1) + sealed[1] + "}", str(self.path)
            kind = _KINDS.get(jsonfile.parse(text, source).get("kind"))
            if kind is None:
                raise DataError(f"{place}: the line is none of {', '.join(map(str, _KINDS))}: {remedy}")
            yield jsonfile.check(text, source, kind)

    def _check_once(self) -> None:
        seen = set[object]()
        for number, line in enumerate(self._lines, 1):
            key = (line.system, line.depth, line.seed) if isinstance(line, Row) else number
            if key in seen:
                raise DataError(f"{self.path}:{number}: there is a row of this system and seed before: remove one")
            seen.add(key)

    @property
    def rows(self) -> list[Row]:
        """All rows, by system and seed."""
        order = {s.name: i for i, s in enumerate(SYSTEMS)}
        found = [line for line in self._lines if isinstance(line, Row)]
        return sorted(found, key=lambda r: (order[r.system], r.depth or 0, r.seed))

    def has(self, system: str, seed: int, depth: int | None = None) -> bool:
        """Whether there is such a row."""
        return any((r.system, r.seed, r.depth) == (system, seed, depth) for r in self.rows)

    def trials(self, system: str) -> list[Tried]:
        """Trials of a system's search, in the order in which they were run."""
        return [line for line in self._lines if isinstance(line, Tried) and line.system == system]

    def spec(self, row: Row) -> RunSpec:
        """The run spec of a row, which `lagcompile solve` reads.

        Raises:
            DataError: no line holds it.
        """
        for line in self._lines:
            if isinstance(line, SpecLine) and line.name == row.spec:
                return RunSpec.model_validate({**line.spec, "run": {**line.spec["run"], "seed": row.seed}})
        raise DataError(f"{self.path}: no line holds the spec {row.spec}")

    def keep_trial(self, system: str, trial: Trial) -> None:
        """Add a trial."""
        self._add(Tried(system=system, **trial.model_dump()))

    def keep(self, row: Row, spec: RunSpec) -> None:
        """Add a row, and its spec where it is new."""
        name, shared = _shared(spec)
        known = any(isinstance(line, SpecLine) and line.name == name for line in self._lines)
        self._add(*([] if known else [SpecLine(name=name, spec=shared)]), row)

    def _add(self, *lines: Line) -> None:
        new = "".join(_sealed(line) for line in lines)
        disk.replace(self.path, (self._text + new).encode())
        self._text += new
        self._lines += lines


def row_of(
    system: str, draw: Draw, spec: RunSpec, *, curve: Mapping[float, float], depth: int | None = None, **measured: Any
) -> Row:
    """A row of a run.

    Args:
        system: its name.
        draw: what was searched or drawn.
        spec: of the run.
        curve: step -> mean |defect|.
        depth: of the network, in a study of depth.
        measured: all other fields.
    """
    points = tuple((int(step), float(f"{value:.4g}")) for step, value in curve.items())
    name, _ = _shared(spec)
    return Row(system=system, depth=depth, seed=spec.run.seed, draw=draw, spec=name, curve=points, **measured)


def _shared(spec: RunSpec) -> tuple[str, dict[str, Any]]:
    """Return the digest and the content of a spec without its seed."""
    shared = spec.model_dump(mode="json", exclude_unset=True)
    shared["run"] = {k: v for k, v in shared["run"].items() if k != "seed"}
    return _digest(json.dumps(shared, sort_keys=True)), shared


def _sealed(line: Line) -> str:
    text = json.dumps({"kind": line.kind, **line.model_dump(mode="json", exclude_none=True)})
    return f'{text[:-1]}, "sha256": "{_digest(text)}"}}\n'


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]
