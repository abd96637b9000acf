"""Data sets: splits, readers on files written here, the real files where they are, and every way they can be wrong."""

from __future__ import annotations

import gc
import gzip
import io
import os
import struct
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from lagcompile.ir.base import DataError
from lagcompile.workbench import data, datafiles
from lagcompile.workbench.data import DataSplits

real_data = pytest.mark.skipif(
    "LAGCOMPILE_DATA" not in os.environ,
    reason="set LAGCOMPILE_DATA to the folder that holds mnist/ and cifar10/",
)


def rows_of(x: torch.Tensor) -> set[bytes]:
    return {row.numpy().tobytes() for row in x}


def same(a: DataSplits, b: DataSplits) -> bool:
    def tensors(splits: DataSplits) -> list[torch.Tensor]:
        return [value for value in vars(splits).values() if isinstance(value, torch.Tensor)]

    return all(torch.equal(x, y) for x, y in zip(tensors(a), tensors(b), strict=True))


# --- digits and synthetic sets ---------------------------------------------------------------------------------------


def test_digits_are_split_by_class_once_for_a_seed() -> None:
    first, again, other = data.digits(), data.digits(), data.digits(seed=1)
    assert same(first, again)
    assert not same(first, other)
    assert [len(first.train_y), len(first.validation_y), len(first.test_y)] == [1259, 179, 359]
    assert first.train_x.shape[1:] == (1, 8, 8)
    assert first.train_x.dtype == torch.float32
    assert first.train_y.dtype == torch.int64
    assert abs(float(first.train_x.mean())) < 1e-5
    assert abs(float(first.train_x.std()) - 1) < 1e-5
    for y in (first.train_y, first.validation_y, first.test_y):
        counts = torch.bincount(y, minlength=10)
        assert int(counts.max() - counts.min()) <= 0.05 * len(y)
    parts = [rows_of(x) for x in (first.train_x, first.validation_x, first.test_x)]
    # The set holds no two equal images, so that the parts are disjoint exactly when no bytes recur.
    assert len(set.union(*parts)) == 1797


def test_digits_limits_and_wrong_shares() -> None:
    small = data.digits(train_limit=100, test_limit=20, validation=0)
    assert [len(small.train_y), len(small.validation_y), len(small.test_y)] == [100, 0, 20]
    with pytest.raises(DataError, match=r"digits: the shares validation=0\.5 and test=0\.5 must be >= 0"):
        data.digits(validation=0.5, test=0.5)
    with pytest.raises(DataError) as caught:
        data.digits(train_limit=0, test_limit=-1)
    assert caught.value.problems == (
        "digits: train_limit must be at least 1, got 0",
        "digits: test_limit must be at least 1, got -1",
    )
    with pytest.raises(DataError, match=r"digits: no training example of class .* among 3: raise train_limit"):
        data.digits(train_limit=3)


def test_synthetic_sets() -> None:
    moons = data.two_moons(train=40, test=10)
    assert moons.train_x.shape == (40, 2)
    assert torch.bincount(moons.train_y).tolist() == [20, 20]
    assert same(moons, data.two_moons(train=40, test=10))
    smooth = data.regression(inputs=3, outputs=2)
    assert smooth.train_x.shape == (256, 3)
    assert smooth.test_y.shape == (256, 2)
    assert smooth.classes == ()
    with pytest.raises(DataError, match="two_moons: expected train >= 2"):
        data.two_moons(train=1)
    with pytest.raises(DataError, match="regression: train, test, inputs and outputs must be at least 1"):
        data.regression(test=0)


def test_two_moons_without_noise_lie_on_their_half_circles() -> None:
    moons = data.two_moons(noise=0.0)
    upper = moons.train_x[moons.train_y == 0]
    lower = moons.train_x[moons.train_y == 1] - torch.tensor([1.0, 0.5])
    for points, side in ((upper, 1), (lower, -1)):
        torch.testing.assert_close(points.norm(dim=1), torch.ones(len(points)))
        assert bool((side * points[:, 1] >= -1e-6).all())


def test_parts_that_do_not_fit_together() -> None:
    x, y = torch.zeros(4, 2), torch.tensor([0, 1, 0, 1])
    with pytest.raises(DataError) as caught:
        DataSplits(x, y[:3], x[:0], y[:0], x[:0], y[:0], ("a", "b"), "mine", "")
    assert caught.value.problems == (
        "mine: the training part has 4 inputs but 3 targets",
        "mine: the test part is empty",
    )


