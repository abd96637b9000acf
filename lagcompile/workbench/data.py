"""Small named data sets: real ones from scikit-learn or from $LAGCOMPILE_DATA, and synthetic ones for tests.

In: a seed, shares and limits. Out: `DataSplits`, tensors on the CPU. Invariant: the same arguments give the same
rows in the same order; training and validation never draw from the test part; every class occurs in the training part.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lagcompile.ir.base import DataError, MissingExtraError
from lagcompile.runtime.dataset import require_all_classes
from lagcompile.workbench import datafiles

CIFAR10_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
DIGIT_CLASSES = tuple(str(digit) for digit in range(10))
CIFAR10_MEAN, CIFAR10_STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
MNIST_MEAN, MNIST_STD = 0.1307, 0.3081


@final
@dataclass(frozen=True)
class DataSplits:
    """A data set in three parts, on the CPU.

    Attributes:
        train_x: float32 inputs, images as [N, channels, rows, columns], normalised.
        train_y: int64 labels [N], or float32 targets [N, ...].
        validation_x: inputs on which hyper-parameters are chosen; may have no rows.
        test_x: inputs on which results are reported.
        classes: names of the classes by label; empty for a regression.
        name: what reports call the data set.
        note: one sentence on how it was made, to be printed beside figures.
    """

    train_x: Tensor
    train_y: Tensor
    validation_x: Tensor
    validation_y: Tensor
    test_x: Tensor
    test_y: Tensor
    classes: tuple[str, ...]
    name: str
    note: str

    def __post_init__(self) -> None:
        parts = {
            "training": (self.train_x, self.train_y),
            "validation": (self.validation_x, self.validation_y),
            "test": (self.test_x, self.test_y),
        }
        problems = [
            f"{self.name}: the {part} part has {len(x)} inputs but {len(y)} targets"
            for part, (x, y) in parts.items()
            if len(x) != len(y)
        ]
        problems += [
            f"{self.name}: the {part} part is empty" for part in ("training", "test") if len(parts[part][0]) == 0
        ]
        if problems:
            raise DataError(problems)
        if self.classes:
            require_all_classes(self.train_y, self.classes, name=self.name)


def digits(
    *,
    seed: int = 0,
    validation: float = 0.1,
    test: float = 0.2,
    train_limit: int | None = None,
    test_limit: int | None = None,
) -> DataSplits:
    """scikit-learn's bundled handwritten digits: 1,797 images [1, 8, 8] of ten classes, no download.

    Args:
        seed: decides the split, and nothing else; each class is split in the same proportions.
        validation: share of the examples kept for validation.
        test: share of the examples kept for testing.
        train_limit: largest number of training examples.
        test_limit: at most so many test examples.

    Raises:
        DataError: shares or limits that leave a part empty or a class out.
        MissingExtraError: scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise MissingExtraError("the digits need scikit-learn: pip install 'lagcompile[data]'") from None
    if validation < 0 or test <= 0 or validation + test >= 1:
        raise DataError(f"digits: the shares validation={validation} and test={test} must be >= 0 and sum to below 1")
    _check_limits("digits", train_limit=train_limit, test_limit=test_limit)
    bunch = load_digits()
    x = torch.from_numpy(bunch.images).to(torch.float32).unsqueeze(1) / 16
    y = torch.from_numpy(bunch.target).to(torch.int64)
    train, held_out, tested = _stratified(y, (validation, test), seed)
    train, tested = train[:train_limit], tested[:test_limit]
    x = (x - x[train].mean()) / x[train].std()
    note = "the 8x8 digits bundled with scikit-learn (the UCI test set of 1,797), split by class"
    return DataSplits(
        x[train], y[train], x[held_out], y[held_out], x[tested], y[tested], DIGIT_CLASSES, "digits", note
    )  # fmt: skip


