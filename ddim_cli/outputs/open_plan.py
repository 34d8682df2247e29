"""The plan of rows that come one by one: items.jsonl grows at its end, a batch at a time.

A row's line is there before its picture is. What a killed process leaves is a line without a picture, or one that is
cut off: so run.json says, from before the first line on, that the plan is ``open``, which is to say that a row without
a picture was promised to nobody. Once the rows have ended, and all have their pictures, the plan is closed as that of
a job file is.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np

from ddim_cli.config.job_file import folded
from ddim_cli.outputs.atomic import append, cut_torn_line, locked
from ddim_cli.outputs.files import here
from ddim_cli.outputs.folder import RUN_SCHEMA, OutputFolder
from ddim_cli.outputs.row_plan import OPEN, Line, RowPlan, is_of_rows, is_open, parsed, text_of
from ddim_cli.outputs.sidecar import utc_now

# Of hashes that are not sorted in yet, so many at least.
FEWEST_NEW = 4096


class Hashes:
    """A set of texts, of which it keeps 64 bits each: of a million texts, two are taken for one in 1 of 10^7 runs."""

    def __init__(self) -> None:
        self._sorted = np.empty(0, np.int64)
        self._new: set[int] = set()

    def add(self, text: str | bytes) -> None:
        self._new.add(hash(text))
        if len(self._new) >= max(FEWEST_NEW, len(self._sorted) // 4):
            self._sorted = np.union1d(self._sorted, np.fromiter(self._new, np.int64, len(self._new)))
            self._new.clear()

    def __contains__(self, text: str | bytes) -> bool:
        wanted = hash(text)
        place = int(np.searchsorted(self._sorted, wanted))
        return wanted in self._new or (place < len(self._sorted) and int(self._sorted[place]) == wanted)


class OpenPlan:
    """The plan in a folder while rows come; made by `opened`. ``record`` is that of their run."""

    def __init__(self, folder: OutputFolder, record: Mapping[str, Any]):
        self._folder, self._record, self._rows, self._items = folder, record, RowPlan(folder), here(folder.items)
        self._names, self._lines = Hashes(), Hashes()
        # The file that is known, and how much of it: other processes may add lines, or replace it.
        self._inode, self._size = 0, 0

    def begin(self) -> None:
        """Read the plan that is there; one of other settings, of which nothing came, is removed. Raises OSError."""
        before = self._folder.read_manifest() or {}
        if is_of_rows(before) and self._folder.is_planned_by(before, self._record):
            cut_torn_line(self._items)
        else:
            self._folder.items.unlink(missing_ok=True)
            self._write_manifest(None)
        self.catch_up()

    def has(self, name: str) -> bool:
        """Whether a row is planned that has this name, or one that some file systems take for it."""
        return folded(name) in self._names

    def find(self, name: str) -> Line | None:
        """The planned row of this name, or of one that some file systems take for it; reads the whole plan."""
        return next((line for line in self._rows if folded(line["name"]) == folded(name)), None)

    def add(self, lines: Iterable[Line]) -> None:
        """Plan these rows; a row of the same name goes. Raises OSError."""
        with locked(self._folder.manifest):
            cut_torn_line(self._items)
            self.catch_up()
            texts = {line["name"]: (line, text) for line in lines if (text := text_of(line)) not in self._lines}
            if not texts:
                return
            before = self._folder.read_manifest()
            if not is_open(before) or "totals" in (before or {}):
                # First: no line is to be there without it.
                self._write_manifest(before)
            if any(map(self.has, texts)):
                self._rows.write([line for line, _ in texts.values()], self._rows, texts.__contains__)
            else:
                append(self._items, b"".join(text for _, text in texts.values()), self._folder.fsync)
            self.catch_up()

    def close(self, made: int, seconds: float, grid: bool) -> int:
        """The rows have ended: write totals and contact sheet where all have their pictures.

        Returns how many have none, which other processes are making, or were before they were killed. Raises OSError,
        and RunError for a picture that is damaged.
        """
        version = self._rows.version
        left = sum(not self._folder.sidecar(line["name"]).exists() for line in self._rows)
        if not left:
            self._rows.finish(made, seconds, grid, version)
        return left

    def _write_manifest(self, before: Mapping[str, Any] | None) -> None:
        count, created = len(self._rows), (before or {}).get("created")
        counts = {"items": count, "images": count, OPEN: True}
        self._folder.write_manifest(
            {"schema": RUN_SCHEMA, **counts, "created": created or utc_now(), **self._record, **self._folder.output}
        )

    def catch_up(self) -> None:
        """Take in the lines that are new since it was last read. Raises OSError."""
        try:
            facts = self._items.stat()
        except FileNotFoundError:
            self._names, self._lines, self._inode, self._size = Hashes(), Hashes(), 0, 0
            return
        if facts.st_ino != self._inode or facts.st_size < self._size:
            self._names, self._lines, self._size = Hashes(), Hashes(), 0
        self._inode = facts.st_ino
        if facts.st_size > self._size:
            with self._folder.items.open("rb") as stream:
                stream.seek(self._size)
                self._take_in(stream)

    def _take_in(self, texts: Iterable[bytes]) -> None:
        for text in texts:
            # What is cut off is to be read again, once it is whole.
            self._size += len(text) if text.endswith(b"\n") else 0
            line = parsed(text)
            if line is not None:
                self._names.add(folded(line["name"]))
                self._lines.add(text)


@contextlib.contextmanager
def opened(folder: OutputFolder, record: Mapping[str, Any]) -> Iterator[OpenPlan]:
    """The folder's plan, for rows to be added to. As `RowPlan.claimed` otherwise, whose errors it raises."""
    plan = OpenPlan(folder, record)
    # Before the lock, for which other processes may wait.
    plan.catch_up()
    with folder.held(record, plan.begin):
        folder.remove_leftovers(plan.has)
        yield plan