# --- MNIST -----------------------------------------------------------------------------------------------------------


def idx(values: np.ndarray[tuple[int, ...], np.dtype[np.uint8]], magic: int | None = None) -> bytes:
    header = struct.pack(f">{1 + values.ndim}I", magic or 0x0800 + values.ndim, *values.shape)
    return header + values.tobytes()


@pytest.fixture
def mnist_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LAGCOMPILE_DATA", str(tmp_path))
    folder = tmp_path / "mnist"
    folder.mkdir()
    draw = np.random.default_rng(0)
    for part, count in (("train", 60), ("t10k", 20)):
        images = draw.integers(0, 256, (count, 28, 28), dtype=np.uint8)
        images[:, 0, 0] = np.arange(count)
        labels = (np.arange(count) % 10).astype(np.uint8)
        (folder / f"{part}-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx(images)))
        (folder / f"{part}-labels-idx1-ubyte.gz").write_bytes(gzip.compress(idx(labels)))
    return folder


def test_mnist_is_read_normalised_and_held_out(mnist_folder: Path) -> None:
    splits = data.mnist(validation=10)
    assert splits.train_x.shape == (50, 1, 28, 28)
    assert splits.validation_x.shape == (10, 1, 28, 28)
    assert splits.test_x.shape == (20, 1, 28, 28)
    assert splits.test_y.tolist() == [i % 10 for i in range(20)]
    first = splits.train_x[:, 0, 0, 0].double() * 0.3081 + 0.1307
    # The first pixel of each image is its row number in the file: rows keep their order and labels follow them.
    numbers = (first * 255).round().long()
    assert numbers.tolist() == sorted(numbers.tolist())
    assert torch.equal(numbers % 10, splits.train_y)
    assert not rows_of(splits.train_x) & rows_of(splits.validation_x)
    assert same(splits, data.mnist(validation=10))
    assert len(data.mnist(validation=0).train_y) == 60
    assert len(data.mnist(validation=0, test_limit=7).test_y) == 7


def test_mnist_unpacked_files_will_do(mnist_folder: Path) -> None:
    packed = data.mnist(validation=10)
    for path in list(mnist_folder.iterdir()):
        path.with_suffix("").write_bytes(gzip.decompress(path.read_bytes()))
        path.unlink()
    assert same(packed, data.mnist(validation=10))


def test_mnist_limits_that_leave_nothing_or_a_class_out(mnist_folder: Path) -> None:
    with pytest.raises(DataError, match="mnist: validation=60 leaves none of the 60 training examples"):
        data.mnist(validation=60)
    with pytest.raises(DataError, match=r"mnist: no training example of class .* among 5: raise train_limit"):
        data.mnist(validation=0, train_limit=5)
    with pytest.raises(DataError, match="mnist: validation must be at least 1, got -3"):
        data.mnist(validation=-3)


def test_missing_data_says_what_to_set_and_where_they_are_to_be_had(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("LAGCOMPILE_DATA", raising=False)
    with pytest.raises(DataError) as unset:
        data.mnist()
    assert unset.value.problems == (
        "the environment variable LAGCOMPILE_DATA is not set: set it to the folder that holds mnist/ with "
        "train-images-idx3-ubyte.gz, train-labels-idx1-ubyte.gz, t10k-images-idx3-ubyte.gz, "
        "t10k-labels-idx1-ubyte.gz. MNIST is published at http://yann.lecun.com/exdb/mnist; "
        "torchvision.datasets.MNIST(root, download=True) leaves the same four files in root/MNIST/raw: copy them, "
        "gzip or unpacked, into the folder mnist",
    )
    monkeypatch.setenv("LAGCOMPILE_DATA", str(tmp_path))
    with pytest.raises(DataError, match=r"there is no folder .*cifar10 with train\.npz, test\.npz .*cs\.toronto\.edu"):
        data.cifar10()
    (tmp_path / "cifar10").mkdir()
    (tmp_path / "cifar10" / "train.npz").write_bytes(b"")
    with pytest.raises(DataError, match=r"cifar10 has no test\.npz \(LAGCOMPILE_DATA is .*\)\. CIFAR-10 is published"):
        data.cifar10()


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"no gzip at all", "the file is damaged: Not a gzipped file"),
        (gzip.compress(bytes(range(256)) * 20)[:100], "the file is damaged: Compressed file ended"),
        (gzip.compress(b"\0\0"), "the file is cut short: 2 bytes, less than an IDX header of 16"),
        (
            gzip.compress(idx(np.zeros((60, 28, 28), np.uint8), magic=0x0801)),
            "wrong magic number 0x00000801, expected 0x00000803: not an IDX file of images",
        ),
        (
            gzip.compress(idx(np.zeros((60, 28, 28), np.uint8))[:-1]),
            "the header says [60, 28, 28], 47040 values, but 47039 follow",
        ),
        (
            gzip.compress(idx(np.zeros((59, 28, 28), np.uint8))),
            "train-images-idx3-ubyte.gz holds 59 images but train-labels-idx1-ubyte.gz holds 60 labels",
        ),
    ],
    ids=["not-gzip", "truncated", "short", "magic", "size", "counts"],
)
def test_damaged_mnist(mnist_folder: Path, content: bytes, problem: str) -> None:
    (mnist_folder / "train-images-idx3-ubyte.gz").write_bytes(content)
    with pytest.raises(DataError) as caught:
        data.mnist(validation=10)
    assert problem in caught.value.problems[0]
    assert "train-images-idx3-ubyte.gz" in caught.value.problems[0]


