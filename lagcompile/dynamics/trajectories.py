"""Measured trajectories: times, observations, inputs and masks of several experiments of unequal length.

In: arrays from a file or an experiment. Out: a `Trajectories` record of padded float tensors. Invariant: every time
stamp sequence increases, every observation that counts is finite, and every step has its input.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lagcompile.ir.arguments import expect
from lagcompile.ir.base import BindError, DataError, SpecError
from lagcompile.ir.reading import read_text

LARGEST = 1 << 30
"""Bytes of a CSV file."""
TOLD = 10
"""Problems of one CSV file that are listed."""


@dataclass(frozen=True, eq=False)
class Trajectory:
    """One experiment of N samples.

    Attributes:
        observations: (N, outputs) measured outputs; where `mask` is False the value is ignored.
        times: (N,) increasing time stamps in the unit of the step length; None means 0, 1, 2, ...
        inputs: (N or N-1, inputs) exogenous inputs; row t acts from sample t to sample t+1. None: no inputs.
        mask: (N, outputs) or (N,) True where an observation counts; None: all of them.
        name: what messages call this trajectory.
    """

    observations: Tensor
    times: Tensor | None = None
    inputs: Tensor | None = None
    mask: Tensor | None = None
    name: str = ""


@dataclass(frozen=True, eq=False)
class Trajectories:
    """Several trajectories, padded to the longest one.

    Attributes:
        observations: (trajectories, N, outputs); padding and missing values are 0.
        mask: (trajectories, N, outputs) bool, False for padding and missing values.
        inputs: (trajectories, N, inputs), None without inputs; the last row repeats where it was not given.
        times: (trajectories, N); padding continues with the last interval.
        lengths: number of samples of each trajectory.
        names: what messages call each trajectory.
    """

    observations: Tensor
    mask: Tensor
    inputs: Tensor | None
    times: Tensor
    lengths: tuple[int, ...]
    names: tuple[str, ...]

    @property
    def samples(self) -> int:
        """Samples of the longest trajectory."""
        return int(self.observations.shape[1])

    @property
    def outputs(self) -> int:
        """Number of measured outputs."""
        return int(self.observations.shape[2])

    def __len__(self) -> int:
        return len(self.lengths)

    def to(self, *, dtype: torch.dtype | None = None, device: torch.device | str | None = None) -> Trajectories:
        """Copy with another floating type or on another device."""
        return Trajectories(
            observations=self.observations.to(device=device, dtype=dtype),
            mask=self.mask.to(device=device),
            inputs=None if self.inputs is None else self.inputs.to(device=device, dtype=dtype),
            times=self.times.to(device=device, dtype=dtype),
            lengths=self.lengths,
            names=self.names,
        )

    def at(self, trajectory: int, sample: int) -> str:
        """Words for a place in the data: trajectory and time, as messages use them."""
        return f"trajectory {self.names[trajectory]!r} at time {float(self.times[trajectory, sample]):.6g}"

    @classmethod
    def single(
        cls,
        observations: Tensor | np.ndarray,
        *,
        times: Tensor | np.ndarray | None = None,
        inputs: Tensor | np.ndarray | None = None,
        mask: Tensor | np.ndarray | None = None,
        name: str = "",
    ) -> Trajectories:
        """One trajectory; arguments as in `Trajectory`, and a one-dimensional array is one output or one input."""
        return cls.stack([Trajectory(_tensor(observations), _maybe(times), _maybe(inputs), _maybe(mask), name=name)])

    @classmethod
    def stack(cls, items: Sequence[Trajectory], *, dtype: torch.dtype = torch.float64) -> Trajectories:
        """Check every trajectory and pad them to one length.

        Args:
            items: the trajectories; all have the same numbers of outputs and inputs.
            dtype: floating type of the result.

        Raises:
            DataError: no trajectory, times that do not increase, NaN without a mask, inputs or masks of a wrong shape;
                all problems of all trajectories at once.
        """
        if not items:
            raise DataError("no trajectory was given: pass at least one")
        problems: list[str] = []
        checked = [_check(item, item.name or str(i), problems) for i, item in enumerate(items)]
        outputs = {int(c.observations.shape[1]) for c in checked}
        inputs = {None if c.inputs is None else int(c.inputs.shape[1]) for c in checked}
        if len(outputs) > 1:
            problems.append(f"trajectories differ in their number of outputs: {sorted(outputs)}")
        if len(inputs) > 1:
            problems.append(f"trajectories differ in their number of inputs: {sorted(map(str, inputs))}")
        if problems:
            raise DataError(problems)
        longest = max(c.observations.shape[0] for c in checked)
        padded = [_pad(c, longest, dtype) for c in checked]
        return cls(
            observations=torch.stack([p.observations for p in padded]),
            mask=torch.stack([_given(p.mask) for p in padded]),
            inputs=None if padded[0].inputs is None else torch.stack([_given(p.inputs) for p in padded]),
            times=torch.stack([_given(p.times) for p in padded]),
            lengths=tuple(int(c.observations.shape[0]) for c in checked),
            names=tuple(c.name for c in checked),
        )


def read_csv(
    path: str | Path,
    *,
    outputs: Sequence[str],
    inputs: Sequence[str] = (),
    time: str | None = None,
    rows: slice = slice(None),
) -> Trajectory:
    """One trajectory from a CSV file with a header line; an empty cell is a missing observation.

    Args:
        path: the file.
        outputs: names of the observed columns.
        inputs: names of the input columns.
        time: name of the column of time stamps; None: samples are one unit apart.
        rows: which data rows to keep.

    Raises:
        SpecError: the names are not names of columns.
        DataError: the file or a column is missing or twice there, a row is too short or too long, or a cell is no
            number; each problem names a line.
    """
    expect("time", time, str, "the name of a column")
    for role, names in (("outputs", outputs), ("inputs", inputs)):
        if not isinstance(names, (list, tuple)) or not all(isinstance(n, str) for n in names):
            raise SpecError(f"{role} takes a list of names of columns, got {names!r:.60}")
    if not outputs:
        raise SpecError("outputs takes at least one name of a column")
    lines = csv.reader(read_text(path, kind="CSV", largest=LARGEST).splitlines(keepends=True), strict=True)
    found = _Rows(str(path), lines)
    wanted = [*outputs, *inputs, *([time] if time is not None else [])]
    column = {name: found.column(name) for name in wanted}
    found.check()
    table = {name: torch.tensor(found.numbers(name, at), dtype=torch.float64)[rows] for name, at in column.items()}
    found.check()
    values = torch.stack([table[name] for name in outputs], 1)
    return Trajectory(
        observations=values,
        times=table[time] if time is not None else None,
        inputs=torch.stack([table[name] for name in inputs], 1) if inputs else None,
        mask=~torch.isnan(values),
        name=Path(path).stem,
    )


class _Rows:
    """Cells of a CSV file by line, and what is wrong with them; of many problems the first ones are told."""

    def __init__(self, source: str, lines: Any) -> None:
        self.source, self.problems = source, list[str]()
        self.rows: list[tuple[int, list[str]]] = []
        try:
            for cells in lines:
                if any(cell.strip() for cell in cells):  # a blank line, as at the end of many files
                    self.rows.append((lines.line_num, cells))
        except csv.Error as error:
            raise DataError(f"{source}:{lines.line_num}: not a table: {error}") from None
        if not self.rows:
            raise DataError(f"{source}: the file is empty")
        self.header = [name.strip() for name in self.rows.pop(0)[1]]
        if not self.rows:
            raise DataError(f"{source}: there are no rows below the line of names")
        for line, cells in self.rows:
            if len(cells) != len(self.header):
                self.problems.append(f"{source}:{line}: {len(cells)} cells, but {len(self.header)} names above")

    def column(self, name: str) -> int:
        """Number of a column."""
        if self.header.count(name) == 1:
            return self.header.index(name)
        has = ", ".join(cell if len(cell) <= 40 else cell[:37] + "..." for cell in self.header[:20])
        if name in self.header:
            self.problems.append(f"{self.source}:1: the column {name!r} is there twice: rename one of them")
        elif len(self.header) == 1 and (other := next((c for c in ";\t| " if c in has), "")):
            raise DataError(
                f"{self.source} has no column {name!r}: cells are separated by commas (and decimals by a point), "
                f"here it seems to be {other!r}"
            )
        else:
            self.problems.append(f"{self.source} has no column {name!r}; it has {has}")
        return 0

    def numbers(self, name: str, at: int) -> list[float]:
        """Cells of a column; empty ones are NaN."""
        return [self._number(name, line, cells[at].strip()) for line, cells in self.rows]

    def _number(self, name: str, line: int, cell: str) -> float:
        try:
            if "_" in cell:  # only Python writes long numbers like this
                raise ValueError
            return float(cell) if cell else math.nan
        except ValueError:
            self.problems.append(f"{self.source}:{line}: column {name!r}: {cell[:40]!r} is not a number")
            return math.nan

    def check(self) -> None:
        """Refuse the file where something is wrong."""
        if len(self.problems) > TOLD:
            more = f"{self.source}: {len(self.problems) - TOLD} more problems of this kind"
            raise DataError([*self.problems[:TOLD], more])
        if self.problems:
            raise DataError(self.problems)


def _tensor(value: Tensor | np.ndarray) -> Tensor:
    return value if isinstance(value, Tensor) else torch.as_tensor(value)


def _maybe(value: Tensor | np.ndarray | None) -> Tensor | None:
    return None if value is None else _tensor(value)


def _given(value: Tensor | None) -> Tensor:
    if value is None:
        raise BindError("a trajectory was not completed before stacking")
    return value


def _columns(value: Tensor) -> Tensor:
    return value[:, None] if value.dim() == 1 else value


def _check(item: Trajectory, name: str, problems: list[str]) -> Trajectory:
    """Two-dimensional copy of a trajectory with times and mask filled in; problems are appended."""
    where = f"trajectory {name!r}"
    obs = _columns(item.observations).double()
    if obs.dim() != 2 or obs.shape[0] < 2:
        problems.append(f"{where}: observations must be (samples >= 2, outputs), got {tuple(item.observations.shape)}")
        obs = torch.zeros(2, 1, dtype=torch.float64)
    count = obs.shape[0]
    times = torch.arange(count, dtype=torch.float64) if item.times is None else item.times.double()
    if times.shape != (count,):
        problems.append(f"{where}: {count} samples need {count} time stamps, got shape {tuple(times.shape)}")
        times = torch.arange(count, dtype=torch.float64)
    elif not bool((times[1:] > times[:-1]).all()):
        late = int((~(times[1:] > times[:-1])).nonzero()[0])
        problems.append(
            f"{where}: time stamps must increase, but sample {late + 1} has time {float(times[late + 1]):.6g} "
            f"after {float(times[late]):.6g}: sort the rows or split the trajectory there"
        )
    mask = torch.ones_like(obs, dtype=torch.bool) if item.mask is None else _columns(item.mask).bool()
    if mask.shape != obs.shape and not (mask.shape[0] == count and mask.shape[1] == 1):
        problems.append(f"{where}: mask {tuple(mask.shape)} does not fit observations {tuple(obs.shape)}")
        mask = torch.ones_like(obs, dtype=torch.bool)
    mask = mask.expand_as(obs)
    bad = mask & ~torch.isfinite(obs)
    if bool(bad.any()):
        row, col = (int(v) for v in bad.nonzero()[0])
        problems.append(
            f"{where}: output {col} is {float(obs[row, col])} at sample {row} (time {float(times[row]):.6g}) "
            "without a mask: pass mask=~isnan(observations) to leave missing values out"
        )
    inputs = _check_inputs(item.inputs, times, where, problems)
    return Trajectory(torch.where(mask, obs, torch.zeros_like(obs)), times, inputs, mask, name=name)


def _check_inputs(inputs: Tensor | None, times: Tensor, where: str, problems: list[str]) -> Tensor | None:
    if inputs is None:
        return None
    count = len(times)
    values = _columns(inputs).double()
    if values.shape[0] < count - 1:
        last = max(values.shape[0] - 1, 0)
        problems.append(
            f"{where}: inputs end at sample {last} (time {float(times[last]):.6g}), "
            f"the trajectory of {count} samples needs at least {count - 1} rows of inputs"
        )
        return values
    values = values[:count]
    finite = torch.isfinite(values)
    if not bool(finite.all()):
        row, col = (int(v) for v in (~finite).nonzero()[0])
        problems.append(
            f"{where}: input {col} is {float(values[row, col])} at sample {row} (time {float(times[row]):.6g}): "
            "inputs cannot be masked"
        )
    return torch.cat([values, values[-1:]]) if values.shape[0] == count - 1 else values


def _pad(item: Trajectory, longest: int, dtype: torch.dtype) -> Trajectory:
    extra = longest - item.observations.shape[0]
    times, mask = _given(item.times), _given(item.mask)
    tail = times[-1] + (times[-1] - times[-2]) * torch.arange(1, extra + 1, dtype=torch.float64)
    inputs = item.inputs
    if inputs is not None:
        inputs = torch.cat([inputs, inputs[-1:].expand(extra, -1)]).to(dtype)
    blank = item.observations.new_zeros(extra, item.observations.shape[1])
    return Trajectory(
        torch.cat([item.observations, blank]).to(dtype),
        torch.cat([times, tail]).to(dtype),
        inputs,
        torch.cat([mask, blank.bool()]),
        name=item.name,
    )
