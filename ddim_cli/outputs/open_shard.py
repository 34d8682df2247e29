"""A tar shard while it is written.

Members are appended to a hidden file beside it, the spool, which becomes the tar when all are there. A spool that a
killed process left is gone on with: a tar says itself how far it is whole.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any, BinaryIO, cast

from ddim_cli.outputs.atomic import atomic_file, claimed_file, flush_folder, write_atomically
from ddim_cli.outputs.files import Place, forget, read_range, size_of, sizes_in
from ddim_cli.outputs.shards import (
    INDEX,
    TAR,
    Entry,
    Index,
    index_name,
    member,
    pairs_in,
    read_index,
    shard_name,
    shard_number,
    trailer,
)

SPOOL = ".spool"
# Members that wait for one that comes before them in the plan; beyond this they are put in order in the end.
MOST_WAITING = 256

# Tells of the sidecar of a pair that was found whether the picture is one of this run.
IsOurs = Callable[[Mapping[str, Any]], bool]


def spool_path(folder: Path, number: int) -> Path:
    return folder / f".{shard_name(number)}{SPOOL}"


def laid_out(
    key: str, ending: str, picture: bytes, sidecar: bytes, pixels_sha256: str, start: int
) -> tuple[bytes, Entry]:
    """The members of a pair, and where they lie in a tar whose byte ``start`` they begin at."""
    head, *content = member(key + ending, picture)
    offset = start + len(head)
    head_of_sidecar, *more = member(f"{key}.json", sidecar)
    json_offset = offset + sum(map(len, content)) + len(head_of_sidecar)
    data = b"".join((head, *content, head_of_sidecar, *more))
    return data, Entry(key, offset, len(picture), json_offset, len(sidecar), pixels_sha256)


def found_in(stream: BinaryIO, ending: str, is_ours: IsOurs) -> Iterator[Entry]:
    """The pairs of a spool from its beginning, as far as they are whole, and of this run."""
    try:
        for pair in pairs_in(stream):
            sidecar = json.loads(pair.sidecar)
            if pair.ending != ending or sidecar["image"]["bytes"] != len(pair.picture) or not is_ours(sidecar):
                return
            sha256 = sidecar["image"]["pixels_sha256"]
            sizes = (pair.offset, len(pair.picture), pair.json_offset, len(pair.sidecar))
            yield Entry(pair.key, *sizes, sha256)
    except (ValueError, KeyError, TypeError, RecursionError, OSError):
        # What is torn is made anew.
        return


def is_whole(tar: Place, index: Index) -> bool:
    """Whether a tar is there, as long as its index says."""
    try:
        return size_of(tar) == index.length
    except FileNotFoundError:
        return False


class OpenShard:
    """Shard ``number`` of the ``folder``, for the pictures of these ``keys``; not for several threads at once.

    What is there of it already is taken over: from a spool, and from a tar that was whole when the plan was shorter.
    Raises OSError.
    """

    def __init__(self, folder: Place, number: int, keys: Sequence[str], ending: str, fsync: bool, is_ours: IsOurs):
        self._folder, self.number, self._keys, self._ending, self._fsync = folder, number, keys, ending, fsync
        self._entries: dict[str, Entry] = {}
        self._waiting: dict[str, tuple[bytes, bytes, str]] = {}
        self._next, self._end = 0, 0
        self._spool_path: Path | None = None
        self._spool = self._open_spool()
        self._take_over_spool(is_ours)
        self._take_over_tar()

    def _open_spool(self) -> BinaryIO:
        if isinstance(self._folder, Path):
            path = spool_path(self._folder, self.number)
            held = claimed_file(path)
            if held is not None:
                self._spool_path = path
                return held
        # Another process is at the same shard, or a store keeps nothing half done.
        return self._unnamed()

    def _unnamed(self) -> BinaryIO:
        """A file that goes with the process; beside the shard, so that there is room for it."""
        beside = self._folder if isinstance(self._folder, Path) else None
        return cast(BinaryIO, TemporaryFile(dir=beside))

    def _take_over_spool(self, is_ours: IsOurs) -> None:
        wanted = set(self._keys)
        if self._spool_path is not None:
            self._spool.seek(0)
            for entry in found_in(self._spool, self._ending, is_ours):
                if entry.key not in wanted:
                    break
                self._entries[entry.key] = entry
                self._end = entry.end
        self._spool.seek(self._end)
        self._spool.truncate()
        self._skip()

    def _take_over_tar(self) -> None:
        index = read_index(self._folder, self.number)
        tar, wanted = self._folder / shard_name(self.number), set(self._keys)
        if index is None or index.ending != self._ending or not is_whole(tar, index):
            return
        for entry in index.entries:
            if entry.key in wanted and entry.key not in self._entries:
                picture = read_range(tar, entry.offset, entry.offset + entry.bytes)
                sidecar = read_range(tar, entry.json_offset, entry.json_offset + entry.json_bytes)
                self.add(entry.key, picture, sidecar, entry.pixels_sha256)

    def _skip(self) -> None:
        """Go to the first key, in the order of the plan, that is not written."""
        while self._next < len(self._keys) and self._keys[self._next] in self._entries:
            self._next += 1

    @property
    def is_complete(self) -> bool:
        return self.images == len(self._keys)

    @property
    def images(self) -> int:
        """How many pictures there are of it."""
        return len(self._entries) + len(self._waiting)

    def add(self, key: str, picture: bytes, sidecar: bytes, pixels_sha256: str) -> None:
        """Append a pair, unless it is there. Raises OSError."""
        if key in self._entries or key in self._waiting:
            return
        self._waiting[key] = picture, sidecar, pixels_sha256
        while self._next < len(self._keys) and self._keys[self._next] in self._waiting:
            self._append(self._keys[self._next])
            self._skip()
        if len(self._waiting) >= MOST_WAITING:
            self._append_all()

    def _append_all(self) -> None:
        for key in list(self._waiting):
            self._append(key)
        self._skip()

    def _append(self, key: str) -> None:
        data, entry = laid_out(key, self._ending, *self._waiting[key], self._end)
        self._spool.write(data)
        del self._waiting[key]
        self._entries[key], self._end = entry, entry.end

    def keep(self) -> None:
        """Leave what there is for the process that goes on with it. Raises OSError."""
        self._append_all()
        self._spool.close()

    def close(self) -> None:
        """Put the shard, which is complete, into its place: index and tar. Raises OSError."""
        self._append_all()
        entries = [self._entries[key] for key in self._keys]
        spool, path = self._spool, self._spool_path
        if any(before.end > after.offset for before, after in pairwise(entries)):
            spool, path = self._unnamed(), None
            entries = self._put_in_order(entries, spool)
        length = entries[-1].end
        spool.write(trailer(length))
        index = Index(self.number, spool.tell(), self._ending, entries)
        self._publish(spool, path, index)
        if spool is not self._spool:
            spool.close()
        if path is None and self._spool_path is not None:
            self._spool_path.unlink(missing_ok=True)
        self._spool.close()

    def _put_in_order(self, entries: Sequence[Entry], to: BinaryIO) -> list[Entry]:
        """Copy the members into another file, in the order of ``entries``; where they lie there."""
        found, end = [], 0
        for entry in entries:
            self._spool.seek(entry.offset)
            picture = self._spool.read(entry.bytes)
            self._spool.seek(entry.json_offset)
            sidecar = self._spool.read(entry.json_bytes)
            data, moved = laid_out(entry.key, self._ending, picture, sidecar, entry.pixels_sha256, end)
            to.write(data)
            found.append(moved)
            end = moved.end
        return found

    def _publish(self, spool: BinaryIO, path: Path | None, index: Index) -> None:
        """``path`` is the spool's, where it has a name and can become the tar."""
        spool.flush()
        folder, number = self._folder, self.number
        if not isinstance(folder, Path):
            # The index last: with it, others take the shard for whole.
            spool.seek(0)
            (folder / shard_name(number)).upload(spool, index.length)
            (folder / index_name(number)).write_bytes(index.encoded())
            forget()
            return
        # The index first: were the process killed between the two, the spool would still be there, whole.
        write_atomically(folder / index_name(number), index.encoded(), self._fsync)
        if path is None:
            spool.seek(0)
            with atomic_file(folder / shard_name(number), self._fsync) as stream:
                shutil.copyfileobj(spool, stream, 1 << 20)
            return
        if self._fsync:
            os.fsync(spool.fileno())
        os.replace(path, folder / shard_name(number))
        if self._fsync:
            flush_folder(folder)


def remove_shard(folder: Place, number: int) -> None:
    """Remove a shard and what there is of it: its index first, with which it would be taken for whole."""
    (folder / index_name(number)).unlink(missing_ok=True)
    (folder / shard_name(number)).unlink(missing_ok=True)
    if isinstance(folder, Path):
        spool_path(folder, number).unlink(missing_ok=True)


def shards_in(folder: Place) -> list[int]:
    """The numbers of the shards of which there is a tar, an index or a spool."""
    numbers = set()
    for name in sizes_in(folder):
        stem, dot, ending = name.removeprefix(".").removesuffix(SPOOL).partition(".")
        if dot + ending in (TAR, INDEX):
            numbers.add(shard_number(stem + TAR))
    return sorted(number for number in numbers if number is not None)
