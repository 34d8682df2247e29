"""An output folder whose pairs lie in tar shards: shard k holds the positions k * size ... of the plan, and no others.

A shard is the unit of work and of resume: it appears whole. So a plan can grow at its end alone.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from ddim_cli.config.seeds import Seeds, in_order
from ddim_cli.errors import UsageError
from ddim_cli.outputs.atomic import claimed_file
from ddim_cli.outputs.figures import shortened
from ddim_cli.outputs.files import File, Member, Place, find_member, forget, is_here, members_in, sizes_in
from ddim_cli.outputs.folder import RUN_SCHEMA, OutputFolder, layout_of
from ddim_cli.outputs.open_shard import SPOOL, OpenShard, found_in, remove_shard, spool_path
from ddim_cli.outputs.picture import Encoding
from ddim_cli.outputs.shards import Index, images_in, index_name, read_index, shard_name, shard_number
from ddim_cli.outputs.sidecar import complete, first_difference, run_identity, to_text
from ddim_cli.outputs.store import Name, encoded, key_of

# Indexes that are read at a time, where that takes a way over a network.
READERS = 16


class Names(Protocol):
    """The names of a plan's pictures, in its order; made as they are asked for."""

    def __len__(self) -> int: ...

    def between(self, start: int, stop: int) -> list[str]:
        """Those of the positions from ``start`` to before ``stop``."""

    def position(self, name: str) -> int | None:
        """Where a name stands; None for one of another plan."""


