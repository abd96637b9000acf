"""Why a model cannot be captured, in the user's own lines: all of them at once.

In: a model and example inputs. Out: one sentence for each place in its forward that depends on the values of tensors,
and for each part of its output that is neither a container nor a value. Invariant: only runs the model as the user
does, in both modes; nothing is changed. A tracer stops at the first such place, a run with values meets all on its way.
"""

from __future__ import annotations

import linecache
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from lagcompile.frontend.capture import is_users, user_line
from lagcompile.frontend.proxies import DataAsDetach
from lagcompile.frontend.signature import Signature
from lagcompile.frontend.still import as_it_was
from lagcompile.frontend.structure import leaves, opened
from lagcompile.frontend.symbolic import is_leaf

# What Python does with a tensor to know its values -> what to write instead.
_VALUES: Mapping[str, str] = {
    "__bool__": "decides by the value of a tensor: use torch.where, or a mask",
    "__int__": "makes a Python number of a tensor: keep the tensor",
    "__index__": "makes a Python number of a tensor: keep the tensor, or index with it",
    "__float__": "makes a Python number of a tensor: keep the tensor",
    "item": "makes a Python number of a tensor: keep the tensor",
    "tolist": "makes a Python list of a tensor: keep the tensor",
    "numpy": "leaves PyTorch for NumPy: use the torch function",
    "__array__": "leaves PyTorch for NumPy: use the torch function",
    "_pack_padded_sequence": "packs sequences by the values of their lengths: keep them padded, with a mask",
    "__iter__": "loops over a tensor: call the function on all of it, or unbind an axis of fixed size",
}
_PLAIN = (Tensor, bool, int, float, complex, str, bytes, torch.dtype, torch.device, torch.Size, type(None))


def diagnosis(model: nn.Module, signature: Signature, tensors: Sequence[Tensor]) -> list[str]:
    """Problems of a model that no front end captured, in the order in which it meets them.

    Args:
        model: the private copy; it is left as it was.
        signature: how it is called.
        tensors: example inputs, on which it runs.
    """
    found: dict[str, None] = {}
    for training in (True, False):
        with as_it_was(model, training), _Watched(found):
            output = signature.call(model, [t.clone() for t in tensors])
        for value in leaves(opened(output)):
            if not isinstance(value, _PLAIN):
                found[
                    f"the model returns an object of class {type(value).__name__}, which cannot be taken apart: return "
                    "tensors, tuples, dictionaries or dataclasses"
                ] = None
        found |= dict.fromkeys(_hidden_writes(model, signature, tensors, training))
    return list(found)


def _hidden_writes(model: nn.Module, signature: Signature, tensors: Sequence[Tensor], training: bool) -> list[str]:
    """Places of `.data` by which a model changes what autograd kept, which PyTorch lets pass."""
    data = DataAsDetach()
    with as_it_was(model, training), data:
        signature.call(model, [t.clone() for t in tensors])
    if not data.places:  # with gradients, PyTorch warns of numbers made of tensors, which others are to blame for
        return []
    with as_it_was(model, training, slopes=True), data:
        output = signature.call(model, [t.clone() for t in tensors])
        found = [v for v in leaves(output) if isinstance(v, Tensor) and v.requires_grad]
        wanted = [p for p in model.parameters() if p.requires_grad]
        try:
            torch.autograd.grad(found, wanted, [torch.ones_like(v) for v in found], allow_unused=True)
        except RuntimeError as error:
            if "modified by an inplace operation" in str(error):
                return [
                    f"{place}: `{_text(place)}` writes through .data into what autograd kept for a gradient, so that "
                    "the model's own gradients are not those of what it computes: write into .detach().clone()"
                    for place in data.places
                ]
        return []


def _text(place: str) -> str:
    path, _, line = place.rpartition(":")
    return linecache.getline(path, int(line)).strip()


@contextmanager
def mode_reads(model: nn.Module) -> Iterator[set[str]]:
    """Paths of the modules whose mode is asked for meanwhile; torch's own layers may ask for theirs.

    What does not ask does the same in train and in eval mode, up to its layers.
    """
    found: set[str] = set()
    kinds: dict[type[nn.Module], type[nn.Module]] = {}
    held = []
    paths = {m: n for n, m in model.named_modules()}

    def get(module: nn.Module) -> bool:
        if not is_leaf(module) or is_users(sys._getframe(1).f_code.co_filename):
            found.add(paths.get(module, ""))
        return bool(vars(module)["training"])

    def put(module: nn.Module, value: bool) -> None:
        vars(module)["training"] = value

    try:
        for module, path in paths.items():
            kind = type(module)
            if kind not in kinds:
                body = {"training": property(get, put), "__module__": kind.__module__}
                kinds[kind] = type(kind.__name__, (kind,), body)
            try:
                module.__class__ = kinds[kind]
            except TypeError:  # a class that allows no other layout
                found.add(path)
                continue
            held.append((module, kind))
        yield found
    finally:
        for module, kind in held:
            module.__class__ = kind


class _Watched(TorchFunctionMode):
    """Note the user's lines in which Python looks at values."""

    def __init__(self, found: dict[str, None]) -> None:
        super().__init__()
        self.found = found

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type[Any]],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        name = getattr(func, "__name__", "")
        if (kwargs or {}).get("generator") is not None and (place := user_line(2)):
            self.found[
                f"{place}: `{_text(place)}` draws from a private generator, which a graph would not advance: draw "
                "from the default one (torch.manual_seed), or give the numbers as an input"
            ] = None
        if name == "unbind":  # what a loop over a tensor calls
            name = sys._getframe(1).f_code.co_name
        what = _VALUES.get(name)
        if what is not None and args and isinstance(args[0], Tensor):
            place = user_line(2)
            if place:
                self.found[f"{place}: `{_text(place)}` {what}"] = None
        return func(*args, **(kwargs or {}))
