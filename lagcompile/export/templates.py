"""Structures of calls and outputs as JSON: containers by name, leaves as references or plain values.

In: templates made by `frontend/structure.py`. Out: JSON data, and templates again. Invariant: nothing of a file is
imported; a class of the user's comes back as a record with the same fields (`Fields`, a named tuple).
"""

from __future__ import annotations

import copyreg
import dataclasses
import functools
from collections import namedtuple
from collections.abc import Mapping
from typing import Any

import torch

from lagcompile.frontend.capture import ModeOutput
from lagcompile.frontend.structure import Nest, Reference, nest_of
from lagcompile.ir.base import DataError, LiftError

_PLAIN: Mapping[str, type[Any]] = {"tuple": tuple, "list": list, "dict": dict, "slice": slice, "size": torch.Size}


class Fields(dict[str, Any]):
    """What a dataclass of the user's becomes where its source is absent: items and attributes by field name."""

    def __getattr__(self, name: str) -> Any:
        if name in self:
            return self[name]
        raise AttributeError(f"this output has no field '{name}' (it has: {', '.join(self) or 'none'})")


class _Named(type):
    """Classes of named tuples that pickle by their fields, as no module holds them."""


@functools.cache
def named(name: str, fields: tuple[str, ...]) -> type[Any]:
    """A named tuple's class."""
    base = namedtuple(name, fields)  # type: ignore[misc]
    return _Named(name, (base,), {"_fields": fields, "__slots__": (), "__module__": __name__})


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
    if value is None or isinstance(value, bool | int | float | str):
        return {"value": value}
    if isinstance(value, torch.dtype):
        return {"dtype": str(value).removeprefix("torch.")}
    if isinstance(value, torch.device):
        return {"device": str(value)}
    raise LiftError(
        f"{what} holds a {type(value).__module__}.{type(value).__qualname__}, which a folder cannot hold as data: "
        "pass tensors, numbers, strings, None, a dtype or a device"
    )


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
    if isinstance(data, dict) and "train" in data:
        return ModeOutput(decode(data["train"]), decode(data["evaluation"]))
    return decode(data)


def _kind(nest: Nest, what: str) -> dict[str, Any]:
    kind = nest.kind
    for name, plain in _PLAIN.items():
        if kind is plain:
            return {"kind": name} if nest.keys is None else {"kind": name, "keys": [_key(k, what) for k in nest.keys]}
    if kind.__module__ == "torch.return_types":
        return {"kind": "torch", "name": kind.__qualname__}
    if issubclass(kind, tuple) and "_fields" in vars(kind):
        return {"kind": "named", "name": kind.__name__, "keys": list(kind._fields)}  # type: ignore[attr-defined]
    if nest.keys is not None:
        return {
            "kind": "fields" if dataclasses.is_dataclass(kind) else "dict",
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
    try:
        return _decoded(data)
    except (KeyError, TypeError, AttributeError, RuntimeError) as error:
        raise DataError(f"not the structure of a call or an output: {error}") from error


def _decoded(data: Any) -> Any:
    if "ref" in data:
        return Reference(str(data["ref"]))
    if "value" in data:
        return data["value"]
    if "dtype" in data:
        return {str(d): d for d in _dtypes()}[f"torch.{data['dtype']}"]
    if "device" in data:
        return torch.device(data["device"])
    items = tuple(_decoded(v) for v in data["items"])
    keys = tuple(data["keys"]) if "keys" in data else None
    if data["kind"] == "named":
        return Nest(named(data["name"], tuple(data["keys"])), None, items)
    if data["kind"] == "fields":
        return Nest(Fields, keys, items)
    if data["kind"] == "torch":
        return Nest(vars(torch.return_types)[data["name"]], None, items)
    return Nest(_PLAIN[data["kind"]], keys, items)


def _dtypes() -> list[torch.dtype]:
    return [v for v in vars(torch).values() if isinstance(v, torch.dtype)]
