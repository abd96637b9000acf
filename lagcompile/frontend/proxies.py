"""What torch.fx's tracer does not see by itself: writes by operators, custom functions, parameters read by other ways.

In: values of a trace. Out: proxies that note `h[i] = v` and `h += v` as the writes that they are, and `watched_trace`,
within which custom autograd functions are one node and every operation on a parameter is noted. Invariant: other
threads are not disturbed; what is replaced while one thread traces hands their calls on.
"""

from __future__ import annotations

import builtins
import operator
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.distributions import Distribution
from torch.fx.proxy import Attribute
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._device import _device_constructors

from lagcompile.frontend.capture import is_users, user_line
from lagcompile.frontend.structure import fill, transform

IN_PLACE = ("iadd", "isub", "imul", "imatmul", "itruediv", "ifloordiv", "imod", "ipow", "iand", "ior", "ixor")


def _function(name: str) -> Callable[[Any, Any], Any]:
    """Function of an augmented assignment. torch.fx would print Python's own so that numbers change under old names."""
    own = getattr(operator, name)

    def call(a: Any, b: Any) -> Any:
        return own(a, b)

    call.__name__ = call.__qualname__ = name
    return call


for _name in IN_PLACE:
    globals()[_name] = _function(_name)


def _note(name: str) -> Callable[[Any, Any], Any]:
    def method(self: Proxy, other: Any) -> Any:
        return self.tracer.create_proxy("call_function", getattr(sys.modules[__name__], name), (self, other), {})

    return method


class Proxy(fx.Proxy):
    """A value of a trace that can be written into."""

    def __getattr__(self, k: str) -> Attribute:
        return _Attribute(self, k)

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in {"tracer", "node", "root", "attr", "_node"}:
            if isinstance(value, fx.Proxy) and value.node.args[:1] == (_attribute_of(self, name, value),):
                return  # `h.data += 1` ends with an assignment of the same tensor
            raise TypeError(f"the attribute '{name}' of a tensor is assigned, which a graph cannot hold")
        super().__setattr__(name, value)

    def __setitem__(self, key: Any, value: Any) -> None:
        self.tracer.create_proxy("call_function", operator.setitem, (self, key, value), {})


def _attribute_of(proxy: fx.Proxy, name: str, value: fx.Proxy) -> Any:
    """The node that a write in place was made on, where that is an attribute of a value."""
    first = value.node.args[0] if value.node.args else None
    read = isinstance(first, fx.Node) and first.target is getattr and first.args == (proxy.node, name)
    return first if read else None


for _name in IN_PLACE:
    setattr(Proxy, f"__{_name}__", _note(_name))


class _Attribute(Attribute, Proxy):
    """An attribute of a value of a trace."""


