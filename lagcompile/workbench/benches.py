"""The benches of the tables: a data set, its network, and where each kind of system cuts it.

In: nothing. Out: `Bench`es. Invariant: what is said here is the same for every system.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, TypeVar

from lagcompile.ir.base import SpecError

Where = Literal["last", "ahead", "behind"]
"""last: after the activation before the output layer. ahead: before every activation (pre-activation codes).
behind: after every activation."""


class _HasName(Protocol):
    @property
    def name(self) -> str: ...


_Named = TypeVar("_Named", bound=_HasName)


@dataclass(frozen=True)
class Bench:
    """One data set with its network and where each kind of system cuts it."""

    name: str
    model: Mapping[str, Any]
    data: Mapping[str, Any]
    splits: Mapping[Where, tuple[str, ...]]
    batch_size: int = 64
    ceilings: Mapping[str, float] = field(default_factory=dict)
    """Spec key -> largest value that a search draws, where its span begins below (ProxProp's rate is larger)."""
    decay: float = 0.0
    """Share of itself that a weight loses in each move at full step size, in every system alike."""
    published: Mapping[str, tuple[float, float | None]] = field(default_factory=dict)
    """System -> accuracy and final defect of the DistProp paper's table."""


BENCHES: tuple[Bench, ...] = (
    Bench(
        "digits",
        {"name": "digits_convnet"},
        {"name": "digits"},
        {
            "last": ("relu3",),
            "ahead": ("conv1", "conv2", "fc1"),
            "behind": ("relu1", "pool", "relu3"),
        },
    ),
    Bench(
        "mnist",
        {"name": "mnist_convnet_small"},
        {"name": "mnist"},
        {
            "last": ("relu3",),
            "ahead": ("pool1", "pool2", "fc1"),
            "behind": ("relu1", "relu2", "relu3"),
        },
        batch_size=128,
        published={
            "backprop": (0.9881, 0.0),
            "regularized": (0.9627, 0.1),
            "gda": (0.9743, 7.2e-4),
            "extraprop": (0.9827, 4.5e-6),
            "distprop": (0.9903, 2.6e-3),
        },
    ),
    Bench(
        "cifar10",
        {"name": "lenet5"},
        {"name": "cifar10"},
        {
            "last": ("relu4",),
            "ahead": ("conv1", "conv2", "fc1", "fc2"),
            "behind": ("pool1", "pool2", "relu3", "relu4"),
        },
        batch_size=32,
        # Above it the short runs of a search do well and full runs overfit: backprop at 3.7e-3 is better than at 1e-3
        # after 2,500 steps, and three points worse after 20,000; ExtraProp at 2e-3 loses four points meanwhile.
        ceilings={"method.weights.lr": 1e-3},
        # On the validation split after 20,000 steps, one seed: backprop 65.9 % at 1e-4, 64.7 at 3e-4, at 0 64.7 at its
        # best step; DistProp 66.1, 65.8, and 63.9 at 0.
        decay=1e-4,
        published={
            "backprop": (0.6309, 0.0),
            "regularized": (0.1726, None),
            "gda": (0.1611, 8.598e-4),
            "extraprop": (0.5833, None),
            "distprop": (0.6540, 0.07447),
        },
    ),
)


def named(kind: str, entries: Sequence[_Named], name: str) -> _Named:
    """Return the entry of that name.

    Raises:
        SpecError: there is none.
    """
    found = next((entry for entry in entries if entry.name == name), None)
    if found is None:
        raise SpecError(f"there is no {kind} '{name}' (there are: {', '.join(entry.name for entry in entries)})")
    return found


def bench_of(name: str) -> Bench:
    """Return a bench by its name.

    Raises:
        SpecError: there is none of that name.
    """
    return named("bench", BENCHES, name)
