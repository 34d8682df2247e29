"""Files that a user names for what a command writes: ``--plot``, ``--npz``, ``report -o`` and their like.

One rule for all of them. What is no regular file (a device, a FIFO, /dev/stdout) is opened and written to. A link is
followed: what it leads to is replaced in one step, and the link stays. A regular file is replaced only if this tool
has made one of the same kind there, or with ``--overwrite``.

That a file is of our making is told from the file itself, never from its name: each kind has a mark of its own, which
no other program writes. A plot says what made it in PNG's own field for that, an array in the comment of its archive;
both are gone once another program has saved the file anew. A page says it in its head, where it stays if somebody
edits the page, which is made from its folder and not kept by hand. A config is there to be edited: a mark would
outlive what its owner writes, so that one that is there is never taken for ours.
"""

from __future__ import annotations

import contextlib
import os
import stat
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from ddim_cli.errors import RunError, UsageError
from ddim_cli.outputs.atomic import atomic_file

# A mark that has to be near a file's beginning is within so many bytes.
_HEAD = 4096
_PNG = b"\x89PNG\r\n\x1a\n"
_MOST_LINKS = 40


@dataclass(frozen=True)
class Kind:
    """A kind of file that this tool writes: its name, as in "no page of ddim report", and whether a file is one."""

    name: str
    has_mark: Callable[[Path], bool]

    def is_ours(self, path: Path) -> bool:
        """Whether the file is of this kind; False for one that cannot be read."""
        try:
            return self.has_mark(path)
        except Exception:
            # It is damaged in a way of its own: then it cannot be told.
            return False

    @classmethod
    def of_text(cls, name: str, mark: bytes) -> Kind:
        """A text that has ``mark`` near its beginning."""
        return cls(name, lambda path: mark in _head(path))

    @classmethod
    def of_png(cls, name: str, software: str) -> Kind:
        """A PNG whose field ``Software`` is ``software``; whatever saves a picture anew replaces that."""
        field = b"tEXtSoftware\0" + software.encode("ascii")
        return cls(name, lambda path: (head := _head(path)).startswith(_PNG) and field in head)

    @classmethod
    def of_archive(cls, name: str, comment: bytes) -> Kind:
        """A ZIP, as an .npz is, with this comment of the archive; whatever saves arrays anew drops that."""
        return cls(name, lambda path: _comment(path) == comment)


def _head(path: Path) -> bytes:
    with path.open("rb") as stream:
        return stream.read(_HEAD)


def _comment(path: Path) -> bytes | None:
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.comment
    except zipfile.BadZipFile:
        return None


@dataclass(frozen=True)
class NamedFile:
    """A file that may be written; made by `name_file`. As a text it is its path."""

    path: Path
    kind: Kind | None
    option: str
    overwrite: bool
    remedy: str

    def __str__(self) -> str:
        return str(self.path)

    @property
    def _label(self) -> str:
        return f"{self.option} {self.path}" if self.option else str(self.path)

    @property
    def is_regular(self) -> bool:
        """Whether a file is made or replaced, and not one that is opened and written to, such as a FIFO."""
        return not _is_opened(self.path)

    def check(self) -> None:
        """Raise UsageError for what is a folder, has none, or is not to be replaced."""
        try:
            self._check()
        except OSError as error:
            raise UsageError(f"{self._label}: cannot be written: {error.strerror or error}") from None

    def _check(self) -> None:
        descriptor = _descriptor(self.path)
        if descriptor is not None:
            os.fstat(descriptor)
        if _is_opened(self.path):
            return
        if self.path.is_dir():
            raise UsageError(f"{self._label}: is a folder; name a file")
        target = _target(self.path)
        if not target.parent.is_dir():
            raise UsageError(f"{self._label}: there is no folder {target.parent}")
        if not os.access(target.parent, os.W_OK | os.X_OK):
            raise UsageError(f"{self._label}: the folder {target.parent} cannot be written to")
        if os.path.lexists(target) and not self.overwrite and not (self.kind and self.kind.is_ours(target)):
            what = f", and is no {self.kind.name}" if self.kind is not None else " already"
            raise UsageError(f"{self._label}: is there{what}; name another file, or {self.remedy}")

    @contextlib.contextmanager
    def open(self, fsync: bool = False) -> Iterator[BinaryIO]:
        """A stream to what the name leads to; a regular file appears there when the block ends, or not at all.

        ``fsync`` as of `atomic_file`. Raises UsageError as `check`, for what has come there since, and RunError where
        it cannot be written.
        """
        self.check()
        target = _target(self.path)
        try:
            with _opened(self.path) if _is_opened(self.path) else atomic_file(target, fsync) as stream:
                yield stream
        except OSError as error:
            if error.filename not in (None, str(self.path), str(target)):
                raise
            raise RunError(f"{self._label}: cannot be written: {error.strerror or error}") from None

    def write(self, data: bytes, fsync: bool = False) -> None:
        with self.open(fsync) as stream:
            stream.write(data)


def name_file(
    path: Path,
    kind: Kind | None,
    option: str = "",
    overwrite: bool = False,
    remedy: str = "replace it with --overwrite",
) -> NamedFile:
    """A file that a user names, to be written later; what is wrong with it is said now, before any work.

    Args:
        path: what the user typed.
        kind: of the file that will be written; one of the same kind that is there is replaced. None: of a kind that
            cannot be told.
        option: how it was named, for messages: ``--plot``.
        overwrite: replace a file of any kind.
        remedy: what a user can do, beside naming another file, about one that is there.

    Raises:
        UsageError: for a folder, for a file in no folder or in one that cannot be written to, and for a regular file
            that is not of our making, unless ``overwrite``.
    """
    named = NamedFile(path, kind, option, overwrite, remedy)
    named.check()
    return named


def _descriptor(path: Path) -> int | None:
    """Which of this process's open files the path stands for, such as /dev/stdout for 1; None if it is none."""
    for _ in range(_MOST_LINKS):
        folder = os.path.realpath(path.parent)
        if path.name.isdecimal() and folder in ("/dev/fd", f"/proc/{os.getpid()}/fd"):
            return int(path.name)
        if not path.is_symlink():
            break
        path = Path(folder, os.readlink(path))
    return None


def _is_opened(path: Path) -> bool:
    """Whether the path is opened and written to, being no file to replace: a device, a FIFO, or an open file."""
    if _descriptor(path) is not None:
        return True
    try:
        mode = path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        return False
    return not (stat.S_ISREG(mode) or stat.S_ISDIR(mode))


def _opened(path: Path) -> BinaryIO:
    # Opening /dev/stdout anew would begin at the start of the file that it is sent to.
    descriptor = _descriptor(path)
    return path.open("wb") if descriptor is None else os.fdopen(os.dup(descriptor), "wb")


def _target(path: Path) -> Path:
    """What is replaced: where links lead, or the path as it was typed."""
    return Path(os.path.realpath(path)) if path.is_symlink() else path
