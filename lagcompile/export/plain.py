"""Plain values that JSON has no word for: numbers that are not finite, and PyTorch's names for types and places.

In: a value, or data of a file. Out: data such as `{"dtype": "float32"}`, or the value. Invariant: a name is looked up
in a table; what is not there is refused.
"""

from __future__ import annotations

import keyword
import math
import re
from collections.abc import Mapping
from typing import Any

import torch

from lagcompile.ir.base import DataError

_TYPES = {"dtype": torch.dtype, "device": torch.device, "layout": torch.layout, "memory_format": torch.memory_format}
_DEVICE = re.compile(r"(cpu|cuda|mps|xpu|meta)(:\d{1,3})?", re.ASCII)
_TABLE: Mapping[str, Mapping[str, Any]] = {
    "float": {"inf": math.inf, "-inf": -math.inf, "nan": math.nan},
    **{
        key: {str(v).removeprefix("torch."): v for v in vars(torch).values() if isinstance(v, kind)}
        for key, kind in _TYPES.items()
    },
}
_RESERVED = frozenset({"torch", "device", "inf", "nan", "NoneType", "getattr", "fx_pytree", "pytree"})
_IDENTIFIER = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,499}", re.ASCII)


def hold(holds: bool, problem: str) -> None:
    """Refuse what a file says.

    Raises:
        DataError: it does not hold.
    """
    if not holds:
        raise DataError(problem)


def is_name(name: object) -> bool:
    """Return whether a value may have a name: an identifier without a meaning in Python or generated code."""
    if not isinstance(name, str) or not _IDENTIFIER.fullmatch(name) or name.startswith("__"):
        return False
    return not keyword.iskeyword(name) and name not in _RESERVED


def is_path(name: object) -> bool:
    """Return whether a tensor may have a name: parts between dots that a module can have and code can quote."""
    if not isinstance(name, str) or len(name) > 2000:
        return False
    return all(
        p and p.isprintable() and not set(p) & set("\"'\\{}") and not p.startswith("__") for p in name.split(".")
    )


def written(value: Any) -> Any:
    """Return the data of a plain value.

    Raises:
        TypeError: it is not a plain value.
    """
    if isinstance(value, float) and not math.isfinite(value):
        return {"float": str(value)}
    if value is None or type(value) in (bool, int, float, str):
        return value
    for key, kind in _TYPES.items():
        if isinstance(value, kind):
            return {key: str(value).removeprefix("torch.")}
    raise TypeError(f"{value!r:.80} of type {type(value).__qualname__}")


def read(data: Any) -> Any:
    """Return the plain value of data.

    Raises:
        DataError: there is none.
    """
    if not isinstance(data, dict):
        hold(data is None or type(data) in (bool, int, float, str), f"not a plain value: {data!r:.80}")
        return data
    hold(len(data) == 1, f"not a plain value: {data!r:.80}")
    ((key, name),) = data.items()
    found = _TABLE.get(key, {}).get(name) if isinstance(name, str) else None
    if key == "device" and isinstance(name, str) and _DEVICE.fullmatch(name):
        found = torch.device(name)
    hold(found is not None, f"there is no {key!r:.30} {name!r:.30}")
    return found


def nested(value: Any) -> Any:
    """Data of plain values in lists and mappings."""
    if isinstance(value, Mapping):
        return {str(k): nested(v) for k, v in value.items()}
    return [nested(v) for v in value] if isinstance(value, list | tuple) else written(value)


def unnested(data: Any) -> Any:
    """Plain values in lists and mappings, from data."""
    if isinstance(data, dict) and data.keys() != {"float"}:
        return {k: unnested(v) for k, v in data.items()}
    return [unnested(v) for v in data] if isinstance(data, list) else read(data)
