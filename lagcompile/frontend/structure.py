"""Nested outputs and inputs: flat lists of values, and a template that builds the user's own containers again.

In: whatever a forward returns. Out: its leaves in a fixed order, and a template with something else in their places.
Invariant: `fill(template, leaf)` is equal to what was flattened, of the same classes (named tuples, dataclasses and
mappings such as a transformer's ModelOutput included).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Reference:
    """Stands for a value, by name, inside a structure."""

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
        named = kind is slice or (issubclass(kind, tuple) and "_fields" in vars(kind))
        return kind(*items) if named else kind(items)
    values = dict(zip(keys, items, strict=True))
    if not dataclasses.is_dataclass(kind):
        return kind(values)
    given = {f.name for f in dataclasses.fields(kind) if f.init}
    built = kind(**{n: v for n, v in values.items() if n in given})
    for name, value in values.items():
        if name not in given:
            object.__setattr__(built, name, value)
    return built
