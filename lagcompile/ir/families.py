"""Families: runs of equal things said once, over an index.

In: a list of records as plain data, or the rows of a printed table. Out: the same list in which a run whose entries
differ only in numbers that rise evenly is one entry, and back. Invariant: `unfold(fold(items))` is `items`.

A thousand equal layers are `{"k": [1, 998], "each": [{"name": "f{k}", "reads": ["h{k}"], "writes": ["h{k+1}"]}]}`:
in every text of `each` a number in braces follows the index, and a number by itself is written `{"at": "k-1"}`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

LEAST = 4
"""Members of a family; fewer are listed."""
LONGEST_PERIOD = 64
"""Entries that one value of the index may stand for (tensors of a transformer's layer, for one)."""
MOST = 1_000_000
"""Entries that a list may unfold to, so that a small file cannot ask for all memory."""

Entry: TypeAlias = Any
"""A record as plain data: mappings, lists, texts, numbers."""
Origin: TypeAlias = Callable[[tuple[str | int, ...]], tuple[str | int, ...]]
Origins: TypeAlias = list[tuple[str | int, ...]]
"""For each entry of an unfolded list, the path inside the folded list that it comes from."""

_NUMBER = re.compile(r"(?<!\d)(?:0|[1-9]\d{0,14})(?!\d)")
_SLOT = re.compile(r"\{(\d*)k([+-]\d+)?\}")
_AT = re.compile(r"(\d*)k([+-]\d+)?")


class FamilyError(ValueError):
    """A family that says no list of entries."""


@dataclass(frozen=True)
class Run:
    """Entries `start` to `start + period * members`: `period` templates over an index from `first`."""

    start: int
    period: int
    members: int
    first: int
    each: tuple[Entry, ...]

    @property
    def last(self) -> int:
        """Largest value of the index."""
        return self.first + self.members - 1

    @property
    def stop(self) -> int:
        """One behind the last entry."""
        return self.start + self.period * self.members


def runs(items: Sequence[Entry]) -> Iterator[Run | int]:
    """Yield the runs of a list, and the numbers of the entries that belong to none, in order."""
    outlines = _Outlines(items)
    place = 0
    while place < len(items):
        run = outlines.longest(place)
        if run is None:
            yield place
            place += 1
        else:
            yield run
            place = run.stop


def fold(items: Sequence[Entry]) -> list[Entry]:
    """Return a list in which runs are said once."""
    return [items[r] if isinstance(r, int) else {"k": [r.first, r.last], "each": list(r.each)} for r in runs(items)]


def unfold(items: Sequence[Entry]) -> tuple[list[Entry], Origins]:
    """Return the entries of a folded list, and where each comes from.

    Raises:
        FamilyError: a family is not two whole numbers in order and a list of templates, or there are too many entries.
    """
    found: list[Entry] = []
    origins: Origins = []
    for i, item in enumerate(items):
        if not isinstance(item, Mapping) or "each" not in item:
            found.append(item)
            origins.append((i,))
            continue
        first, last, each = _family(item, i)
        if len(found) + (last - first + 1) * len(each) > MOST:
            raise FamilyError(f"entry {i} unfolds to more than {MOST:,} entries")
        for k in range(first, last + 1):
            found += [_at(template, k) for template in each]
            origins += [(i, "each", m) for m in range(len(each))]
    return found, origins


def fold_lists(data: Mapping[str, Entry]) -> dict[str, Entry]:
    """Return a mapping in whose lists runs are said once."""
    return {key: fold(value) if isinstance(value, list) else value for key, value in data.items()}


def unfold_lists(data: object) -> tuple[object, Origin]:
    """Return the mapping that `fold_lists` was given, and where in the folded one a path of it comes from.

    Raises:
        FamilyError: as for `unfold`; the key is named.
    """
    if not isinstance(data, Mapping):
        return data, lambda path: path
    found: dict[str, Entry] = {}
    origins: dict[str, Origins] = {}
    for key, value in data.items():
        found[key] = value
        if isinstance(value, list):
            try:
                found[key], origins[key] = unfold(value)
            except FamilyError as error:
                raise FamilyError(f"{key}: {error}") from None

    def origin(path: tuple[str | int, ...]) -> tuple[str | int, ...]:
        if len(path) < 2 or path[0] not in origins:
            return path
        places = origins[str(path[0])]
        place = places[int(path[1])] if int(path[1]) < len(places) else ()
        return (path[0], *place, *path[2:])

    return found, origin


def _family(item: Mapping[str, Any], i: int) -> tuple[int, int, list[Entry]]:
    span: Any = item.get("k")
    each: Any = item["each"]
    whole = isinstance(span, list) and len(span) == 2 and all(type(v) is int for v in span)
    if set(item) != {"k", "each"} or not whole or not isinstance(each, list) or not 0 <= span[0] <= span[1]:
        raise FamilyError(f"entry {i} is not a family: write k: [first, last] and each: [templates of entries]")
    return span[0], span[1], each


class _Outlines:
    """What each entry looks like without its numbers, and the numbers."""

    def __init__(self, items: Sequence[Entry]) -> None:
        self.items = items
        self.shapes: list[int] = []
        self.numbers: list[list[int]] = []
        known: dict[str, int] = {}
        for item in items:
            numbers: list[int] = []
            try:
                shape = known.setdefault(repr(_shape(item, numbers)), len(known))
            except FamilyError:
                shape = -1 - len(self.shapes)  # like no other
            self.shapes.append(shape)
            self.numbers.append(numbers)

    def longest(self, start: int) -> Run | None:
        """The run from an entry on that holds the most entries; of equals the one with the fewest templates."""
        best: Run | None = None
        left = len(self.items) - start
        for period in range(1, min(LONGEST_PERIOD, left // LEAST) + 1):
            if best is not None and best.stop == len(self.items):
                break
            members = self._members(start, period)
            if members >= LEAST and (best is None or period * members > best.period * best.members):
                best = self._run(start, period, members) or best
        return best

    def _members(self, start: int, period: int) -> int:
        """How many times a period of entries repeats with numbers that rise evenly."""
        shapes = self.shapes[start : start + period]
        a, b, c = (self.numbers[start + i * period] for i in range(3))
        if shapes != self.shapes[start + period : start + 2 * period] or len(a) != len(c):
            return 0
        if any(x - 2 * y + z for x, y, z in zip(a, b, c, strict=True)):  # most periods are none by their first entry
            return 0
        first, second = (self._numbers(start + i * period, period) for i in (0, 1))
        members = 1
        for place in range(start + period, len(self.items) - period + 1, period):
            if self.shapes[place : place + period] != shapes:
                break
            if self._numbers(place, period) != [x + members * (y - x) for x, y in zip(first, second, strict=True)]:
                break
            members += 1
        return members

    def _numbers(self, start: int, period: int) -> list[int]:
        return [v for numbers in self.numbers[start : start + period] for v in numbers]

    def _run(self, start: int, period: int, members: int) -> Run | None:
        """The family; None where a number falls, or none moves. The index is that of the first number that moves."""
        values = self._numbers(start, period)
        slopes = [y - x for x, y in zip(values, self._numbers(start + period, period), strict=True)]
        moving = [(slope, value) for slope, value in zip(slopes, values, strict=True) if slope]
        if not moving or min(slope for slope, _ in moving) < 0:
            return None
        first = moving[0][1] // moving[0][0]
        slots = iter([(slope, value - slope * first) for slope, value in zip(slopes, values, strict=True)])
        each = tuple(_template(item, slots) for item in self.items[start : start + period])
        return Run(start, period, members, first, each)


def _shape(value: Entry, numbers: list[int]) -> Entry:
    """A value without its numbers.

    Raises:
        FamilyError: no template can say it: a text with braces, a mapping that looks like a number of a template.
    """
    if isinstance(value, str):
        if "{" in value or "}" in value:
            raise FamilyError(value)
        numbers += map(int, _NUMBER.findall(value))
        return _NUMBER.sub("\0", value)
    if type(value) is int and value >= 0:
        numbers.append(value)
        return int
    if isinstance(value, Mapping):
        if set(value) == {"at"}:
            raise FamilyError("at")
        return tuple((key, _shape(item, numbers)) for key, item in value.items())
    if isinstance(value, (list, tuple)):
        return [_shape(item, numbers) for item in value]
    return (type(value), value)


def _template(value: Entry, slots: Iterator[tuple[int, int]]) -> Entry:
    if isinstance(value, str):

        def replaced(match: re.Match[str]) -> str:
            slope, offset = next(slots)
            return f"{{{_text(slope, offset)}}}" if slope else match.group()

        return _NUMBER.sub(replaced, value)
    if type(value) is int and value >= 0:
        slope, offset = next(slots)
        return {"at": _text(slope, offset)} if slope else value
    if isinstance(value, Mapping):
        return {key: _template(item, slots) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_template(item, slots) for item in value]
    return value


def _text(slope: int, offset: int) -> str:
    """`k`, `k-1`, `2k+1`."""
    return f"{'' if slope == 1 else slope}k{f'{offset:+d}' if offset else ''}"


def _at(template: Entry, k: int) -> Entry:
    """The entry of a value of the index."""
    if isinstance(template, str):
        return _SLOT.sub(lambda m: str(_number(m, k)), template)
    if isinstance(template, Mapping):
        if set(template) == {"at"} and isinstance(template["at"], str) and (m := _AT.fullmatch(template["at"])):
            return _number(m, k)
        return {key: _at(item, k) for key, item in template.items()}
    if isinstance(template, list):
        return [_at(item, k) for item in template]
    return template


def _number(match: re.Match[str], k: int) -> int:
    slope, offset = match.groups()
    if len(slope) > 15 or len(offset or "") > 16:
        raise FamilyError(f"the number {match.group():.40} is too long")
    return int(slope or 1) * k + int(offset or 0)
