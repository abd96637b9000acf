"""Where the subproblem's Hessian comes from.

In: points and multipliers. Out: a symmetric matrix. Invariant: `update` is called after every accepted step, whatever
the kind of curvature.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import numpy as np

from lagcompile.exact.linear import Matrix
from lagcompile.exact.problem import Evaluation, Problem
from lagcompile.exact.residuals import Duals, lagrangian_gradient


class Curvature(ABC):
    """Source of Hessians of the Lagrangian, exact or approximate.

    Attributes:
        learnt: all that steps have taught, plain data.
    """

    learnt: Any = None

    @abstractmethod
    def matrix(self, point: Evaluation, duals: Duals) -> Matrix:
        """Symmetric (n, n) matrix at a point."""

    @abstractmethod
    def update(self, before: Evaluation, after: Evaluation, duals: Duals) -> None:
        """Learn from a step; `duals` are those of the new point."""


class ExactCurvature(Curvature):
    """Second derivatives of the Lagrangian."""

    def __init__(self, problem: Problem) -> None:
        self._problem = problem

    def matrix(self, point: Evaluation, duals: Duals) -> Matrix:
        """Exact Hessian."""
        return self._problem.hessian(point.x, 1.0, duals.eq, duals.ineq)

    def update(self, before: Evaluation, after: Evaluation, duals: Duals) -> None:
        """Nothing to learn."""


class GaussNewtonCurvature(Curvature):
    """J'J of the residuals; the curvature of the constraints is left out."""

    def __init__(self, problem: Problem) -> None:
        self._problem = problem

    def matrix(self, point: Evaluation, duals: Duals) -> Matrix:
        """J'J at the point."""
        return self._problem.gauss_newton(point.x)

    def update(self, before: Evaluation, after: Evaluation, duals: Duals) -> None:
        """Nothing to learn."""


class DampedBFGS(Curvature):
    """Powell's damped BFGS (1978): always positive definite."""

    def __init__(self, size: int) -> None:
        self.learnt = np.eye(size), False

    def matrix(self, point: Evaluation, duals: Duals) -> Matrix:
        """The current approximation."""
        matrix: Matrix = self.learnt[0]
        return matrix

    def update(self, before: Evaluation, after: Evaluation, duals: Duals) -> None:
        """Rank-two update with s = step, y = change of the Lagrangian gradient at the new multipliers."""
        s = after.x - before.x
        y = lagrangian_gradient(after, duals.eq, duals.ineq) - lagrangian_gradient(before, duals.eq, duals.ineq)
        length = float(s @ s)
        if length <= 1e-30 or not np.isfinite(y).all():
            return
        matrix, scaled = self.learnt
        if not scaled and float(s @ y) > 0:
            matrix, scaled = np.eye(len(s)) * max(float(y @ y) / float(s @ y), 1e-8), True
            self.learnt = matrix, scaled
        Bs = matrix @ s
        sBs = float(s @ Bs)
        sy = float(s @ y)
        if sBs <= 0:
            return
        theta = 1.0 if sy >= 0.2 * sBs else 0.8 * sBs / (sBs - sy)
        r = theta * y + (1.0 - theta) * Bs
        self.learnt = matrix - np.outer(Bs, Bs) / sBs + np.outer(r, r) / float(s @ r), scaled
