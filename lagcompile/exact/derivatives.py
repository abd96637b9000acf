"""First and second derivatives of the program's functions.

In: torch functions of a flat float64 tensor. Out: gradients, Jacobians and Hessians as numpy arrays (small programs)
or scipy `csc_array` (large ones). Invariant: values are exact (torch.func); sparsity only saves work, and a pattern
that no longer fits is detected afresh.
"""

from __future__ import annotations

import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from lagcompile.exact.linear import Matrix, Vector
from lagcompile.exact.sparsity import Compression, Pattern, detect
from lagcompile.exact.tracing import Routine, traced

Function = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class FirstOrder:
    """First derivatives at one point.

    Shapes: gradient (n,); jacobian_eq (equalities, n); jacobian_ineq (inequalities, n), dense arrays or scipy sparse.
    """

    gradient: Vector
    jacobian_eq: Matrix
    jacobian_ineq: Matrix


class Derivatives(ABC):
    """Derivatives of one program; subclass it to hand your own sparse matrices to `minimize(..., derivatives=)`."""

    @abstractmethod
    def first_order(self, x: Tensor) -> FirstOrder:
        """Gradient of the objective and Jacobians of the constraints at x (n,)."""

    @abstractmethod
    def hessian(self, x: Tensor, weight: float, multipliers_eq: Tensor, multipliers_ineq: Tensor) -> Matrix:
        """Symmetric (n, n) Hessian of weight * objective + <multipliers_eq, eq> + <multipliers_ineq, ineq> at x."""


class JacobianOf:
    """Jacobian of one torch function; dense up to `dense_limit` entries, else compressed by colouring."""

    def __init__(
        self,
        function: Function,
        outputs: int,
        inputs: int,
        *,
        dense_limit: int,
        deadline: float = math.inf,
        trace: bool = False,
    ) -> None:
        self._deadline = deadline
        self._trace = trace
        self._recorded: Routine | None = None
        self.preparation_seconds = 0.0  # recording, or detecting and colouring the pattern
        self._function = function
        self._shape = (outputs, inputs)
        self._dense = outputs * inputs <= dense_limit
        self._pattern: Pattern | None = None
        self._compression: Compression | None = None

    def __call__(self, x: Tensor) -> Matrix:
        """The Jacobian at x."""
        if 0 in self._shape:
            return np.zeros(self._shape)
        if self._dense:
            if self._trace and self._recorded is None:
                begin = time.perf_counter()
                self._recorded = traced(lambda point: self._full(point), x)
                self.preparation_seconds += time.perf_counter() - begin
            return (self._recorded or self._full)(x).detach().numpy()
        if self._compression is not None:
            matrix = self._evaluate(x)
            if matrix is not None:
                return matrix
        begin = time.perf_counter()
        self._detect(x)
        self.preparation_seconds += time.perf_counter() - begin
        matrix = self._evaluate(x)
        if matrix is None:  # entries that cancel in every sample: give up on sparsity, never on exactness
            self._dense = True
            return self(x)
        return matrix

    def _full(self, x: Tensor) -> Tensor:
        full: Tensor = self._rows(x)(torch.eye(self._shape[0], dtype=x.dtype))
        return full

    @property
    def products(self) -> int:
        """Products with vectors that one evaluation takes."""
        return self._shape[0] if self._compression is None else self._compression.colours + 1

    def _rows(self, x: Tensor) -> Callable[[Tensor], Tensor]:
        product = torch.func.vmap(torch.func.vjp(self._function, x)[1], chunk_size=256)
        return lambda seeds: product(seeds)[0]

    def _columns(self, x: Tensor) -> Callable[[Tensor], Tensor]:
        """Products J v by reverse mode twice: w -> J'w is linear, its pullback is v -> J v."""
        pullback = torch.func.vjp(self._function, x)[1]
        weights = torch.zeros(self._shape[0], dtype=x.dtype)
        product = torch.func.vmap(torch.func.vjp(lambda w: pullback(w)[0], weights)[1], chunk_size=256)
        return lambda seeds: product(seeds)[0]

    def _evaluate(self, x: Tensor) -> Matrix | None:
        compression = self._compression
        if compression is None:
            return None
        return compression.evaluate(self._rows(x) if self._transposed else self._columns(x))

    def _detect(self, x: Tensor) -> None:
        """Widen the pattern by what is nonzero at x and nearby, then colour rows or columns, whichever is cheaper."""
        generator = torch.Generator().manual_seed(0)
        for scale in (0.0, 0.1, 1.0):
            near = x + scale * torch.randn(x.shape, dtype=x.dtype, generator=generator)
            found = Pattern.of(detect(self._rows(near), self._shape[0], deadline=self._deadline))
            self._pattern = found if self._pattern is None else self._pattern.union(found)
        if self._pattern is None:
            return
        by_rows = Compression(self._pattern, transposed=True)
        by_columns = Compression(self._pattern)
        self._transposed = by_rows.colours <= by_columns.colours
        self._compression = by_rows if self._transposed else by_columns


