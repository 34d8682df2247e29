"""Job files: a row is a picture.

A file is checked whole when it is read, and kept as its bytes: a row is parsed again when it is asked for. So a million
rows take the size of their file, and some 40 bytes each. Needs no torch.
"""

from __future__ import annotations

import json
import operator
import os
import sys
import unicodedata
import zlib
from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from ddim_cli.config.rows import (
    JSON,
    KEYS,
    Format,
    Row,
    RowError,
    as_number,
    format_by_content,
    format_by_ending,
    number_name,
)
from ddim_cli.config.seeds import MAX_SEED
from ddim_cli.errors import ConfigError, UsageError

STDIN = "-"
MOST_PROBLEMS = 10
_MARK = b"\xef\xbb\xbf"


class Names:
    """Finds rows by their names: kept are hashes, 17 bytes a row."""

    def __init__(self) -> None:
        self._hashes, self._named = array("q"), array("q")
        self._unnamed = bytearray()
        # Rows whose names could be those of rows without one.
        self._numbers = array("q")

    def add(self, name: str | None) -> None:
        """The name of the next row."""
        number = len(self._unnamed)
        self._unnamed.append(name is None)
        if name is not None:
            self._hashes.append(_hash(name))
            self._named.append(number)
            if as_number(name) is not None:
                self._numbers.append(number)

    def sort(self) -> None:
        """To be called once, when all are there."""
        hashes = np.frombuffer(self._hashes, np.int64)
        order = np.argsort(hashes, kind="stable")
        self._hashes = array("q", hashes[order].tobytes())
        self._named = array("q", np.frombuffer(self._named, np.int64)[order].tobytes())

    def candidates(self, name: str) -> Iterator[int]:
        """The rows that may have this name, or one that some file systems take for it."""
        number = as_number(name)
        if number is not None and number < len(self._unnamed) and self._unnamed[number]:
            yield number
        hashes, wanted = np.frombuffer(self._hashes, np.int64), _hash(name)
        for place in range(int(np.searchsorted(hashes, wanted)), len(hashes)):
            if hashes[place] != wanted:
                return
            yield self._named[place]

    def suspects(self) -> Iterator[int]:
        """The rows for which `candidates` of their name are more than one, the row that comes last of each."""
        hashes = np.frombuffer(self._hashes, np.int64)
        for place in np.flatnonzero(hashes[1:] == hashes[:-1]).tolist():
            yield self._named[place + 1]
        yield from self._numbers


def folded(name: str) -> str:
    """What two names share that some file systems take for one."""
    return name.casefold() if name.isascii() else unicodedata.normalize("NFC", name).casefold()


def _hash(name: str) -> int:
    return hash(folded(name))


@dataclass(frozen=True, eq=False)
class JobFile:
    """A job file that was checked; see `read_job_file` and `job_of`.

    ``label`` is what messages call it, ``stem`` what its folder is named after, ``folder`` where its paths lead from.
    ``kinds`` has for each combination of keys, as one truth value for each of `KEYS`, the first row that says just
    these; ``highest_class`` is the row with the highest class, ``dotted`` the first whose name has a dot.
    """

    label: str
    stem: str
    folder: Path
    kinds: Mapping[tuple[bool, ...], int]
    highest_class: int | None
    dotted: int | None
    _content: bytes = field(repr=False)
    _format: Format = field(repr=False)
    _starts: array[int] = field(repr=False)
    _lines: array[int] = field(repr=False)
    _names: Names = field(repr=False)

    def __len__(self) -> int:
        return len(self._starts)

    def __getitem__(self, number: int) -> Row:
        """Row ``number``, from 0."""
        end = self._starts[number + 1] if number + 1 < len(self) else len(self._content)
        return self._format.row(self._content[self._starts[number] : end])

    def where(self, number: int) -> str:
        """What messages call a row: FILE:LINE, or of a list NAME[NUMBER]."""
        return f"{self.label}:{self._lines[number]}" if self._lines else f"{self.label}[{number}]"

    def name(self, number: int) -> str:
        return name_of(self[number], number)

    def find(self, name: str) -> int | None:
        """The number of the row of this name."""
        return next((number for number in self._names.candidates(name) if self.name(number) == name), None)

    def first(self, *said: str, without: Sequence[str] = ()) -> int | None:
        """The first row that says all keys of ``said``, and none of ``without``."""
        wanted = {**dict.fromkeys(said, True), **dict.fromkeys(without, False)}
        found = (
            number
            for kind, number in self.kinds.items()
            if all(kind[KEYS.index(key)] is is_said for key, is_said in wanted.items())
        )
        return min(found, default=None)

    def doubles(self) -> Iterator[tuple[int, int]]:
        """Rows of one name, or of names that differ in case alone: the later and the earlier one."""
        for number in self._names.suspects():
            name = self.name(number)
            others = (n for n in self._names.candidates(name) if n < number)
            others = (n for n in others if folded(self.name(n)) == folded(name))
            if (other := min(others, default=None)) is not None:
                yield number, other


