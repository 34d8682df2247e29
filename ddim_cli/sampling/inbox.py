"""Lines from a pipe as they come, read in a thread of its own. Needs no torch."""

from __future__ import annotations

import os
import threading
import time
from collections import deque
from collections.abc import Iterator
from typing import BinaryIO, NamedTuple

from ddim_cli.errors import RunError
from ddim_cli.interrupts import LONGEST_SLEEP, uninterrupted

# No row of ours is longer; a stream without line ends is not to fill the memory.
LONGEST_LINE = 2**20
# Bytes that are read ahead at most, and lines: enough for any batch. Then whoever writes has to wait.
MOST_BYTES, MOST_LINES = 2**24, 1024
_CHUNK = 2**16
_MARK = b"\xef\xbb\xbf"


class Line(NamedTuple):
    """A line that is not blank, without its end; ``data`` is None for one that is too long. ``came``: when it was there
    (`time.monotonic`)."""

    data: bytes | None
    came: float


class Inbox:
    """The lines of ``stream``, which messages call ``label``. A last line may lack its end."""

    def __init__(self, stream: BinaryIO, label: str):
        self._stream, self._label = stream, label
        self._changed = threading.Condition()
        self._lines: deque[Line] = deque()
        self._bytes = 0
        self._ended = self._woken = False
        self._failure: OSError | None = None
        # Nothing waits for it at the end of the process: it may be reading what never comes.
        threading.Thread(target=self._read, daemon=True, name="ddim-reader").start()

    def take(self, until: float | None = None) -> Line | None:
        """The next line; None where there is none ``until`` then (`time.monotonic`; by default however long it takes),
        behind the last one, and after `wake`. Raises RunError where the stream cannot be read."""
        while True:
            with uninterrupted(), self._changed:
                left = LONGEST_SLEEP if until is None else min(LONGEST_SLEEP, until - time.monotonic())
                if self._lines or self._ended or self._woken or left <= 0:
                    return self._taken()
                self._changed.wait(left)

    def _taken(self) -> Line | None:
        """As `take`, of what there is now; called with the lock."""
        self._woken = False
        if self._lines:
            line = self._lines.popleft()
            self._bytes -= len(line.data or b"")
            self._changed.notify_all()
            return line
        if self._failure is not None:
            raise RunError(f"{self._label}: cannot be read: {self._failure.strerror or self._failure}")
        return None

    @property
    def ended(self) -> bool:
        """Whether the last line has been taken."""
        with uninterrupted(), self._changed:
            return self._ended and not self._lines

    def wake(self) -> None:
        """Have `take` return, now or when it is next called."""
        with self._changed:
            self._woken = True
            self._changed.notify_all()

    def _read(self) -> None:
        try:
            for data in _lines(_chunks(self._stream)):
                self._put(Line(data, time.monotonic()))
        except OSError as error:
            self._failure = error
        finally:
            with self._changed:
                self._ended = True
                self._changed.notify_all()

    def _put(self, line: Line) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self._bytes < MOST_BYTES and len(self._lines) < MOST_LINES)
            self._lines.append(line)
            self._bytes += len(line.data or b"")
            self._changed.notify_all()


def _chunks(stream: BinaryIO) -> Iterator[bytes]:
    """What there is, when it is there: a buffered reader would wait for more, and keep its lock meanwhile."""
    try:
        descriptor = stream.fileno()
    except (OSError, AttributeError):
        yield from iter(lambda: stream.read(_CHUNK), b"")
        return
    yield from iter(lambda: os.read(descriptor, _CHUNK), b"")


def _lines(chunks: Iterator[bytes]) -> Iterator[bytes | None]:
    """The lines of these bytes that are not blank; None in place of one that is too long."""
    rest, too_long, first = b"", False, True
    for chunk in chunks:
        *whole, rest = (rest + chunk).split(b"\n")
        for line in whole:
            if first:
                line, first = line.removeprefix(_MARK), False
            if too_long or len(line) > LONGEST_LINE:
                yield None
            elif line and not line.isspace():
                yield line
            too_long = False
        if len(rest) > LONGEST_LINE:
            rest, too_long = b"", True
    if too_long or rest.strip():
        yield None if too_long else rest.removeprefix(_MARK) if first else rest
