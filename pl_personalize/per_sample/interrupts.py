"""Ctrl-C at moments at which nothing is half done."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType
from typing import Any, Self


class InterruptsHeld:
    """A context in which Ctrl-C waits, so that what was begun is finished or put back; then it counts as always.

    Where a ``KeyboardInterrupt`` may be raised meanwhile, :meth:`let_through` says. In other threads than the main
    one, and where something other than Python handles the signal, there is nothing to hold.
    """

    def __init__(self) -> None:
        self._handler: Any = None
        self._waiting = False

    def __enter__(self) -> Self:
        # No generator: the signal may come when a context is left, before a line of its own has run.
        if threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGINT) is not None:
            self._handler = signal.signal(signal.SIGINT, self._wait)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._restore()

    def let_through(self) -> LetThrough:
        """A context in which Ctrl-C counts at once, also one that came before."""
        return LetThrough(self)

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


class LetThrough:
    """See :meth:`InterruptsHeld.let_through`."""

    def __init__(self, held: InterruptsHeld) -> None:
        self._held = held

    def __enter__(self) -> None:
        self._held._restore()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._held._hold()
