"""Ctrl-C at a chosen moment of a call: a real SIGINT, and yet the same moment each time."""

from __future__ import annotations

import gc
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import pl_personalize

# Where Python looks for signals: when one of its functions begins, and after a call of one in C.
_EVENTS = ("call", "c_return")
_OWN_FOLDER = str(Path(pl_personalize.__file__).parent)

Moment = Callable[[FrameType], bool]


def _frames(frame: FrameType | None) -> Iterator[FrameType]:
    while frame is not None:
        yield frame
        frame = frame.f_back


def _context_edge(frame: FrameType) -> tuple[str, str] | None:
    """The innermost `__enter__` or `__exit__` that runs, and the file of the context it belongs to."""
    for outer in _frames(frame):
        if outer.f_code.co_name in ("__enter__", "__exit__"):
            generator = getattr(outer.f_locals.get("self"), "gen", None)
            code = outer.f_code if generator is None else generator.gi_code
            return outer.f_code.co_name, code.co_filename
    return None


def during_the_pass(frame: FrameType) -> bool:
    """While batches are worked on, and no context is being entered or left."""
    names = {outer.f_code.co_name for outer in _frames(frame)}
    return bool(names & {"_sums_per_batch", "add"}) and not names & {"__enter__", "__exit__", "__del__", "__init__"}


def on_entering(frame: FrameType) -> bool:
    """While the package prepares the model."""
    edge = _context_edge(frame)
    return edge is not None and edge[0] == "__enter__" and edge[1].startswith(_OWN_FOLDER)


def on_leaving(frame: FrameType) -> bool:
    """While the package puts the model back."""
    edge = _context_edge(frame)
    return edge is not None and edge[0] == "__exit__" and edge[1].startswith(_OWN_FOLDER)


def on_swapping_parameters(frame: FrameType) -> bool:
    """While torch.func puts other tensors in the place of a model's parameters, or takes them out again."""
    edge = _context_edge(frame)
    return edge is not None and Path(edge[1]).name == "stateless.py"


@contextmanager
def _at_each_event(act: Callable[[FrameType], None]) -> Iterator[None]:
    def profile(frame: FrameType, event: str, arg: Any) -> None:
        if event in _EVENTS:
            act(frame)

    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    collects = gc.isenabled()
    gc.disable()  # what finalisers do would be counted, now here, now there
    try:
        sys.setprofile(profile)
        yield
    finally:
        sys.setprofile(None)
        signal.signal(signal.SIGINT, handler)
        if collects:
            gc.enable()


def count_moments(call: Callable[[], object], moment: Moment) -> list[int]:
    """The numbers of the events of a call at which ``moment`` holds."""
    found: list[int] = []
    number = 0

    def act(frame: FrameType) -> None:
        nonlocal number
        number += 1
        if moment(frame):
            found.append(number)

    with _at_each_event(act):
        call()
    return found


def interrupt(call: Callable[[], object], moment: Moment, number: int) -> bool:
    """Call, with a SIGINT at the first such moment from the given event on; whether there was one.

    Whether it ends the call is not said: Python loses an exception in a finaliser, whoever raised it.
    """
    seen, sent = 0, False

    def act(frame: FrameType) -> None:
        nonlocal seen, sent
        seen += 1
        if seen >= number and not sent and moment(frame):
            sent = True
            sys.setprofile(None)
            signal.raise_signal(signal.SIGINT)

    try:
        with _at_each_event(act):
            call()
    except KeyboardInterrupt:
        pass
    return sent
