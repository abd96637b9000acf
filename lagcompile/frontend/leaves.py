"""Layers that torch.export passes over: torch's own modules become one operator call each, not their insides.

In: a private copy of a model, while it is exported. Out: `Calls`, which records each call's module path and the
structure of its arguments and result. Invariant: the model is left as it was; an exported graph keeps `nn.Linear`,
`nn.LSTM` and the like as modules under their own paths, so that train and eval modes, names and ties are theirs.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch import library as operators

from lagcompile.frontend.proxies import Custom, custom_functions
from lagcompile.frontend.stages import describe_module
from lagcompile.frontend.structure import Reference, fill, leaves, transform
from lagcompile.frontend.symbolic import is_leaf


@dataclass
class Call:
    """One call of a layer: its path, the module, its forward, templates of (args, kwargs) and of its result.

    Layers of one `kind` give the same shapes; a user's module that is kept whole has none.
    """

    path: str
    layer: nn.Module
    kind: str
    forward: Callable[..., Any]
    arguments: Any
    result: Any = None


@dataclass
class Calls:
    """Calls of layers, in order, during one export, and the template of the model's output."""

    made: list[Call] = field(default_factory=list)
    inside: bool = False
    placed: Mapping[nn.Module, tuple[Any, ...]] = field(default_factory=dict)
    """Parameters of each module as it was."""
    output: Any = None
    shapes: dict[tuple[Any, ...], tuple[Any, list[Tensor]]] = field(default_factory=dict)
    """What layers gave, by what they are and what they were given: equal ones are run once."""


_ACTIVE: ContextVar[Calls] = ContextVar("lagcompile_leaf_calls")


@contextmanager
def layers_as_calls(model: nn.Module, whole: Mapping[str, str]) -> Iterator[Calls]:
    """Replace the forward of each layer (and of each module kept whole) by a recorded operator call."""
    calls = Calls()
    token = _ACTIVE.set(calls)
    patched: list[nn.Module] = []
    try:
        for path, module in model.named_modules():  # parents first: they are described with their parts as they are
            layer = is_leaf(module) and path and not _hooked(module)
            if (path in whole or layer) and "forward" not in vars(module):
                kind = describe_module(module) if is_leaf(module) else ""
                vars(module)["forward"] = functools.partial(_call, calls, path, module, kind, module.forward)
                patched.append(module)
        with custom_functions(functools.partial(_custom, calls)):
            yield calls
    finally:
        for module in patched:
            vars(module).pop("forward", None)
        _ACTIVE.reset(token)


def _hooked(module: nn.Module) -> bool:
    """Whether hooks run with a layer: they are followed while it is traced, and would run again in a call of it."""
    return any(
        m._forward_hooks or m._forward_pre_hooks or m._backward_hooks or m._backward_pre_hooks for m in module.modules()
    )


def parameters_of(model: nn.Module) -> dict[nn.Module, tuple[Any, ...]]:
    """The parameters that each module holds itself."""
    return {m: tuple(m._parameters.values()) for m in model.modules()}


