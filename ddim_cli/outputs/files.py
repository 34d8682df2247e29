"""Where files lie: in a folder of this machine, in an object store, or inside a tar shard.

All three are named, opened and read alike. A member of a shard is named through its tar: ``out/000000.tar/000003.png``.
"""

from __future__ import annotations

import contextlib
import errno
import io
import os
from collections import Counter, OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path, PurePath
from tempfile import TemporaryFile
from threading import Lock
from typing import BinaryIO, Union

from ddim_cli.errors import UsageError
from ddim_cli.outputs.shards import TAR, Entry, Index, read_index, shard_number
from ddim_cli.stores.objects import ObjectPath, StoreError, is_url, open_url

# A folder, or a file that is no member of a shard.
Place = Union[Path, ObjectPath]  # noqa: UP007  # read at run time, where ObjectPath is quoted
File = Union[Path, ObjectPath, "Member"]

# Of a shard in an object store so many members are fetched one by one; then it is fetched whole.
FEW = 4
KEPT = 2


@dataclass(frozen=True)
class Member:
    """A picture in a shard, or its sidecar (``is_sidecar``); named and read as a path is."""

    tar: Place
    entry: Entry
    ending: str
    is_sidecar: bool = False

    def __str__(self) -> str:
        return f"{self.tar}/{self.name}"

    @property
    def name(self) -> str:
        return self.stem + self.suffix

    @property
    def stem(self) -> str:
        return self.entry.key

    @property
    def suffix(self) -> str:
        return ".json" if self.is_sidecar else self.ending

    @property
    def parent(self) -> Place:
        return self.tar

    def with_suffix(self, suffix: str) -> Member | Path:
        """The picture or the sidecar of the same key; of another ending a path where nothing is."""
        if suffix in (".json", self.ending):
            return Member(self.tar, self.entry, self.ending, suffix == ".json")
        return Path(str(self.tar), self.stem + suffix)

    def exists(self) -> bool:
        return True

    def is_file(self) -> bool:
        return True

    def is_dir(self) -> bool:
        return False

    def size(self) -> int:
        return self.entry.json_bytes if self.is_sidecar else self.entry.bytes

    def read_bytes(self) -> bytes:
        """Raises OSError where the tar is gone, or ends too soon."""
        start = self.entry.json_offset if self.is_sidecar else self.entry.offset
        data = read_range(self.tar, start, start + self.size())
        if len(data) < self.size():
            raise OSError(errno.EIO, "the tar ends before it does", str(self))
        return data

    def open(self, mode: str = "rb") -> BinaryIO:
        return io.BytesIO(self.read_bytes())


class _Fetched:
    """The shards of object stores that were read last, as files of this machine without names."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._asked: Counter[ObjectPath] = Counter()
        self._files: OrderedDict[ObjectPath, BinaryIO] = OrderedDict()

    def read(self, tar: ObjectPath, start: int, stop: int) -> bytes:
        with self._lock:
            self._asked[tar] += 1
            if self._asked[tar] > FEW and tar not in self._files:
                self._fetch(tar)
            if tar in self._files:
                self._files.move_to_end(tar)
                self._files[tar].seek(start)
                return self._files[tar].read(stop - start)
        return tar.read_range(start, stop)

    def forget(self) -> None:
        with self._lock:
            for file in self._files.values():
                file.close()
            self._files.clear()
            self._asked.clear()

    def _fetch(self, tar: ObjectPath) -> None:
        while len(self._files) >= KEPT:
            old, file = self._files.popitem(last=False)
            file.close()
            del self._asked[old]
        file = TemporaryFile()  # noqa: SIM115  # closed when others have taken its place
        tar.download(file)
        file.flush()
        self._files[tar] = file


_fetched = _Fetched()


def read_range(file: Place, start: int, stop: int) -> bytes:
    """The bytes from ``start`` to before ``stop`` of a file; fewer where it ends. Raises OSError."""
    if not isinstance(file, Path):
        return _fetched.read(file, start, stop)
    with file.open("rb") as stream:
        stream.seek(start)
        return stream.read(stop - start)


def is_here(file: File) -> bool:
    """Whether a file or a folder is one of this machine's own, and not in an object store or in a shard."""
    return isinstance(file, Path)


