"""What a solver knows of the place where its run is kept: it hands its state out between iterations, and takes it back.

In: a solver's state, plain data with tensors and arrays. Out: the state to go on from, and whether to stop. Invariant:
a solver that is given a state does what it would have done had it never stopped, bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

Wait = Callable[[Callable[[], object]], object]
"""Makes a call and gives back what it gives."""


class Keeper(Protocol):
    """Keeps a run."""

    @property
    def state(self) -> Mapping[str, Any] | None:
        """What the run goes on from; None where it begins."""

    @property
    def rows(self) -> list[Mapping[str, Any]]:
        """Rows of the history so far, those before the run was resumed included."""

    @property
    def stopped(self) -> bool:
        """Whether the run is to end before its next iteration."""

    def between(self, moment: int, state: Callable[[], Mapping[str, Any]]) -> None:
        """Called between two iterations.

        Args:
            moment: number of iterations made.
            state: gives what the run needs to go on from here; it may be called later, but before the next iteration
                changes anything.
        """

    def at_once(self, call: str) -> AbstractContextManager[Wait]:
        """Around a call of another library that cannot be stopped half-way: a request to stop ends it at once.

        Args:
            call: what it is called in sentences.

        Returns:
            what makes the call, so that signals are heard meanwhile.
        """


class Unkept:
    """Keeps nothing, and never stops a run."""

    state = None
    stopped = False

    def __init__(self) -> None:
        self.rows: list[Mapping[str, Any]] = []

    def between(self, moment: int, state: Callable[[], Mapping[str, Any]]) -> None:
        """Nothing is kept."""

    def at_once(self, call: str) -> AbstractContextManager[Wait]:
        """Nothing stops it."""
        return nullcontext(lambda made: made())
