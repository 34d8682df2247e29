"""The plan of a job file's rows, items.jsonl beside run.json: a line a row, with its name and what decides its picture.

Plans of several job files add up, by name. A line is read when it is its turn: a plan of millions takes no memory.
Where rows come one by one the plan is open (see `open_plan`): a row whose picture is not there yet is not missing.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any

from ddim_cli.outputs.atomic import atomic_file, locked
from ddim_cli.outputs.contact_sheet import MOST_IMAGES
from ddim_cli.outputs.files import version_of
from ddim_cli.outputs.folder import RUN_SCHEMA, OutputFolder
from ddim_cli.outputs.sidecar import utc_now
from ddim_cli.stores.objects import StoreError

Line = Mapping[str, Any]
# Says of a name whether one of the rows at hand has it.
HasName = Callable[[str], bool]
OPEN = "open"


def is_of_rows(manifest: Mapping[str, Any] | None) -> bool:
    """Whether a run.json is that of a job file's rows."""
    return manifest is not None and manifest.get("schema") == RUN_SCHEMA and "items" in manifest


def is_open(manifest: Mapping[str, Any] | None) -> bool:
    """Whether a run.json is that of a plan whose rows still come, or came until a process was stopped."""
    return is_of_rows(manifest) and (manifest or {}).get(OPEN) is True


@dataclass(frozen=True)
class RowPlan:
    """The plan in a folder."""

    folder: OutputFolder

    def __len__(self) -> int:
        """How many lines there are."""
        try:
            with self.folder.items.open("rb") as stream:
                return sum(chunk.count(b"\n") for chunk in iter(lambda: stream.read(1 << 20), b""))
        except StoreError:
            raise
        except OSError:
            return 0

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """The lines; what is no line of ours, or one that is cut off, is left out."""
        try:
            stream = self.folder.items.open("rb")
        except StoreError:
            raise
        except OSError:
            return
        with stream:
            for text in stream:
                line = parsed(text)
                if line is not None:
                    yield line

    @property
    def version(self) -> object:
        """Another one after every change: the file is replaced, or grows."""
        return version_of(self.folder.items)

    def _begins_with(self, lines: Iterable[Line]) -> bool:
        there = iter(self)
        return all(next(there, None) == line for line in lines)

    @contextlib.contextmanager
    def claimed(
        self, lines: Iterable[Line], has_name: HasName, record: Mapping[str, Any], complete: bool
    ) -> Iterator[None]:
        """Write the plan: these ``lines``, and behind them those of plans before that have other names; and run.json.

        Otherwise as `OutputFolder.claimed`, whose errors it raises.
        """
        self.folder.remove_leftovers(has_name)
        # Before the lock, for which other processes may wait.
        version, planned = self.version, self._begins_with(lines)
        manifest = self.folder.read_manifest()
        if complete and planned and is_of_rows(manifest) and self.folder.is_planned_by(manifest, record):
            yield
            return

        def extend() -> None:
            before = self.folder.read_manifest() or {}
            kept = is_of_rows(before) and self.folder.is_planned_by(before, record)
            same = kept and planned and self.version == version
            count = len(self) if same else self.write(lines, self if kept else (), has_name)
            created = before.get("created") if kept else None
            counts = {"items": count, "images": count}
            # A process may be at work on the rows that come.
            still = {OPEN: True} if kept and is_open(before) else {}
            after = {
                "schema": RUN_SCHEMA,
                **counts,
                **still,
                "created": created or utc_now(),
                **record,
                **self.folder.output,
            }
            if complete and same and "totals" in before:
                after["totals"] = before["totals"]
            self.folder.write_manifest(after)

        with self.folder.held(record, extend):
            yield

    def write(self, lines: Iterable[Line], before: Iterable[Line], has_name: HasName) -> int:
        """Write these lines, and behind them those of ``before`` that have other names; how many. Raises OSError."""
        count = 0
        with atomic_file(self.folder.items, self.folder.fsync) as stream:
            for line in lines:
                stream.write(text_of(line))
                count += 1
            for line in before:
                if not has_name(line["name"]):
                    stream.write(text_of(line))
                    count += 1
        return count

    def finish(self, made: int, seconds: float, grid: bool, version: object) -> None:
        """Write the contact sheet of the first rows, and the totals into run.json.

        Not where the plan has changed since it was found complete in this ``version``, nor where nothing was ``made``
        and both are there already.
        """
        folder = self.folder
        if not made and folder.is_finished(grid):
            return
        with locked(folder.manifest):
            if self.version == version and (made or not folder.is_finished(grid)):
                first, count = [line["name"] for line in islice(self, MOST_IMAGES)], len(self)
                manifest = folder.read_manifest() or {}
                if manifest.pop(OPEN, None):
                    folder.write_manifest({**manifest, "items": count, "images": count})
                folder.write_totals(made, seconds, count, first if grid and first else None)


def text_of(line: Line) -> bytes:
    return json.dumps(line, ensure_ascii=False).encode() + b"\n"


def parsed(text: bytes) -> dict[str, Any] | None:
    """The line that this text with its end is; None for what is none."""
    if not text.endswith(b"\n"):
        return None
    try:
        line = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return line if isinstance(line, dict) and isinstance(line.get("name"), str) else None
