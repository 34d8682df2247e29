"""Ctrl-C and SIGTERM where they would do harm: there they wait.

Python raises KeyboardInterrupt between any two instructions of the main thread. If that has just taken a lock, and is
not yet in the block that gives it back, nobody ever does, and every thread that wants it waits for ever. So the main
thread takes locks that it shares with others within `uninterrupted`.
"""

from __future__ import annotations

import threading

# Of the main thread in such a block, in seconds: where there is nothing yet it sleeps again, and may be interrupted.
LONGEST_SLEEP = 0.5


class _State:
    """Of the main thread: how many blocks it is in, and whether an interrupt waits for their end."""

    depth = 0
    waiting = False


def interrupt() -> None:
    """What a handler of signals calls: raise KeyboardInterrupt, or have it wait for the end of `uninterrupted`."""
    if _State.depth:
        _State.waiting = True
    else:
        raise KeyboardInterrupt


# Classes, and no generators: one that is left in the middle of its end does the rest whenever it is cleared away.


class uninterrupted:  # noqa: N801
    """Within the block the main thread is not interrupted by `interrupt`, but at its end. Keep it short."""

    def __enter__(self) -> None:
        self._is_main = threading.current_thread() is threading.main_thread()
        if self._is_main:
            self._before = _State.depth
            _State.depth = self._before + 1

    def __exit__(self, *error: object) -> None:
        if self._is_main:
            _State.depth = self._before
            _raise_if_waiting()


class interrupted_again:  # noqa: N801
    """Within `uninterrupted`, what may last: it is interrupted as elsewhere, and the locks of the blocks around it are
    given back."""

    def __enter__(self) -> None:
        self._is_main = threading.current_thread() is threading.main_thread()
        if self._is_main:
            self._before = _State.depth
            _State.depth = 0
            _raise_if_waiting()

    def __exit__(self, *error: object) -> None:
        if self._is_main:
            _State.depth = self._before


def _raise_if_waiting() -> None:
    if _State.waiting and not _State.depth:
        _State.waiting = False
        raise KeyboardInterrupt
