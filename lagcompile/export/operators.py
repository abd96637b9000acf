"""The operators that a folder may hold: PyTorch's own on tensors, arithmetic on sizes, and nothing else.

In: a name in a file, or what torch.export put into a graph. Out: the function; whether arguments fit it. Invariant: a
name is looked up in these tables and never imported or evaluated; no operator reads or writes files, opens devices,
prints, or holds objects other than tensors and numbers.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

_NAMED = """
abs absolute acos acosh add addcdiv addcmul angle arccos arccosh arcsin arcsinh arctan arctan2 arctanh asin asinh atan
atan2 atanh ceil clamp clamp_max clamp_min clip copysign cos cosh deg2rad digamma div divide erf erfc erfinv exp exp2
expm1 fix float_power floor floor_divide fmax fmin fmod frac gcd heaviside hypot i0 igamma igammac lcm ldexp lerp
lgamma log log10 log1p log2 logaddexp logaddexp2 logit maximum minimum mul multiply mvlgamma nan_to_num neg negative
nextafter polygamma positive pow rad2deg reciprocal remainder round rsqrt rsub sgn sigmoid sign signbit sin sinc sinh
special_entr special_erf special_erfc special_erfcx special_erfinv special_exp2 special_expit special_expm1
special_gammainc special_gammaincc special_gammaln special_i0 special_i0e special_i1 special_i1e special_log1p
special_log_ndtr special_log_softmax special_logit special_logsumexp special_ndtr special_ndtri special_psi
special_sinc special_softmax special_xlog1py special_xlogy sqrt square sub subtract tan tanh true_divide trunc xlogy

all allclose any bitwise_and bitwise_left_shift bitwise_not bitwise_or bitwise_right_shift bitwise_xor eq equal ge
greater greater_equal gt isclose isfinite isin isinf isnan isneginf isposinf isreal le less less_equal logical_and
logical_not logical_or logical_xor lt ne not_equal where __and__ __or__ __xor__ __lshift__ __rshift__

amax amin aminmax argmax argmin argsort argwhere bincount bucketize count_nonzero cummax cummin cumprod cumsum
cumulative_trapezoid diff dist histc kthvalue logcumsumexp logsumexp max mean median min mode msort nanmean nanmedian
nanquantile nansum norm nonzero nonzero_static prod quantile renorm searchsorted sort std std_mean sum sum_to_size
topk trapezoid trapz unique_consecutive unique_dim var var_mean _unique _unique2

adjoint alias as_strided as_strided_scatter atleast_1d atleast_2d atleast_3d block_diag broadcast_tensors broadcast_to
cartesian_prod cat channel_shuffle chunk clone column_stack combinations concat concatenate constant_pad_nd contiguous
copy detach detach_ diag diag_embed diagflat diagonal diagonal_scatter dsplit dstack expand expand_as fill flatten
flip fliplr flipud gather hsplit hstack index index_add index_copy index_fill index_put index_reduce index_select lift
lift_fresh lift_fresh_copy mH mT masked_fill masked_scatter masked_select matrix_H meshgrid moveaxis movedim narrow
narrow_copy numpy_T one_hot pad pad_sequence permute pixel_shuffle pixel_unshuffle put ravel reflection_pad1d
reflection_pad2d reflection_pad3d repeat repeat_interleave replication_pad1d replication_pad2d replication_pad3d
reshape reshape_as resolve_conj resolve_neg roll rot90 row_stack scatter scatter_add scatter_reduce select
select_scatter slice slice_scatter split split_with_sizes squeeze stack swapaxes swapdims t take take_along_dim
tensor_split tile trace transpose tril tril_indices triu triu_indices unbind unflatten unfold unsafe_chunk
unsafe_split unsafe_split_with_sizes unsqueeze vander view view_as vsplit vstack zero _pad_circular _pad_enum
_reshape_alias _unsafe_index _unsafe_index_put _unsafe_view

complex conj conj_physical imag is_nonzero polar real to to_dense type_as view_as_complex view_as_real _conj _to_copy

arange bartlett_window blackman_window empty empty_like empty_permuted empty_strided eye full full_like hamming_window
hann_window kaiser_window linspace logspace new_empty new_empty_strided new_full new_ones new_zeros ones ones_like
range scalar_tensor zeros zeros_like

bernoulli binomial cauchy exponential geometric log_normal multinomial normal normal_functional poisson rand rand_like
randint randint_like randn randn_like random randperm uniform

