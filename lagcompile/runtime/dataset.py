"""Any data set as tensors with row numbers.

In: a `torch.utils.data` data set, a pair of tensors, or batches. Out: inputs and targets with one row an example.
Invariant: the rows keep the order in which the data set gives them, so that a row number names an example for a whole
run; no value is NaN or infinite.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from types import NoneType
from typing import TypeGuard

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset, TensorDataset

from lagcompile.ir.base import DataError

_GIVES_EXAMPLES = (Dataset, Iterable)


def as_tensors(dataset: object) -> tuple[Tensor, Tensor]:
    """Return inputs and targets of a data set with one input, as tensors with one row an example.

    Args:
        dataset: a pair of tensors or arrays, a `TensorDataset`, a map-style or iterable `Dataset` of (input, target)
            examples, a `DataLoader` or another iterable of (inputs, targets)
            batches. Random augmentation and
            shuffling happen once, here: an example is the same in every step of a run.

    Raises:
        DataError: no rows, lengths that differ, non-finite values, or something that is not a data set.
    """
    inputs, targets = as_rows(dataset)
    if len(inputs) != 1:
        raise DataError(f"the data set has {len(inputs)} inputs an example, expected 1")
    return inputs[0], targets


def as_rows(dataset: object) -> tuple[tuple[Tensor, ...], Tensor]:
    """Do as `as_tensors` for data sets whose inputs may be a tuple of tensors.

    Raises:
        DataError: as for `as_tensors`.
    """
    if isinstance(dataset, TensorDataset):
        *inputs, targets = dataset.tensors
    elif _is_pair(dataset):
        inputs, targets = _columns(dataset[0]), _tensor(dataset[1], "targets")
    else:
        inputs, targets = _joined(dataset)
    _check_rows(inputs, targets)
    return tuple(inputs), targets


def class_counts(labels: Tensor, classes: int) -> Tensor:
    """Count the examples of each class, int64 [classes].

    Raises:
        DataError: labels that are not whole numbers from 0 to classes - 1, one an example.
    """
    if labels.dim() != 1 or labels.is_floating_point() or labels.dtype == torch.bool:
        raise DataError(f"expected one whole number an example as label, got {labels.dtype} {list(labels.shape)}")
    if len(labels) and (int(labels.min()) < 0 or int(labels.max()) >= classes):
        raise DataError(f"labels run from {int(labels.min())} to {int(labels.max())}, expected 0 to {classes - 1}")
    return torch.bincount(labels, minlength=classes)


def require_all_classes(labels: Tensor, classes: Sequence[str], *, name: str) -> None:
    """Check that every class occurs.

    Raises:
        DataError: names each class that does not.
    """
    counts = class_counts(labels, len(classes)).tolist()
    absent = [f"{index} ('{classes[index]}')" for index, count in enumerate(counts) if count == 0]
    if absent:
        raise DataError(
            f"{name}: no training example of class {', '.join(absent)} among {len(labels)}: "
            "raise train_limit, or leave the class out of the data set"
        )


def _is_pair(dataset: object) -> TypeGuard[Sequence[object]]:
    """Return whether a value is (inputs, targets), and not a list of two examples."""
    arrays = (Tensor, np.ndarray)
    return (
        isinstance(dataset, (tuple, list))
        and len(dataset) == 2
        and (isinstance(dataset[0], arrays) or isinstance(dataset[1], (*arrays, NoneType)))
    )


def _columns(value: object) -> list[Tensor]:
    items = [v for v in value if v is not None] if isinstance(value, (tuple, list)) else [value]
    return [_tensor(item, "inputs") for item in items]  # an argument that is None is the model's, not the data's


def _tensor(value: object, what: str) -> Tensor:
    if isinstance(value, Tensor):
        return value.detach()
    if isinstance(value, (np.ndarray, np.generic, int, float)):
        return torch.as_tensor(value)
    advice = ": give a number an example that the loss leaves alone" if value is None and what == "targets" else ""
    raise DataError(f"expected {what} as a tensor or an array, got {type(value).__name__}{advice}")


def _joined(dataset: object) -> tuple[list[Tensor], Tensor]:
    """Columns of a data set that gives one example, or one batch, after another."""
    rows: list[object]
    bare = isinstance(dataset, (tuple, list)) and any(isinstance(item, (Tensor, np.ndarray)) for item in dataset)
    if (
        bare
        or isinstance(dataset, (str, bytes, dict, Tensor, np.ndarray))
        or not isinstance(dataset, (Dataset, Iterable))
    ):
        count = f" of {len(dataset)} entries" if isinstance(dataset, (tuple, list)) else ""
        raise DataError(
            f"expected a data set of (input, target) examples, got {type(dataset).__name__}{count}: give a pair "
            "(inputs, targets); several inputs form a tuple, ((a, b), targets)"
        )
    if isinstance(dataset, Dataset) and not isinstance(dataset, IterableDataset):
        # A map-style data set need not be iterable; its length is part of its contract.
        rows = [dataset[index] for index in range(len(dataset))]  # type: ignore[arg-type]
    else:
        rows = list(dataset)
    if not rows:
        raise DataError("the data set is empty")
    pairs = [(_columns(row[0]), _tensor(row[1], "targets")) for row in map(_pair, rows)]
    # Batches have a target for each of their rows; only a `Dataset` promises single examples.
    batched = not isinstance(dataset, Dataset) and pairs[0][1].dim() > 0
    join = torch.cat if batched else torch.stack
    try:
        inputs = [join(list(column)) for column in zip(*(x for x, _ in pairs), strict=True)]
        return inputs, join([y for _, y in pairs])
    except (RuntimeError, ValueError) as error:
        raise DataError(f"the examples do not have equal shapes: {str(error).splitlines()[0]}") from None


def _pair(row: object) -> Sequence[object]:
    if isinstance(row, (tuple, list)) and len(row) == 2:
        return row
    raise DataError(f"expected (input, target) examples, got {type(row).__name__}")


def _check_rows(inputs: Sequence[Tensor], targets: Tensor) -> None:
    columns = {f"input {index}" if len(inputs) > 1 else "inputs": x for index, x in enumerate(inputs)}
    columns["targets"] = targets
    flat = [name for name, values in columns.items() if values.dim() == 0]
    if not inputs or flat:
        raise DataError(f"expected one row an example, got a single number as {', '.join(flat) or 'the data set'}")
    if len({len(values) for values in columns.values()}) > 1:
        raise DataError("lengths differ: " + ", ".join(f"{len(values)} {name}" for name, values in columns.items()))
    if len(targets) == 0:
        raise DataError("the data set is empty")
    problems = []
    for name, values in columns.items():
        if (values.is_floating_point() or values.is_complex()) and not torch.isfinite(values.sum()):
            bad = (~torch.isfinite(values)).flatten(1).any(1) if values.dim() > 1 else ~torch.isfinite(values)
            if rows := bad.nonzero().flatten().tolist():
                problems.append(f"{name}: {len(rows)} rows hold values that are not finite, the first is row {rows[0]}")
    if problems:
        raise DataError(problems)
