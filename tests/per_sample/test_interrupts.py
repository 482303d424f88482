"""Ctrl-C waits where it is held, counts where it is let through, and is never lost."""

# ruff: noqa: PT012 (what is reached before the interrupt counts is what is tested)

import signal
import threading

import pytest

from pl_personalize.per_sample.interrupts import InterruptsHeld


@pytest.fixture(autouse=True)
def handler():
    """Python's own, whoever runs the tests."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield signal.default_int_handler
    signal.signal(signal.SIGINT, before)


def interrupt():
    signal.raise_signal(signal.SIGINT)


def test_an_interrupt_waits_until_the_end(handler):
    reached = []
    with pytest.raises(KeyboardInterrupt), InterruptsHeld():
        interrupt()
        reached.append("the end")
    assert reached == ["the end"]
    assert signal.getsignal(signal.SIGINT) is handler


def test_an_interrupt_that_waits_is_let_through():
    reached = []
    with pytest.raises(KeyboardInterrupt), InterruptsHeld() as held:
        interrupt()
        with held.let_through():
            reached.append("inside")
    assert reached == []


def test_what_is_let_through_counts_at_once_and_then_no_more(handler):
    reached = []
    with pytest.raises(KeyboardInterrupt), InterruptsHeld() as held:
        with held.let_through():
            reached.append("inside")
        interrupt()
        reached.append("after")
        with held.let_through():
            interrupt()
            reached.append("never")
    assert reached == ["inside", "after"]
    assert signal.getsignal(signal.SIGINT) is handler


def test_nested_ones_hand_it_on():
    reached = []
    with pytest.raises(KeyboardInterrupt), InterruptsHeld():
        with InterruptsHeld():
            interrupt()
        reached.append("outer")
    assert reached == ["outer"]


def test_a_handler_of_the_users_own_gets_the_signal():
    calls = []
    signal.signal(signal.SIGINT, lambda *args: calls.append(args))
    with InterruptsHeld():
        interrupt()
        assert calls == []
    assert len(calls) == 1


def test_other_threads_are_left_alone(handler):
    seen = []

    def work():
        with InterruptsHeld() as held, held.let_through():
            seen.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [handler]
