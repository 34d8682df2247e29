"""Ctrl-C and SIGTERM: the first ends a command in good order, a second Ctrl-C ends it at once."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from types import FrameType

from ddim_cli.errors import InterruptedRunError
from ddim_cli.interrupts import interrupt


def options_of(arguments: Sequence[str]) -> Sequence[str]:
    """The arguments before ``--``, after which nothing is an option."""
    return arguments[: arguments.index("--")] if "--" in arguments else arguments


def asks_for_json(arguments: Sequence[str]) -> bool:
    """Whether ``--json`` is among the options."""
    return "--json" in options_of(arguments)


@contextlib.contextmanager
def ended_at_once(as_json: bool) -> Iterator[None]:
    """Within the block, in which nothing is at work yet, SIGINT or SIGTERM ends the process.

    Needs nothing that is loaded there. Signals that the process was started to ignore stay ignored.
    """

    def handle(number: int, frame: FrameType | None) -> None:
        code = InterruptedRunError.exit_code
        # Under torchrun rank 0 alone speaks.
        speaks = not os.environ.get("TORCHELASTIC_RUN_ID") or os.environ.get("RANK") == "0"
        with contextlib.suppress(OSError):
            os.write(2, b"interrupted\n")
            if as_json and speaks:
                os.write(1, f'{{"error": "interrupted", "exit_code": {code}}}\n'.encode())
        os._exit(code)

    with _handling(handle):
        yield


@contextlib.contextmanager
def _handling(handle: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """Within the block, ``handle`` answers SIGINT and SIGTERM, where they are not ignored."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    handled = [number for number, handler in before.items() if handler is not signal.SIG_IGN]
    for number in handled:
        signal.signal(number, handle)
    try:
        yield
    finally:
        for number in handled:
            signal.signal(number, before[number])


@contextlib.contextmanager
def interruptible(at_once: Callable[[], None]) -> Iterator[None]:
    """Within the block, the first SIGINT or SIGTERM raises KeyboardInterrupt; a SIGINT after it ends the process.

    A SIGTERM after the first is ignored: schedulers and torchrun send several. ``at_once`` is called before
    the end. Signals that the process was started to ignore stay ignored.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    stopping = False

    def handle(number: int, frame: FrameType | None) -> None:
        nonlocal stopping
        if not stopping:
            stopping = True
            interrupt()
            return
        if number == signal.SIGINT:
            at_once()
            # Files are renamed into place whole, so there is nothing to tidy up.
            os._exit(InterruptedRunError.exit_code)

    with _handling(handle):
        yield