class HessianOf:
    """Hessian of x -> <weights, function(x)>; dense or compressed like a Jacobian."""

    def __init__(
        self,
        function: Function,
        outputs: int,
        inputs: int,
        *,
        dense_limit: int,
        deadline: float = math.inf,
        trace: bool = False,
    ) -> None:
        self._deadline = deadline
        self._trace = trace
        self._recorded: Routine | None = None
        self.preparation_seconds = 0.0  # recording, or detecting and colouring the pattern
        self._function = function
        self._outputs = outputs
        self._inputs = inputs
        self._dense = inputs * inputs <= dense_limit
        self._pattern: Pattern | None = None
        self._compression: Compression | None = None

    def __call__(self, x: Tensor, weights: Tensor) -> Matrix:
        """The Hessian at x for these weights (outputs,)."""
        if self._dense:
            if self._trace and self._recorded is None:
                begin = time.perf_counter()
                self._recorded = traced(lambda point, factors: self._full(point, factors), x, weights)
                self.preparation_seconds += time.perf_counter() - begin
            full = (self._recorded or self._full)(x, weights).detach().numpy()
            return 0.5 * (full + full.T)
        products = self._products(x, weights)
        matrix = None if self._compression is None else self._compression.evaluate(products)
        if matrix is None:
            begin = time.perf_counter()
            self._compression = self._detect(x)
            self.preparation_seconds += time.perf_counter() - begin
            matrix = self._compression.evaluate(products)
        if matrix is None:
            self._dense = True
            return self(x, weights)
        return (0.5 * (matrix + matrix.T)).tocsc()

    def _full(self, x: Tensor, weights: Tensor) -> Tensor:
        full: Tensor = self._products(x, weights)(torch.eye(self._inputs, dtype=x.dtype))
        return full

    def _products(self, x: Tensor, weights: Tensor) -> Callable[[Tensor], Tensor]:
        gradient = torch.func.grad(lambda point: (weights * self._function(point)).sum())
        product = torch.func.vmap(torch.func.vjp(gradient, x)[1], chunk_size=256)
        return lambda seeds: product(seeds)[0]

    def _detect(self, x: Tensor) -> Compression:
        generator = torch.Generator().manual_seed(0)
        for scale in (0.0, 0.1, 1.0):
            near = x + scale * torch.randn(x.shape, dtype=x.dtype, generator=generator)
            weights = torch.rand(self._outputs, dtype=x.dtype, generator=generator) + 0.5
            found = detect(self._products(near, weights), self._inputs, deadline=self._deadline)
            pattern = Pattern.of(found + found.T)
            self._pattern = pattern if self._pattern is None else self._pattern.union(pattern)
        if self._pattern is None:
            raise AssertionError("no sample point was taken")
        return Compression(self._pattern)


class TorchDerivatives(Derivatives):
    """Derivatives by torch.func of functions that the caller wrote in torch.

    Args:
        fused: x -> (1 + equalities + inequalities,), the objective first.
        sizes: (variables, equalities, inequalities).
        dense_limit: entries up to which a matrix is dense.
        deadline: `time.perf_counter()` at which the detection of sparsity gives up.
        trace: record dense derivatives once.
    """

    def __init__(
        self,
        fused: Function,
        sizes: tuple[int, int, int],
        *,
        dense_limit: int,
        deadline: float = math.inf,
        trace: bool = False,
    ) -> None:
        n, equalities, inequalities = sizes
        outputs = 1 + equalities + inequalities
        self._equalities = equalities
        self._small = outputs * n <= dense_limit
        self._all = JacobianOf(fused, outputs, n, dense_limit=dense_limit, deadline=deadline, trace=trace)
        self._gradient = torch.func.grad(lambda point: fused(point)[0])
        self._constraints = JacobianOf(
            lambda point: fused(point)[1:], outputs - 1, n, dense_limit=dense_limit, deadline=deadline
        )
        self._hessian = HessianOf(fused, outputs, n, dense_limit=dense_limit, deadline=deadline, trace=trace)

    @property
    def preparation_seconds(self) -> float:
        """Seconds spent on recording, and on detecting sparsity."""
        return sum(part.preparation_seconds for part in (self._all, self._constraints, self._hessian))

    def first_order(self, x: Tensor) -> FirstOrder:
        """Gradient and Jacobians; one reverse pass for all rows when the program is small."""
        if self._small:
            rows = self._all(x)
            return FirstOrder(rows[0], rows[1 : 1 + self._equalities], rows[1 + self._equalities :])
        matrix = self._constraints(x)
        gradient = self._gradient(x).detach().numpy()
        if isinstance(matrix, np.ndarray):
            return FirstOrder(gradient, matrix[: self._equalities], matrix[self._equalities :])
        by_row = matrix.tocsr()
        return FirstOrder(gradient, by_row[: self._equalities].tocsc(), by_row[self._equalities :].tocsc())

    def hessian(self, x: Tensor, weight: float, multipliers_eq: Tensor, multipliers_ineq: Tensor) -> Matrix:
        """Exact Hessian of the weighted sum."""
        start = torch.tensor([weight], dtype=x.dtype)
        return self._hessian(x, torch.cat([start, multipliers_eq, multipliers_ineq]))
