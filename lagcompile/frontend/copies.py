"""Copies of a user's modules that share nothing with them.

In: a module, or a record that holds modules. Out: a copy. Invariant: parameters and buffers are copied as they are; a
tensor that was computed from others and kept as an attribute (the cache of an earlier forward) is cut off from their
graph in the copy.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.overrides import TorchFunctionMode

from lagcompile.frontend.closures import Closures
from lagcompile.ir.base import LiftError

Value = TypeVar("Value")
_COMPRESSED = (torch.sparse_csr, torch.sparse_csc, torch.sparse_bsr, torch.sparse_bsc)
_OWN = frozenset(vars(nn.Module()))


def check_model(model: Any) -> None:
    """Refuse what cannot be looked into.

    Raises:
        LiftError: it is not a module, or is a TorchScript one.
    """
    if not isinstance(model, nn.Module):
        raise LiftError(f"lift takes a torch.nn.Module, got {type(model).__name__}")
    if isinstance(model, torch.jit.ScriptModule):
        raise LiftError(
            "the model is a TorchScript module (torch.jit.script, trace or load), whose forward is not Python that "
            "can be traced: lift the module that it was made of. Scripted sub-modules are kept whole"
        )


def private_copy(model: nn.Module) -> nn.Module:
    """A copy of a user's model.

    Raises:
        LiftError: names each lazy layer that has no weights yet, or each thing that no copy would hold.
    """
    lazy = {name.rpartition(".")[0] for name, p in [*model.named_parameters(), *model.named_buffers()] if is_lazy(p)}
    if lazy:
        named = ", ".join(f"'{n}'" for n in sorted(lazy)) if lazy != {""} else "the model"
        raise LiftError(f"{named} has no weights yet (a lazy layer): run the model once before lifting")
    closures = Closures(model)
    if lost := [*_lost(model, closures)]:
        raise LiftError(lost)
    try:
        return copied(model, closures=closures)
    except Exception as error:
        problems = [
            f"the attribute '{path}' ({type(value).__name__}) cannot be copied, and lifting works on a copy of the "
            f"model ({_first_line(reason)}): make it inside forward, or keep it outside the model"
            for path, value, reason in _uncopied(model)
        ]
        raise LiftError(problems or f"the model cannot be copied: {_first_line(error)}") from error


def copied(value: Value, memo: dict[int, Any] | None = None, *, closures: Closures | None = None) -> Value:
    """A deep copy: computed tensors are cut off from what they were computed from, closures read the copy."""
    memo = {} if memo is None else memo
    closures = closures or Closures(value)
    closures.ahead(memo)
    with _CutOff():
        result = copy.deepcopy(value, memo)
        closures.behind(memo)
    return result


class _CutOff(TorchFunctionMode):
    """Allow copies of tensors that belong to a graph, which PyTorch refuses."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type[Any]],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if func is Tensor.__deepcopy__ and (not args[0].is_leaf or args[0].layout in _COMPRESSED):
            value, memo = args
            return memo.setdefault(id(value), value.detach().clone())
        return func(*args, **(kwargs or {}))


def renew(model: nn.Module) -> None:
    """Have a module forget what it keeps of its weights: those that keep something clear it when the mode changes."""
    modes = [(m, m.training) for m in model.modules()]
    model.train(not model.training)
    model.train(not model.training)
    for module, mode in modes:
        module.training = mode


def unregistered(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Tensors that a model holds besides parameters and buffers, by path: in lists, in modules inside lists, plain."""
    seen = {id(t) for t in [*model.parameters(), *model.buffers()]} | {id(m) for m in model.modules()}
    for path, module in model.named_modules():
        yield from _attributes(path, module, seen)


def own_memory(model: nn.Module) -> None:
    """Refuse tensors beside the parameters that share a parameter's memory: a copy of the model would not follow.

    Raises:
        LiftError: names each of them, with its parameter.
    """
    owner = {p.untyped_storage()._cdata: n for n, p in model.named_parameters() if _is_plain(p)}
    found = [
        (path, owner[key])
        for path, value in [*unregistered(model), *model.named_buffers()]
        if _is_plain(value) and not isinstance(value, nn.Parameter) and not _made_ahead(model, path)
        if (key := value.untyped_storage()._cdata) in owner
    ]
    if found:
        raise LiftError(
            [
                f"'{path}' shares the memory of the parameter '{name}', and a copy of the model would not follow it: "
                "read the parameter itself in the forward"
                for path, name in found
            ]
        )


def _made_ahead(model: nn.Module, path: str) -> bool:
    """Return whether a hook makes an attribute before every forward (such as torch.nn.utils.spectral_norm)."""
    owner, _, name = path.rpartition(".")
    modules = dict(model.named_modules())
    hooks = modules[owner]._forward_pre_hooks.values() if owner in modules else ()
    return any(getattr(hook, "name", None) == name for hook in hooks)


def _is_plain(value: Tensor) -> bool:
    return not is_lazy(value) and value.layout is torch.strided and value.device.type != "meta"


def _attributes(path: str, module: nn.Module, seen: set[int]) -> Iterator[tuple[str, Tensor]]:
    for name, value in vars(module).items():
        if name not in _OWN:
            yield from _inside(f"{path}.{name}" if path else name, value, seen)


def _inside(path: str, value: Any, seen: set[int]) -> Iterator[tuple[str, Tensor]]:
    if not isinstance(value, Tensor | nn.Module | list | tuple | Mapping) or id(value) in seen:
        return
    seen.add(id(value))
    if isinstance(value, Tensor):
        yield path, value
    elif isinstance(value, nn.Module):
        for name, tensor in [*value.named_parameters(), *value.named_buffers()]:
            yield from _inside(f"{path}.{name}", tensor, seen)
        for name, module in value.named_modules():
            yield from _attributes(f"{path}.{name}" if name else path, module, seen)
    else:
        items = value.items() if isinstance(value, Mapping) else enumerate(value)
        for key, item in items:
            yield from _inside(f"{path}[{key!r}]", item, seen)


def _lost(model: nn.Module, closures: Closures) -> Iterator[str]:
    """What a model does that no copy of it would do."""
    for path, p in model.named_parameters():
        if p._backward_hooks:
            yield (
                f"the parameter '{path}' has a hook on its gradient (register_hook), and copies of a model lose it: "
                "remove the hook, and change the gradient in the forward, by a torch.autograd.Function"
            )
    for function, name in closures.foreign():
        yield (
            f"{function} reads the global variable '{name}', which is a part of the model, and would read the original "
            "in every copy: reach it through 'self', or through the module that a hook is given"
        )


def _uncopied(model: nn.Module) -> Iterator[tuple[str, Any, Exception]]:
    for path, module in model.named_modules():
        for name, value in vars(module).items():
            if name in {"_modules", "_parameters", "_buffers"}:
                continue
            try:
                copied(value)
            except Exception as error:
                yield f"{path}.{name}" if path else name, value, error


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].split(".  ")[0]
