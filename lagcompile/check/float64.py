"""Float64 in place of the lower precisions that a model hard-codes.

In: any PyTorch code, while `in_float64` is active. Out: the same code, in which casts to float32, float16 and bfloat16
and constants of those dtypes are float64. Invariant: outside of it nothing is changed; integers, booleans and complex
numbers are left alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

_LOWER = frozenset({torch.float32, torch.float16, torch.bfloat16})
_CASTS = frozenset({Tensor.float, Tensor.half, Tensor.bfloat16})
_TYPES = frozenset({"torch.FloatTensor", "torch.HalfTensor", "torch.BFloat16Tensor"})


class _Widen(TorchFunctionMode):
    """Replaces dtype arguments of every torch function."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type[Any]],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if func in _CASTS:
            return args[0].double()
        wide = tuple(_wide(a) for a in args)
        return func(*wide, **{k: _wide(v) for k, v in (kwargs or {}).items()})


def _wide(value: Any) -> Any:
    if isinstance(value, torch.dtype):
        return torch.float64 if value in _LOWER else value
    if isinstance(value, str) and value in _TYPES:
        return "torch.DoubleTensor"
    if isinstance(value, Tensor) and value.dtype in _LOWER and not value.requires_grad:
        return value.double()
    return value


@contextmanager
def in_float64() -> Iterator[None]:
    """Run with float64 as default dtype, and with hard-coded lower precisions widened to it."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with _Widen():
            yield
    finally:
        torch.set_default_dtype(before)
