"""Refuse tensors that do not fit into memory before they are allocated.

In: code that makes tensors from sizes. Out: the same, or one named problem. Invariant: numbers are what they would be
without; only new tensors on the CPU are looked at, as the kernel promises more memory than it has and then ends the
process.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from lagcompile.frontend.plan import size
from lagcompile.ir.base import LagcompileError
from lagcompile.ir.machine import available_memory

SMALL = 1 << 24
"""Smaller tensors are not checked."""


class WithinMemory(TorchDispatchMode):
    """Context in which a tensor larger than the free memory is a problem, not the end of the process."""

    def __init__(self, error: type[LagcompileError], remedy: str, *, beside: int | None = None) -> None:
        """Take the class of the problem and the remedy that ends its message.

        Args:
            error: class of the problem.
            remedy: end of its message.
            beside: bytes that are needed besides, where all that is made here is kept and counts together; None where
                each tensor counts alone.
        """
        super().__init__()
        self.error, self.remedy = error, remedy
        self.together, self.free = beside, 0 if beside is None else available_memory()

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Compute as before what fits."""
        options = kwargs or {}
        like = next((a for a in args if isinstance(a, torch.Tensor)), None)
        shape = _new_shape(func, args, like)
        device = options.get("device") or ("cpu" if like is None else like.device)
        if shape and torch.device(device).type == "cpu":
            counts = func.__name__.startswith(("arange", "randperm")) and all(isinstance(a, int) for a in args)
            usual = torch.int64 if counts else torch.get_default_dtype() if like is None else like.dtype
            dtype = options.get("dtype") or usual
            needed = math.prod(shape) * dtype.itemsize
            if self.together is not None:
                self.together += needed
                if self.together > max(self.free, SMALL):
                    raise self.error(
                        f"weights, states, multipliers and their optimiser rows need {size(self.together)} or more, "
                        f"but {size(self.free)} of memory are free: {self.remedy}"
                    )
            elif needed > SMALL and needed > (free := available_memory()):
                numbers = " x ".join(f"{n:,}" for n in shape)
                raise self.error(
                    f"a tensor of {numbers} numbers needs {size(needed)}, but {size(free)} of memory are free: "
                    f"{self.remedy}"
                )
        return func(*args, **options)


_LIKE = frozenset({"empty_like", "zeros_like", "ones_like", "full_like", "rand_like", "randn_like", "clone"})
_SIZED = frozenset({"empty", "empty_strided", "zeros", "ones", "full", "rand", "randn", "randint", "new_empty"})


def _new_shape(func: Callable[..., Any], args: Sequence[Any], like: torch.Tensor | None) -> tuple[int, ...]:
    """Return the shape of the tensor that a call makes; empty where it makes none that is checked."""
    name = str(getattr(func, "overloadpacket", func)).rpartition(".")[2]
    if name in _LIKE and like is not None:
        return tuple(like.shape)
    if name in _SIZED:
        sizes = next((a for a in args if isinstance(a, (list, tuple))), ())
        return tuple(n for n in sizes if isinstance(n, int))
    if name == "randperm":
        return (int(args[0]),)
    if name == "arange":
        first, last, step = {1: (0, *args, 1), 2: (*args, 1)}.get(len(args), (*args[:3],))
        return (max(math.ceil((last - first) / step), 0),)
    return ()
