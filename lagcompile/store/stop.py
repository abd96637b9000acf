"""Requests to stop a run: from Ctrl-C, a scheduler's SIGTERM, a terminal that closes.

In: signals. Out: `Stop`. Invariant: a request takes effect between two steps; a second Ctrl-C takes effect at once.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class StoppedError(Exception):
    """Raised between two steps where a stop was asked for."""


class Stop:
    """Whether a stop was asked for, and by which signal."""

    def __init__(self) -> None:
        self.asked, self.signal = False, int(signal.SIGINT)

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
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def ask(number: int, frame: FrameType | None) -> None:
            if self.asked and number == signal.SIGINT:
                raise KeyboardInterrupt
            self.asked, self.signal = True, number

        before = {s: signal.getsignal(s) for s in SIGNALS}
        heard = {s: h for s, h in before.items() if h not in (signal.SIG_IGN, None)}
        try:
            for number in heard:
                signal.signal(number, ask)
            yield
        finally:
            for number, handler in heard.items():
                signal.signal(number, handler)