def name_below(file: File, folder: Place) -> str:
    """How a file in a folder is called from there: ``000003.png``, ``000000.tar/000003.png``."""
    if isinstance(file, Member):
        return f"{file.tar.name}/{file.name}"
    return str(file).removeprefix(str(folder)).replace(os.sep, "/").strip("/")


def here(file: File) -> Path:
    """A file of this machine, of what has no others."""
    assert isinstance(file, Path), file
    return file


def lies_in(file: File, folder: Path) -> bool:
    """Whether a file is in a folder of this machine, or in one below it."""
    place = file.tar if isinstance(file, Member) else file
    return isinstance(place, Path) and folder.resolve() in place.resolve().parents


def source_of(file: File) -> Path | BinaryIO:
    """What Pillow opens: a path, or what is in a file that has none here. Raises OSError."""
    return file if isinstance(file, Path) else file.open("rb")


def size_of(file: File) -> int:
    """In bytes. Raises OSError for what is not there."""
    return file.stat().st_size if isinstance(file, Path) else file.size()


def sizes_in(folder: Place) -> dict[str, int]:
    """The files that lie in a folder, with their sizes in bytes; none where it cannot be read. Lists once."""
    if not isinstance(folder, Path):
        return {name: size for name, size in folder.listing().items() if "/" not in name}
    found = {}
    with contextlib.suppress(OSError), os.scandir(folder) as entries:
        for entry in entries:
            with contextlib.suppress(OSError):
                found[entry.name] = entry.stat().st_size
    return found


@lru_cache(maxsize=16)
def _index(folder: Place, number: int, version: object) -> tuple[Index | None, dict[str, Entry]]:
    index = read_index(folder, number)
    return index, {entry.key: entry for entry in index.entries} if index is not None else {}


def version_of(file: Place) -> object:
    """Another one after every change of a file that is replaced or grows; None of one that is not there."""
    try:
        if not isinstance(file, Path):
            return file.entry()
        facts = file.stat()
    except StoreError:
        raise
    except OSError:
        return None
    return facts.st_ino, facts.st_size, facts.st_mtime_ns


def forget() -> None:
    """Look anew at shards in object stores, which other processes may have replaced."""
    _index.cache_clear()
    _fetched.forget()


def find_member(tar: Place, name: str) -> Member | None:
    """The member of a shard that is called ``name``, by the shard's index; None where there is none."""
    number = shard_number(tar.name)
    if number is None:
        return None
    key, dot, ending = name.partition(".")
    # In an object store nobody asks before each picture whether its shard has changed: see `forget`.
    index, entries = _index(tar.parent, number, version_of(tar) if is_here(tar) else None)
    if index is None or key not in entries or dot + ending not in (".json", index.ending):
        return None
    return Member(tar, entries[key], index.ending, dot + ending == ".json")


def members_in(folder: Place, kind: str) -> Iterator[Member]:
    """The pictures, or for "json" the sidecars, of the shards in a folder, as their indexes say."""
    for name in sorted(sizes_in(folder)):
        number = shard_number(name)
        index = read_index(folder, number) if number is not None else None
        if index is not None:
            yield from (Member(folder / name, entry, index.ending, kind == "json") for entry in index.entries)


def place_of(text: str | PurePath) -> Place:
    """The folder or file that a user names: a path, or a URL such as s3://bucket/run. Raises UsageError."""
    if not str(text):
        raise UsageError("the name is empty; name a file or a folder")
    return open_url(str(text)) if is_url(str(text)) else Path(text)


def files_of(text: str) -> list[File]:
    """As `file_of`; of the tar of a shard, the sidecars of all its pictures. Raises UsageError."""
    forget()
    place = place_of(text)
    number = shard_number(place.name)
    if number is None or not place.is_file():
        return [file_of(text)]
    index = read_index(place.parent, number)
    if index is None:
        raise UsageError(f"{place}: has no index beside it that says what it holds")
    return [Member(place, entry, index.ending, True) for entry in index.entries]


def file_of(text: str | PurePath) -> File:
    """As `place_of`, also through a shard.

    Raises:
        UsageError: for a shard that does not have the member.
    """
    place = place_of(text)
    tar = place.parent
    if tar.name.endswith(TAR) and tar.is_file():
        member = find_member(tar, place.name)
        if member is None:
            raise UsageError(f"{place}: {tar.name} holds no {place.name}, or has no index beside it")
        return member
    return place
