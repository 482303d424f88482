"""Deferral of Ctrl-C to moments at which nothing is half done."""

from __future__ import annotations

import signal
import threading
from contextlib import ExitStack
from types import FrameType
from typing import Any, Self


class InterruptsHeld:
    """Context that defers Ctrl-C until its end, so that the work inside is finished or undone first.

    :meth:`let_through` lets it raise ``KeyboardInterrupt`` in between. Does nothing outside of the main thread, or if
    the signal is not handled by Python.
    """

    def __init__(self) -> None:
        self._handler: Any = None
        self._waiting = False

    def __enter__(self) -> Self:
        # Not a generator: the signal may come on exit, before a line of the generator has run.
        if threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGINT) is not None:
            self._handler = signal.signal(signal.SIGINT, self._wait)
        return self

    def __exit__(self, *error: object) -> None:
        self._restore()

    def let_through(self) -> ExitStack:
        """A context in which Ctrl-C takes effect at once, including one that came before."""
        stack = ExitStack()
        stack.callback(self._hold)
        self._restore()
        return stack

    def _wait(self, number: int, frame: FrameType | None) -> None:
        self._waiting = True

    def _restore(self) -> None:
        if self._handler is None:
            return
        signal.signal(signal.SIGINT, self._handler)
        if self._waiting:
            self._waiting = False
            signal.raise_signal(signal.SIGINT)

    def _hold(self) -> None:
        if self._handler is not None:
            signal.signal(signal.SIGINT, self._wait)
