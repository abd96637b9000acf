"""Arguments of the public functions, checked where they are given.

In: a name, a value, what it should be. Out: nothing, or one `SpecError` that says so. Invariant: None is left to the
function's own default.
"""

from __future__ import annotations

import math

import torch

from lagcompile.ir.base import LARGEST_INTEGER, SpecError


def expect(name: str, value: object, kind: type | tuple[type, ...], words: str) -> None:
    """Refuse a value of any other type.

    Raises:
        SpecError: the value is neither None nor of one of the types.
    """
    if value is not None and not isinstance(value, kind):
        raise SpecError(f"{name} takes {words}, got {_shown(value)}")


def expect_functions(**given: object) -> None:
    """Refuse what cannot be called.

    Raises:
        SpecError: one of the values is neither None nor a function.
    """
    for name, value in given.items():
        if value is not None and not callable(value):
            raise SpecError(f"{name} takes a function, got {_shown(value)}")


def expect_count(name: str, value: object, least: int) -> None:
    """Refuse anything but an integer of at least `least` that fits 64 bits.

    Raises:
        SpecError: it is none.
    """
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= LARGEST_INTEGER:
        raise SpecError(f"{name} takes an integer of at least {least}, got {_shown(value)}")


def expect_positive(name: str, value: object) -> None:
    """Refuse anything but a positive finite number.

    Raises:
        SpecError: it is none.
    """
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not 0 < float(str(value)) < math.inf:
        raise SpecError(f"{name} takes a positive number, got {_shown(value)}")


def loss_name(value: object) -> str:
    """Return the name of a loss.

    Raises:
        SpecError: it cannot be called.
    """
    if not callable(value):
        raise SpecError(f"loss takes a function of (output, target), got {_shown(value)}")
    return str(getattr(value, "__name__", type(value).__name__))


def device_of(value: object) -> torch.device:
    """Return a device from its name.

    Raises:
        SpecError: it is not the name of a device.
    """
    try:
        found: torch.device = torch.device(value)  # type: ignore[call-overload]
        return found
    except (RuntimeError, TypeError, ValueError):
        raise SpecError(f"device takes a name such as 'cpu' or 'cuda:0', got {_shown(value)}") from None


def _shown(value: object) -> str:
    plain = isinstance(value, (str, int, float, bool)) or value is None
    return repr(value)[:60] if plain else f"an object of type {type(value).__name__}"
