"""YAML files in and out: safe reading with line numbers, validation by a pydantic class, clean writing, a hash.

In: the path of a YAML 1.2 file and a pydantic class. Out: an instance of that class, or one `SpecError` that holds
every problem of the file, each beginning with `file:line: key`. Invariant: reading builds only mappings, lists,
strings, numbers, booleans and null; no tag of a file can construct anything else, so a file cannot run code.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from types import MappingProxyType
from typing import TypeVar, final

from pydantic import BaseModel, ValidationError
from pydantic_core import to_jsonable_python
from ruamel.yaml import YAML
from ruamel.yaml.composer import Composer
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

from lagcompile.ir import disk, reading
from lagcompile.ir.base import SpecError
from lagcompile.ir.places import path_of
from lagcompile.ir.schemaerrors import KeyPath, explain, show_path

Model = TypeVar("Model", bound=BaseModel)

# Aliases may repeat a value; a file that multiplies itself beyond any sensible spec is refused, not expanded.
MAX_VALUES = 100_000
MAX_DEPTH = 60
LARGEST = 1 << 18
"""Bytes of a YAML file: the reader takes half a minute for a mebibyte."""
LINE_WIDTH = 100
_PLAIN = re.compile(r"[A-Za-z_][\w./*+-]*(:[\w./*+-]+)*", re.ASCII)
_READ_AS_OTHER = frozenset({"null", "true", "false", "yes", "no", "on", "off", "y", "n"})
_TAG = "tag:yaml.org,2002:"


@final
@dataclass(frozen=True)
class Document:
    """A YAML file as plain data, with the line of every key and list item.

    Attributes:
        source: the file's path as the user wrote it.
        data: mappings with string keys, lists, strings, numbers, booleans, None.
        lines: line number (from 1) by key path, e.g. `("split", "k")`; list items by their index. None are known where
            it is empty.
        origin: path in the file of a path in the data, where the data were made from what the file holds.
    """

    source: str
    data: object
    lines: Mapping[KeyPath, int]
    origin: Callable[[KeyPath], KeyPath] = tuple

    def line(self, path: KeyPath = ()) -> int:
        """Return the line of a key, or of the nearest key above it that the file has."""
        path = self.origin(path)
        while path and path not in self.lines:
            path = path[:-1]
        return self.lines.get(path, 1)

    def problem(self, path: KeyPath, message: str) -> str:
        """Write one sentence for a `SpecError`: `specs/x.yaml:12: split.k: message`."""
        place = f"{self.source}:{self.line(path)}: " if self.lines else f"{self.source}: "
        return f"{place}{show_path(path)}: {message}" if path else place + message


def read(path: str | Path, *kinds: type[BaseModel]) -> Document:
    """Read one YAML 1.2 file.

    Args:
        path: the file.
        kinds: what it may be; nothing of any other file is shown.

    Raises:
        SpecError: the file is missing, is not UTF-8 text, is of another kind, or is not one well-formed YAML document
            of plain data.
    """
    text = reading.read_text(path, error=SpecError, kind="YAML", largest=LARGEST)
    if kinds:
        reading.check_kind(text, str(path), kinds, error=SpecError)
    return read_text(text, str(path))


def read_text(text: str, source: str) -> Document:
    """Read YAML 1.2 text; `source` is the name that problems begin with.

    Raises:
        SpecError: as for `read`.
    """
    reader = YAML(typ="safe", pure=True)
    reader.Composer = _Shallow
    reader.composer.warn_double_anchors = False
    try:
        node = reader.compose(io.StringIO(text))
    except MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        what = error.problem or error.context or "not well-formed"
        begun = f" ({error.context} that begins on line {error.context_mark.line + 1})" if _earlier(error) else ""
        line = 1 if mark is None else mark.line + 1
        raise SpecError(f"{source}:{line}: not valid YAML: {what}{begun}") from None
    except YAMLError as error:
        raise SpecError(f"{source}: not valid YAML: {str(error).splitlines()[0]}") from None
    except RecursionError:
        raise SpecError(f"{source}: too many or too deeply nested values") from None
    except (ValueError, ArithmeticError, LookupError, AttributeError, TypeError, AssertionError) as error:
        # The reader itself fails on some texts that are not YAML, such as an escape beyond Unicode.
        raise SpecError(f"{source}: not valid YAML: {error}") from None
    if node is None:
        raise SpecError(f"{source}: the file is empty")
    builder = _Builder(source)
    data = builder.value(node, ())
    if builder.problems:
        raise SpecError(builder.problems)
    return Document(source, data, MappingProxyType(builder.lines))


def _earlier(error: MarkedYAMLError) -> bool:
    begin, end = error.context_mark, error.problem_mark
    return bool(error.context) and begin is not None and end is not None and begin.line < end.line


class _Shallow(Composer):
    """Stop at the depth that is refused anyway: the rest could take minutes to read."""

    depth = 0

    def compose_node(self, parent: Node | None, index: int) -> Node:
        self.depth += 1
        if self.depth > MAX_DEPTH + 2:
            raise RecursionError
        node: Node = super().compose_node(parent, index)
        self.depth -= 1
        return node


class _Builder:
    """Turn composed YAML nodes into plain data, and gather lines and problems on the way."""

    def __init__(self, source: str) -> None:
        self.source = source
        self.lines: dict[KeyPath, int] = {}
        self.problems: list[str] = []
        self.count = 0

    def value(self, node: Node, path: KeyPath) -> object:
        line = node.start_mark.line + 1
        self.lines.setdefault(path, line)
        self.count += 1
        if self.count > MAX_VALUES or len(path) > MAX_DEPTH:
            # Raised at once: a file made to exhaust the reader would keep it busy.
            raise SpecError(f"{self.source}:{line}: too many or too deeply nested values (an alias inside itself?)")
        if isinstance(node, MappingNode) and node.tag == _TAG + "map":
            return self.mapping(node, path)
        if isinstance(node, SequenceNode) and node.tag == _TAG + "seq":
            return [self.value(item, (*path, index)) for index, item in enumerate(node.value)]
        if isinstance(node, ScalarNode):
            return self.scalar(node, path)
        self.refuse_tag(node, path)
        return None

    def mapping(self, node: MappingNode, path: KeyPath) -> dict[str, object]:
        result: dict[str, object] = {}
        for key_node, value_node in node.value:
            line = key_node.start_mark.line + 1
            if not isinstance(key_node, ScalarNode):
                self.problems.append(
                    f"{self.source}:{line}: {_lead(path)}a key must be a word, not a list or a mapping"
                )
                continue
            # The key as written: `10:` in a mapping from steps to values reaches pydantic as the text "10".
            key = str(key_node.value)
            inner = (*path, key)
            if key_node.tag == _TAG + "merge":
                self.problems.append(f"{self.source}:{line}: {_lead(path)}merge keys (<<) are not part of YAML 1.2")
            elif key in result:
                first = self.lines[inner]
                self.problems.append(
                    f"{self.source}:{line}: {show_path(inner)}: duplicate key, first given on line {first}"
                )
            else:
                self.lines[inner] = line
                result[key] = self.value(value_node, inner)
        return result

    def scalar(self, node: ScalarNode, path: KeyPath) -> object:
        text, kind = str(node.value), str(node.tag).removeprefix(_TAG)
        if any("\ud800" <= c <= "\udfff" for c in text):
            self.problems.append(
                f"{self.source}:{node.start_mark.line + 1}: {_lead(path)}the text holds half a character (a surrogate)"
            )
            return None
        plain = node.style is None
        try:
            if kind == "int":
                return _integer(text)
            if kind == "float":
                return _number(text)
        except ValueError:
            self.problems.append(
                f"{self.source}:{node.start_mark.line + 1}: {_lead(path)}{_short(text)} is not a number"
            )
            return None
        # `on` and `yes` are words in YAML 1.2, also under a `%YAML 1.1` directive.
        if kind == "bool" and text.lower() in ("true", "false"):
            return text.lower() == "true"
        if kind == "null" and plain:
            return None
        if kind in ("str", "bool", "null", "timestamp", "value", "merge"):
            return text
        self.refuse_tag(node, path)
        return None

    def refuse_tag(self, node: Node, path: KeyPath) -> None:
        tag = str(node.tag).replace(_TAG, "!!")
        self.problems.append(
            f"{self.source}:{node.start_mark.line + 1}: {_lead(path)}unknown tag '{tag}'; only plain data is read"
        )


def _lead(path: KeyPath) -> str:
    return f"{show_path(path)}: " if path else ""


def _short(text: str) -> str:
    long = f"{text[:20]!r}... of {len(text)} digits"
    return repr(text) if len(text) <= reading.LONGEST_INTEGER else long


def _integer(text: str) -> int:
    digits = text.replace("_", "")
    if len(digits) > reading.LONGEST_INTEGER:
        raise ValueError("too long")
    return int(digits, 0 if digits.lstrip("+-")[:2].lower() in ("0x", "0o", "0b") else 10)


def _number(text: str) -> float:
    # Python writes inf and nan without YAML's leading dot.
    digits = text.replace("_", "").lower()
    return float(digits.replace(".", "") if digits.lstrip("+-") in (".inf", ".nan") else digits)


def validate(path: str | Path, model_class: type[Model]) -> Model:
    """Read a YAML file and validate it with a pydantic class.

    Raises:
        SpecError: one problem for each thing that is wrong, in the order of the lines.
    """
    return check(read(path, model_class), model_class)


def check(document: Document, model_class: type[Model]) -> Model:
    """Validate a document that has been read: strictly, so that no text is taken for a number or a truth value.

    Raises:
        SpecError: one problem for each thing that is wrong, in the order of the lines.
    """
    if not isinstance(document.data, dict):
        got = "a list" if isinstance(document.data, list) else f"the single value {document.data!r}"
        raise SpecError(document.problem((), f"expected a mapping of keys to values, got {got}"))
    try:
        # As JSON, because strict validation there still takes a list for a tuple and text for a path.
        return model_class.model_validate_json(json.dumps(document.data), strict=True)
    except ValidationError as error:
        problems = problems_of(error, model_class, document.data, document)
    raise SpecError(problems)


def problems_of(error: ValidationError, model_class: type[BaseModel], data: object, document: Document) -> list[str]:
    """List what a class found wrong with the data of a document, in the order of lines."""
    found = list(explain(error, model_class, data))
    found.sort(key=lambda problem: document.line(problem[0]))
    return [document.problem(path, message) for path, message in found]


def dump(model: BaseModel, path: str | Path) -> None:
    """Write a model as YAML that `validate` reads back as an equal model.

    Raises:
        DataError: the file cannot be written.
    """
    disk.replace(path_of("path", path), dumps(model).encode())


def dumps(model: BaseModel | Mapping[str, object]) -> str:
    """Return YAML text of a model or plain data: keys in their order, one a line, lists of plain values on one line."""
    return "\n".join(_written(plain(model), "")) + "\n"


def spec_hash(model: BaseModel) -> str:
    """First 16 hexadecimal digits of the SHA-256 of the model's canonical JSON (sorted keys, no spaces)."""
    text = json.dumps(plain(model), sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def plain(value: object) -> object:
    """Turn a model, or anything in one, into mappings with string keys, lists and scalars; sets are sorted."""
    if isinstance(value, BaseModel):
        return plain(value.model_dump(mode="python", by_alias=True))
    if isinstance(value, Enum):
        return plain(value.value)
    if isinstance(value, Mapping):
        return {str(plain(key)): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, (set, frozenset)):
        return sorted((plain(item) for item in value), key=repr)
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    return to_jsonable_python(value)


def _written(value: object, indent: str) -> list[str]:
    """Lines of block style. Written here because ruamel's emitter leaves words plain that do not read back."""
    if isinstance(value, dict) and value:
        return [line for key, item in value.items() for line in _entry(f"{indent}{_word(key)}:", item, indent + "  ")]
    if isinstance(value, list) and value:
        return [line for item in value for line in _item(item, indent)]
    return [indent + _inline(value)]


def _entry(head: str, value: object, indent: str) -> list[str]:
    nested = isinstance(value, (dict, list)) and bool(value)
    if nested and not _fits(head, value):
        return [head, *_written(value, indent)]
    return [f"{head} {_inline(value)}"]


def _item(value: object, indent: str) -> list[str]:
    first, *rest = _written(value, indent + "  ")
    return [f"{indent}- {first.removeprefix(indent + '  ')}", *rest]


def _fits(head: str, value: object) -> bool:
    plain_list = isinstance(value, list) and not any(isinstance(item, (dict, list)) for item in value)
    return plain_list and len(head) + len(_inline(value)) < LINE_WIDTH


def _inline(value: object) -> str:
    if isinstance(value, list):
        return f"[{', '.join(_inline(item) for item in value)}]"
    if isinstance(value, dict):
        return "{}"
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float) and not math.isfinite(value):
        return ".nan" if math.isnan(value) else "-.inf" if value < 0 else ".inf"
    return _word(value) if isinstance(value, str) else repr(value)


def _word(text: str) -> str:
    """Write a string plain where every YAML reader takes it for a string, else in double quotes."""
    if _PLAIN.fullmatch(text) and text.lower() not in _READ_AS_OTHER:
        return text
    return '"' + "".join(_character(character) for character in text) + '"'


def _character(character: str) -> str:
    if character in '"\\':
        return "\\" + character
    return character if character.isprintable() else f"\\U{ord(character):08x}"
