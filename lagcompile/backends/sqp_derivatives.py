"""Derivatives of an exact program: dense ones traced once to plain ATen calls, large ones by coloured products.

In: `fused`, the objective and all constraints as one vector function. Out: `ProgramFunctions`: the separate functions
that `lagcompile.exact.minimize` takes, evaluated together once per point, and its `Derivatives`. Invariant: a traced
graph is used only where it reproduces the untraced function at another point (control flow that depends on values
cannot be traced).
"""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor
from torch.func import grad, vjp, vmap

from lagcompile.exact import Derivatives, FirstOrder
from lagcompile.exact.derivatives import TorchDerivatives
from lagcompile.ir.alone import ALONE, without_warnings

DENSE_LIMIT = 20_000
Traced = Callable[..., Tensor]


class ProgramFunctions(Derivatives):
    """Values and derivatives of one fused function.

    Args:
        fused: z -> (1 + equalities + inequalities,), the objective first.
        start: a point at which it is traced.
        sizes: variables, equalities, inequalities.
        trace: False evaluates through torch.func at every point.
    """

    def __init__(
        self, fused: Callable[[Tensor], Tensor], start: Tensor, sizes: tuple[int, int, int], *, trace: bool = True
    ) -> None:
        begin = time.perf_counter()
        n, self.equalities, self.inequalities = sizes
        outputs = 1 + self.equalities + self.inequalities
        self._fused = fused
        self._point: Tensor | None = None
        self._values: Tensor | None = None
        self._large = TorchDerivatives(fused, sizes, dense_limit=DENSE_LIMIT)
        self._all: Traced | None = None
        self._hessian: Traced | None = None
        self.value: Traced = fused
        if trace and outputs * n <= DENSE_LIMIT and n * n <= DENSE_LIMIT:
            self._trace(start, outputs)
        self.seconds = time.perf_counter() - begin
        """Seconds of tracing."""

    def _trace(self, start: Tensor, outputs: int) -> None:
        eye, unit = torch.eye(outputs, dtype=torch.float64), torch.eye(len(start), dtype=torch.float64)
        fused = self._fused

        def plain(z: Tensor) -> Tensor:  # a bound method's `self` would count as an argument
            return fused(z)

        def rows(z: Tensor) -> Tensor:
            return vmap(vjp(fused, z)[1])(eye)[0]

        def second(z: Tensor, weights: Tensor) -> Tensor:
            gradient = grad(lambda point: (weights * fused(point)).sum())
            return vmap(vjp(gradient, z)[1])(unit)[0]

        ones = torch.ones(outputs, dtype=torch.float64)
        traced = [
            _traced(plain, (start,)),
            _traced(rows, (start,)),
            _traced(second, (start, ones)),
        ]
        if traced[0] is not None:
            self.value = traced[0]
        self._all, self._hessian = traced[1], traced[2]

    @property
    def traced(self) -> bool:
        """Whether second derivatives run as a traced graph."""
        return self._hessian is not None

    # ---------------------------------------------------------------- the functions
    def _at(self, z: Tensor) -> Tensor:
        if z is not self._point or self._values is None:
            self._point, self._values = z, self.value(z)
        return self._values

    def objective(self, z: Tensor) -> Tensor:
        """The first entry."""
        return self._at(z)[0]

    def eq(self, z: Tensor) -> Tensor:
        """The equalities."""
        return self._at(z)[1 : 1 + self.equalities]

    def ineq(self, z: Tensor) -> Tensor:
        """The inequalities."""
        return self._at(z)[1 + self.equalities :]

    # ---------------------------------------------------------------- derivatives
    def first_order(self, x: Tensor) -> FirstOrder:
        """Gradient and Jacobians."""
        if self._all is None:
            return self._large.first_order(x)
        with torch.no_grad():
            rows = self._all(x).numpy()
        return FirstOrder(rows[0], rows[1 : 1 + self.equalities], rows[1 + self.equalities :])

    def hessian(self, x: Tensor, weight: float, multipliers_eq: Tensor, multipliers_ineq: Tensor) -> object:
        """Hessian of the weighted sum."""
        if self._hessian is None:
            return self._large.hessian(x, weight, multipliers_eq, multipliers_ineq)
        weights = torch.cat([torch.tensor([weight], dtype=torch.float64), multipliers_eq, multipliers_ineq])
        with torch.no_grad():
            full = self._hessian(x, weights).numpy()
        return 0.5 * (full + full.T)


def _traced(function: Callable[..., Tensor], example: tuple[Tensor, ...]) -> Traced | None:
    """The function as a flat graph of ATen calls; None where tracing fails or the graph does something else."""
    from torch.fx.experimental.proxy_tensor import make_fx

    generator = torch.Generator().manual_seed(0)
    try:
        with ALONE, without_warnings():
            graph = make_fx(function)(*example)
            graph.graph.eliminate_dead_code()
            graph.recompile()
        for scale in (0.0, 0.1):
            near = tuple(a + scale * torch.randn(a.shape, dtype=a.dtype, generator=generator) for a in example)
            expected, got = function(*near).detach().numpy(), graph(*near).detach().numpy()
            if not np.allclose(expected, got, rtol=1e-10, atol=1e-10, equal_nan=True):
                return None
    except Exception:  # tracing is an optimisation: whatever stops it, the untraced function remains
        return None
    return graph
