"""pydantic's validation errors in the user's words.

In: a `ValidationError`, the class that was asked for, and the plain data that failed. Out: pairs of a key path and a
sentence. Invariant: a path consists of keys and indices of the data only; pydantic's own labels for union members
are followed through the class's types and never shown. Errors of the members of one union are told as one.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, TypeAlias, Union, final, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from lagcompile.ir.base import NAME

KeyPath: TypeAlias = tuple[str | int, ...]
Problem: TypeAlias = tuple[KeyPath, str]

_NAMES: Mapping[object, str] = {
    str: "a string",
    bool: "true or false",
    Path: "a path",
    NoneType: "null",
}
# Error types whose own sentence says more than "expected this or that" does at a union.
_TELLING = frozenset({"union_tag_invalid", "union_tag_not_found", "value_error", "assertion_error"})
# Error types that the description of the expected type covers.
_EXPECTED = re.compile(
    r"(_type|_parsing|_from_float|_error|greater_than|greater_than_equal|less_than|less_than_equal)$"
)


def explain(error: ValidationError, model_class: type[BaseModel], data: object) -> list[Problem]:
    """Return every problem once, as (key path, sentence), in no order of lines.

    Args:
        error: what `model_class` raised on `data`.
        model_class: the class that was asked for.
        data: plain data with string keys.
    """
    traces = [_trace(details, model_class, data) for details in error.errors(include_url=False)]
    problems: list[Problem] = []
    for path, members in groupby(traces, key=lambda trace: trace.union_path):
        found = list(members)
        told = found if path is None else _told_of_union(found, path)
        problems += [trace.problem() for trace in told] if told else [found[0].union_problem(data)]
    return list(dict.fromkeys(problems))


def show_path(path: KeyPath) -> str:
    """Write a key path as users do: `stages[2].split.k`."""
    parts = (part if isinstance(part, int) or len(part) <= 60 else f"{part[:57]}..." for part in path)
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in parts).removeprefix(".")


def suggestion(word: str, known: Iterable[str]) -> str:
    """Return `, did you mean 'epsilon'?`, or nothing when no known word is near."""
    near = difflib.get_close_matches(word, list(known), n=1)
    return f", did you mean '{near[0]}'?" if near else ""


def listed(words: Iterable[str]) -> str:
    """List words in order, for a message."""
    return ", ".join(sorted(words))


@final
@dataclass(frozen=True)
class _Type:
    """A type with the constraints around it; `core` is None where the type is not known."""

    core: object
    metadata: tuple[object, ...] = ()
    discriminator: str | None = None

    @staticmethod
    def of(annotation: object) -> _Type:
        if get_origin(annotation) is not Annotated:
            return _Type(annotation)._unwrapped()
        inner, *extras = get_args(annotation)
        result = _Type.of(inner)
        for extra in extras:
            found = extra.metadata if isinstance(extra, FieldInfo) else [extra]
            key = extra.discriminator if isinstance(extra, FieldInfo) else None
            result = _Type(
                result.core,
                (*result.metadata, *found),
                key if isinstance(key, str) else result.discriminator,
            )
        return result

    @staticmethod
    def of_field(field: FieldInfo) -> _Type:
        inner = _Type.of(field.annotation)
        key = field.discriminator if isinstance(field.discriminator, str) else inner.discriminator
        return _Type(inner.core, (*inner.metadata, *field.metadata), key)

    def _unwrapped(self) -> _Type:
        members = [member for member in self._arguments() if member is not NoneType]
        return _Type.of(members[0]) if self.is_union() and len(members) == 1 else self

    def _arguments(self) -> tuple[Any, ...]:
        return get_args(self.core)

    def is_union(self) -> bool:
        return get_origin(self.core) in (Union, UnionType)

    def is_choice(self) -> bool:
        """A union that pydantic labels member by member."""
        return self.is_union() and self.discriminator is None

    def model(self) -> type[BaseModel] | None:
        return self.core if isinstance(self.core, type) and issubclass(self.core, BaseModel) else None

    def members(self) -> list[_Type]:
        return [_Type.of(member) for member in self._arguments() if member is not NoneType]

    def tagged(self) -> dict[str, _Type]:
        """Members of a discriminated union by the value of their tag."""
        result: dict[str, _Type] = {}
        if self.discriminator is None:
            return result
        for member in self.members():
            model = member.model()
            if model is None:  # a discriminated union inside this one
                result |= member.tagged()
            else:
                result |= {str(tag): member for tag in get_args(model.model_fields[self.discriminator].annotation)}
        return result

    def member(self, label: str) -> _Type:
        """The union member that pydantic's label speaks of, or an unknown type."""
        fits = [member for member in self.members() if member.has_label(label)]
        return fits[0] if len(fits) == 1 else _Type(None)

    def has_label(self, label: str) -> bool:
        if self.discriminator is not None:
            return label.startswith("tagged-union[")
        if model := self.model():
            return not label.startswith("tagged-union[") and bool(re.search(rf"\b{model.__name__}\b", label))
        origin = get_origin(self.core) or self.core
        name = str(getattr(origin, "__name__", "?")).lower()
        return label.split("[", maxsplit=1)[0].removeprefix("constrained-") == name

    def inner(self, part: str | int) -> _Type:
        """Type of an entry of a mapping, model, list or tuple."""
        if model := self.model():
            field = _fields(model).get(str(part))
            return _Type(None) if field is None else _Type.of_field(field)
        arguments, origin = self._arguments(), get_origin(self.core)
        if not isinstance(origin, type) or not arguments:
            return _Type(None)
        if issubclass(origin, Mapping):
            return _Type.of(arguments[-1])
        fixed = origin is tuple and arguments[-1] is not Ellipsis
        index = part if fixed and isinstance(part, int) and part < len(arguments) else 0
        return _Type.of(arguments[index])

    def key(self) -> _Type:
        """Type of a mapping's keys."""
        arguments = self._arguments()
        return _Type.of(arguments[0]) if len(arguments) == 2 else _Type(None)

    def describe(self) -> str:
        """Return what a message calls a value of this type."""
        if self.core in (int, float):
            return _number_words("integer" if self.core is int else "number", self.metadata)
        if get_origin(self.core) is Literal:
            return _either([repr(value) for value in self._arguments()])
        if self.discriminator is not None:
            return f"a mapping with '{self.discriminator}' one of {listed(self.tagged())}"
        if self.is_union():
            return _either([member.describe() for member in self.members()])
        if model := self.model():
            return f"a mapping with the keys {listed(_fields(model))}"
        return _NAMES.get(self.core) or self._collection_words()

    def _collection_words(self) -> str:
        origin = get_origin(self.core) or self.core
        if not isinstance(origin, type):
            return "another value"
        if issubclass(origin, Mapping):
            return "a mapping"
        arguments = [argument for argument in self._arguments() if argument is not Ellipsis]
        if issubclass(origin, (list, tuple, set, frozenset, Sequence)):
            entry = _Type.of(arguments[0]).describe() if len(set(arguments)) == 1 else ""
            number = f"{len(arguments)} entries" if origin is tuple and Ellipsis not in self._arguments() else ""
            return "a list" + (f" of {number}" if number else "") + (f", each entry {entry}" if entry else "")
        return f"a value of type {origin.__name__}"


