"""Nested outputs and inputs: flat lists of values, and a template that builds the user's own containers again.

In: whatever a forward returns. Out: its leaves in a fixed order, and a template with something else in their places.
Invariant: `fill(template, leaf)` is equal to what was flattened, of the same classes (named tuples, dataclasses and
mappings such as a transformer's ModelOutput included, and of an output that was `opened`, plain objects such as a
transformer's cache or a distribution).
"""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import BuiltinFunctionType, FunctionType, MethodType, ModuleType
from typing import Any

from torch import SymBool, SymFloat, SymInt

_WHOLE = (type, FunctionType, BuiltinFunctionType, MethodType, ModuleType, SymInt, SymFloat, SymBool)
"""What has attributes and is a leaf all the same."""


@dataclass(frozen=True)
class Reference:
    """Placeholder of a value, by name, inside a structure."""

    name: str


@dataclass(frozen=True)
class Nest:
    """One container of a structure.

    Attributes:
        kind: the user's class.
        keys: keys or field names; None for sequences.
        items: templates of the entries, in order.
    """

    kind: type[Any]
    keys: tuple[Any, ...] | None
    items: tuple[Any, ...]


def nest_of(value: Any) -> Nest | None:
    """The container as a record of its entries, None where the value is a leaf."""
    if isinstance(value, tuple | list):
        return Nest(type(value), None, tuple(value))
    if isinstance(value, slice):
        return Nest(slice, None, (value.start, value.stop, value.step))
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        names = tuple(f.name for f in dataclasses.fields(value))
        return Nest(type(value), names, tuple(getattr(value, n) for n in names))
    if isinstance(value, Mapping):
        return Nest(type(value), tuple(value), tuple(value.values()))
    return None


def opened(output: Any, around: tuple[int, ...] = ()) -> Any:
    """A template of an output in which plain objects, too, are containers: of their attributes."""
    nest = nest_of(output)
    if nest is None and _is_plain(output):
        nest = Nest(type(output), tuple(vars(output)), tuple(vars(output).values()))
    if nest is None or id(output) in around:  # an object that holds itself has no end
        return output
    return Nest(nest.kind, nest.keys, tuple(opened(v, (*around, id(output))) for v in nest.items))


def _is_plain(value: Any) -> bool:
    """Whether an object is its attributes and nothing else: it is copied as Python copies objects by itself."""
    own = [vars(c) for c in type(value).__mro__[:-1]]
    special = {"__reduce__", "__reduce_ex__", "__setstate__", "__torch_function__"}
    return (
        hasattr(value, "__dict__")
        and not isinstance(value, _WHOLE)
        and not any(v.get("__slots__") or special & v.keys() for v in own)
    )


def transform(value: Any, leaf: Callable[[Any], Any]) -> Any:
    """Template of a value: containers as `Nest`, each leaf replaced by what the function makes of it."""
    if isinstance(value, Nest):
        return Nest(value.kind, value.keys, tuple(transform(v, leaf) for v in value.items))
    nest = None if isinstance(value, Reference) else nest_of(value)
    if nest is None:
        return leaf(value)
    return transform(nest, leaf)


def leaves(value: Any) -> list[Any]:
    """Leaves of a value or of a template, in order."""
    found: list[Any] = []
    transform(value, found.append)
    return found


def fill(template: Any, leaf: Callable[[Any], Any]) -> Any:
    """The user's containers, with leaves made from those of the template."""
    if not isinstance(template, Nest):
        return leaf(template)
    return _build(template.kind, template.keys, [fill(v, leaf) for v in template.items])


def _build(kind: type[Any], keys: tuple[Any, ...] | None, items: list[Any]) -> Any:
    if keys is None:
        named = kind is slice or (issubclass(kind, tuple) and hasattr(kind, "_fields"))
        return kind(*items) if named else kind(items)
    values = dict(zip(keys, items, strict=True))
    if not dataclasses.is_dataclass(kind):
        if issubclass(kind, defaultdict):
            return kind(None, values)
        if issubclass(kind, Mapping):
            return kind(values)  # type: ignore[call-arg]
        made = object.__new__(kind)
        vars(made).update(values)
        return made
    given = {f.name for f in dataclasses.fields(kind) if f.init}
    built = kind(**{n: v for n, v in values.items() if n in given})
    for name, value in values.items():
        if name not in given:
            object.__setattr__(built, name, value)
    return built
