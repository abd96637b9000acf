"""Structures of calls and outputs as JSON: containers by name, leaves as references or plain values.

In: templates made by `frontend/structure.py`. Out: JSON data, and templates again. Invariant: nothing of a file is
imported; a class of the user becomes a record with the same fields (`Fields`, a named tuple).
"""

from __future__ import annotations

import copyreg
import dataclasses
import functools
import operator
from collections.abc import Mapping
from typing import Any

import torch

from lagcompile.export import plain
from lagcompile.export.plain import hold, is_name
from lagcompile.frontend.capture import ModeOutput
from lagcompile.frontend.structure import Nest, Reference, fill, leaves, nest_of
from lagcompile.ir.base import LiftError

_PLAIN: Mapping[str, type[Any]] = {"tuple": tuple, "list": list, "dict": dict, "slice": slice, "size": torch.Size}


class Fields(dict[str, Any]):
    """Replaces an object of the user whose source is absent: items and attributes by field name."""

    def __getattribute__(self, name: str) -> Any:
        return self[name] if name in self else super().__getattribute__(name)  # a field may be called `keys`

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(f"this output has no field '{name}' (it has: {', '.join(self) or 'none'})")


class _Named(type):
    """Classes of named tuples that pickle by their fields, as no module holds them."""


@functools.cache
def named(name: str, fields: tuple[str, ...]) -> type[Any]:
    """A named tuple's class (`collections.namedtuple` would generate code)."""

    def new(cls: type[Any], *values: Any) -> Any:
        if len(values) != len(fields):
            raise TypeError(f"{name} has {len(fields)} fields, got {len(values)} values")
        return tuple.__new__(cls, values)

    def shown(self: Any) -> str:
        return f"{name}({', '.join(f'{n}={v!r}' for n, v in zip(fields, self, strict=True))})"

    own = {
        "_asdict": lambda self: dict(zip(fields, self, strict=True)),
        "_replace": lambda self, **given: type(self)(*{**self._asdict(), **given}.values()),
        "__getnewargs__": tuple,
        "__repr__": shown,
    }
    entries = {n: property(operator.itemgetter(i)) for i, n in enumerate(fields)}
    basic = {"_fields": fields, "__slots__": (), "__module__": __name__, "__new__": new}
    return _Named(name, (tuple,), {**entries, **basic, **own})


def _reduce(kind: _Named) -> tuple[Any, ...]:
    return named, (kind.__name__, vars(kind)["_fields"])


copyreg.pickle(_Named, _reduce)


def encode(value: Any, what: str) -> Any:
    """JSON data of a template or of a nested value.

    Args:
        value: a template, containers, references and plain values.
        what: what errors call it.

    Raises:
        LiftError: a leaf or a container cannot be written as data.
    """
    if isinstance(value, Reference):
        return {"ref": value.name}
    nest = value if isinstance(value, Nest) else nest_of(value)
    if nest is not None:
        return {**_kind(nest, what), "items": [encode(v, what) for v in nest.items]}
    try:
        return {"value": plain.written(value)}
    except TypeError:
        raise LiftError(
            f"{what} holds a {type(value).__module__}.{type(value).__qualname__}, which a folder cannot hold as data: "
            "pass tensors, numbers, strings, None, a dtype or a device"
        ) from None


def encode_output(output: Any) -> Any:
    """JSON data of an output's template; of two templates where the modes return different structures.

    Raises:
        LiftError: a leaf or a container cannot be written as data.
    """
    if isinstance(output, ModeOutput):
        return {"train": encode_output(output.train), "evaluation": encode_output(output.evaluation)}
    return encode(output, "the model's output")


def decode_output(data: Any) -> Any:
    """The template, or the two of them.

    Raises:
        DataError: the data are not what `encode_output` writes.
    """
    if isinstance(data, dict) and data.keys() == {"train", "evaluation"}:
        return ModeOutput(decode(data["train"]), decode(data["evaluation"]))
    return decode(data)


