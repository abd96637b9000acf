"""The state of a fit as plain data: every attribute of the iteration, by name.

In: objects that hold tensors, numbers, lists and other such objects. Out: nested mappings, and the same objects again.
Invariant: what was taken shares no memory with the iteration, which changes its tensors in place.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor


@dataclass
class Trace:
    """Numbers and parameters along a run.

    Attributes:
        rows: one mapping for each iteration.
        theta: parameters (starts, p) after each iteration.
    """

    rows: list[Mapping[str, float]] = field(default_factory=list)
    theta: list[Tensor] = field(default_factory=list)


def taken(value: Any, names: Iterable[str] | None = None) -> Any:
    """Return a value as plain data; of an object all attributes, or those named."""
    if isinstance(value, Tensor):
        return value.clone()
    if isinstance(value, list | tuple):
        return [taken(v) for v in value]
    if value is None or isinstance(value, bool | int | float | str | Mapping):
        return value
    return {name: taken(getattr(value, name)) for name in (vars(value) if names is None else names)}


def given(like: Any, state: Any) -> Any:
    """Return what was taken, as objects of the classes that stand in `like` where the run begins."""
    if isinstance(like, tuple):
        return tuple(given(a, b) for a, b in zip(like, state, strict=True))
    if isinstance(like, Tensor | list) or not hasattr(like, "__dict__"):
        return state
    made = copy.copy(like)
    for name, value in state.items():
        object.__setattr__(made, name, given(getattr(made, name), value))  # frozen records are made anew, too
    return made
