"""How many bytes a run needs, compared with what there is.

In: sizes and options. Out: a sentence with the numbers when they do not fit, else None. Invariant: called before
anything of that size is allocated; the estimate counts what certainly is needed (it refuses too late rather than too
early).
"""

from __future__ import annotations

from lagcompile.exact.linear import Matrix, is_sparse
from lagcompile.exact.options import Options
from lagcompile.ir.machine import available_memory

DOUBLE = 8
CHUNK = 256  # products evaluated at a time while sparsity is detected


def limit(options: Options) -> int:
    """Bytes that the run may use."""
    return options.memory_limit if options.memory_limit is not None else int(0.8 * available_memory())


def before_start(n: int, rows: int, options: Options, *, own_derivatives: bool) -> str | None:
    """Check the sizes alone: vectors, detection batches, and the matrices that are dense in any case.

    Args:
        n: variables.
        rows: equalities and inequalities.
        own_derivatives: whether the caller hands in sparse matrices.
    """
    parts = {"vectors": 40 * DOUBLE * (n + rows)}
    if options.hessian == "bfgs":
        parts["dense BFGS matrices"] = 4 * DOUBLE * n * n
        parts["dense subproblem factor"] = DOUBLE * n * n
    if not own_derivatives:
        parts["batches of derivative products"] = 2 * DOUBLE * CHUNK * (n + rows)
    return _refuse(parts, f"{n} variables and {rows} constraints", options)


def after_detection(hessian: Matrix, jacobians: tuple[Matrix, Matrix], options: Options) -> str | None:
    """Check the matrices as they turned out to be.

    A dense Hessian makes the factor dense in the variables; a sparse one is counted with its entries and a fill of ten.
    """
    n = hessian.shape[0]
    stored = [_stored(matrix) for matrix in (hessian, *jacobians)]
    dense = not is_sparse(hessian) or stored[0] > 0.3 * n * n
    parts = {
        "Hessian and its copies": 12 * DOUBLE * stored[0],
        "Jacobians and their copies": 12 * DOUBLE * (stored[1] + stored[2]),
        "subproblem factor": DOUBLE * (n * n // 2 if dense else 10 * sum(stored)),
    }
    return _refuse(parts, f"{n} variables, {stored[0]} Hessian and {stored[1] + stored[2]} Jacobian entries", options)


def _stored(matrix: Matrix) -> int:
    return int(matrix.nnz) if is_sparse(matrix) else int(matrix.size)


def _refuse(parts: dict[str, int], sizes: str, options: Options) -> str | None:
    allowed, needed = limit(options), sum(parts.values())
    if needed <= allowed:
        return None
    listed = ", ".join(f"{name} {count / 2**20:.1f} MiB" for name, count in parts.items())
    return f"{sizes} need {needed / 2**20:.1f} MiB ({listed}); the limit is {allowed / 2**20:.1f} MiB"
