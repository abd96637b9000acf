"""Float64 in place of the lower precisions that a model hard-codes, and of torch's default dtype.

In: any PyTorch code, while `in_float64` is active. Out: the same code, in which casts to float32, float16 and bfloat16,
constants of those dtypes, and what torch makes in its default dtype are float64, and complex numbers complex128.
Invariant: nothing is changed for other threads, nor afterwards; integers and booleans are left alone. Some operations
are computed otherwise: torch's float64 kernel of grouped convolutions runs group by group, some hundred times slower
than one product of patches, and that of attention rounds its gradient where the softmax is saturated.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, suppress
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

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
        call = _OTHERWISE.get(func, func)
        result = call(*wide, **named)
        if not isinstance(result, Tensor) or result.dtype not in _WIDER or result.requires_grad or "out" in named:
            return result
        return result if any(_is_low(a) for a in wide) else _anew(call, wide, named, _WIDER[result.dtype])


def _is_low(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dtype in _WIDER


def _anew(call: Callable[..., Any], args: Sequence[Any], named: Mapping[str, Any], dtype: torch.dtype) -> Any:
    """What a function makes of numbers and integers in torch's default dtype, in double precision."""

    def precise(value: Any, *, booleans: bool) -> Any:
        if isinstance(value, float):
            return torch.tensor(value, dtype=torch.float64)
        whole = isinstance(value, Tensor) and not value.is_floating_point() and not value.is_complex()
        return value.double() if whole and (booleans or value.dtype != torch.bool) else value

    again = [([precise(a, booleans=b) for a in args], named) for b in (True, False)]  # a mask stays one where it must
    for positional, keywords in [(list(args), {**named, "dtype": dtype}), *again]:
        with suppress(TypeError, RuntimeError):
            found = call(*positional, **keywords)
            if found.dtype == dtype:
                return found
    return widened(call(*args, **named))


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
    patches = functional.unfold(input, tuple(kernel), gaps, pads, steps)
    # examples beside positions: with the batch in front, matmul would hold a copy of the weights for each example
    patches = patches.reshape(len(input), groups, -1, rows * columns).permute(1, 2, 0, 3).flatten(2)
    product = torch.matmul(weight.reshape(groups, len(weight) // groups, -1), patches)
    product = product.reshape(groups, -1, len(input), rows * columns).permute(2, 0, 1, 3)
    result = product.reshape(len(input), len(weight), rows, columns)
    return result if bias is None else result + bias[:, None, None]


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    **named: Any,
) -> Any:
    """`scaled_dot_product_attention` by its definition: the gradient is that of the softmax that was computed."""
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        attn_mask = torch.zeros_like(attn_mask, dtype=query.dtype).masked_fill(~attn_mask, -math.inf)
    given = query, key, value, attn_mask, dropout_p, is_causal
    return torch.ops.aten._scaled_dot_product_attention_math(*given, **named)[0]


def _multi_head_attention(*args: Any, **named: Any) -> Any:
    """`multi_head_attention_forward`, which forms the weights where it is asked for them."""
    output, weights = functional.multi_head_attention_forward(*args, **{**named, "need_weights": True})
    return output, weights if named.get("need_weights", True) else None


def _grouped_product(
    a: Tensor,
    b: Tensor,
    offs: Tensor | None = None,
    bias: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """`grouped_mm` of rows that lie in groups with a matrix each (experts), which has no kernel in float64."""
    if a.dtype != torch.float64 or a.dim() != 2 or b.dim() != 3 or offs is None:
        return torch.ops.aten._grouped_mm.default(a, b, offs, bias, out_dtype)
    group = torch.searchsorted(offs, torch.arange(len(a), device=a.device, dtype=offs.dtype), right=True)
    products = (torch.where((group == g)[:, None], a, 0.0) @ matrix for g, matrix in enumerate(b.unbind()))
    result = sum(products, torch.zeros(len(a), b.shape[2], dtype=a.dtype, device=a.device))
    return result if bias is None else result + bias


_OTHERWISE: Mapping[Any, Callable[..., Any]] = {
    torch.conv2d: _grouped,
    torch.ops.aten.conv2d.default: _grouped,
    torch._grouped_mm: _grouped_product,
    torch.ops.aten._grouped_mm.default: _grouped_product,
    functional.scaled_dot_product_attention: _attention,
    torch.ops.aten.scaled_dot_product_attention.default: _attention,
    functional.multi_head_attention_forward: _multi_head_attention,
}


def _wide(value: Any) -> Any:
    if isinstance(value, torch.dtype):
        return _WIDER.get(value, value)
    if isinstance(value, str) and value in _TYPES:
        return "torch.DoubleTensor"
    return value if isinstance(value, Tensor) and value.requires_grad else widened(value)


def widened(value: Any) -> Any:
    """Return a floating or complex tensor in double precision, anything else as it is."""
    return value.to(_WIDER[value.dtype]) if isinstance(value, Tensor) and value.dtype in _WIDER else value


def double_on_cpu(value: Any) -> Any:
    """Return a tensor on the CPU, without its graph, in double precision; anything else as it is."""
    return widened(value.detach().cpu()) if isinstance(value, Tensor) else value


def in_float64() -> AbstractContextManager[object]:
    """Run with float64 as default dtype, and with hard-coded lower precisions widened to it, in this thread."""
    return _Widen()


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
