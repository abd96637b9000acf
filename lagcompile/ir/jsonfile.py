"""JSON files in: validation by a pydantic class, with file, line and key of every problem.

In: text. Out: an instance of a class, or one error that holds every problem. Invariant: a text that reads as JSON twice
over (the same key given twice) or that is nested more deeply than any of ours is refused.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

from pydantic import BaseModel, ValidationError

from lagcompile.ir.base import DataError, LagcompileError
from lagcompile.ir.families import FamilyError, Origin
from lagcompile.ir.reading import LONGEST_INTEGER, check_kind, read_text
from lagcompile.ir.yamlfile import MAX_DEPTH, Document, problems_of
from lagcompile.ir.yamlfile import read_text as read_yaml_text

Model = TypeVar("Model", bound=BaseModel)
LOCATED = 1 << 20
"""Characters of a text; line numbers are not searched for in a longer one."""


Unfold: TypeAlias = Callable[[object], tuple[object, Origin]]
"""Gives the data that are meant, and where in the text they stand."""


def validate(
    path: str | Path,
    model_class: type[Model],
    *,
    error: type[LagcompileError] = DataError,
    unfold: Unfold | None = None,
) -> Model:
    """Read a JSON file and validate it.

    Raises:
        LagcompileError: of class `error`: the file cannot be read or is not JSON, or one problem for each thing that is
            wrong in it.
    """
    text = read_text(path, error=error, kind="JSON")
    if _holds_words(text):
        check_kind(text, str(path), [model_class], error=error)
    return check(text, str(path), model_class, error=error, unfold=unfold)


def read(path: str | Path, *, error: type[LagcompileError] = DataError) -> Any:
    """Read a JSON file as plain data.

    Raises:
        LagcompileError: of class `error`: the file cannot be read, or is not JSON.
    """
    return parse(read_text(path, error=error, kind="JSON"), str(path), error=error)


def _holds_words(text: str) -> bool:
    """Return whether problems would quote the text: those of its form show places only."""
    try:
        data = json.loads(text, parse_int=str)
    except (ValueError, RecursionError):
        return False
    return bool(data) and not isinstance(data, list)


def check(
    text: str,
    source: str,
    model_class: type[Model],
    *,
    error: type[LagcompileError] = DataError,
    unfold: Unfold | None = None,
) -> Model:
    """Validate JSON text strictly: no text is taken for a number.

    Args:
        text: JSON.
        source: the name that problems begin with.
        model_class: what is expected.
        error: class of the problems.
        unfold: gives the data that are meant, and where in the text they stand.

    Raises:
        LagcompileError: of class `error`: the text is not JSON, or one problem for each thing that is wrong in it.
    """
    data = parse(text, source, error=error)
    if unfold is None:
        return _validated(data, text, source, model_class, error)
    try:
        meant, origin = unfold(data)
    except FamilyError as caught:
        raise error(f"{source}: {caught}") from None
    return _validated(meant, text, source, model_class, error, origin=origin)


def parse(text: str, source: str, *, error: type[LagcompileError] = DataError, standard: bool = False) -> Any:
    """Read JSON text as plain data; NaN and infinities are read as Python writes them.

    Args:
        text: JSON.
        source: the name that problems begin with.
        error: class of the problems.
        standard: refuse NaN, infinities and numbers beyond 64 bits, on which readers differ.

    Raises:
        LagcompileError: of class `error`: the text is not JSON, repeats a key, or nests too deeply.
    """
    twice: list[str] = []

    def pairs(found: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(found)
        if len(result) < len(found):
            keys = [k for k, _ in found]
            twice.extend(k for k in result if keys.count(k) > 1)
        return result

    try:
        numbers: dict[str, Any] = {"parse_float": _finite, "parse_constant": _refused} if standard else {}
        data = json.loads(text, object_pairs_hook=pairs, parse_int=_bounded if standard else _integer, **numbers)
    except json.JSONDecodeError as caught:
        what = "the file is empty" if not text.strip() else caught.msg[:1].lower() + caught.msg[1:]
        end = ": it may have been cut short" if caught.pos >= len(text.rstrip()) else ""
        raise error(f"{source}:{caught.lineno}:{caught.colno}: not valid JSON: {what}{end}") from None
    except RecursionError:
        raise error(f"{source}: the values are nested too deeply") from None
    except ValueError as caught:
        raise error(f"{source}: {caught}") from None
    if twice:
        raise error(f"{source}: the key {twice[0]!r} is given twice in one mapping: keep one of them")
    if _deeper(data, MAX_DEPTH):
        raise error(f"{source}: the values are nested too deeply")
    return data


def _validated(
    data: object,
    text: str,
    source: str,
    model_class: type[Model],
    error: type[LagcompileError],
    origin: Origin | None = None,
) -> Model:
    if not isinstance(data, dict):
        raise error(f"{source}: expected a mapping of keys to values, got {_words(data)}")
    try:
        return model_class.model_validate_json(json.dumps(data) if origin else text, strict=True)
    except ValidationError as caught:
        document = _located(text, source, data)
        document = replace(document, origin=origin) if origin else document
        raise error(problems_of(caught, model_class, data, document)) from None
    except LagcompileError as caught:
        raise error([f"{source}: {p}" for p in caught.problems]) from None


def _integer(digits: str) -> int:
    if len(digits) > LONGEST_INTEGER:
        raise ValueError(f"a number of {len(digits)} digits is too long")
    return int(digits)


def _bounded(digits: str) -> int:
    value = _integer(digits)
    if not -(1 << 63) <= value < 1 << 63:
        raise ValueError(f"the number {digits[:30]} does not fit into 64 bits")
    return value


def _finite(digits: str) -> float:
    value = float(digits)
    if math.isinf(value):
        raise ValueError(f"the number {digits[:30]} is too large")
    return value


def _refused(word: str) -> float:
    raise ValueError(f"{word} is not a number in JSON")


def _deeper(data: object, depth: int) -> bool:
    inner = data.values() if isinstance(data, dict) else data if isinstance(data, list) else ()
    return depth < 0 or any(_deeper(value, depth - 1) for value in inner if isinstance(value, (dict, list)))


def _located(text: str, source: str, data: object) -> Document:
    """Read the text as YAML, which includes JSON, to know its lines; without lines where that fails."""
    if len(text) <= LOCATED:
        try:
            return read_yaml_text(text, source)
        except LagcompileError:
            pass
    return Document(source, data, {})


def _words(data: object) -> str:
    return "a list" if isinstance(data, list) else f"the single value {str(data)[:40]!r}"