def _custom(
    calls: Calls, function: type[torch.autograd.Function], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """A custom function as a call of a layer without weights."""
    if calls.inside or not any(isinstance(v, Tensor) for v in args):
        return NotImplemented
    forward = functools.partial(_inside, calls, function)
    return _call(calls, f"_function_{len(calls.made)}", Custom(function), "", forward, *args, **kwargs)


def _inside(calls: Calls, function: type[torch.autograd.Function], *args: Any, **kwargs: Any) -> Any:
    """The function itself, where it need not or cannot be a call."""
    before, calls.inside = calls.inside, True
    try:
        return function.apply(*args, **kwargs)
    finally:
        calls.inside = before


def _call(
    calls: Calls, path: str, layer: nn.Module, kind: str, forward: Callable[..., Any], *args: Any, **kwargs: Any
) -> Any:
    given = [v for v in leaves((args, kwargs)) if isinstance(v, Tensor)]
    plain = all(isinstance(v, Tensor | int | float | bool | str | torch.dtype | None) for v in leaves((args, kwargs)))
    moved = any(
        list(map(id, calls.placed[m])) != list(map(id, m._parameters.values()))
        for m in layer.modules()
        if m in calls.placed
    )
    mapped = torch._C._functorch.maybe_current_level() is not None  # vmap and grad have no rule for the operator
    if calls.inside or moved or mapped or not given or not plain:
        return forward(*args, **kwargs)
    numbers = iter(range(len(given)))
    template = transform((args, kwargs), lambda v: Reference(str(next(numbers))) if isinstance(v, Tensor) else v)
    calls.made.append(Call(path, layer, kind, forward, template))
    found = operator()(given, len(calls.made) - 1)
    return fill(calls.made[-1].result, lambda v: found[int(v.name)] if isinstance(v, Reference) else v)


@functools.cache
def operator() -> Any:
    """Operator of a layer's call; it exists for the tracer only and cannot be run."""
    declared = operators.Library("lagcompile_export", "FRAGMENT")
    declared.define("layer(Tensor[] tensors, int call) -> Tensor[]")
    operators.register_fake("lagcompile_export::layer", _shapes, lib=declared)
    return _Held(declared, torch.ops.lagcompile_export.layer.default)


class _Held:
    """An operator together with its declaration (the operator goes when the declaration is collected)."""

    def __init__(self, declared: operators.Library, target: Any) -> None:
        self.declared = declared
        self.target = target

    def __call__(self, tensors: Sequence[Tensor], call: int) -> list[Tensor]:
        result: list[Tensor] = self.target(tensors, call)
        return result


_SAME = (nn.Dropout, nn.ReLU, nn.GELU, nn.Tanh, nn.Sigmoid, nn.SiLU, nn.ELU, nn.LeakyReLU, nn.Softplus)


def _known(call: Call, tensors: Sequence[Tensor]) -> Tensor | None:
    """Result of a layer whose shape follows at once; None where it must be run."""
    if len(tensors) != 1 or call.arguments.items[1].items or len(call.arguments.items[0].items) != 1:
        return None
    (x,), layer = tensors, call.layer
    if type(layer) is nn.Linear and x.dtype == layer.weight.dtype and x.shape[-1] == layer.in_features:
        return x.new_empty((*x.shape[:-1], layer.out_features))
    if type(layer) is nn.Embedding and not x.is_floating_point():
        return layer.weight.new_empty((*x.shape, layer.embedding_dim))
    if type(layer) is nn.LayerNorm and x.shape[-len(layer.normalized_shape) :] == layer.normalized_shape:
        return torch.empty_like(x, memory_format=torch.contiguous_format)
    return torch.empty_like(x) if type(layer) in _SAME and x.is_floating_point() else None


def _shapes(tensors: Sequence[Tensor], call: int) -> list[Tensor]:
    """Run the layer on tensors without values; what it gives tells shapes and the result's structure."""
    calls = _ACTIVE.get()
    record = calls.made[call]
    known = _known(record, tensors)
    if known is not None:
        record.result = Reference("0")
        return [known]
    forms = [(t.dtype, t.device, *map(_size, (*t.shape, *t.stride()))) for t in tensors]
    key = (record.kind or call, record.arguments, *forms)
    if key not in calls.shapes:
        calls.shapes[key] = _run(calls, record, tensors)
    record.result, found = calls.shapes[key]
    return [torch.empty_strided(v.shape, v.stride(), dtype=v.dtype, device=v.device) for v in found]


def _size(size: int | torch.SymInt) -> Any:
    """A size that can be compared without a guard."""
    return size.node.expr if isinstance(size, torch.SymInt) else size


def _run(calls: Calls, record: Call, tensors: Sequence[Tensor]) -> tuple[Any, list[Tensor]]:
    """Template and tensors of a layer's result."""
    args, kwargs = fill(record.arguments, lambda v: tensors[int(v.name)] if isinstance(v, Reference) else v)
    calls.inside = True
    try:
        with torch.no_grad():
            result = record.forward(*args, **kwargs)
    finally:
        calls.inside = False
    found = [v for v in leaves(result) if isinstance(v, Tensor)]
    numbers = iter(range(len(found)))
    return transform(result, lambda v: Reference(str(next(numbers))) if isinstance(v, Tensor) else v), found