@final
@dataclass(frozen=True)
class _Trace:
    """One pydantic error, followed to its place in the data.

    Attributes:
        path: where in the data.
        expected: the type there; `holder` the type around it.
        union_path: path of the outermost unlabelled union that was entered, with its type and the member's label.
    """

    kind: str
    message: str
    path: KeyPath
    expected: _Type
    holder: _Type
    value: object
    of_key: bool
    tag: str = ""
    union_path: KeyPath | None = None
    union: _Type | None = None
    label: str = ""

    def problem(self) -> Problem:
        if self.kind == "extra_forbidden":
            model = self.holder.model()
            known = [] if model is None else list(_fields(model))
            return self.path, _unknown("key", str(self.path[-1]), known, "allowed here")
        if self.kind == "missing" and isinstance(self.value, list):  # an entry of it
            return self.path, _expectation(self.expected, self.value, of_key=False)
        if self.kind == "missing":
            words = "" if self.expected.core is None else f" (expected {self.expected.describe()})"
            return self.path[:-1], f"required key '{self.path[-1]}' is missing{words}"
        if self.kind == "union_tag_not_found":
            key = self.expected.discriminator or "kind"
            return self.path, f"key '{key}' is missing; known {_plural(key)}: {listed(self.expected.tagged())}"
        if self.kind == "union_tag_invalid":
            key = self.expected.discriminator or "kind"
            found = _unknown(f"{key} '{self.tag}'", self.tag, self.expected.tagged(), f"known {_plural(key)}")
            return (*self.path, key), found
        if self.kind in ("value_error", "assertion_error"):
            return self.path, self.message
        if self.kind == "finite_number":
            return self.path, f"expected a finite number, got {_show(self.value)}"
        if self.expected.core is not None and _EXPECTED.search(self.kind):
            return self.path, _expectation(self.expected, self.value, of_key=self.of_key)
        return self.path, f"{self.message[:1].lower()}{self.message[1:]}, got {_show(self.value)}"

    def union_problem(self, data: object) -> Problem:
        assert self.union is not None
        path = self.union_path or ()
        return path, _expectation(self.union, _lookup(data, path), of_key=False)


