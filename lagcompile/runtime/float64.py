"""Float64 in place of the lower precisions that a model hard-codes.

In: any PyTorch code, while `in_float64` is active. Out: the same code, in which casts to float32, float16 and bfloat16
and constants of those dtypes are float64, and complex numbers complex128. Invariant: outside of it nothing is changed;
integers and booleans are left alone. Grouped convolutions are computed as one product of patches: torch's own float64
kernel runs group by group, some hundred times slower.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lagcompile.ir.alone import ALONE

_WIDER = {
    **dict.fromkeys((torch.float32, torch.float16, torch.bfloat16), torch.float64),
    **dict.fromkeys((torch.complex64, torch.complex32), torch.complex128),
}
_CASTS = {
    **dict.fromkeys((Tensor.float, Tensor.half, Tensor.bfloat16), torch.float64),
    **dict.fromkeys((Tensor.cfloat, Tensor.chalf), torch.complex128),  # type: ignore[attr-defined]
}
_TYPES = frozenset({"torch.FloatTensor", "torch.HalfTensor", "torch.BFloat16Tensor"})


class _Widen(TorchFunctionMode):
    """Replace dtype arguments of every torch function."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type[Any]],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if func in _CASTS:
            return args[0].to(_CASTS[func])
        wide = tuple(_wide(a) for a in args)
        named = {k: _wide(v) for k, v in (kwargs or {}).items()}
        return (_grouped if func is torch.conv2d else func)(*wide, **named)


def _grouped(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Tensor:
    """`torch.conv2d`; on the CPU with several groups as a product of the weights with the patches that they see."""
    if groups == 1 or isinstance(padding, str) or input.dim() != 4 or input.device.type != "cpu":
        return torch.conv2d(input, weight, bias, stride, padding, dilation, groups)
    steps, pads, gaps = (
        (v, v) if isinstance(v, int) else tuple(v) * (2 // len(v)) for v in (stride, padding, dilation)
    )
    kernel = weight.shape[2:]
    rows, columns = (
        (input.shape[2 + i] + 2 * pads[i] - gaps[i] * (kernel[i] - 1) - 1) // steps[i] + 1 for i in range(2)
    )
    patches = torch.nn.functional.unfold(input, tuple(kernel), gaps, pads, steps)
    # examples beside positions: with the batch in front, matmul would hold a copy of the weights for each example
    patches = patches.reshape(len(input), groups, -1, rows * columns).permute(1, 2, 0, 3).flatten(2)
    product = torch.matmul(weight.reshape(groups, len(weight) // groups, -1), patches)
    product = product.reshape(groups, -1, len(input), rows * columns).permute(2, 0, 1, 3)
    result = product.reshape(len(input), len(weight), rows, columns)
    return result if bias is None else result + bias[:, None, None]


def _wide(value: Any) -> Any:
    if isinstance(value, torch.dtype):
        return _WIDER.get(value, value)
    if isinstance(value, str) and value in _TYPES:
        return "torch.DoubleTensor"
    return value if isinstance(value, Tensor) and value.requires_grad else widened(value)


def widened(value: Any) -> Any:
    """Return a floating or complex tensor in double precision, anything else as it is."""
    return value.to(_WIDER[value.dtype]) if isinstance(value, Tensor) and value.dtype in _WIDER else value


@contextmanager
def in_float64() -> Iterator[None]:
    """Run with float64 as default dtype, and with hard-coded lower precisions widened to it."""
    with ALONE:  # the default dtype belongs to the process
        before = torch.get_default_dtype()
        torch.set_default_dtype(torch.float64)
        try:
            with _Widen():
                yield
        finally:
            torch.set_default_dtype(before)


@contextmanager
def float64_for(*runs: Callable[[], Any]) -> Iterator[None]:
    """Run in float64, without a change of the default dtype where code on float64 tensors stays in float64 by itself.

    Args:
        runs: what is about to be run, once.
    """
    try:
        with _Widen():
            needed = any(leaves_float64(run) for run in runs)
    except Exception:  # its failure is reported where it is run
        needed = True
    with in_float64() if needed else _Widen():
        yield


class _Watching(TorchDispatchMode):
    """Note whether any operation gives numbers of a lower precision."""

    def __init__(self) -> None:
        super().__init__()
        self.seen = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.seen |= any(isinstance(t, Tensor) and t.dtype in _WIDER for t in tree_leaves(result))
        return result


def leaves_float64(run: Callable[[], Any]) -> bool:
    """Whether code on float64 tensors computes in a lower precision somewhere, by its casts or constants."""
    try:
        with _Watching() as watching:
            run()
    except RuntimeError:  # operations that do not mix precisions
        return True
    return watching.seen