def mnist(
    *,
    seed: int = 0,
    validation: int = 5000,
    train_limit: int | None = None,
    test_limit: int | None = None,
) -> DataSplits:
    """MNIST from $LAGCOMPILE_DATA/mnist: images [1, 28, 28], mean .1307 and deviation .3081 taken out.

    Args:
        seed: decides which training images are held out for validation, and which ones a limit keeps.
        validation: so many of the 60,000 training images are held out; 0 trains on all of them.
        train_limit: largest number of training examples.
        test_limit: at most so many of the 10,000 test examples; all of them by default.

    Raises:
        DataError: files are missing or damaged, or the limits leave a class out.
    """
    _check_limits("mnist", validation=validation or 1, train_limit=train_limit, test_limit=test_limit)
    paths = datafiles.locate("mnist", datafiles.MNIST_FILES, datafiles.MNIST_HELP)
    images, labels = datafiles.read_idx_pair(paths[0], paths[1], classes=10)
    test_images, test_labels = datafiles.read_idx_pair(paths[2], paths[3], classes=10)
    train, held_out = _hold_out("mnist", len(labels), validation, train_limit, seed)
    tested = _some(len(test_labels), test_limit, seed)

    def part(x: NDArray[np.uint8], y: NDArray[np.uint8], rows: NDArray[np.int64]) -> tuple[Tensor, Tensor]:
        pixels = _normalised(x[rows][:, None], (MNIST_MEAN,), (MNIST_STD,))
        return pixels, torch.from_numpy(y[rows].astype(np.int64))

    train_part, validation_part = part(images, labels, train), part(images, labels, held_out)
    note = "MNIST, original pixels; validation examples held out of the training part"
    return DataSplits(
        *train_part, *validation_part, *part(test_images, test_labels, tested), DIGIT_CLASSES, "mnist", note
    )


def cifar10(
    *,
    seed: int = 0,
    validation: int = 5000,
    train_limit: int | None = None,
    test_limit: int | None = None,
) -> DataSplits:
    """CIFAR-10 from $LAGCOMPILE_DATA/cifar10: images [3, 32, 32], each channel's mean and deviation taken out.

    Only the rows that are asked for are decoded. Images kept as JPEG are not the original pixels: `note` says so.

    Args:
        seed: decides which training images are held out for validation, and which ones a limit keeps.
        validation: so many of the 50,000 training images are held out; 0 trains on all of them.
        train_limit: largest number of training examples.
        test_limit: at most so many of the 10,000 test examples; all of them by default.

    Raises:
        DataError: files are missing or damaged, or the limits leave a class out.
        MissingExtraError: Pillow is not installed.
    """
    _check_limits("cifar10", validation=validation or 1, train_limit=train_limit, test_limit=test_limit)
    paths = datafiles.locate("cifar10", datafiles.CIFAR10_FILES, datafiles.CIFAR10_HELP)
    train_file, test_file = (datafiles.ImageArchive(path, classes=10) for path in paths)
    train, held_out = _hold_out("cifar10", len(train_file.labels), validation, train_limit, seed)
    tested = _some(len(test_file.labels), test_limit, seed)

    def part(file: datafiles.ImageArchive, rows: NDArray[np.int64]) -> tuple[Tensor, Tensor]:
        return _normalised(file.images(rows), CIFAR10_MEAN, CIFAR10_STD), torch.from_numpy(file.labels[rows])

    lossy = train_file.jpeg or test_file.jpeg
    form = "re-encoded as JPEG: figures are close to, not the same as, those from the original pixels"
    note = f"CIFAR-10, {form if lossy else 'original pixels'}; validation examples held out of the training part"
    parts = (*part(train_file, train), *part(train_file, held_out), *part(test_file, tested))
    return DataSplits(*parts, CIFAR10_CLASSES, "cifar10", note)