addbmm addmm addmv addr baddbmm bilinear bmm cdist chain_matmul cholesky cholesky_inverse cholesky_solve corrcoef
cosine_similarity cov cross det dot einsum geqrf ger inner inverse kron linalg_cholesky linalg_cholesky_ex linalg_cond
linalg_cross linalg_det linalg_diagonal linalg_eig linalg_eigh linalg_eigvals linalg_eigvalsh
linalg_householder_product linalg_inv linalg_inv_ex linalg_ldl_factor linalg_ldl_solve linalg_lstsq linalg_lu
linalg_lu_factor linalg_lu_solve linalg_matmul linalg_matrix_exp linalg_matrix_norm linalg_matrix_power
linalg_matrix_rank linalg_multi_dot linalg_norm linalg_pinv linalg_qr linalg_slogdet linalg_solve
linalg_solve_triangular linalg_svd linalg_svdvals linalg_tensorinv linalg_tensorsolve linalg_vander linalg_vecdot
linalg_vector_norm logdet lu_solve lu_unpack matmul matrix_exp matrix_power mm mv orgqr ormqr outer pairwise_distance
pdist pinverse qr slogdet svd tensordot triangular_solve vdot _trilinear

fft_fft fft_fft2 fft_fftfreq fft_fftn fft_fftshift fft_hfft fft_hfft2 fft_hfftn fft_ifft fft_ifft2 fft_ifftn
fft_ifftshift fft_ihfft fft_ihfft2 fft_ihfftn fft_irfft fft_irfft2 fft_irfftn fft_rfft fft_rfft2 fft_rfftfreq
fft_rfftn istft stft

celu elu gelu glu hardshrink hardsigmoid hardswish hardtanh leaky_relu log_sigmoid log_softmax mish prelu relu relu6
rrelu rrelu_with_noise rrelu_with_noise_functional selu silu softmax softplus softshrink threshold _log_softmax
_prelu_kernel _safe_softmax _softmax

adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d adaptive_max_pool1d adaptive_max_pool2d
adaptive_max_pool3d affine_grid_generator alpha_dropout avg_pool1d avg_pool2d avg_pool3d batch_norm col2im conv1d
conv2d conv3d conv_tbc conv_transpose1d conv_transpose2d conv_transpose3d convolution dropout embedding embedding_bag
embedding_renorm feature_alpha_dropout feature_dropout fractional_max_pool2d fractional_max_pool3d grid_sampler
grid_sampler_2d grid_sampler_3d group_norm gru gru_cell im2col instance_norm layer_norm linear lstm lstm_cell
max_pool1d max_pool1d_with_indices max_pool2d max_pool2d_with_indices max_pool3d max_pool3d_with_indices max_unpool2d
max_unpool3d native_batch_norm native_dropout native_group_norm native_layer_norm norm_except_dim rms_norm rnn_relu
rnn_relu_cell rnn_tanh rnn_tanh_cell scaled_dot_product_attention upsample_bicubic2d upsample_bilinear2d
upsample_linear1d upsample_nearest1d upsample_nearest2d upsample_nearest3d upsample_trilinear3d _adaptive_avg_pool2d
_adaptive_avg_pool3d _convolution _convolution_mode _scaled_dot_product_flash_attention_for_cpu _upsample_bicubic2d_aa
_upsample_bilinear2d_aa _upsample_nearest_exact1d _upsample_nearest_exact2d _upsample_nearest_exact3d _weight_norm
_weight_norm_interface

binary_cross_entropy binary_cross_entropy_with_logits cosine_embedding_loss cross_entropy_loss ctc_loss
hinge_embedding_loss huber_loss kl_div l1_loss margin_ranking_loss mse_loss multi_margin_loss multilabel_margin_loss
nll_loss nll_loss2d nll_loss_nd poisson_nll_loss smooth_l1_loss soft_margin_loss triplet_margin_loss

