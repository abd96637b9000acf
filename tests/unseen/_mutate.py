"""Slips of the hand and bad disks: small changes to bytes, to plain data and to tables of numbers."""

from __future__ import annotations

import copy
import random
from typing import Any

VALUES: tuple[Any, ...] = (
    None, True, False, -1, 0, 1, 2, 3, 7, 10**6, 10**12, 2**31, 2**63, 10**30, 10**120, -(10**12), 0.5, -0.5, 1e-320,
    1e300, float("inf"), float("-inf"), float("nan"), "", " ", "x", "ß", "a" * 300, "\u202e", "\ud800", "1", "1e3",
    "auto", "..", "../x", "/", "a\nb", "%s", "{}", "null", "kind", [], {}, [[]], [None], [1, "a"], {"kind": "sgd"},
    {"kind": None}, {"": 1}, {"kind": "x" * 50}, [1] * 300, {"a": {"b": {"c": 1}}},
)  # fmt: skip
CELLS = (
    "",
    " ",
    "x",
    "nan",
    "inf",
    "-inf",
    "1e400",
    "1e-400",
    "1,5",
    "1.5.2",
    "0x10",
    "1_0",
    "'1'",
    '"1',
    '"1\n2"',
    "١",
    "-",
)


def of_bytes(data: bytes, rng: random.Random) -> bytes:
    """One to three changes to bytes."""
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        data = _damaged(data, rng)
    return data


def _damaged(data: bytes, rng: random.Random) -> bytes:
    a, b = sorted(rng.randrange(len(data) + 1) for _ in range(2))
    kind = rng.randrange(14)
    if kind == 0 and data:  # one bit
        at = rng.randrange(len(data))
        return data[:at] + bytes([data[at] ^ (1 << rng.randrange(8))]) + data[at + 1 :]
    if kind == 1:
        return data[:a]
    if kind == 2:
        return data[:a] + data[min(b, a + 20) :]
    if kind == 3:
        return data[:b] + data[a:b] + data[b:]
    if kind == 4:
        return (
            data[:a] + rng.choice([b"\0", b"\xff\xfe", b"\xe9", b"\xef\xbb\xbf", b"\r", b"\t", b"\x1b[2J"]) + data[a:]
        )
    if kind == 5:
        return rng.choice([b"\xef\xbb\xbf", b"\xff\xfe", b"\0\0\0\0", b"%YAML 1.1\n---\n", b"#"]) + data
    if kind == 6:
        return data.replace(b"\n", b"\r\n")
    if kind == 7:
        return data.replace(b" ", b"\t", 1)
    if kind == 8:
        lines = data.splitlines(keepends=True)
        rng.shuffle(lines)
        return b"".join(lines)
    if kind == 9:
        return data[:a] + rng.choice([b"[", b"{", b'{"a":', b"- ", b"&a [*a", b"("]) * rng.choice([1, 3000]) + data[a:]
    if kind == 10:
        return data[:a] + rng.choice([b"9", b"-", b"1e", b"0x", b".", b"_"]) * rng.choice([1, 6000]) + data[a:]
    if kind == 11:
        lines = data.splitlines(keepends=True)
        at = rng.randrange(len(lines) + 1)
        return b"".join(lines[:at] + lines[at : at + 1] + lines[at:])
    if kind == 12:
        lines = data.splitlines(keepends=True)
        at = rng.randrange(len(lines) + 1)
        return b"".join(lines[:at] + lines[at + 1 :])
    return data.replace(b":", rng.choice([b"", b"=", b": &x ", b": *x", b": !!python/name:os ", b": |"]), 1)


def of_data(value: Any, rng: random.Random) -> Any:
    """One to three changes to plain data."""
    value = copy.deepcopy(value)
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        value = _changed(value, rng)
    return value


def _changed(value: Any, rng: random.Random) -> Any:
    places = list(_places(value))
    if not places or rng.random() < 0.01:
        return rng.choice(VALUES)
    holder, key = rng.choice(places)
    old, kind = holder[key], rng.randrange(9)
    if kind <= 2:
        holder[key] = copy.deepcopy(rng.choice(VALUES))
    elif kind == 3 and isinstance(holder, dict):
        new = rng.choice([key[:-1], key + "s", key.upper(), "", "kind", "\ud800", key[::-1]]) if key else "x"
        holder[new] = holder.pop(key)
    elif kind == 4:
        del holder[key]
    elif kind == 5:
        holder[key] = [old] if rng.random() < 0.5 else {"a": old}
    elif kind == 6:
        other, at = rng.choice(places)
        holder[key] = copy.deepcopy(other[at])
    elif kind == 7 and isinstance(old, (int, float)) and not isinstance(old, bool):
        holder[key] = rng.choice([-old, old * 1e6, old * 1000, str(old), old + 0.5, 1 - old, old * 10**9])
    elif isinstance(old, list):
        holder[key] = rng.choice([old[:1], old[::-1], old + old, old * 50, old[0] if old else 0])
    else:
        deep: Any = old
        for _ in range(rng.choice([2, 70, 400])):
            deep = [deep]
        holder[key] = deep
    return value


def _places(value: Any) -> Any:
    inner = (
        list(value.items()) if isinstance(value, dict) else list(enumerate(value)) if isinstance(value, list) else []
    )
    for key, item in inner:
        yield value, key
        yield from _places(item)


def of_table(rng: random.Random) -> bytes:
    """A CSV file of time, angle and torque, changed in shape, scale, cells or bytes."""
    count, scale = rng.choice([0, 1, 2, 3, 30]), rng.choice([1.0, 1e-300, 1e300, 1e30, 1e-12])
    table = [["t", "angle", "torque"]]
    table += [[str(0.1 * i), str(scale * rng.gauss(0, 1)), str(rng.random())] for i in range(count)]
    for _ in range(rng.choice([0, 1, 1, 2])):
        if not table:
            break
        row, column = rng.randrange(len(table)), rng.randrange(3)
        kind = rng.randrange(8)
        if kind == 0 and column < len(table[row]):
            table[row][column] = rng.choice(CELLS)
        elif kind == 1:
            table[row] = table[row][:column]
        elif kind == 2:
            table[row] = table[row] + ["1"]
        elif kind == 3:
            table = [
                [rng.choice(["", "nan"]) if j == column and i else c for j, c in enumerate(r)]
                for i, r in enumerate(table)
            ]
        elif kind == 4:
            table[0] = rng.choice([["t", "angle", "angle"], ["t", "torque", "Angle"], [" t", '"angle"', "torque "], []])
        elif kind == 5:
            table.append(list(rng.choice(table)))
        elif kind == 6:
            table = table[:1] + table[:0:-1]
        else:
            table = table[1:]
    separator = rng.choice([","] * 8 + [";", "\t", ", ", " "])
    data = "\n".join(separator.join(row) for row in table).encode() + b"\n"
    return of_bytes(data, rng) if rng.random() < 0.4 else data
