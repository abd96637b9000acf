"""Requests to stop a run: from Ctrl-C, a scheduler's SIGTERM, a terminal that closes.

In: signals. Out: `Stop`. Invariant: a request takes effect between two steps; a second Ctrl-C, and any request during a
call that has no steps, takes effect at once.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import TypeVar

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


T = TypeVar("T")
ABANDONED: list[threading.Event] = []
"""Ends of calls of other libraries that nobody waits for any more: the calls end with the process."""


class StoppedError(Exception):
    """Raised between two steps where a stop was asked for."""


class Ended(KeyboardInterrupt):
    """Raised wherever the program is when a signal ends it at once.

    Attributes:
        number: of the signal.
        said: what the user reads.
    """

    def __init__(self, number: int, said: str = "") -> None:
        self.number = number
        self.said = said or ("interrupted" if number == signal.SIGINT else f"ended by {signal.Signals(number).name}")
        super().__init__(self.said)


def waited(call: Callable[[], T]) -> T:
    """What a call gives that does not look at signals: they end the waiting for it at once (in the main thread)."""
    if threading.current_thread() is not threading.main_thread():
        return call()
    given, raised, ended = list[T](), list[BaseException](), threading.Event()

    def run() -> None:
        try:
            given.append(call())
        except BaseException as error:  # raised again below, where it is expected
            raised.append(error)
        finally:
            ended.set()

    threading.Thread(target=run, daemon=True).start()
    try:
        while not ended.wait(0.1):
            pass
    except BaseException:
        ABANDONED.append(ended)
        raise
    if raised:
        raise raised[0]
    return given[0]


@contextmanager
def ending() -> Iterator[None]:
    """SIGTERM and SIGHUP raise `Ended` while the context lasts, as Ctrl-C does (in the main thread)."""

    def end(number: int, frame: FrameType | None) -> None:
        raise Ended(number)

    with _handled(end):
        yield


class Stop:
    """Whether a stop was asked for, and by which signal.

    Attributes:
        at_once: gives what is said where a signal ends everything at once; None where it waits for the end of a step.
    """

    def __init__(self) -> None:
        self.asked, self.signal = False, int(signal.SIGINT)
        self.at_once: Callable[[], str] | None = None

    @property
    def exit_status(self) -> int:
        """As shells count it: 130 after SIGINT, 143 after SIGTERM, 129 after SIGHUP."""
        return 128 + self.signal

    def check(self) -> None:
        """Stop here, where that was asked for.

        Raises:
            StoppedError: it was.
        """
        if self.asked:
            raise StoppedError

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Take signals as requests while the context lasts (in the main thread; elsewhere nothing is changed).

        A signal that the process ignores, as under `nohup`, stays ignored.
        """

        def ask(number: int, frame: FrameType | None) -> None:
            if self.at_once is not None:
                raise Ended(number, self.at_once())
            if self.asked and number == signal.SIGINT:
                raise Ended(number)
            self.asked, self.signal = True, number

        with _handled(ask):
            yield


@contextmanager
def _handled(handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {s: signal.getsignal(s) for s in SIGNALS}
    heard = {s: h for s, h in before.items() if h not in (signal.SIG_IGN, None)}
    try:
        for number in heard:
            signal.signal(number, handler)
        yield
    finally:
        for number, old in heard.items():
            signal.signal(number, old)