def test_a_label_out_of_range(mnist_folder: Path) -> None:
    labels = np.full(60, 12, np.uint8)
    (mnist_folder / "train-labels-idx1-ubyte.gz").write_bytes(gzip.compress(idx(labels)))
    with pytest.raises(DataError, match="label 12 is out of range, expected 0 to 9"):
        data.mnist(validation=10)


# --- CIFAR-10 --------------------------------------------------------------------------------------------------------


def jpeg(colour: tuple[int, int, int], size: int = 32) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (size, size), colour).save(stream, "JPEG", quality=95)
    return stream.getvalue()


def archive(path: Path, parts: list[bytes], **replaced: object) -> None:
    arrays: dict[str, object] = {
        "jpeg": np.frombuffer(b"".join(parts), np.uint8),
        "offsets": np.cumsum([0, *map(len, parts)]),
        "labels": np.arange(len(parts)).astype(np.uint8) % 10,
        **replaced,
    }
    np.savez(
        path, allow_pickle=True, **{name: np.asarray(value) for name, value in arrays.items() if value is not None}
    )


@pytest.fixture
def cifar_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LAGCOMPILE_DATA", str(tmp_path))
    folder = tmp_path / "cifar10"
    folder.mkdir()
    archive(folder / "train.npz", [jpeg((8 * i, 255 - 8 * i, 128)) for i in range(30)])
    archive(folder / "test.npz", [jpeg((8 * i, 0, 255)) for i in range(20)])
    return folder


def test_cifar_jpegs_are_decoded_row_by_row(cifar_folder: Path) -> None:
    splits = data.cifar10(validation=5)
    assert splits.train_x.shape == (25, 3, 32, 32)
    assert splits.validation_x.shape == (5, 3, 32, 32)
    assert splits.test_x.shape == (20, 3, 32, 32)
    assert "JPEG" in splits.note
    mean, std = torch.tensor(data.CIFAR10_MEAN), torch.tensor(data.CIFAR10_STD)
    pixels = (splits.test_x[3].mean((1, 2)) * std + mean) * 255
    torch.testing.assert_close(pixels, torch.tensor([24.0, 0.0, 255.0]), atol=3.0, rtol=0)
    red = splits.train_x[:, 0].mean((1, 2))
    assert torch.equal(red, red.sort().values)


def test_cifar_original_pixels_and_their_note(cifar_folder: Path) -> None:
    draw = np.random.default_rng(0)
    for part, count in (("train", 30), ("test", 20)):
        images = draw.integers(0, 256, (count, 32, 32, 3), dtype=np.uint8)
        np.savez(cifar_folder / f"{part}.npz", images=images, labels=np.arange(count) % 10)
    splits = data.cifar10(validation=0)
    mean, std = torch.tensor(data.CIFAR10_MEAN), torch.tensor(data.CIFAR10_STD)
    pixels = (splits.test_x[0].permute(1, 2, 0) * std + mean) * 255
    torch.testing.assert_close(pixels, torch.from_numpy(images[0]).float(), atol=1e-3, rtol=0)
    assert splits.note.startswith("CIFAR-10, original pixels;")


