"""Ctrl-C beside locks, at every instruction of what the main thread does there."""

import contextlib
import signal
import sys
import threading

import pytest

from ddim_cli.cli.signals import interruptible
from ddim_cli.interrupts import interrupted_again, uninterrupted
from ddim_cli.outputs.writer import BackgroundWriter
from ddim_cli.sampling.inbox import Inbox
from ddim_cli.sampling.resident import Answers

TRACED = ("ddim_cli", "threading", "contextlib")


def interrupt_at(number, function, *args):
    """Call it, and send the process a SIGINT at the instruction that is the ``number``-th. Whether it came so far."""
    count = 0

    def trace(frame, event, argument):
        nonlocal count
        frame.f_trace_opcodes = True
        if event == "opcode" and frame.f_globals.get("__name__", "").startswith(
            ("ddim_cli", "threading", "contextlib")
        ):
            count += 1
            if count == number:
                sys.settrace(None)
                frame.f_trace = None
                signal.raise_signal(signal.SIGINT)
                return None
        return trace

    before = sys.gettrace()
    with contextlib.suppress(KeyboardInterrupt), interruptible(lambda: None):
        sys.settrace(trace)
        try:
            function(*args)
        finally:
            sys.settrace(before)
    return count >= number


def is_free(lock):
    """Whether another thread can have it."""
    got = []
    thread = threading.Thread(target=lambda: got.append(lock.acquire(timeout=5)) or lock.release())
    thread.start()
    thread.join()
    return got == [True]


class Pipe:
    """A stream of lines that ends."""

    def __init__(self, lines):
        self._lines = list(lines)

    def read(self, size):
        return self._lines.pop(0) if self._lines else b""


@pytest.mark.parametrize("what", ["take", "ended", "expect", "awaits", "settle", "wait", "refuse"])
def test_no_lock_stays_taken_wherever_it_is_interrupted(what):
    inbox, answers = Inbox(Pipe([b"a\n"] * 2000), "pipe"), Answers(lambda answer: None)
    calls = {
        "take": (inbox.take,),
        "ended": (lambda: inbox.ended,),
        "expect": (answers.expect, "a"),
        "awaits": (answers.awaits, "a"),
        "settle": (answers.settle, "a"),
        "wait": (answers.wait, lambda: None),
        "refuse": (answers.refuse, {}, "no"),
    }
    lock = (inbox if what in ("take", "ended") else answers)._changed
    number = 1
    while interrupt_at(number, *calls[what]):
        assert is_free(lock), number
        answers.settle("a")
        number += 1
    assert number > 20


def test_what_is_written_is_written_wherever_it_is_interrupted(tmp_path):
    number, written = 1, []

    def write(of):
        with BackgroundWriter(tmp_path) as writer:
            writer.submit(written.append, of)

    while interrupt_at(number, write, number):
        number += 1
    assert number > 100


def interrupted(run):
    """Whether a KeyboardInterrupt comes out of it."""
    try:
        with interruptible(lambda: None):
            run()
    except KeyboardInterrupt:
        return True
    return False


def test_it_is_raised_at_the_end_of_the_outer_block():
    reached = []

    def run():
        with uninterrupted():
            with uninterrupted():
                signal.raise_signal(signal.SIGINT)
                reached.append("inner")
            reached.append("outer")
        reached.append("never")

    assert interrupted(run)
    assert reached == ["inner", "outer"]


@pytest.mark.parametrize("before", [True, False])
def test_what_may_last_is_interrupted(before):
    reached = []

    def run():
        with uninterrupted():
            if before:
                signal.raise_signal(signal.SIGINT)
            with interrupted_again():
                signal.raise_signal(signal.SIGTERM)
                reached.append("never")

    assert interrupted(run)
    assert reached == []
    # Nothing is left of it for the next.
    with uninterrupted():
        reached.append("now")
    assert reached == ["now"]


def test_another_thread_is_never_interrupted():
    found = []

    def in_thread():
        with uninterrupted(), interrupted_again():
            found.append(1)

    def run():
        with uninterrupted():
            signal.raise_signal(signal.SIGINT)
            thread = threading.Thread(target=in_thread)
            thread.start()
            thread.join()

    assert interrupted(run)
    assert found == [1]