def two_moons(*, seed: int = 0, train: int = 256, test: int = 256, noise: float = 0.1) -> DataSplits:
    """Two interleaved half circles in the plane: float32 [N, 2], two classes in equal numbers; no validation part.

    Raises:
        DataError: fewer than two examples in a part, or a negative noise.
    """
    if train < 2 or test < 2 or noise < 0:
        raise DataError(f"two_moons: expected train >= 2, test >= 2, noise >= 0, got {train}, {test}, {noise}")
    generator = torch.Generator().manual_seed(seed)
    y = torch.arange(train + test) % 2
    angle = math.pi * torch.rand(train + test, generator=generator)
    upper = torch.stack([angle.cos(), angle.sin()], 1)
    x = torch.where(y[:, None] == 0, upper, torch.tensor([1.0, 0.5]) - upper)
    x = x + noise * torch.randn(x.shape, generator=generator)
    return DataSplits(
        x[:train], y[:train], x[:0], y[:0], x[train:], y[train:], ("upper", "lower"), "two_moons", "synthetic"
    )


def regression(
    *, seed: int = 0, train: int = 256, test: int = 256, inputs: int = 4, outputs: int = 1, noise: float = 0.05
) -> DataSplits:
    """A smooth function of Gaussian inputs, tanh(x A) B plus noise: float32 [N, inputs] -> [N, outputs].

    Raises:
        DataError: an empty part, no input or output, or a negative noise.
    """
    if min(train, test, inputs, outputs) < 1 or noise < 0:
        raise DataError("regression: train, test, inputs and outputs must be at least 1, noise at least 0")
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(train + test, inputs, generator=generator)
    mixing = torch.randn(inputs, 2 * inputs, generator=generator) / math.sqrt(inputs)
    readout = torch.randn(2 * inputs, outputs, generator=generator) / math.sqrt(2 * inputs)
    y = torch.tanh(x @ mixing) @ readout
    y = y + noise * torch.randn(y.shape, generator=generator)
    return DataSplits(x[:train], y[:train], x[:0], y[:0], x[train:], y[train:], (), "regression", "synthetic")


def _check_limits(name: str, **limits: int | None) -> None:
    problems = [
        f"{name}: {key} must be at least 1, got {limit}"
        for key, limit in limits.items()
        if limit is not None and limit < 1
    ]
    if problems:
        raise DataError(problems)


def _normalised(pixels: NDArray[np.uint8], mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Return float32 (pixels / 255 - mean) / std, by channel; computed in place."""
    x = torch.from_numpy(pixels).to(torch.float32)
    scale = torch.tensor(std).view(-1, 1, 1)
    return x.div_(255 * scale).sub_(torch.tensor(mean).view(-1, 1, 1) / scale)


def _hold_out(
    name: str, total: int, validation: int, limit: int | None, seed: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Row numbers, ascending, of the training and the validation part."""
    if validation >= total:
        raise DataError(f"{name}: validation={validation} leaves none of the {total} training examples")
    order = np.random.default_rng(seed).permutation(total)
    return np.sort(order[validation:][:limit]), np.sort(order[:validation])


def _some(total: int, limit: int | None, seed: int) -> NDArray[np.int64]:
    """Row numbers, ascending: all of them, or a random choice of `limit`."""
    return np.sort(np.random.default_rng(seed).permutation(total)[:limit])


def _stratified(labels: Tensor, shares: tuple[float, float], seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Row numbers, in random order, of three parts with the same share of every class."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(labels), generator=generator)
    parts: tuple[list[Tensor], ...] = ([], [], [])
    for label in labels.unique():
        rows = order[labels[order] == label]
        first = round(shares[0] * len(rows))
        last = first + round(shares[1] * len(rows))
        for part, chosen in zip(parts, (rows[last:], rows[:first], rows[first:last]), strict=True):
            part.append(chosen)
    train, held_out, tested = (torch.cat(part) for part in parts)
    # Mixed again, so that a limit keeps examples of every class.
    return tuple(part[torch.randperm(len(part), generator=generator)] for part in (train, held_out, tested))  # type: ignore[return-value]