item sym_numel sym_size sym_storage_offset sym_stride _local_scalar_dense
"""
OPERATORS = frozenset(_NAMED.split())
"""Names in torch.ops.aten; with an underscore behind it, the same operation in place."""
_NUMBERS = frozenset({"item", "sym_numel", "sym_size", "sym_storage_offset", "sym_stride", "_local_scalar_dense"})
_TRUTHS = frozenset({"allclose", "equal", "is_nonzero"})
_WITHOUT_IN_PLACE = frozenset({"as_strided", "detach", "__and__", "__or__", "__xor__", "__lshift__", "__rshift__"})

SCALARS: Mapping[str, Callable[..., Any]] = {
    **{
        n: getattr(operator, n) for n in ("add", "sub", "mul", "floordiv", "truediv", "mod", "pow", "neg", "pos", "abs")
    },
    **{n: getattr(operator, n) for n in ("eq", "ne", "lt", "le", "gt", "ge", "and_", "or_", "not_")},
    **{n: getattr(torch, n) for n in ("sym_max", "sym_min", "sym_float", "sym_int", "sym_not", "sym_ite", "sym_sqrt")},
    **{n: getattr(math, n) for n in ("ceil", "floor", "trunc", "sqrt")},
    "round": round,
}
"""Arithmetic on sizes, by the name behind `size.`."""
_NAMES = {function: name for name, function in SCALARS.items()}


def named(function: Any) -> str | None:
    """The name of a function of a graph in a file; None where a folder cannot hold it."""
    if isinstance(function, torch._ops.OpOverload):
        name = str(function)
        return name if function_of(name) is function else None
    return f"size.{_NAMES[function]}" if isinstance(function, Callable) and function in _NAMES else None  # type: ignore[arg-type]


def function_of(name: str) -> Callable[..., Any] | None:
    """The function of a name in a file; None where it is not allowed."""
    parts = name.split(".")
    if parts[0] == "size" and len(parts) == 2:
        return SCALARS.get(parts[1])
    if parts[0] != "aten" or len(parts) != 3:
        return None
    base = parts[1] if parts[1] in OPERATORS else parts[1].removesuffix("_")
    if base not in OPERATORS or (base != parts[1] and base in _WITHOUT_IN_PLACE):
        return None
    packet = getattr(torch.ops.aten, parts[1], None)
    if not isinstance(packet, torch._ops.OpOverloadPacket) or parts[2] not in packet.overloads():
        return None
    found: torch._ops.OpOverload = getattr(packet, parts[2])
    returned = [str(r.real_type) for r in found._schema.returns]
    plain = all(r in {"Tensor", "List[Tensor]"} for r in returned) and bool(returned)
    known = all(str(a.real_type) in _FITS for a in found._schema.arguments)
    return found if known and (plain or base in _NUMBERS | _TRUTHS) else None


def kind_of(function: Callable[..., Any]) -> Any:
    """Return what a function gives: 'tensor', 'number', 'list' of tensors of any length, or a tuple of these."""
    if not isinstance(function, torch._ops.OpOverload):
        return "number"
    kinds = tuple(_KINDS.get(str(r.real_type), "number") for r in function._schema.returns)
    return kinds[0] if len(kinds) == 1 else kinds


_KINDS = {"Tensor": "tensor", "List[Tensor]": "list"}


def misfit(function: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> str:
    """Say what is wrong with the arguments of a function; '' where nothing is.

    Args:
        function: of these tables.
        args: plain values, and `Kind` in the place of values that are computed.
        kwargs: those by name.
    """
    if not isinstance(function, torch._ops.OpOverload):
        wrong = [a for a in args if not isinstance(a, bool | int | float) and a != Kind("number")]
        return "it takes one to three numbers" if wrong or kwargs or not 1 <= len(args) <= 3 else ""
    schema = function._schema.arguments
    if len(args) > sum(not a.kwarg_only for a in schema):
        return f"{len(args)} arguments are too many"
    given = dict(zip((a.name for a in schema), args, strict=False))
    for name, value in kwargs.items():
        if name in given or not any(a.name == name for a in schema):
            return f"it has no argument {name!r} behind the others"
        given[name] = value
    for a in schema:
        if a.name not in given:
            if not a.has_default_value():
                return f"its argument '{a.name}' is missing"
        elif not _FITS[str(a.real_type)](given[a.name]):
            return f"its argument '{a.name}' must be of type {a.real_type}"
    return ""


class Kind(str):
    """Return what a value of a graph is: 'tensor', 'number', 'list'."""


def _is(*kinds: Any, also: str = "") -> Callable[[Any], bool]:
    return lambda v: (type(v) is Kind and v in also.split()) if type(v) is Kind else type(v) in kinds


def _list(item: Callable[[Any], bool], *, lone: bool = False) -> Callable[[Any], bool]:
    return lambda v: (isinstance(v, list) and all(map(item, v))) or (lone and item(v))


def _optional(item: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda v: v is None or item(v)


def _fits() -> dict[str, Callable[[Any], bool]]:
    """By type in a schema: whether a value fits it."""
    number = _is(int, float, bool, also="number")
    tensor = _is(int, float, bool, also="tensor number")  # torch makes tensors of numbers
    integer = _is(int, bool, also="number")
    plain: dict[str, Callable[[Any], bool]] = {
        "Tensor": tensor,
        "number": number,
        "int": integer,
        "float": _is(int, float, also="number"),
        "bool": _is(bool, also="number"),
        "str": lambda v: type(v) is str and len(v) <= 200,
        "ScalarType": _is(torch.dtype),
        "Layout": _is(torch.layout),
        "Device": _is(torch.device),
        "MemoryFormat": _is(torch.memory_format),
        "Generator": lambda v: False,  # the global one
        "List[int]": _list(integer, lone=True),
        "List[float]": _list(number, lone=True),
        "List[bool]": _list(_is(bool), lone=True),
    }
    tensors = _is(also="tensor")
    plain["List[Tensor]"] = lambda v: v == Kind("list") or _list(tensors)(v)
    plain["List[Optional[Tensor]]"] = _list(_optional(tensors))
    return plain | {f"Optional[{name}]": _optional(fits) for name, fits in plain.items()}


_FITS = _fits()
