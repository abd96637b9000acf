"""The program as the solver sees it: numpy vectors in, numpy values and derivatives out.

In: the caller's torch functions, bounds and (optionally) derivatives. Out: `Problem` with `values`, `evaluate` and
`hessian`, and the seconds they took. Invariant: shapes and dtypes were checked once at the start; values may be
non-finite (the solver decides what that means), shapes may not change.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from lagcompile.exact.derivatives import Derivatives, Function, JacobianOf, TorchDerivatives
from lagcompile.exact.linear import Matrix, Vector, finite
from lagcompile.exact.options import Options
from lagcompile.ir.base import ProgramError


@dataclass(frozen=True)
class Values:
    """Function values at one point: objective, equalities (m,), inequalities (k,)."""

    objective: float
    eq: Vector
    ineq: Vector

    @property
    def finite(self) -> bool:
        """Whether all of them are."""
        return bool(np.isfinite(self.objective) and np.isfinite(self.eq).all() and np.isfinite(self.ineq).all())

    @property
    def violation(self) -> float:
        """Sum of constraint violations (l1), the filter's measure of infeasibility."""
        return float(np.abs(self.eq).sum() + np.maximum(self.ineq, 0.0).sum())


@dataclass(frozen=True)
class Evaluation:
    """Values and first derivatives at x."""

    x: Vector
    values: Values
    gradient: Vector
    jacobian_eq: Matrix
    jacobian_ineq: Matrix

    @property
    def finite(self) -> bool:
        """Whether every number is."""
        parts = (self.gradient, self.jacobian_eq, self.jacobian_ineq)
        return self.values.finite and all(finite(part) for part in parts)


@dataclass(frozen=True)
class Bounds:
    """Lower and upper bounds, both (n,), with infinities."""

    lower: Vector
    upper: Vector

    def project(self, x: Vector) -> Vector:
        """The nearest point within the bounds."""
        return np.clip(x, self.lower, self.upper)

    @property
    def fixed(self) -> Vector:
        """Mask of variables whose bounds coincide."""
        return self.lower == self.upper