class Custom(nn.Module):
    """A custom autograd function: forward and backward as its author wrote them."""

    def __init__(self, function: type[torch.autograd.Function]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Apply it."""
        return self.function.apply(*args, **kwargs)


def detached(value: Any) -> Any:
    """A value made without gradients, as it is read where gradients are on."""
    if isinstance(value, Tensor):
        return value.detach()
    if not any(isinstance(v, Tensor) for v in pytree.tree_leaves(value)):
        return value
    return fill(transform(value, lambda v: v), lambda v: v.detach() if isinstance(v, Tensor) else v)


Apply = Callable[[type[torch.autograd.Function], tuple[Any, ...], dict[str, Any]], Any]


@contextmanager
def custom_functions(call: Apply) -> Iterator[None]:
    """Within: applications of custom functions in this thread go to `call`, which may return NotImplemented."""
    before = torch.autograd.Function.__dict__["apply"]
    thread = threading.get_ident()

    def apply(cls: type[torch.autograd.Function], *args: Any, **kwargs: Any) -> Any:
        if threading.get_ident() == thread:
            found = call(cls, args, kwargs)
            if found is not NotImplemented:
                return found
        return before.__get__(None, cls)(*args, **kwargs)

    torch.autograd.Function.apply = classmethod(apply)  # type: ignore[assignment, method-assign]
    try:
        yield
    finally:
        torch.autograd.Function.apply = before  # type: ignore[method-assign]


@contextmanager
def inference_as_no_grad() -> Iterator[None]:
    """Within: `torch.inference_mode()` in this thread is `torch.no_grad()`, which torch.export keeps as a region."""
    kind, thread = torch.inference_mode, threading.get_ident()
    enter, leave, held = kind.__enter__, kind.__exit__, {}

    def entered(self: torch.inference_mode) -> None:
        if threading.get_ident() != thread or not self.mode:
            enter(self)
        else:
            held[self] = torch.no_grad()
            held[self].__enter__()

    def left(self: torch.inference_mode, *error: Any) -> None:
        (held.pop(self).__exit__ if self in held else partial(leave, self))(*error)

    kind.__enter__, kind.__exit__ = entered, left  # type: ignore[method-assign]
    try:
        yield
    finally:
        kind.__enter__, kind.__exit__ = enter, leave  # type: ignore[method-assign]


@contextmanager
def lengths() -> Iterator[None]:
    """Within: `len(tensor)` in the user's code in this thread is a size that the graph holds, not one number."""
    before, thread = builtins.len, threading.get_ident()

    def length(value: Any) -> Any:
        asked = isinstance(value, Tensor | fx.Proxy) and threading.get_ident() == thread
        if not asked or not is_users(sys._getframe(1).f_code.co_filename):
            return before(value)
        if isinstance(value, fx.Proxy):
            return value.tracer.create_proxy("call_function", before, (value,), {})
        return value.shape[0] if value.dim() else before(value)

    builtins.len = length
    try:
        yield
    finally:
        builtins.len = before


@contextmanager
def unchecked_distributions() -> Iterator[None]:
    """Within: torch.distributions do not check their arguments in this thread, which a trace cannot do."""
    before = Distribution._validate_args
    thread = threading.get_ident()

    class Checks:
        def __get__(self, owner: Distribution | None, kind: type[Distribution]) -> bool:
            if threading.get_ident() == thread:
                return False
            return before if owner is None else bool(vars(owner).get("_validate_args", before))

        def __set__(self, owner: Distribution, value: bool) -> None:
            vars(owner)["_validate_args"] = value

    Distribution._validate_args = Checks()  # type: ignore[assignment]
    try:
        yield
    finally:
        Distribution._validate_args = before


_FORM_NAMES = (
    "shape dtype device layout ndim is_leaf requires_grad grad_fn grad names itemsize size dim numel nelement stride "
    "storage_offset is_contiguous is_floating_point get_device is_complex element_size data_ptr __len__ "
    "untyped_storage __hash__ __repr__ __format__ _version is_cuda is_sparse is_meta is_quantized is_nested nbytes "
    "output_nr _base "
    "retains_grad is_shared is_inference __deepcopy__ __reduce_ex__ is_mps is_cpu is_signed"
)
_FORM = frozenset(_FORM_NAMES.split())
"""What tells of a tensor's form, not of its values."""


_MAKERS = frozenset(_device_constructors())
"""Functions that make tensors of numbers; as they are before torch.fx wraps some of them."""


def _asked_by_user() -> bool:
    """Whether the user's own code calls a function of torch's, past what torch.fx has wrapped around it."""
    frame = sys._getframe(2)
    while frame.f_code.co_filename == fx._symbolic_trace.__file__ and frame.f_back is not None:
        frame = frame.f_back
    return is_users(frame.f_code.co_filename)


class Reads(TorchFunctionMode):
    """Operations on parameters that were reached by other ways than an attribute of their module.

    Args:
        proxies: gives the proxy of a tensor in the trace; None where it is not a parameter.
        maker: notes the tensors, too, that the user's code makes of numbers.
    """

    def __init__(self, proxies: Callable[[Tensor], fx.Proxy | None], maker: fx.Tracer | None = None) -> None:
        super().__init__()
        self.proxies = proxies
        self.maker = maker

    def __torch_function__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        given = dict(kwargs or {})
        name = getattr(func, "__name__", "")
        if name == "__get__":
            name = getattr(getattr(func, "__self__", None), "__name__", "")
        if name in _FORM or name == "__set__":
            return func(*args, **given)
        if self.maker and func in _MAKERS and _asked_by_user():
            return self.maker.create_proxy("call_function", func, args, given)
        met = False

        def swapped(value: Any) -> Any:
            nonlocal met
            found = self.proxies(value) if isinstance(value, Tensor) else None
            met = met or found is not None
            return value if found is None else found

        new_args, new_kwargs = pytree.tree_map(swapped, (tuple(args), given))
        if not met:
            return func(*args, **given)
        if getattr(func, "__name__", "") == "__get__":
            return getattr(new_args[0], name)
        return fx.Proxy.__torch_function__(func, tuple(types), new_args, new_kwargs)


class DataAsDetach(TorchFunctionMode):
    """Within: `h.data` is read as `h.detach()`, which torch.export knows, and behind which autograd sees writes.

    Attributes:
        places: lines of the user's code that read `.data`.
    """

    def __init__(self) -> None:
        super().__init__()
        self.places: dict[str, None] = {}

    def __torch_function__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func == torch.Tensor.data.__get__:  # type: ignore[attr-defined]
            self.places[user_line()] = None
            return args[0].detach()
        return func(*args, **(kwargs or {}))
