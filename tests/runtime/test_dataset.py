"""Any data set as tensors: what is accepted, in which order, and what is refused."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

from lagcompile.ir.base import DataError
from lagcompile.runtime.dataset import as_rows, as_tensors, class_counts, require_all_classes

X = torch.arange(12.0).view(6, 2)
Y = torch.tensor([0, 1, 2, 0, 1, 2])


class MapStyle(Dataset[Any]):
    def __len__(self) -> int:
        return len(X)

    def __getitem__(self, index: int) -> Any:
        return X[index], int(Y[index])


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Iterator[Any]:
        return iter([(x, y) for x, y in zip(X, Y, strict=True)])


@pytest.mark.parametrize(
    "dataset",
    [
        (X, Y),
        [X, Y],
        (X.numpy(), Y.numpy()),
        TensorDataset(X, Y),
        MapStyle(),
        Stream(),
        DataLoader(MapStyle(), batch_size=4),
        DataLoader(TensorDataset(X, Y), batch_size=3),
        [(X[:3], Y[:3]), (X[3:], Y[3:])],
        [(X[:4], Y[:4]), (X[4:], Y[4:])],
        [(x, int(y)) for x, y in zip(X, Y, strict=True)],
        ((x, y) for x, y in zip(X.numpy(), Y.numpy(), strict=True)),
        (X.clone().requires_grad_(), Y),
    ],
    ids=lambda dataset: type(dataset).__name__,
)
def test_every_form_gives_the_same_rows(dataset: object) -> None:
    x, y = as_tensors(dataset)
    assert torch.equal(x, X)
    assert torch.equal(y, Y)
    assert not x.requires_grad


@pytest.mark.parametrize(
    "dataset",
    [((X, 2 * X), Y), TensorDataset(X, 2 * X, Y), [((X, 2 * X), Y)]],
    ids=lambda dataset: type(dataset).__name__,
)
def test_several_inputs(dataset: object) -> None:
    (first, second), y = as_rows(dataset)
    assert torch.equal(second, 2 * first)
    assert torch.equal(y, Y)
    with pytest.raises(DataError, match="the data set has 2 inputs an example, expected 1"):
        as_tensors(((X, 2 * X), Y))


def bad(row: int) -> Tensor:
    x = X.clone()
    x[row, 1] = float("nan")
    x[row + 1, 0] = float("inf")
    return x


@pytest.mark.parametrize(
    ("dataset", "problem"),
    [
        ((X[:0], Y[:0]), "the data set is empty"),
        ([], "the data set is empty"),
        (DataLoader(TensorDataset(X[:0], Y[:0])), "the data set is empty"),
        ((X, Y[:4]), "lengths differ: 6 inputs, 4 targets"),
        (((X, X[:1]), Y), "lengths differ: 6 input 0, 1 input 1, 6 targets"),
        ((bad(2), Y), "inputs: 2 rows hold values that are not finite, the first is row 2"),
        ((X, bad(0)[:, 1]), "targets: 1 rows hold values that are not finite, the first is row 0"),
        (X, "expected a data set of (input, target) examples, got Tensor"),
        (3, "expected a data set of (input, target) examples, got int"),
        ({"x": X}, "expected a data set of (input, target) examples, got dict"),
        ([X, X, X], "expected a data set of (input, target) examples, got list of 3 entries: give a pair (inputs, tar"),
        ((X,), "expected a data set of (input, target) examples, got tuple of 1 entries: give a pair (inputs, targets"),
        ((X, None), "expected targets as a tensor or an array, got NoneType: give a number an example that the loss"),
        (((X, X), None), "expected targets as a tensor or an array, got NoneType"),
        ((X, "y"), "expected targets as a tensor or an array, got str"),
        ((None, Y), "expected inputs as a tensor or an array, got NoneType"),
        ([("a", 1)], "expected inputs as a tensor or an array, got str"),
        ((torch.tensor(1.0), Y), "expected one row an example, got a single number as inputs"),
        ([(X[0], 1), (X[:2], 1)], "the examples do not have equal shapes: "),
    ],
)
def test_what_is_refused(dataset: object, problem: str) -> None:
    with pytest.raises(DataError) as caught:
        as_rows(dataset)
    assert caught.value.problems[0].startswith(problem)


def test_large_finite_values_pass() -> None:
    # Their sum overflows: the check must not take that for a value that is not finite.
    x = torch.full((4, 2), 3e38)
    assert torch.equal(as_tensors((x, Y[:4]))[0], x)


def test_class_counts_and_absent_classes() -> None:
    assert class_counts(Y, 4).tolist() == [2, 2, 2, 0]
    require_all_classes(Y, ("a", "b", "c"), name="mine")
    with pytest.raises(DataError, match=r"mine: no training example of class 3 \('d'\), 4 \('e'\) among 6: "):
        require_all_classes(Y, ("a", "b", "c", "d", "e"), name="mine")
    with pytest.raises(DataError, match="labels run from 0 to 2, expected 0 to 1"):
        class_counts(Y, 2)
    with pytest.raises(DataError, match=r"expected one whole number an example as label, got torch\.float32 \[6, 2\]"):
        class_counts(X, 2)
    assert class_counts(torch.from_numpy(np.zeros(0, np.int64)), 2).tolist() == [0, 0]
