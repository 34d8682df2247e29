"""Check a folder of tar shards: each holds what the plan has at its place, whole, and as its index says."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from typing import Any

from ddim_cli.config.seeds import runs
from ddim_cli.evaluation.pairs import check_bytes, check_sidecar, parsed
from ddim_cli.evaluation.verified import Problem, Verified, check_grid
from ddim_cli.outputs.files import sizes_in
from ddim_cli.outputs.folder import RUN_SCHEMA, OutputFolder
from ddim_cli.outputs.open_shard import shards_in
from ddim_cli.outputs.row_plan import RowPlan, is_of_rows
from ddim_cli.outputs.shards import Index, Pair, index_name, pairs_in, read_index, shard_name
from ddim_cli.outputs.sidecar import SCHEMA, identity, row_settings
from ddim_cli.outputs.store import key_of
from ddim_cli.outputs.tar_folder import TarFolder

MOST_RANGES = 6


@dataclass(frozen=True)
class Planned:
    """A picture as the plan has it: its key, its seed, and the settings that it is to be made with, if these are
    known."""

    key: str
    seed: int | None
    settings: Mapping[str, Any] | None


def verify_shards(folder: TarFolder, on_image: Callable[[int, int], None]) -> Verified:
    """As `verify.verify`, of a folder of shards."""
    manifest = folder.read_manifest() or {}
    problems, sizes, done, lossy = list[Problem](), sizes_in(folder.path), 0, 0
    planned = manifest.get("schema") == RUN_SCHEMA
    if not planned:
        problems.append(
            Problem("run.json", None, "is missing, or is not one of ddim; nobody can tell what belongs here")
        )
    total = _count(folder, manifest) if planned else sum(len(index.entries) for index in folder.finished())
    blocks = _blocks(folder, manifest) if planned else _blocks_there(folder)
    numbers = set()
    for number, block in blocks:
        numbers.add(number)
        shard = _Shard(folder, number, block, sizes)
        for problem in shard.check():
            if problem is not None:
                problems.append(problem)
            done += 1
            on_image(min(done, total), total)
        lossy += 0 if folder.coding.is_lossless else shard.found
    problems += [
        Problem(shard_name(number), None, "is extra: the plan ends before it")
        for number in shards_in(folder.path)
        if number not in numbers and (shard_name(number) in sizes or index_name(number) in sizes)
    ]
    problems += _files_beside(folder)
    problems += check_grid(folder)
    return Verified(total, tuple(problems), lossy)


def _count(folder: TarFolder, manifest: Mapping[str, Any]) -> int:
    return len(RowPlan(folder)) if is_of_rows(manifest) else len(folder.planned())


def _blocks(folder: TarFolder, manifest: Mapping[str, Any]) -> Iterator[tuple[int, list[Planned]]]:
    """The shards of the plan, each with the pictures that belong into it."""
    shared, plan = identity(manifest), _plan(folder, manifest)
    plans = iter(plan)
    number = 0
    while block := [Planned(key, seed, {**shared, **own}) for key, seed, own in islice(plans, folder.shard_size)]:
        yield number, block
        number += 1


def _plan(folder: TarFolder, manifest: Mapping[str, Any]) -> Iterator[tuple[str, int | None, Mapping[str, Any]]]:
    """Key, seed, and what decides a picture beside the settings of the run."""
    if is_of_rows(manifest):
        yield from ((line["name"], line.get("seed"), row_settings(line)) for line in RowPlan(folder))
        return
    yield from ((key_of(seed), seed, {}) for seed in folder.planned())


def _blocks_there(folder: TarFolder) -> Iterator[tuple[int, list[Planned]]]:
    """The shards that are there, where no plan tells which should be."""
    for number in shards_in(folder.path):
        index = read_index(folder.path, number)
        keys = index.keys if index is not None else []
        yield number, [Planned(key, int(key) if key.isdecimal() else None, None) for key in keys]


def _files_beside(folder: TarFolder) -> Iterator[Problem]:
    """Pairs that lie beside the shards, as a folder of files has them."""
    files = OutputFolder(folder.path, encoding=folder.coding)
    for seed, paths in chain(files.numbered("json").items(), files.pictures().items()):
        yield from (Problem(path.name, seed, "is extra: the pictures of this folder are in shards") for path in paths)


@dataclass
class _Shard:
    """A shard that is checked; ``found`` is how many pictures of it were there."""

    folder: TarFolder
    number: int
    block: Sequence[Planned]
    sizes: Mapping[str, int]
    found: int = 0

    @property
    def name(self) -> str:
        return shard_name(self.number)

    def _of_all(self, text: str, count: int) -> Iterator[Problem | None]:
        """One problem, for so many pictures."""
        yield Problem(self.name, None, text)
        yield from (None for _ in range(count - 1))

    def check(self) -> Iterator[Problem | None]:
        """For each picture what is wrong with it, None for nothing; of what concerns several, once."""
        size, index = self.sizes.get(self.name), read_index(self.folder.path, self.number)
        count, keys = len(self.block), [planned.key for planned in self.block]
        if size is None:
            yield from self._of_all(f"is missing, with {_named(keys)}", count)
        elif index is None:
            yield from self._of_all(f"has no index {index_name(self.number)} that is one", count)
        elif index.keys != keys[: len(index.keys)]:
            place = next(n for n, key in enumerate(index.keys) if key != (keys[n] if n < count else None))
            there = f"{index.keys[place]} where the plan has {keys[place] if place < count else 'nothing'}"
            yield from self._of_all(f"holds {there}", count)
        else:
            yield from self._check_members(index, size)
            if len(index.keys) < count:
                yield from self._of_all(f"lacks {_named(keys[len(index.keys) :])}", count - len(index.keys))

    def _check_members(self, index: Index, size: int) -> Iterator[Problem | None]:
        lost = [entry.key for entry in index.entries if entry.json_offset + entry.json_bytes > size]
        read = 0
        with (self.folder.path / self.name).open("rb") as stream:
            for planned, entry, pair in zip(self.block, index.entries, pairs_in(stream), strict=False):
                if pair[:3:2] != entry[:2] or pair.json_offset != entry.json_offset:
                    break
                read += 1
                self.found += 1
                text = _check_pair(planned, pair, entry.pixels_sha256)
                file = f"{self.name}/{pair.key}{pair.ending}"
                yield Problem(file, planned.seed, text) if text is not None else None
        unread = [entry.key for entry in index.entries[read:]]
        if size < index.length:
            told = f"is cut short: it has {size:,} of {index.length:,} bytes"
            yield from self._of_all(f"{told}, and lost {_named(lost)}" if lost else told, max(1, len(unread)))
        elif unread:
            yield from self._of_all(f"is damaged, and cannot be read from {unread[0]} on", len(unread))
        elif size != index.length:
            yield Problem(self.name, None, f"has {size:,} bytes, its index says {index.length:,}")


def _check_pair(planned: Planned, pair: Pair, pixels_sha256: str) -> str | None:
    sidecar = parsed(pair.sidecar)
    if not isinstance(sidecar, dict) or sidecar.get("schema") != SCHEMA:
        return "has a sidecar that is not one of ddim, or does not parse"
    try:
        wrong = check_sidecar(planned.seed, sidecar, planned.settings)
        wrong = wrong or check_bytes(pair.picture, pair.ending, sidecar)
        if wrong is None and sidecar["image"]["pixels_sha256"] != pixels_sha256:
            return "has other pixels than the index of its shard says"
        return wrong
    except (KeyError, TypeError, AttributeError):
        return "has a sidecar in which something is missing"


def _named(keys: Sequence[str]) -> str:
    """Keys in words: runs of numbers as ranges, of others the first and the last."""
    if not all(key.isdecimal() for key in keys):
        return keys[0] if len(keys) == 1 else f"{len(keys):,} pictures from {keys[0]} to {keys[-1]}"
    found = list(runs(map(int, keys)))
    told = [key_of(a) if a == b else f"{key_of(a)} to {key_of(b)}" for a, b in found[:MOST_RANGES]]
    more = [f"and {len(found) - MOST_RANGES:,} more"] if len(found) > MOST_RANGES else []
    return ", ".join(told + more)
