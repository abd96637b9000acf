"""Do two runs agree? Up to rounding, and as much rounding as this very model amplifies.

In: `Outcome`s of a model and of what was made of it. Out: `Gap`: how far they are apart, and what differs, in words.
Invariant: structure, shapes, types, devices, whole numbers, buffers' names and random numbers must be equal; NaN equals
NaN only; a gradient that is missing where the model has one is a difference at any scale.

Numbers may differ by a few units in the last place, relative to the largest of their tensor. Where they differ by more,
the model itself is run again with weights and inputs moved in their last place: what that moves is rounding.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lagcompile.frontend.tensors import identical
from lagcompile.frontend.trials import Call, Known, Outcome, Trial, run

UNITS = 8
"""Units in the last place that any two runs may differ by."""
REPEATED = 1e-3
"""What a run may differ from its repetition: kernels that add in another order each time."""
NOISE = 32
"""Times the model's own answer to rounding."""


@dataclass(frozen=True)
class Gap:
    """How far two runs are apart.

    Attributes:
        outputs: largest difference of outputs, relative to their size; 0 where they are bit-equal.
        slopes: the same of gradients.
        buffers: the same buffers changed, to the same values.
        random: the random generators were left in the same state.
        problems: what differs by more than rounding.
    """

    outputs: float
    slopes: float
    buffers: bool
    random: bool
    problems: tuple[str, ...]


def gap(expected: Outcome, got: Outcome, moved: Callable[[], Outcome]) -> Gap:
    """Compare a run with the model's own.

    Args:
        expected: the model's.
        got: of what was made of it.
        moved: gives the model's own with weights and inputs moved in their last place.
    """
    problems: list[str] = []
    if got.structure != expected.structure or not _equal(expected.values, got.values):
        problems.append("the output has another structure, or holds other values that are not tensors")
    random = got.drawn == expected.drawn
    if not random:
        python = got.drawn[-2:] != expected.drawn[-2:]
        own = " (the forward draws from Python's random module or from NumPy, whose numbers a graph would freeze)"
        problems.append(f"random numbers are drawn differently{own if python else ''}")
    worst = {"output": 0.0, "buffer": 0.0, "gradient": 0.0}
    noise: Outcome | None = None
    for name, value in expected.numbers.items():
        kind = name.split()[0]
        other = got.numbers.get(name)
        off = distance(value, other)
        worst[kind] = max(worst[kind], off)
        if off <= UNITS * _eps(value):
            continue
        if noise is None and off < float("inf"):
            noise = moved()
        if noise is None or off > NOISE * distance(value, noise.numbers.get(name)) + UNITS * _eps(value):
            problems.append(f"{name} {_said(value, other, off)}{_where(expected, name)}")
    new = [n for n in got.numbers if n not in expected.numbers]
    problems += [f"{n} is there in the graph only" for n in new]
    buffers = not any(p.startswith("buffer") for p in problems)
    return Gap(worst["output"], worst["gradient"], buffers, random, tuple(problems))


def rounded(model: nn.Module, call: Call, trial: Trial, expected: Outcome, known: Known | None = None) -> Outcome:
    """The model's own run with weights and inputs moved in their last place.

    The run itself where it is not the same when it is repeated: then what moves is not rounding.
    """
    again = run(model, call, trial, known=known)
    if any(distance(value, again.numbers.get(name)) > REPEATED for name, value in expected.numbers.items()):
        return expected
    return run(model, call, trial, rounding=True, known=known)


def distance(a: Tensor | None, b: Tensor | None) -> float:
    """Largest difference over the largest number; infinite where NaN, shape, type or presence differ."""
    if a is None or b is None:
        there = b if a is None else a
        return 0.0 if there is None or not bool(there.any()) else float("inf")
    if a.shape != b.shape or a.dtype != b.dtype or a.device != b.device:
        return float("inf")
    if identical(a, b):
        return 0.0
    if not (a.is_floating_point() or a.is_complex()):
        return float("inf")
    wide = torch.complex128 if a.is_complex() else torch.float64
    x, y = a.to(wide), b.to(wide)
    known = x.isfinite() & y.isfinite()
    if not bool((known | (x == y) | (x.isnan() & y.isnan())).all()):
        return float("inf")
    x, y = x[known], y[known]
    return float((x - y).abs().max()) / max(float(x.abs().max()), float(y.abs().max()))


def _eps(value: Tensor | None) -> float:
    real = value is not None and (value.is_floating_point() or value.is_complex())
    return torch.finfo(value.dtype).eps if real and value is not None else 0.0


def _said(a: Tensor | None, b: Tensor | None, off: float) -> str:
    if b is None:
        return "is lost"
    if a is None:
        return "is there in the graph, not in the model"
    if a.shape != b.shape:
        return f"has the shape {tuple(b.shape)} instead of {tuple(a.shape)}"
    if a.dtype != b.dtype or a.device != b.device:
        return f"is {b.dtype} on {b.device} instead of {a.dtype} on {a.device}"
    return "differs" if off == float("inf") else f"is off by {off:.1e} of its size"


def _where(expected: Outcome, name: str) -> str:
    if name.endswith(" call") and expected.attributes:
        return (
            f": the forward changes the attribute {', '.join(expected.attributes[:3])}, and its result depends on it "
            "(make it a buffer)"
        )
    return ""


def _equal(a: tuple[object, ...], b: tuple[object, ...]) -> bool:
    """Return whether leaves that are not tensors are of one type and equal, NaN to NaN."""
    return len(a) == len(b) and all(type(x) is type(y) and _are_equal(x, y) for x, y in zip(a, b, strict=True))


def _are_equal(x: object, y: object) -> bool:
    try:
        return x is y or bool(x == y) or bool(x != x and y != y)
    except Exception:  # NumPy's arrays do not say
        return False
