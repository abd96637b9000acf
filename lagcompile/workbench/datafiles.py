"""Data sets on disk: IDX files (MNIST) and archives of images (CIFAR-10), read into uint8 arrays.

In: the folder named by the environment variable LAGCOMPILE_DATA. Out: numpy arrays, checked. Invariant: nothing is
downloaded, written or cached, no pickle is read, and whatever is missing or damaged is a `DataError` that names the
file and says what was expected there.
"""

from __future__ import annotations

import gzip
import io
import os
import struct
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from lagcompile.ir.base import DataError, MissingExtraError

VARIABLE = "LAGCOMPILE_DATA"
Bytes: TypeAlias = NDArray[np.uint8]

MNIST_FILES = (
    "train-images-idx3-ubyte.gz",
    "train-labels-idx1-ubyte.gz",
    "t10k-images-idx3-ubyte.gz",
    "t10k-labels-idx1-ubyte.gz",
)
MNIST_HELP = (
    "MNIST is published at http://yann.lecun.com/exdb/mnist; torchvision.datasets.MNIST(root, download=True) leaves "
    "the same four files in root/MNIST/raw: copy them, gzip or unpacked, into the folder mnist"
)
CIFAR10_FILES = ("train.npz", "test.npz")
CIFAR10_HELP = (
    "CIFAR-10 is published at https://www.cs.toronto.edu/~kriz/cifar.html; write each part with numpy.savez as "
    "'images' (uint8 [n, 32, 32, 3]) and 'labels' ([n], classes in alphabetical order), or with the images as JPEG: "
    "'jpeg' (all bytes), 'offsets' ([n + 1]) and 'labels'"
)


def locate(folder: str, names: Sequence[str], remedy: str) -> list[Path]:
    """Paths of the files of a data set; for each `name.gz` the unpacked `name` will do.

    Args:
        folder: the data set's folder inside the one that LAGCOMPILE_DATA names.
        names: the files that must be there.
        remedy: where to get the data, and in which layout.

    Raises:
        DataError: the variable is not set, or files are missing; all of them are named at once.
    """
    root = os.environ.get(VARIABLE)
    if not root:
        raise DataError(
            f"the environment variable {VARIABLE} is not set: set it to the folder that holds "
            f"{folder}/ with {', '.join(names)}. {remedy}"
        )
    base = Path(root) / folder
    found = [path if (path := base / name).is_file() else base / name.removesuffix(".gz") for name in names]
    if missing := [name for name, path in zip(names, found, strict=True) if not path.is_file()]:
        place = f"{base} has no" if base.is_dir() else f"there is no folder {base} with"
        raise DataError(f"{place} {', '.join(missing)} ({VARIABLE} is {root}). {remedy}")
    return found


def read_idx(path: Path, *, dimensions: int) -> Bytes:
    """Array of an IDX file of unsigned bytes, gzip or not, as http://yann.lecun.com/exdb/mnist describes the format.

    Args:
        path: the file.
        dimensions: 3 for images [n, rows, columns], 1 for labels [n].

    Raises:
        DataError: the file is damaged, is not an IDX file of bytes, or holds fewer or more values than it says.
    """
    try:
        raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path}: the file is damaged: {error}") from None
    magic, header = 0x0800 + dimensions, 4 + 4 * dimensions
    if len(raw) < header:
        raise DataError(f"{path}: the file is cut short: {len(raw)} bytes, less than an IDX header of {header}")
    first, *shape = struct.unpack(f">{1 + dimensions}I", raw[:header])
    if first != magic:
        raise DataError(
            f"{path}: wrong magic number {first:#010x}, expected {magic:#010x}: not an IDX file of "
            f"{'images' if dimensions == 3 else 'labels'}"
        )
    values = np.frombuffer(raw, np.uint8, offset=header)
    if values.size != int(np.prod(shape)):
        raise DataError(f"{path}: the header says {shape}, {int(np.prod(shape))} values, but {values.size} follow")
    return values.reshape(shape)


def read_idx_pair(images: Path, labels: Path, *, classes: int) -> tuple[Bytes, Bytes]:
    """Images [n, rows, columns] and labels [n] of one part.

    Raises:
        DataError: as for `read_idx`; the counts differ; a label is out of range.
    """
    x, y = read_idx(images, dimensions=3), read_idx(labels, dimensions=1)
    if len(x) != len(y):
        raise DataError(f"{images.name} holds {len(x)} images but {labels.name} holds {len(y)} labels")
    _check_labels(labels, y, classes)
    return x, y


