"""Compiled kernels of batched functions: traced once per shape, fused by torch.compile, called in pieces of few sizes.

In: a function of parameters (starts, p), states (starts, lanes, n) and data (lanes, ...). Out: the same function,
several times as fast after its first call, which takes seconds (a C++ compiler must be there). Invariant: results are
those of the function; starts are padded to full pieces, so that starts that drop out of a run never cause another
compilation.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable

import torch
from torch import Tensor

from lagcompile.ir.alone import ALONE, without_warnings

SMALL, LARGE = 16, 56
"""Starts of one call: few sizes, so that starts that drop out of a run never cause another compilation."""

Function = Callable[..., tuple[Tensor, ...]]


def _sizes(starts: int) -> list[int]:
    """Sizes of the calls that serve some starts, padding included."""
    sizes: list[int] = []
    while starts > 0:
        sizes.append(LARGE if starts > LARGE // 2 else SMALL)
        starts -= sizes[-1]
    return sizes


class Kernel:
    """A compiled function.

    Args:
        function: takes theta (starts, p), x (starts, lanes, n) and further tensors without a starts axis, and returns
            tensors whose first axis is starts.
        backend: of torch.compile; "eager" only traces.
    """

    def __init__(self, function: Function, backend: str = "inductor") -> None:
        self._function, self._backend = function, backend
        self._compiled: dict[Hashable, Function] = {}

    def __call__(self, theta: Tensor, x: Tensor, *data: Tensor, key: Hashable = None) -> tuple[Tensor, ...]:
        """Call in pieces; `key` tells apart calls that differ in something else than shapes."""
        starts = theta.shape[0]
        if starts == 1:
            return self._at(key, theta, x, data)
        sizes = _sizes(starts)
        missing = sum(sizes) - starts
        if missing:
            theta = torch.cat([theta, theta[-1:].expand(missing, -1)])
            x = torch.cat([x, x[-1:].expand(missing, -1, -1)])
        pieces = [self._at(key, t, s, data) for t, s in zip(theta.split(sizes), x.split(sizes), strict=True)]
        return tuple(torch.cat(parts)[:starts] for parts in zip(*pieces, strict=True))

    def _at(self, key: Hashable, theta: Tensor, x: Tensor, data: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        theta, x = theta.contiguous(), x.contiguous()
        full = (key, theta.shape, x.shape, tuple(d.shape for d in data), theta.device)
        if full not in self._compiled:
            self._compiled[full] = self._compile(theta, x, data)
        return self._compiled[full](theta, x, *data)

    def _compile(self, theta: Tensor, x: Tensor, data: tuple[Tensor, ...]) -> Function:
        from torch.fx.experimental.proxy_tensor import make_fx

        with ALONE, without_warnings():
            # Tracing removes the layers of forward mode and vmap, which torch.compile would otherwise meet one by one.
            graph = make_fx(self._function)(theta, x, *data)
            graph.graph.eliminate_dead_code()
            graph.recompile()
            if self._backend == "inductor":
                # Straight to the code generator: nothing is left to guard, and a guarded call takes 0.3 ms.
                from torch._inductor import compile as generate

                made = generate(graph, [theta, x, *data])
            else:
                made = torch.compile(graph, dynamic=False, backend=self._backend)
            made(theta, x, *data)

        def compiled(*given: Tensor) -> tuple[Tensor, ...]:
            return tuple(made(*given))

        return compiled
