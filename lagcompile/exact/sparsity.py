"""Fixed sparsity patterns and compressed evaluation of Jacobians.

In: a pattern (which entries may be nonzero) and a routine for products with a batch of vectors. Out: the matrix as
`csc_array`, from as many products as the pattern has colours. Invariant: every evaluation multiplies by one random
vector more, and a matrix that does not reproduce that product is refused (None), so that an entry missing from the
pattern cannot stay unnoticed. Compression by colouring: Curtis, Powell and Reid (1974).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import scipy.sparse as sp
import torch
from torch import Tensor

from lagcompile.exact.linear import Indices, Matrix, Vector

Products = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Pattern:
    """Positions of stored entries in column order.

    Attributes: rows and offsets as in `csc_array` (indices, indptr), cols the column of each entry.
    """

    shape: tuple[int, int]
    rows: Indices
    cols: Indices
    offsets: Indices

    @classmethod
    def of(cls, matrix: Matrix) -> Pattern:
        """All stored entries of a sparse matrix, every entry of a dense one; never empty unless the shape is."""
        if not sp.issparse(matrix):
            count, width = matrix.shape
            rows = np.tile(np.arange(count), width)
            cols = np.repeat(np.arange(width), count)
            return cls((count, width), rows, cols, np.arange(width + 1) * count)
        stored = sp.csc_array(matrix, copy=True)
        stored.sum_duplicates()
        if stored.nnz == 0 and 0 not in stored.shape:
            stored = sp.csc_array((np.zeros(1), (np.zeros(1, int), np.zeros(1, int))), shape=stored.shape)
        cols = np.repeat(np.arange(stored.shape[1]), np.diff(stored.indptr))
        return cls(stored.shape, stored.indices.astype(np.intp), cols, stored.indptr.astype(np.intp))

    @property
    def count(self) -> int:
        """Number of stored entries."""
        return len(self.rows)

    def matrix(self, values: Vector) -> Matrix:
        """The sparse matrix with these values."""
        return sp.csc_array((values, self.rows, self.offsets), shape=self.shape)

    def union(self, other: Pattern) -> Pattern:
        """Entries of either pattern."""
        return Pattern.of(self.matrix(np.ones(self.count)) + other.matrix(np.ones(other.count)))

    def values(self, matrix: Matrix) -> Vector | None:
        """Values of the matrix at these positions; None if it stores an entry elsewhere."""
        if not sp.issparse(matrix):
            flat: Vector = matrix.ravel(order="F")
            return flat if flat.size == self.count else None
        same = matrix.nnz == self.count and np.array_equal(matrix.indptr, self.offsets)
        if same and np.array_equal(matrix.indices, self.rows):
            own: Vector = matrix.data
            return own
        ours = self.cols * self.shape[0] + self.rows
        stored = matrix.tocoo()
        theirs = stored.col.astype(np.intp) * self.shape[0] + stored.row
        place = np.minimum(np.searchsorted(ours, theirs), max(self.count - 1, 0))
        if self.count == 0 or not np.array_equal(ours[place], theirs):
            return None
        values = np.zeros(self.count)
        np.add.at(values, place, stored.data)
        return values


def colour_columns(pattern: Pattern) -> Indices:
    """Greedy colouring: columns of one colour share no row. Widest columns first.

    A row with many entries forces as many colours; where that leaves nothing to gain every column gets its own.
    """
    columns = pattern.shape[1]
    mask = sp.csc_array((np.ones(pattern.count, dtype=np.int32), pattern.rows, pattern.offsets), shape=pattern.shape)
    by_row = mask.tocsr()
    if int(np.diff(by_row.indptr).max(initial=0)) > 0.5 * columns:
        return np.arange(columns)
    colours = np.full(columns, -1, dtype=np.intp)
    for column in np.argsort(-np.diff(pattern.offsets), kind="stable"):
        rows = pattern.rows[pattern.offsets[column] : pattern.offsets[column + 1]]
        taken = np.zeros(columns + 2, dtype=bool)
        for row in rows:
            taken[colours[by_row.indices[by_row.indptr[row] : by_row.indptr[row + 1]]]] = True
        taken[-1] = False  # the place that uncoloured columns (-1) have marked
        colours[column] = int(np.argmin(taken))
    return colours


class Compression:
    """Evaluates a matrix of known pattern from few products with batches of vectors.

    Args:
        pattern: where entries may be nonzero.
        transposed: products are with rows (w'A) instead of columns (A v).
    """

    def __init__(self, pattern: Pattern, *, transposed: bool = False) -> None:
        self.pattern = pattern
        colours = colour_columns(_transpose(pattern) if transposed else pattern)
        self.colours = int(colours.max(initial=-1)) + 1
        seeds = np.zeros((self.colours + 1, len(colours)))
        seeds[colours, np.arange(len(colours))] = 1.0
        seeds[-1] = np.random.default_rng(20).standard_normal(len(colours))
        self.seeds = torch.from_numpy(seeds)
        self._probe = seeds[-1]
        self._transposed = transposed
        self._colour = colours[pattern.rows if transposed else pattern.cols]
        self._place = pattern.cols if transposed else pattern.rows

    def evaluate(self, products: Products) -> Matrix | None:
        """The matrix, or None when the probe vector shows an entry outside of the pattern.

        Args:
            products: maps a (k, size) batch to its k products.
        """
        out = products(self.seeds).detach().numpy()
        matrix = self.pattern.matrix(out[self._colour, self._place])
        expected = out[-1]
        reached = matrix.T @ self._probe if self._transposed else matrix @ self._probe
        if not np.isfinite(out).all():
            return matrix
        scale = 1.0 + np.abs(out).max(initial=0.0)
        return matrix if np.abs(expected - reached).max(initial=0.0) <= 1e-9 * scale * len(self._probe) else None


def _transpose(pattern: Pattern) -> Pattern:
    return Pattern.of(pattern.matrix(np.ones(pattern.count)).T)


class OutOfTimeError(Exception):
    """The clock ran out while sparsity was being detected; becomes Status.TIME_LIMIT."""


def detect(products: Products, count: int, *, batch: int = 256, deadline: float = math.inf) -> Matrix:
    """Entries that are nonzero (and finite) in the products with all unit vectors, one row for each of them.

    Args:
        products: maps a (k, count) batch to a (k, other) batch.
        count: number of unit vectors.
        batch: products at a time, which bounds the memory.
        deadline: `time.perf_counter()` after which to give up.

    Raises:
        OutOfTimeError: when the deadline has passed.
    """
    parts = []
    for start in range(0, count, batch):
        if time.perf_counter() > deadline:
            raise OutOfTimeError
        seeds = torch.zeros(min(batch, count - start), count, dtype=torch.float64)
        seeds[torch.arange(len(seeds)), start + torch.arange(len(seeds))] = 1.0
        found = products(seeds).detach()
        parts.append(sp.csr_array(((found != 0) & found.isfinite()).numpy().astype(float)))
    return sp.vstack(parts, format="csc")