def _trace(details: Mapping[str, Any], model_class: type[BaseModel], data: object) -> _Trace:
    """Follow a pydantic location through types and data side by side."""
    here, holder, of_key = _Type.of(model_class), _Type(None), False
    path: KeyPath = ()
    union_path: KeyPath | None = None
    union, label = None, ""
    for part in details["loc"]:
        if part == "[key]":
            of_key, here = True, holder.key()
        elif here.is_choice():
            if union is None:
                union_path, union, label = path, here, str(part)
            here = here.member(str(part))
        elif here.discriminator is not None:
            here = here.tagged().get(str(part), _Type(None))
        elif here.model() is not None or _has(_lookup(data, path), part):
            holder, here, path = here, here.inner(part), (*path, part)
    context = details.get("ctx", {})
    return _Trace(
        kind=details["type"],
        message=_message(details),
        path=path,
        expected=here,
        holder=holder,
        value=path[-1] if of_key else _lookup(data, path),
        of_key=of_key,
        tag=str(context.get("tag", "")),
        union_path=union_path,
        union=union,
        label=label,
    )


def _message(details: Mapping[str, Any]) -> str:
    """Return pydantic's sentence, or a better one where the error carries its facts."""
    context = details.get("ctx", {})
    if details["type"] in ("too_short", "too_long"):
        few = details["type"] == "too_short"
        return f"expected at {'least' if few else 'most'} {context['min_length' if few else 'max_length']} entries"
    if context.get("pattern") == NAME:
        return "expected a name of up to 100 letters, digits, '.', '_' and '-' that begins with a letter or a digit"
    return str(context.get("error") or details["msg"])


def _plural(noun: str) -> str:
    return noun.removesuffix("y") + "ies" if noun.endswith("y") else noun + "s"


def _unknown(what: str, word: str, known: Iterable[str], title: str) -> str:
    words = list(known)
    if guess := suggestion(word, words):
        return f"unknown {what}{guess} {title.capitalize()}: {listed(words)}"
    return f"unknown {what}" + (f"; {title}: {listed(words)}" if words else "")


def _told_of_union(traces: Sequence[_Trace], path: KeyPath) -> list[_Trace]:
    """The errors of the one union member that the data has the shape of; none when it has the shape of none."""
    telling = [trace for trace in traces if len(trace.path) > len(path) or trace.kind in _TELLING]
    by_member: dict[str, list[_Trace]] = {}
    for trace in telling:
        by_member.setdefault(trace.label, []).append(trace)
    return min(by_member.values(), key=len, default=[])


def _fields(model: type[BaseModel]) -> dict[str, FieldInfo]:
    return {field.alias or name: field for name, field in model.model_fields.items()}


def _has(data: object, part: str | int) -> bool:
    if isinstance(data, dict):
        return part in data
    return isinstance(data, list) and isinstance(part, int) and part < len(data)


def _lookup(data: object, path: KeyPath) -> object:
    for part in path:
        if not _has(data, part):
            return None
        data = data[part]  # type: ignore[index]
    return data


def _expectation(expected: _Type, value: object, *, of_key: bool) -> str:
    guess = ""
    if isinstance(value, str):
        words = [entry for entry in _literals(expected) if isinstance(entry, str)]
        guess = suggestion(value, words)
    return f"expected {'the key to be ' if of_key else ''}{expected.describe()}, got {_show(value)}{guess}"


def _literals(expected: _Type) -> list[object]:
    if get_origin(expected.core) is Literal:
        return list(get_args(expected.core))
    if expected.is_choice():
        return [value for member in expected.members() for value in _literals(member)]
    return []


def _number_words(noun: str, metadata: Sequence[object]) -> str:
    above = [entry.gt for entry in metadata if isinstance(entry, Gt)]
    least = [entry.ge for entry in metadata if isinstance(entry, Ge)]
    article, limits = ("an" if noun == "integer" else "a"), []
    if 0 in above or (noun == "integer" and 1 in least):
        article, noun = "a", f"positive {noun}"
    elif 0 in least:
        article, noun = "a", f"non-negative {noun}"
    else:
        limits += [f"above {limit}" for limit in above] + [f"of at least {limit}" for limit in least]
    limits += [f"below {entry.lt}" for entry in metadata if isinstance(entry, Lt)]
    limits += [f"of at most {entry.le}" for entry in metadata if isinstance(entry, Le)]
    return f"{article} {noun}" + (" " + " and ".join(limits) if limits else "")


def _either(words: Sequence[str]) -> str:
    return " or ".join([", ".join(words[:-1]), words[-1]]) if len(words) > 1 else "".join(words)


def _show(value: object) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    text = repr(value)
    if len(text) <= 60:
        return text
    if isinstance(value, dict):
        return f"a mapping with {len(value)} keys"
    return f"a list of {len(value)} values" if isinstance(value, list) else text[:57] + "..."
