"""Linear algebra that treats dense and sparse matrices alike.

In and out: float64 numpy vectors, and matrices that are either numpy arrays (small programs) or scipy `csc_array`
(large ones). Invariant: a function here never turns a sparse matrix into a dense one unless its name says so.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import scipy.sparse as sp
from numpy.typing import NDArray
from scipy.linalg import cho_factor
from scipy.sparse.linalg import splu

Vector: TypeAlias = NDArray[np.float64]
Mask: TypeAlias = NDArray[np.bool_]
Indices: TypeAlias = NDArray[np.intp]
Matrix: TypeAlias = Any  # numpy array of two dimensions or scipy csc_array


def largest(values: Vector) -> float:
    """Largest absolute value, 0 for an empty vector."""
    return float(np.abs(values).max()) if values.size else 0.0


def is_sparse(matrix: Matrix) -> bool:
    """Whether the matrix is a scipy sparse one."""
    return bool(sp.issparse(matrix))


def entries(matrix: Matrix) -> Vector:
    """Stored values, flat."""
    values: Vector = matrix.data if is_sparse(matrix) else matrix.ravel()
    return values


def finite(matrix: Matrix) -> bool:
    """Whether all stored values are finite."""
    return bool(np.isfinite(entries(matrix)).all())


def toarray(matrix: Matrix) -> Matrix:
    """The dense form; a dense matrix is returned as it is."""
    return matrix.toarray() if is_sparse(matrix) else matrix


def select_rows(matrix: Matrix, mask: Mask) -> Matrix:
    """Rows where the mask is true, in the same format."""
    return matrix.tocsr()[mask].tocsc() if is_sparse(matrix) else matrix[mask]


def stack_rows(upper: Matrix, lower: Matrix) -> Matrix:
    """One matrix above the other; sparse if either one is."""
    if is_sparse(upper) or is_sparse(lower):
        return sp.vstack([sp.csc_array(upper), sp.csc_array(lower)], format="csc")
    return np.vstack([upper, lower])


def add_diagonal(matrix: Matrix, diagonal: Vector) -> Matrix:
    """The matrix plus a diagonal one."""
    if is_sparse(matrix):
        return (matrix + sp.diags_array(diagonal, format="csc")).tocsc()
    total = matrix.copy()
    total.flat[:: matrix.shape[0] + 1] += diagonal
    return total


def row_norms(matrix: Matrix) -> Vector:
    """Euclidean norm of every row."""
    squares = matrix.multiply(matrix) if is_sparse(matrix) else matrix * matrix
    norms: Vector = np.sqrt(np.asarray(squares.sum(axis=1), dtype=float).reshape(-1))
    return norms


def scale_rows(matrix: Matrix, factors: Vector) -> Matrix:
    """diag(factors) A."""
    if is_sparse(matrix):
        return (sp.diags_array(factors, format="csc") @ matrix).tocsc()
    return factors[:, None] * matrix


def weighted_gram(matrix: Matrix, weights: Vector) -> Matrix:
    """A' diag(weights) A."""
    if is_sparse(matrix):
        return (matrix.T @ sp.diags_array(weights, format="csc") @ matrix).tocsc()
    return matrix.T @ (weights[:, None] * matrix)


def positive_semidefinite(matrix: Matrix, slack: float) -> bool:
    """Whether matrix + slack * identity has a Cholesky factor.

    Sparse matrices: an LU factorisation restricted to diagonal pivots; all pivots are positive exactly when the
    symmetric matrix is positive definite (Sylvester).
    """
    size = matrix.shape[0]
    shifted = add_diagonal(matrix, np.full(size, slack))
    if not is_sparse(matrix):
        try:
            cho_factor(shifted, check_finite=False)
        except np.linalg.LinAlgError:
            return False
        return True
    try:
        factor = splu(shifted, permc_spec="MMD_AT_PLUS_A", diag_pivot_thresh=0.0, options={"SymmetricMode": True})
    except RuntimeError:  # an exactly singular matrix
        return False
    return bool((factor.perm_r == factor.perm_c).all() and (factor.U.diagonal() > 0).all())


@dataclass(frozen=True)
class SaddlePoint:
    """Solution of [[M, A'], [A, 0]] (step, multipliers) = (right, below), with the residual that was reached."""

    step: Vector
    multipliers: Vector
    residual: float


def solve_saddle_point(M: Matrix, A: Matrix, right: Vector, below: Vector) -> SaddlePoint | None:
    """Newton-KKT system, regularised to be solvable for dependent rows and refined against the true one.

    Returns None when the matrix is singular beyond what the regularisation covers.
    """
    size, rows = M.shape[0], A.shape[0]
    total = np.concatenate([right, below])
    shift = 1e-12 * max(1.0, largest(entries(M)))
    if is_sparse(M) or is_sparse(A):
        exact = sp.block_array([[sp.csc_array(M), sp.csc_array(A).T], [sp.csc_array(A), None]], format="csc")
        diagonal = np.concatenate([np.full(size, shift), np.full(rows, -shift)])
        try:
            solve = splu((exact + sp.diags_array(diagonal)).tocsc()).solve
        except RuntimeError:
            return None
    else:
        exact = np.zeros((size + rows, size + rows))
        exact[:size, :size] = M
        exact[size:, :size] = A
        exact[:size, size:] = A.T
        regular = exact.copy()
        regular.flat[:: size + rows + 1] += np.concatenate([np.full(size, shift), np.full(rows, -shift)])
        try:
            inverse = np.linalg.inv(regular)
        except np.linalg.LinAlgError:
            return None
        solve = inverse.__matmul__
    solution = solve(total)
    for _ in range(3):
        error = total - exact @ solution
        if not np.isfinite(error).all():
            return None
        solution = solution + solve(error)
    residual = largest(total - exact @ solution)
    return SaddlePoint(solution[:size], solution[size:], residual) if np.isfinite(residual) else None