class ImageArchive:
    """One part of CIFAR-10 in an npz file: raw pixels, or JPEG bytes that are decoded when rows are asked for.

    Attributes:
        labels: int64 [n].
        jpeg: whether the images are JPEG, that is, not the original pixels.

    Raises:
        DataError: the archive is damaged, lacks an array, or its arrays do not fit together.
    """

    def __init__(self, path: Path, *, classes: int, size: int = 32) -> None:
        self.path, self.size = path, size
        arrays = _read_npz(path)
        self.jpeg = "images" not in arrays
        wanted = ("jpeg", "offsets", "labels") if self.jpeg else ("images", "labels")
        if missing := [name for name in wanted if name not in arrays]:
            has = ", ".join(sorted(arrays)) or "nothing"
            raise DataError(f"{path}: the archive has no {', '.join(missing)}; it has {has}. {CIFAR10_HELP}")
        self.labels: NDArray[np.int64] = arrays["labels"].astype(np.int64)
        _check_labels(path, self.labels, classes)
        self._bytes = arrays["jpeg"] if self.jpeg else arrays["images"]
        self._offsets = arrays["offsets"] if self.jpeg else np.arange(len(self._bytes) + 1)
        self._check()

    def _check(self) -> None:
        images, labels, offsets = len(self._offsets) - 1, len(self.labels), self._offsets
        if images != labels:
            raise DataError(f"{self.path}: {images} images but {labels} labels")
        if not self.jpeg and self._bytes.shape[1:] != (self.size, self.size, 3):
            raise DataError(f"{self.path}: images have shape {list(self._bytes.shape)}, expected [n, 32, 32, 3]")
        if offsets[0] != 0 or offsets[-1] != len(self._bytes) or bool(np.any(np.diff(offsets) <= 0)):
            raise DataError(f"{self.path}: 'offsets' must rise from 0 to the {len(self._bytes)} bytes of 'jpeg'")

    def images(self, rows: NDArray[np.int64]) -> Bytes:
        """Images uint8 [len(rows), 3, size, size].

        Raises:
            DataError: an image cannot be decoded or has another size.
            MissingExtraError: Pillow is needed and not installed.
        """
        if not self.jpeg:
            return np.ascontiguousarray(self._bytes[rows].transpose(0, 3, 1, 2))
        try:
            from PIL import Image
        except ImportError:
            raise MissingExtraError("JPEG images need Pillow: pip install 'lagcompile[data]'") from None
        result = np.empty((len(rows), self.size, self.size, 3), np.uint8)
        data, offsets = self._bytes.tobytes(), self._offsets.tolist()
        # One thread: images this small spend their time under the interpreter lock.
        for index, row in enumerate(rows.tolist()):
            try:
                image = Image.open(io.BytesIO(data[offsets[row] : offsets[row + 1]]), formats=("JPEG",))
                result[index] = np.asarray(image if image.mode == "RGB" else image.convert("RGB"))
            except (OSError, ValueError, SyntaxError) as error:
                raise DataError(f"{self.path}: image {row} cannot be decoded: {_first_line(error)}") from None
        return np.ascontiguousarray(result.transpose(0, 3, 1, 2))


def _first_line(error: Exception) -> str:
    # Pillow prints the address of the bytes it was given, which tells the user nothing.
    return str(error).split(" <", maxsplit=1)[0].splitlines()[0]


def _read_npz(path: Path) -> dict[str, NDArray[np.generic]]:
    try:
        # Opened here, because NumPy leaves a damaged archive open.
        with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
            return {name: archive[name] for name in archive.files}
    except TypeError:
        raise DataError(f"{path}: expected an archive of arrays (np.savez), got a single array") from None
    except (OSError, EOFError, ValueError, RuntimeError, zipfile.BadZipFile, zlib.error) as error:
        raise DataError(f"{path}: the archive is damaged: {error}") from None


def _check_labels(path: Path, labels: NDArray[np.generic], classes: int) -> None:
    if labels.ndim != 1 or len(labels) == 0:
        raise DataError(f"{path}: expected one label for each image, got labels of shape {list(labels.shape)}")
    lowest, highest = int(labels.min()), int(labels.max())
    if lowest < 0 or highest >= classes:
        wrong = lowest if lowest < 0 else highest
        raise DataError(f"{path}: label {wrong} is out of range, expected 0 to {classes - 1}")
