"""How the user's model is called: which arguments are tensors, which are constants.

In: the model's `forward` and example inputs (or none). Out: `Signature`, which turns a call into the flat list of
tensors that captured graphs take. Invariant: the same call always flattens to the same names in the same order.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.utils import _pytree as pytree

from lagcompile.ir.base import BindError, LiftError

Inputs = torch.Tensor | Sequence[Any]


@dataclass(frozen=True)
class Signature:
    """The call of a model, flattened.

    Attributes:
        names: one name for each tensor, in order.
        parameters: forward's parameter for each top-level argument, in order.
        structure: the arguments' nested containers, with the position of each leaf in its place.
        constants: arguments that are not tensors, by position in the flattened call.
        exact: False where no example was given, so that each required argument is taken to be one tensor.
        starred: name of forward's *args among `parameters`, '' where there is none.
        graded: the model runs with gradients on only: its forward takes derivatives.
        optional: parameters whose constant is forward's own default.
    """

    names: tuple[str, ...]
    parameters: tuple[str, ...]
    structure: Any
    constants: Mapping[int, Any]
    exact: bool
    starred: str = ""
    graded: bool = False
    optional: frozenset[str] = frozenset()

    def flatten(self, args: Sequence[Any], kwargs: Mapping[str, Any], *, kept: bool = False) -> list[torch.Tensor]:
        """Tensors of a call, in the order of `names`.

        Args:
            args: positional arguments.
            kwargs: keyword arguments.
            kept: arguments without a tensor that are not given are those that the model was lifted with.

        Raises:
            BindError: the call does not have the structure that the model was lifted with.
        """
        if self.starred:
            count = self.parameters.index(self.starred)
            args = [*args[:count], tuple(args[count:])]
        fixed = self._fixed()
        moving = [n for n in self.parameters if n not in fixed]
        order = moving if kept and len(args) <= len(moving) else self.parameters
        given = {n: v for n, v in fixed.items() if kept or n in self.optional}
        given |= dict(zip(order, args, strict=False)) | dict(kwargs)
        problems = [f"the model has no argument '{n}'" for n in kwargs if n not in self.parameters]
        problems += [f"the argument '{n}' is missing" for n in self.parameters if n not in given]
        if len(args) > len(self.parameters):
            problems.append(
                f"{len(args)} inputs were given, the lifted model takes {len(self.parameters)}: "
                f"{', '.join(self.parameters)}"
            )
        if problems:
            raise BindError(problems)
        leaves, spec = pytree.tree_flatten(tuple(given[n] for n in self.parameters))
        if spec != pytree.tree_structure(self.structure):
            raise BindError("the inputs have another structure than the example inputs that the model was lifted with")
        for position, constant in self.constants.items():
            if not isinstance(leaves[position], type(constant)) or leaves[position] != constant:
                raise BindError(
                    f"the model was lifted with the constant {constant!r} among its inputs, "
                    f"now it is {leaves[position]!r}: lift it again"
                )
        tensors = [v for i, v in enumerate(leaves) if i not in self.constants]
        for name, value in zip(self.names, tensors, strict=True):
            if not isinstance(value, torch.Tensor):
                raise BindError(f"the input '{name}' is of type {type(value).__name__}, expected a tensor")
        return tensors

    def _fixed(self) -> dict[str, Any]:
        """Arguments that hold no tensor."""
        parts = zip(self.parameters, self.structure, strict=True)
        positions = {n: (part, pytree.tree_leaves(part)) for n, part in parts}
        return {
            n: pytree.tree_map(lambda i: self.constants[i], part)
            for n, (part, found) in positions.items()
            if all(i in self.constants for i in found)
        }

    def call(self, forward: Callable[..., Any], tensors: Sequence[Any]) -> Any:
        """Call the model, or its forward, with tensors (or proxies) in the order of `names`."""
        arguments = self.rebuild(tensors)
        with torch.set_grad_enabled(self.graded or torch.is_grad_enabled()):
            if not self.starred:
                return forward(**arguments)
            ahead = self.parameters[: self.parameters.index(self.starred)]
            positional = [arguments.pop(n) for n in ahead]
            return forward(*positional, *arguments.pop(self.starred), **arguments)

    def rebuild(self, tensors: Sequence[Any]) -> dict[str, Any]:
        """Arguments by parameter name, from tensors (or proxies) in the order of `names`."""
        values = iter(tensors)
        count = len(self.names) + len(self.constants)
        leaves = [self.constants[i] if i in self.constants else next(values) for i in range(count)]
        arguments = pytree.tree_map(lambda position: leaves[position], self.structure)
        return dict(zip(self.parameters, arguments, strict=True))


def as_args(inputs: Any) -> tuple[Any, ...]:
    """Example inputs as a tuple of arguments: a lone tensor is one argument, a NumPy array is a tensor."""
    given = inputs if isinstance(inputs, tuple | list) else (inputs,)
    return tuple(torch.as_tensor(v) if isinstance(v, np.ndarray) else v for v in given)


def signature_of(
    forward: Callable[..., Any], args: Sequence[Any] | None, kwargs: Mapping[str, Any] | None = None
) -> Signature:
    """Signature from `forward` and example inputs; without examples, each required argument is one tensor.

    Raises:
        LiftError: the example inputs do not fit `forward`.
    """
    parameters = inspect.signature(forward).parameters.values()
    if args is None and not kwargs:
        plain = {inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD}
        needed = [p for p in parameters if p.default is p.empty]
        names = tuple(p.name for p in needed if p.kind in plain or p.kind is p.KEYWORD_ONLY)
        return Signature(names, names, tuple(range(len(names))), {}, exact=False)
    try:
        bound = inspect.signature(forward).bind(*(args or ()), **(kwargs or {}))
    except TypeError as error:
        raise LiftError(f"the example inputs do not fit the model's forward: {error}") from error
    arguments = dict(bound.arguments)
    starred = ""
    for p in parameters:
        if p.kind is p.VAR_KEYWORD:
            arguments |= arguments.pop(p.name, {})
        elif p.kind is p.VAR_POSITIONAL and p.name in arguments:
            starred = p.name
    leaves, spec = pytree.tree_flatten(tuple(arguments.values()))
    constants = {i: v for i, v in enumerate(leaves) if not isinstance(v, torch.Tensor)}
    names = tuple(_leaf_names(arguments))
    kept = tuple(n for i, n in enumerate(names) if i not in constants)
    structure = pytree.tree_unflatten(list(range(len(leaves))), spec)
    optional = frozenset(
        p.name
        for p in parameters
        if p.name in arguments and p.default is not p.empty and _is_default(arguments[p.name], p.default)
    )
    return Signature(kept, tuple(arguments), structure, constants, exact=True, starred=starred, optional=optional)


def _is_default(value: Any, default: Any) -> bool:
    plain = type(value) in {bool, int, float, str} and type(value) is type(default)
    return value is default or (plain and value == default)


def _leaf_names(arguments: Mapping[str, Any]) -> list[str]:
    names: list[str] = []
    for name, value in arguments.items():
        paths = pytree.tree_flatten_with_path(value)[0]
        for path, _ in paths:
            tail = "_".join("".join(ch for ch in str(k) if ch.isalnum() or ch == "_") for k in path)
            names.append(f"{name}_{tail}" if tail else name)
    return names