def test_a_cut_archive_is_closed_and_a_single_array_is_none(cifar_folder: Path) -> None:
    path = cifar_folder / "train.npz"
    path.write_bytes(path.read_bytes()[:-30])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with pytest.raises(DataError, match=r"train.npz: the archive is damaged"):
            data.cifar10(validation=5)
        gc.collect()
    assert not caught
    with path.open("wb") as file:
        np.save(file, np.ones(3))
    with pytest.raises(DataError, match=r"train.npz: expected an archive of arrays \(np.savez\), got a single array"):
        data.cifar10(validation=5)


@pytest.mark.parametrize(
    ("replaced", "problem"),
    [
        ({"labels": None}, "the archive has no labels; it has jpeg, offsets. CIFAR-10 is published at"),
        ({"labels": np.zeros(29, int)}, "30 images but 29 labels"),
        ({"labels": np.full(30, 10)}, "label 10 is out of range, expected 0 to 9"),
        ({"labels": np.zeros((30, 1), int)}, "expected one label for each image, got labels of shape [30, 1]"),
        ({"offsets": np.zeros(31, int)}, "'offsets' must rise from 0 to the"),
        ({"jpeg": np.array([object()])}, "the archive is damaged: Object arrays cannot be loaded"),
    ],
    ids=["no-labels", "counts", "range", "shape", "offsets", "pickle"],
)
def test_damaged_cifar(cifar_folder: Path, replaced: dict[str, object], problem: str) -> None:
    archive(cifar_folder / "train.npz", [jpeg((i, i, i)) for i in range(30)], **replaced)
    with pytest.raises(DataError) as caught:
        data.cifar10(validation=5)
    assert "train.npz: " + problem in caught.value.problems[0]


def test_images_that_do_not_decode(cifar_folder: Path) -> None:
    good = [jpeg((i, i, i)) for i in range(30)]
    archive(cifar_folder / "train.npz", [*good[:4], b"nothing", *good[5:]])
    with pytest.raises(DataError, match=r"train\.npz: image 4 cannot be decoded: cannot identify image file$"):
        data.cifar10(validation=0)
    archive(cifar_folder / "train.npz", [*good[:4], good[4][:300], *good[5:]])
    with pytest.raises(DataError, match=r"train\.npz: image 4 cannot be decoded: "):
        data.cifar10(validation=0)
    archive(cifar_folder / "train.npz", [*good[:4], jpeg((0, 0, 0), size=16), *good[5:]])
    with pytest.raises(DataError, match=r"train\.npz: image 4 cannot be decoded: "):
        data.cifar10(validation=0)
    (cifar_folder / "train.npz").write_bytes(b"PK no zip")
    with pytest.raises(DataError, match=r"train\.npz: the archive is damaged"):
        data.cifar10(validation=0)


def test_raw_images_of_a_wrong_shape(cifar_folder: Path) -> None:
    np.savez(cifar_folder / "train.npz", images=np.zeros((4, 3, 32, 32), np.uint8), labels=np.zeros(4, int))
    with pytest.raises(DataError, match=r"images have shape \[4, 3, 32, 32\], expected \[n, 32, 32, 3\]"):
        datafiles.ImageArchive(cifar_folder / "train.npz", classes=10)


# --- the real files --------------------------------------------------------------------------------------------------


@real_data
def test_the_real_mnist() -> None:
    splits = data.mnist()
    assert [len(splits.train_y), len(splits.validation_y), len(splits.test_y)] == [55000, 5000, 10000]
    # The published counts of the test part's labels.
    assert torch.bincount(splits.test_y).tolist() == [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]
    assert abs(float(splits.train_x.mean())) < 0.01
    assert abs(float(splits.train_x.std()) - 1) < 0.01


@real_data
def test_the_real_cifar10() -> None:
    splits = data.cifar10(validation=100, train_limit=400, test_limit=200)
    assert [len(splits.train_y), len(splits.validation_y), len(splits.test_y)] == [400, 100, 200]
    assert abs(float(splits.train_x.mean())) < 0.1
    assert abs(float(splits.train_x.std()) - 1) < 0.1