class _Open:
    """The shards that this process is writing."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.shards: dict[int, OpenShard] = {}


@dataclass(frozen=True)
class TarFolder(OutputFolder):
    """``shard_size`` is how many pictures a shard has, ``names`` those of the plan, ``settings`` the run's identity.

    The latter two are for who writes.
    """

    shard_size: int = 1000
    names: Names | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    _open: _Open = field(default_factory=_Open, init=False, compare=False, repr=False)

    # What is there.

    @property
    def layout(self) -> tuple[str, int | None]:
        return "tar", self.shard_size

    @property
    def output(self) -> dict[str, Any]:
        return {"output": {"format": "tar", "shard_size": self.shard_size, **super().output.get("output", {})}}

    def finished(self) -> Iterator[Index]:
        """The shards that are there, whole, in their order. Lists once."""
        sizes = sizes_in(self.path)
        numbers = sorted(n for name in sizes if (n := shard_number(name)) is not None and index_name(n) in sizes)
        if isinstance(self.path, Path):
            indexes: Iterable[Index | None] = (read_index(self.path, number) for number in numbers)
            yield from self._whole(indexes, sizes)
            return
        with ThreadPoolExecutor(READERS) as pool:
            yield from self._whole(pool.map(lambda number: read_index(self.path, number), numbers), sizes)

    @staticmethod
    def _whole(indexes: Iterable[Index | None], sizes: Mapping[str, int]) -> Iterator[Index]:
        for index in indexes:
            if index is not None and sizes[shard_name(index.number)] == index.length:
                yield index

    def keys(self, begun: bool = True) -> Iterator[str]:
        """The names of the pictures that are there: those of whole shards, and where shards that were ``begun`` count,
        of spools that nobody writes."""
        yield from chain.from_iterable(index.keys for index in self.finished())
        for number in self._spools() if begun else ():
            with _left_over(self._spool(number)) as stream:
                if stream is not None:
                    yield from (entry.key for entry in found_in(stream, self.coding.ending, self._is_ours))

    def _spool(self, number: int) -> Path:
        assert isinstance(self.path, Path)
        return spool_path(self.path, number)

    def _spools(self) -> list[int]:
        """The shards that processes have begun."""
        if not isinstance(self.path, Path):
            return []
        found = (name[1:].removesuffix(SPOOL) for name in sizes_in(self.path) if name.endswith(SPOOL))
        return sorted(number for name in found if (number := shard_number(name)) is not None)

    def _is_ours(self, sidecar: Mapping[str, Any]) -> bool:
        return first_difference(run_identity(sidecar), self.settings) is None

    def missing(self, seeds: Sequence[int], settings: Mapping[str, Any]) -> Seeds:
        return self._without(Seeds.of(seeds), begun=True)

    def left(self, seeds: Sequence[int], settings: Mapping[str, Any]) -> Seeds:
        return self._without(Seeds.of(seeds), begun=False)

    def _without(self, seeds: Seeds, begun: bool) -> Seeds:
        if not seeds:
            return seeds
        there = {seed for key in self.keys(begun) if key.isdecimal() and (seed := int(key)) in seeds}
        return seeds.without(there)

    def count(self) -> int:
        """How many pictures are in whole shards, by the heads of their indexes alone."""
        sizes = sizes_in(self.path)
        numbers = (number for name in sizes if (number := shard_number(name)) is not None)
        return sum(images_in(self.path, number) for number in numbers if index_name(number) in sizes)

    def members(self, kind: str) -> Iterator[Member]:
        """The pictures, or for "json" the sidecars, of whole shards, in their order."""
        for index in self.finished():
            tar = self.path / shard_name(index.number)
            yield from (Member(tar, entry, index.ending, kind == "json") for entry in index.entries)

    def numbered(self, kind: str) -> dict[int, list[File]]:
        found: dict[int, list[File]] = {}
        for member in self.members(kind):
            if member.stem.isdecimal():
                found.setdefault(int(member.stem), []).append(member)
        return dict(sorted(found.items()))

    def named(self, kind: str) -> dict[str, list[File]]:
        found: dict[str, list[File]] = {}
        for member in self.members(kind):
            found.setdefault(member.stem, []).append(member)
        return found

    @cached_property
    def _numbers(self) -> dict[str, int]:
        """The shard of each picture that is there."""
        return {entry.key: index.number for index in self.finished() for entry in index.entries}

    def _number_of(self, key: str) -> int | None:
        if self.names is None:
            return self._numbers.get(key)
        position = self.names.position(key)
        return None if position is None else position // self.shard_size

    def picture(self, name: Name) -> File:
        key = key_of(name)
        number = self._number_of(key)
        file = key + self.coding.ending
        if number is None:
            return self.path / file
        tar = self.path / shard_name(number)
        return find_member(tar, file) or tar / file

    def pairs(self) -> Iterator[File]:
        yield from self.members("json")
        # Those of a run before this one that wrote files.
        for paths in super().numbered("json").values():
            yield from paths

    def is_pair(self, path: File, settings: Mapping[str, Any]) -> bool:
        """Whether it is in a whole shard: what it is of, the plan says."""
        return isinstance(path, Member)

    # What is planned.

    def check_plan(self, seeds: Sequence[int]) -> None:
        """UsageError for seeds that are not those of the folder's plan, or more behind them."""
        planned = self.planned() if self.manifest.exists() else Seeds(())
        self.merged(planned, seeds)

    def merged(self, planned: Seeds, seeds: Sequence[int]) -> Sequence[int]:
        few = min(len(planned), len(seeds))
        seeds = Seeds.of(seeds)
        if planned[:few] != seeds[:few]:
            raise UsageError(
                f"output folder {self.path}: has shards of the seeds {shortened(in_order(planned), 60)}, and a plan in "
                "shards can only grow at its end; begin with those seeds, choose another folder with --out, or replace "
                "what is there with --overwrite"
            )
        return seeds if len(seeds) > len(planned) else planned

    def seeds_text(self, seeds: Sequence[int]) -> str:
        # Their order says which shard has which.
        return in_order(seeds)

    # What is written.

    @contextmanager
    def working(self) -> Iterator[None]:
        """What killed processes have written whole is put into its place before; what is not whole is kept after."""
        for number in self._spools():
            shard = self._opened(number)
            if shard.is_complete:
                shard.close()
            else:
                shard.keep()
        try:
            yield
        finally:
            with self._open.lock:
                for shard in self._open.shards.values():
                    with suppress(OSError):
                        shard.keep()
                self._open.shards.clear()

    def _opened(self, number: int) -> OpenShard:
        assert self.names is not None
        start = number * self.shard_size
        keys = self.names.between(start, min(start + self.shard_size, len(self.names)))
        return OpenShard(self.path, number, keys, self.coding.ending, self.fsync, self._is_ours)

    def write(
        self, name: Name, described: Mapping[str, Any], pixels: np.ndarray, seconds: float, settings: Mapping[str, Any]
    ) -> None:
        """As `PairFolder.write`, into the shard of the name's position; with its last picture the shard appears."""
        key = key_of(name)
        number = self._number_of(key)
        assert number is not None
        described, picture = encoded(described, pixels, self.coding, self.parameters)
        # Nothing that is another one when it is made again: so are the bytes of a shard the same.
        sidecar = to_text(complete(described, key + self.coding.ending, picture)).encode()
        with self._open.lock:
            if number not in self._open.shards:
                self._open.shards[number] = self._opened(number)
            shard = self._open.shards[number]
            shard.add(key, picture, sidecar, described["image"]["pixels_sha256"])
            if shard.is_complete:
                shard.close()
                del self._open.shards[number]

    @property
    def keeps_all(self) -> bool:
        # A store keeps nothing of a shard that is not whole.
        return is_here(self.path)

    def remove(self, name: Name, *others: Encoding) -> None:
        """Remove the shard that a picture is in."""
        number = self._number_of(key_of(name))
        if number is not None:
            remove_shard(self.path, number)

    def clear(self, names: Iterable[Name], settings: Mapping[str, Any]) -> None:
        manifest = self.read_manifest()
        if manifest is None or manifest.get("schema") != RUN_SCHEMA or self.difference(manifest, settings) is not None:
            super().clear((), settings)
            return
        for number in {self._number_of(key_of(name)) for name in names}:
            if number is not None:
                remove_shard(self.path, number)


@contextmanager
def _left_over(path: Path) -> Iterator[Any]:
    """A spool to read, which nobody writes; None for one that somebody does."""
    held = claimed_file(path, make=False)
    try:
        yield held
    finally:
        if held is not None:
            held.close()


def open_folder(path: Place) -> OutputFolder:
    """An output folder to read, whether its pictures are files or in shards."""
    forget()
    folder = OutputFolder(path)
    manifest = folder.read_manifest() or {}
    if manifest.get("schema") != RUN_SCHEMA:
        return TarFolder(path) if next(members_in(path, "json"), None) is not None else folder
    name, size = layout_of(manifest)
    return TarFolder(path, shard_size=size or TarFolder.shard_size) if name == "tar" else folder
