"""Tar shards: many pictures and their sidecars in one file, as WebDataset reads them.

A shard is ``000000.tar`` with the members ``KEY.png`` and ``KEY.json`` of each picture, a picture's two beside each
other. What is the same has the same bytes: members have no times and no owners. Beside it lies ``000000.index.json``,
which says where each picture begins, and how long the tar is: a shard is there once both are, and agree on that.
"""

from __future__ import annotations

import json
import re
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple

if TYPE_CHECKING:
    from ddim_cli.outputs.files import Place

SHARD_SCHEMA = "ddim-cli/shard/1"
TAR, INDEX = ".tar", ".index.json"
BLOCK = tarfile.BLOCKSIZE

_SHARD = re.compile(r"(\d{6,})\.tar", re.ASCII)
_HEADER_END = b'"items": ['
# The header of an index is read without its items.
_HEAD = 4096


def shard_name(number: int) -> str:
    """The name of a shard's tar."""
    return f"{number:06d}{TAR}"


def index_name(number: int) -> str:
    return f"{number:06d}{INDEX}"


def shard_number(name: str) -> int | None:
    """The number of the shard whose tar is called ``name``; None for any other name."""
    match = _SHARD.fullmatch(name)
    return int(match[1]) if match is not None and shard_name(int(match[1])) == name else None


class Entry(NamedTuple):
    """Where a picture and its sidecar lie in a tar: the first byte of each, and how many there are."""

    key: str
    offset: int
    bytes: int
    json_offset: int
    json_bytes: int
    pixels_sha256: str

    @property
    def end(self) -> int:
        """Where the next member begins."""
        return self.json_offset + padded(self.json_bytes)


@dataclass(frozen=True)
class Index:
    """What a tar holds: ``length`` is that of the whole file, ``ending`` that of its pictures' names."""

    number: int
    length: int
    ending: str
    entries: Sequence[Entry]

    def encoded(self) -> bytes:
        """The bytes of the index file: an item a line, so that a person can read it."""
        head = {
            "schema": SHARD_SCHEMA,
            "shard": shard_name(self.number),
            "images": len(self.entries),
            "bytes": self.length,
            "ending": self.ending,
        }
        lines = ",\n".join(f"    {json.dumps(entry._asdict(), ensure_ascii=False)}" for entry in self.entries)
        return f'{json.dumps(head, indent=2)[:-2]},\n  "items": [\n{lines}\n  ]\n}}\n'.encode()

    @property
    def keys(self) -> list[str]:
        return [entry.key for entry in self.entries]


def _checked(values: Any, number: int) -> Index | None:
    """The index that these values are; None where they are none of this shard."""
    try:
        if values["schema"] != SHARD_SCHEMA or values["shard"] != shard_name(number):
            return None
        entries = [Entry(**item) for item in values["items"]]
        length, ending, count = values["bytes"], values["ending"], values["images"]
    except (KeyError, TypeError):
        return None
    numbers = [length, *(value for entry in entries for value in entry[1:5])]
    sound = all(type(value) is int and value >= 0 for value in numbers) and isinstance(ending, str)
    texts = all(isinstance(entry.key, str) and isinstance(entry.pixels_sha256, str) for entry in entries)
    return Index(number, length, ending, entries) if sound and texts and count == len(entries) else None


def read_index(folder: Place, number: int) -> Index | None:
    """The index of a shard; None where it is not there, or is none."""
    try:
        return _checked(json.loads((folder / index_name(number)).read_bytes()), number)
    except (FileNotFoundError, ValueError, RecursionError):
        return None


def images_in(folder: Place, number: int) -> int:
    """How many pictures a shard holds, by the head of its index; 0 where there is none."""
    try:
        with (folder / index_name(number)).open("rb") as stream:
            head = stream.read(_HEAD).partition(_HEADER_END)[0]
        return int(json.loads(head + _HEADER_END + b"]}")["images"])
    except (OSError, ValueError, KeyError, TypeError):
        return 0


def padded(size: int) -> int:
    """What a member of so many bytes takes in a tar, its header aside."""
    return -(-size // BLOCK) * BLOCK


def trailer(length: int) -> bytes:
    """What ends a tar that is ``length`` bytes long."""
    end = -(-(length + 2 * BLOCK) // tarfile.RECORDSIZE) * tarfile.RECORDSIZE
    return bytes(end - length)


@lru_cache(maxsize=1)
def _blank() -> tuple[bytes, int]:
    """A header without name, size and checksum, and the sum of its bytes."""
    info = tarfile.TarInfo("")
    info.mode = 0o644
    text = bytearray(info.tobuf(tarfile.USTAR_FORMAT))
    text[124:136] = bytes(12)
    # The checksum counts as blanks in itself.
    text[148:156] = b" " * 8
    return bytes(text), sum(text)


def header(name: str, size: int) -> bytes:
    """A member's header, for a file that everybody may read, of no time and nobody."""
    if len(name) > tarfile.LENGTH_NAME or not name.isascii() or size >= 8**11:
        info = tarfile.TarInfo(name)
        info.size, info.mode = size, 0o644
        return info.tobuf(tarfile.PAX_FORMAT)
    # As tarfile does it, in a tenth of the time: a million pictures have two million headers.
    blank, total = _blank()
    called, length = name.encode(), b"%011o\0" % size
    text = bytearray(blank)
    text[: len(called)], text[124:136] = called, length
    text[148:156] = b"%06o\0 " % (total + sum(called) + sum(length))
    return bytes(text)


def member(name: str, data: bytes) -> list[bytes]:
    """The parts of a member: header, content, padding."""
    return [header(name, len(data)), data, bytes(padded(len(data)) - len(data))]


class Pair(NamedTuple):
    """A picture and its sidecar as they were found in a tar."""

    key: str
    ending: str
    offset: int
    picture: bytes
    json_offset: int
    sidecar: bytes


def pairs_in(stream: BinaryIO) -> Iterator[Pair]:
    """The pairs of a tar from its beginning, as far as they are whole; in what order pictures come is not looked at."""
    try:
        opened = tarfile.open(fileobj=stream, mode="r:")  # noqa: SIM115  # closed below
    except tarfile.TarError:
        return
    with opened as archive:
        while True:
            picture = _next_member(archive, stream)
            sidecar = _next_member(archive, stream) if picture is not None else None
            if picture is None or sidecar is None:
                return
            key, dot, ending = picture[0].partition(".")
            if sidecar[0] != f"{key}.json":
                return
            yield Pair(key, dot + ending, picture[1], picture[2], sidecar[1], sidecar[2])


def _next_member(archive: tarfile.TarFile, stream: BinaryIO) -> tuple[str, int, bytes] | None:
    """Name, first byte and content of the next member; None at the end, and where it is torn."""
    try:
        info = archive.next()
    except tarfile.TarError:
        return None
    # What tarfile keeps of each member adds up.
    archive.members.clear()  # type: ignore[attr-defined]
    if info is None or not info.isfile():
        return None
    stream.seek(info.offset_data)
    data = stream.read(info.size)
    return (info.name, info.offset_data, data) if len(data) == info.size else None
