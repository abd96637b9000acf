"""Capture an unmodified `nn.Module` as a torch.fx graph.

In: the user's model (never touched: a private deep copy is traced) and its call signature. Out: `Capture`. Invariant:
running `Capture.module` is running the model; a sub-module that cannot be traced is kept whole, as one opaque node.
"""

from __future__ import annotations

import copy
import functools
import sys
import traceback
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import fx, nn

from lagcompile.frontend.signature import Signature
from lagcompile.ir.base import LiftError

FrontEnd = Literal["torch.fx", "torch.export"]


@dataclass(frozen=True)
class Capture:
    """A captured model.

    Attributes:
        module: graph module whose placeholders are `signature.names`; it owns the private copy's parameters.
        original: the private copy itself, an instance of the user's class that shares those parameters.
        signature: how the model is called.
        front_end: what made the graph.
        whole: modules kept as one node, with the reason.
        ties: canonical name of a tied parameter -> its other names.
    """

    module: fx.GraphModule
    original: nn.Module
    signature: Signature
    front_end: FrontEnd
    whole: Mapping[str, str] = field(default_factory=dict)
    ties: Mapping[str, tuple[str, ...]] = field(default_factory=dict)


def capture(model: nn.Module, signature: Signature, whole: Collection[str] = ()) -> Capture:
    """Trace a deep copy of a model with torch.fx.

    Args:
        model: any module; it is not changed.
        signature: its call, from `signature_of`.
        whole: module paths to keep as one node each.

    Raises:
        LiftError: the model's own forward cannot be traced; one problem names the class and the source line.
    """
    if not isinstance(model, nn.Module):
        raise LiftError(f"lift takes a torch.nn.Module, got {type(model).__name__}")
    copied = copy.deepcopy(model)
    tracer = _Tracer(signature, frozenset(whole))
    try:
        graph = tracer.trace(copied)
    except Exception as error:
        raise LiftError(
            f"{type(model).__name__}.forward cannot be traced: {_reason(error)}. Move the lines that need values "
            "into a sub-module (it is then kept whole), or make them tensor operations"
        ) from error
    module = fx.GraphModule(copied, graph, type(model).__name__)
    placeholders = tuple(n.name for n in graph.nodes if n.op == "placeholder")
    signature = replace(signature, names=placeholders)
    return Capture(module, copied, signature, "torch.fx", dict(tracer.opaque), ties_of(copied))


def ties_of(model: nn.Module) -> dict[str, tuple[str, ...]]:
    """Canonical name -> other names, for parameters that a model holds under several names."""
    names: dict[nn.Parameter, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(parameter, []).append(name)
    return {n[0]: tuple(n[1:]) for n in names.values() if len(n) > 1}


class _Tracer(fx.Tracer):
    """torch.fx's tracer with our arguments, source lines, and opaque modules in place of failures."""

    def __init__(self, signature: Signature | None = None, whole: frozenset[str] = frozenset()) -> None:
        super().__init__()
        self.signature = signature
        self.keep = whole
        self.opaque: dict[str, str] = {}

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return module_qualified_name in self.keep or super().is_leaf_module(m, module_qualified_name)

    def create_args_for_root(
        self, root_fn: Callable[..., Any], is_module: bool, concrete_args: Any = None
    ) -> tuple[Callable[..., Any], list[Any]]:
        if self.signature is None:  # torch.fx traces the generated code of a graph module again when it is unpickled
            return super().create_args_for_root(root_fn, is_module, concrete_args)
        proxies = [self.create_proxy("placeholder", name, (), {}) for name in self.signature.names]
        arguments = self.signature.rebuild(proxies)
        return functools.partial(root_fn, **arguments), [self.root]

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        node = super().create_node(*args, **kwargs)
        node.meta["source"] = _user_line()
        return node

    def call_module(
        self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        last = next(iter(reversed(self.graph.nodes)))
        try:
            return super().call_module(m, forward, args, kwargs)
        except Exception as error:
            path = self.path_of_module(m)
            self.opaque[path] = _reason(error)
            while (node := next(iter(reversed(self.graph.nodes)))) is not last:
                self.graph.erase_node(node)
            return self.create_proxy("call_module", path, args, kwargs)


_OWN = (torch.__path__[0], __file__)


def _user_line() -> str:
    """file:line of the user's code that is running, '' where there is none."""
    frame = sys._getframe(2)
    while frame is not None:
        name = frame.f_code.co_filename
        if not name.startswith(_OWN) and not name.startswith("<") and "lagcompile/lift.py" not in name:
            return f"{name}:{frame.f_lineno}"
        frame = frame.f_back  # type: ignore[assignment]
    return ""


def _reason(error: BaseException) -> str:
    """What went wrong and where, in one line: the innermost line of the user's own code."""
    text = str(error).strip().splitlines()
    first = text[0] if text else type(error).__name__
    for entry in reversed(traceback.extract_tb(error.__traceback__)):
        if not entry.filename.startswith(_OWN) and not entry.filename.startswith("<"):
            return f"{first} ({entry.filename}:{entry.lineno}: {entry.line})"
    return first