class Problem:
    """One nonlinear program.

    Args:
        objective: x -> scalar.
        x0: start, (n,) float64.
        eq: x -> (m,), zero at feasible points; None: no equalities.
        ineq: x -> (k,), at most zero at feasible points; None: no inequalities.
        bounds: lower and upper bounds.
    """

    def __init__(
        self, objective: Function, x0: Tensor, eq: Function | None, ineq: Function | None, bounds: Bounds
    ) -> None:
        self._objective = objective
        self._eq = eq
        self._ineq = ineq
        self.bounds = bounds
        self.x0, self.size = x0, len(x0)
        self.seconds = 0.0
        start = self._start = torch.from_numpy(bounds.project(x0.numpy()))
        self._last: tuple[Vector, float, Vector, Vector, Matrix] | None = None  # arguments and value of `hessian`
        with torch.no_grad():
            self._check("objective", objective(start), scalar=True)
            self.equalities = 0 if eq is None else self._check("eq", eq(start)).numel()
            self.inequalities = 0 if ineq is None else self._check("ineq", ineq(start)).numel()
        self.derivatives: Derivatives | None = None
        self._residuals: JacobianOf | None = None

    def attach(
        self, derivatives: Derivatives | None, residuals: Function | None, options: Options, *, deadline: float
    ) -> None:
        """Choose where derivatives come from: the caller's object, or torch.func of the functions."""
        limit, trace = options.dense_limit, options.trace
        sizes = (self.size, self.equalities, self.inequalities)
        self.derivatives = derivatives or TorchDerivatives(
            self._fused, sizes, dense_limit=limit, deadline=deadline, trace=trace
        )
        if residuals is not None:
            count = residuals(self._start).numel()
            self._residuals = JacobianOf(residuals, count, self.size, dense_limit=limit, deadline=deadline, trace=trace)

    def values(self, x: Vector) -> Values:
        """Function values at x."""
        begin = time.perf_counter()
        point = torch.from_numpy(x)
        with torch.no_grad():
            objective = float(self._objective(point))
            eq = np.zeros(0) if self._eq is None else self._eq(point).reshape(-1).detach().numpy()
            ineq = np.zeros(0) if self._ineq is None else self._ineq(point).reshape(-1).detach().numpy()
        self.seconds += time.perf_counter() - begin
        return Values(objective, eq, ineq)

    def evaluate(self, x: Vector, values: Values | None = None) -> Evaluation:
        """Values (unless already known) and first derivatives at x."""
        known = self.values(x) if values is None else values
        begin = time.perf_counter()
        first = self._source.first_order(torch.from_numpy(x))
        self.seconds += time.perf_counter() - begin
        return Evaluation(x, known, first.gradient, first.jacobian_eq, first.jacobian_ineq)

    def hessian(self, x: Vector, weight: float, multipliers_eq: Vector, multipliers_ineq: Vector) -> Matrix:
        """Hessian of weight * objective + <multipliers, constraints> at x (the last one is remembered)."""
        last = self._last
        if last is not None and last[1] == weight:
            known = (last[0], last[2], last[3])
            if all(np.array_equal(a, b) for a, b in zip(known, (x, multipliers_eq, multipliers_ineq), strict=True)):
                return last[4]
        begin = time.perf_counter()
        matrix = self._source.hessian(
            torch.from_numpy(x), weight, torch.from_numpy(multipliers_eq), torch.from_numpy(multipliers_ineq)
        )
        if not isinstance(self._source, TorchDerivatives):  # the caller's matrix need not be symmetric in every bit
            matrix = 0.5 * (matrix + matrix.T)
            matrix = matrix if isinstance(matrix, np.ndarray) else matrix.tocsc()
        self.seconds += time.perf_counter() - begin
        self._last = (x, weight, multipliers_eq, multipliers_ineq, matrix)
        return matrix

    def gauss_newton(self, x: Vector) -> Matrix:
        """J'J of the residuals at x."""
        if self._residuals is None:
            raise ProgramError("minimize: hessian='gauss_newton' needs residuals=, with objective = |residuals|^2 / 2")
        begin = time.perf_counter()
        jacobian = self._residuals(torch.from_numpy(x))
        gram = jacobian.T @ jacobian
        self.seconds += time.perf_counter() - begin
        return gram if isinstance(gram, np.ndarray) else gram.tocsc()

    @property
    def preparation_seconds(self) -> float:
        """The part of `seconds` that went into recording derivatives and detecting sparsity."""
        own = self.derivatives.preparation_seconds if isinstance(self.derivatives, TorchDerivatives) else 0.0
        return own + (0.0 if self._residuals is None else self._residuals.preparation_seconds)

    @property
    def _source(self) -> Derivatives:
        if self.derivatives is None:
            raise ProgramError("minimize: the program has no derivatives attached")
        return self.derivatives

    def _fused(self, point: Tensor) -> Tensor:
        parts = [self._objective(point).reshape(1)]
        if self._eq is not None:
            parts.append(self._eq(point).reshape(-1))
        if self._ineq is not None:
            parts.append(self._ineq(point).reshape(-1))
        return torch.cat(parts)

    def _check(self, name: str, value: object, *, scalar: bool = False) -> Tensor:
        if not isinstance(value, Tensor):
            raise ProgramError(f"minimize: {name}(x) must return a tensor, it returned {type(value).__name__}")
        if value.dtype != torch.float64:
            raise ProgramError(
                f"minimize: {name}(x) must be float64, it is {str(value.dtype).removeprefix('torch.')}: "
                "build its constants with dtype=torch.float64"
            )
        if scalar and value.numel() != 1:
            raise ProgramError(f"minimize: {name}(x) must be one number, its shape is {tuple(value.shape)}")
        if not scalar and value.dim() > 1:
            raise ProgramError(f"minimize: {name}(x) must be flat, its shape is {tuple(value.shape)}")
        return value