def name_of(row: Row, number: int) -> str:
    return row.name if row.name is not None else number_name(number)


def seed_of(row: Row, number: int, first: int) -> int | None:
    """The seed of a row: its own, else ``first`` plus its number, or plus the CRC-32 of its name, if it has one.

    So what rows with names are does not depend on their places. None for a latent without a seed.
    """
    if row.seed is not None or row.latent is not None:
        return row.seed
    return (first + (number if row.name is None else zlib.crc32(row.name.encode()))) % (MAX_SEED + 1)


def read_job_file(path: Path) -> JobFile:
    """Read a job file, "-" for stdin, and check it whole.

    Its format is told by the ending of its name, that of stdin and of a pipe by what it holds.

    Raises:
        ConfigError: for a file that is not there or cannot be read, holds no rows, or has wrong ones; a line for each
            of the first ten, with file and line.
    """
    label = "stdin" if str(path) == STDIN else str(path)
    try:
        content = sys.stdin.buffer.read() if str(path) == STDIN else path.read_bytes()
        is_file = str(path) != STDIN and path.is_file()
    except OSError as error:
        raise ConfigError(f"--items {label}: cannot be read: {error.strerror}") from None
    start = len(_MARK) if content.startswith(_MARK) else 0
    try:
        form = format_by_ending(path.suffix, content, start) if is_file else format_by_content(content, start)
    except RowError as error:
        raise ConfigError(f"{label}:1: {error}") from None
    return _checked(label, path.stem if is_file else "items", path.parent if is_file else Path(), content, start, form)


def job_of(items: Sequence[Mapping[str, Any]], folder: Path = Path(), label: str = "items") -> JobFile:
    """The job of rows that a Python program gives, checked; their paths lead from ``folder``.

    ``label`` is what messages call them. Raises UsageError for what are no mappings, and ConfigError.
    """
    lines = []
    for number, item in enumerate(items):
        if not isinstance(item, Mapping):
            raise UsageError(f"{label}[{number}] is a {type(item).__name__}; a row is a mapping")
        try:
            lines.append(json.dumps(dict(item), default=_plain))
        except (TypeError, ValueError) as error:
            raise UsageError(f"{label}[{number}]: {error}") from None
    return _checked(label, "items", folder, "\n".join(lines).encode(), 0, JSON, has_lines=False)


def _plain(value: Any) -> Any:
    """A path as its text, and numbers of other kinds, such as numpy's, as numbers."""
    return os.fspath(value) if isinstance(value, os.PathLike) else operator.index(value)


def _checked(
    label: str, stem: str, folder: Path, content: bytes, start: int, form: Format, has_lines: bool = True
) -> JobFile:
    starts, lines, names = array("q"), array("q"), Names()
    kinds: dict[tuple[bool, ...], int] = {}
    highest: tuple[int, int] | None = None
    dotted: int | None = None
    problems: list[str] = []
    for position, line, row in form.rows(content, start):
        number = len(starts)
        if isinstance(row, RowError):
            problems.append(f"{label}:{line}: {row}" if has_lines else f"{label}[{number}]: {row}")
            if row.ends or len(problems) == MOST_PROBLEMS:
                break
            row = Row()
        starts.append(position)
        lines.append(line)
        names.add(row.name)
        kinds.setdefault((*[value is not None for value in row],), number)
        if row.class_number is not None and (highest is None or row.class_number > highest[0]):
            highest = row.class_number, number
        if dotted is None and row.name is not None and "." in row.name:
            dotted = number
    if problems:
        raise ConfigError(*problems)
    if not starts:
        raise ConfigError(f"{label}: holds no rows")
    names.sort()
    last = highest[1] if highest is not None else None
    places = lines if has_lines else array("q")
    job = JobFile(label, stem, folder, kinds, last, dotted, content, form, starts, places, names)
    doubles = [_double(job, *pair) for pair in islice(job.doubles(), MOST_PROBLEMS)]
    if doubles:
        raise ConfigError(*doubles)
    return job


def _double(job: JobFile, number: int, other: int) -> str:
    name, before = job.name(number), job.name(other)
    but = "" if name == before else f", but for the case of its letters ({before!r})"
    return f"{job.where(number)}: the name {name!r} is that of {job.where(other)} already{but}"
