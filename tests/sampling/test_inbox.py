"""Lines from a pipe: which are lines, and how far ahead they are read."""

import io
import os
import threading
import time

import pytest

from ddim_cli.errors import RunError
from ddim_cli.sampling import inbox
from ddim_cli.sampling.inbox import Inbox


def lines(content: bytes) -> list[bytes | None]:
    box = Inbox(io.BytesIO(content), "stdin")
    found = []
    while (line := box.take()) is not None:
        found.append(line.data)
    assert box.ended
    return found


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", []),
        (b"\n \r\n", []),
        (b"a\nb\n", [b"a", b"b"]),
        (b"a\n\n  \nb", [b"a", b"b"]),
        (b"a\r\nb\r\n", [b"a\r", b"b\r"]),
        (b"\xef\xbb\xbfa\n\xef\xbb\xbfb", [b"a", b"\xef\xbb\xbfb"]),
        (b"\xef\xbb\xbfa", [b"a"]),
    ],
)
def test_what_is_a_line(content, expected):
    assert lines(content) == expected


@pytest.mark.parametrize("ends", [b"\n", b""])
def test_a_line_that_is_too_long_is_left_out(monkeypatch, ends):
    monkeypatch.setattr(inbox, "LONGEST_LINE", 10)
    monkeypatch.setattr(inbox, "_CHUNK", 4)
    assert lines(b"0123456789\n0123456789a\nb\n" + b"x" * 100 + ends) == [b"0123456789", None, b"b", None]


def test_a_line_is_there_before_the_next_is_written():
    """Also from a stream that buffers, and where a line comes in parts."""
    read, write = os.pipe()
    with os.fdopen(read, "rb") as stream, os.fdopen(write, "wb", buffering=0) as other:
        box = Inbox(stream, "stdin")
        other.write(b"a\nb")
        assert box.take().data == b"a"
        assert box.take(time.monotonic()) is None
        other.write(b"c\n")
        assert box.take().data == b"bc"
        assert not box.ended
        box.wake()
        assert box.take() is None
        assert not box.ended
        other.close()
        assert box.take() is None
        assert box.ended


class Endless(io.RawIOBase):
    """Counts the lines that were read."""

    read_so_far = 0

    def read(self, size=-1):
        self.read_so_far += 1
        return b"x\n"


def test_only_so_much_is_read_ahead(monkeypatch):
    monkeypatch.setattr(inbox, "MOST_LINES", 5)
    stream = Endless()
    box = Inbox(stream, "stdin")
    deadline = time.monotonic() + 30
    while stream.read_so_far < 6 and time.monotonic() < deadline:
        time.sleep(0.001)
    for _ in range(20):
        assert box.take().data == b"x"
    assert stream.read_so_far <= 20 + 6
    # The thread waits for ever, and holds up nothing.
    assert any(thread.name == "ddim-reader" and thread.daemon for thread in threading.enumerate())


def test_a_stream_that_cannot_be_read_is_told_behind_its_lines():
    class Broken(io.RawIOBase):
        given = False

        def read(self, size=-1):
            if self.given:
                raise OSError(5, "Input/output error")
            self.given = True
            return b"a\n"

    box = Inbox(Broken(), "a pipe")
    assert box.take().data == b"a"
    with pytest.raises(RunError, match="a pipe: cannot be read: Input/output error"):
        box.take()