def _kind(nest: Nest, what: str) -> dict[str, Any]:
    kind = nest.kind
    for name, known in _PLAIN.items():
        if kind is known:
            return {"kind": name} if nest.keys is None else {"kind": name, "keys": [_key(k, what) for k in nest.keys]}
    if kind.__module__ == "torch.return_types":
        return {"kind": "torch", "name": kind.__qualname__}
    if issubclass(kind, tuple) and "_fields" in vars(kind):
        return {"kind": "named", "name": kind.__name__, "keys": list(kind._fields)}  # type: ignore[attr-defined]
    if nest.keys is not None:
        return {
            "kind": "fields" if dataclasses.is_dataclass(kind) or not issubclass(kind, Mapping) else "dict",
            "keys": [_key(k, what) for k in nest.keys],
        }
    return {"kind": "list" if issubclass(kind, list) else "tuple"}


def _key(key: Any, what: str) -> str | int:
    if isinstance(key, str | int):
        return key
    raise LiftError(f"{what} has the key {key!r}: only strings and integers can be written")


def plain_containers(value: Any, what: str) -> None:
    """Check that a call's structure is made of tuples, lists and dicts.

    Raises:
        LiftError: it holds another container.
    """
    nest = nest_of(value)
    if nest is None:
        return
    if nest.kind not in (tuple, list, dict):
        raise LiftError(
            f"{what} holds a {nest.kind.__qualname__}, which exists only with the model's source: "
            "pass tuples, lists and dicts of tensors"
        )
    for item in nest.items:
        plain_containers(item, what)


def decode(data: Any) -> Any:
    """Template from JSON data.

    Raises:
        DataError: the data are not what `encode` writes.
    """
    hold(isinstance(data, dict), f"not a structure: {data!r:.80}")
    if data.keys() == {"ref"}:
        hold(is_name(data["ref"]), f"{data['ref']!r:.60} is not the name of a value")
        return Reference(data["ref"])
    if data.keys() == {"value"}:
        return plain.read(data["value"])
    kind, entries, keys, name = (data.get(k) for k in ("kind", "items", "keys", "name"))
    shown = f"{ {k: v for k, v in data.items() if k != 'items'}!r:.80}"
    hold(isinstance(kind, str) and type(entries) is list, f"not a container: {shown}")
    items = tuple(decode(v) for v in entries)
    if keys is not None:
        hold(type(keys) is list and all(type(k) in (str, int) for k in keys), f"not the keys of a container: {shown}")
        hold(len(keys) == len(items) == len(set(keys)), f"other keys than items: {shown}")
    if kind in {"dict", "fields"}:
        hold(keys is not None, f"a container without keys: {shown}")
        return Nest(dict if kind == "dict" else Fields, tuple(keys), items)
    if kind == "named":
        hold(keys is not None and all(is_name(k) and k[0] != "_" for k in (name, *keys)), f"not a named tuple: {shown}")
        return Nest(named(name, tuple(keys)), None, items)
    if kind == "torch":
        found = vars(torch.return_types).get(name) if isinstance(name, str) else None
        hold(getattr(found, "__module__", "") == "torch.return_types" and isinstance(found, type), f"no type: {shown}")
        hold(getattr(found, "n_sequence_fields", -1) == len(items), f"other fields than items: {shown}")
        return Nest(found, None, items)  # type: ignore[arg-type]
    hold(kind in _PLAIN and keys is None and (kind != "slice" or len(items) == 3), f"not a container: {shown}")
    hold(kind != "size" or all(type(v) in (int, Reference) for v in items), f"not sizes: {shown}")
    return Nest(_PLAIN[kind], None, items)


def decode_plain(data: Any) -> Any:
    """Plain values in containers, from JSON data.

    Raises:
        DataError: the data are not what `encode` writes, or refer to values.
    """
    template = decode(data)
    hold(not any(isinstance(v, Reference) for v in leaves(template)), "a constant refers to a value")
    return fill(template, lambda v: v)
