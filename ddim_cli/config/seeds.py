"""The list grammar of seeds and classes: ``0-63,100`` is 0 to 63 and 100, in that order."""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence, Set
from functools import cached_property
from itertools import accumulate, chain, pairwise
from typing import Any, overload

MAX_SEED = 2**63 - 1
# Beyond this a list is a mistake, and would only fill the memory.
MAX_LENGTH = 10_000_000

_PART = re.compile(r"(\d+)(?:-(\d+))?", re.ASCII)


class Seeds(Sequence[int]):
    """Seeds in the order of a plan, kept as ranges: ten million of them in a row take no memory.

    Otherwise as a tuple of them, which it equals; a slice of it is another. No part begins within another.
    """

    def __init__(self, parts: Iterable[range]):
        self._parts = tuple(part for part in parts if part)
        # Of each part, the position after its last.
        self._ends = tuple(accumulate(map(len, self._parts)))

    @classmethod
    def of(cls, seeds: Iterable[int]) -> Seeds:
        """These seeds, in the order in which they come."""
        if isinstance(seeds, Seeds):
            return seeds
        return cls([seeds] if isinstance(seeds, range) else (range(a, b + 1) for a, b in runs(seeds)))

    @property
    def parts(self) -> tuple[range, ...]:
        return self._parts

    @property
    def is_ascending(self) -> bool:
        return all(before[-1] < after[0] for before, after in pairwise(self._parts))

    def without(self, seeds: Set[int]) -> Seeds:
        if not seeds:
            return self
        return Seeds(piece for part in self._parts for piece in _cut(part, seeds))

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __iter__(self) -> Iterator[int]:
        return chain.from_iterable(self._parts)

    def __contains__(self, seed: Any) -> bool:
        which = bisect_right(self._ascending, seed, key=lambda part: part.start) - 1
        return which >= 0 and seed in self._ascending[which]

    @cached_property
    def _ascending(self) -> list[range]:
        return sorted(self._parts, key=lambda part: part.start)

    def index(self, seed: Any, start: int = 0, stop: int | None = None) -> int:
        """The position of a seed. Raises ValueError where it is not among these."""
        which = bisect_right(self._by_start, (seed, len(self._parts))) - 1
        part = self._by_start[which][1] if which >= 0 else -1
        if part < 0 or seed not in self._parts[part]:
            raise ValueError(f"{seed} is not among the seeds")
        position = self._ends[part] - len(self._parts[part]) + self._parts[part].index(seed)
        if not start <= position < (len(self) if stop is None else stop):
            raise ValueError(f"{seed} is not among the seeds from {start} on")
        return position

    @cached_property
    def _by_start(self) -> list[tuple[int, int]]:
        """The first seed of each part, ascending, and which part that is."""
        return sorted((part.start, which) for which, part in enumerate(self._parts))

    @overload
    def __getitem__(self, index: int) -> int: ...

    @overload
    def __getitem__(self, index: slice) -> Seeds: ...

    def __getitem__(self, index: int | slice) -> int | Seeds:
        if isinstance(index, slice):
            return Seeds(self._slice(*index.indices(len(self))))
        position = index + len(self) if index < 0 else index
        if not 0 <= position < len(self):
            raise IndexError(f"there is no seed {index} of {len(self)}")
        which = bisect_right(self._ends, position)
        # From its end, so that the first part is no exception.
        return self._parts[which][position - self._ends[which]]

    def _slice(self, start: int, stop: int, step: int) -> Iterator[range]:
        if step < 0:
            yield from (range(seed, seed + 1) for seed in tuple(self)[start : stop if stop >= 0 else None : step])
            return
        for which in range(bisect_right(self._ends, start), len(self._parts)):
            part = self._parts[which]
            first = self._ends[which] - len(part)
            if first >= stop:
                return
            # The first position of the slice that lies in this part.
            offset = start - first if start >= first else (start - first) % step
            yield part[offset : stop - first : step]

    def __eq__(self, other: object) -> bool:
        if isinstance(other, Seeds) and self._parts == other._parts:
            return True
        if not isinstance(other, Sequence):
            return NotImplemented
        return len(self) == len(other) and all(a == b for a, b in zip(self, other, strict=True))

    def __hash__(self) -> int:
        return hash((len(self), self[0], self[-1]) if self else 0)

    def __repr__(self) -> str:
        return f"Seeds.of({list(self)})" if len(self) < 10 else f"<{len(self)} seeds from {self[0]} to {self[-1]}>"


def _cut(part: range, seeds: Set[int]) -> Iterator[range]:
    """What is left of a range without ``seeds``."""
    if len(seeds) < len(part):
        positions = sorted(part.index(seed) for seed in seeds if seed in part)
    else:
        positions = [position for position, seed in enumerate(part) if seed in seeds]
    start = 0
    for position in positions:
        yield part[start:position]
        start = position + 1
    yield part[start:]


def runs(seeds: Iterable[int]) -> Iterator[tuple[int, int]]:
    """The first and the last of each run of consecutive numbers."""
    run: tuple[int, int] | None = None
    for seed in seeds:
        if run is not None and seed == run[1] + 1:
            run = run[0], seed
        else:
            if run is not None:
                yield run
            run = seed, seed
    if run is not None:
        yield run


def _parse(text: str, noun: str, most: int) -> list[range]:
    """The parts of a list as ranges. Raises ValueError as `parse_list`."""
    ranges: list[range] = []
    count = 0
    for part in text.split(","):
        match = _PART.fullmatch(part.strip())
        if match is None:
            raise ValueError(f"{part.strip()!r} is neither a {noun} nor a range of them such as 0-63")
        if len(match[1]) > 20 or len(match[2] or "") > 20:
            raise ValueError(f"the {noun} {part.strip()[:20]}... is above {most}")
        first = int(match[1])
        last = int(match[2]) if match[2] is not None else first
        if last < first:
            raise ValueError(f"the range {part.strip()} runs backwards; write {last}-{first}")
        if last > most:
            raise ValueError(f"the {noun} {last} is above {most}")
        ranges.append(range(first, last + 1))
        count += last - first + 1
        if count > MAX_LENGTH:
            raise ValueError(f"these are more than {MAX_LENGTH:,}; split the job")
    return ranges


def parse_list(text: str, noun: str = "number", most: int = MAX_SEED) -> tuple[int, ...]:
    """``"0-3,7"`` -> ``(0, 1, 2, 3, 7)``.

    Raises:
        ValueError: with a sentence, for a part that is no number or range, a range that runs
            backwards, a number above ``most``, or more than ten million of them.
    """
    return tuple(chain.from_iterable(_parse(text, noun, most)))


def parse_seeds(text: str) -> Seeds:
    """As `parse_list`, for seeds: none above 2**63 - 1, and none named twice, else ValueError."""
    parts = _parse(text, "seed", MAX_SEED)
    for before, after in pairwise(sorted(parts, key=lambda part: part.start)):
        if after.start < before.stop:
            raise ValueError(f"the seed {after.start} is named twice")
    return Seeds(parts)


def parse_classes(text: str) -> tuple[int, ...]:
    """As `parse_list`, for classes; one may be named twice, to be drawn twice as often."""
    return parse_list(text, "class", 2**31 - 1)


def format_seeds(seeds: Iterable[int]) -> str:
    """The shortest text of the grammar for these seeds, ascending: the inverse of `parse_seeds` up to order."""
    if isinstance(seeds, Seeds) and all(part.step == 1 for part in seeds.parts):
        spans: Iterable[tuple[int, int]] = sorted((part[0], part[-1]) for part in seeds.parts)
    else:
        spans = runs(sorted(seeds))
    joined: list[tuple[int, int]] = []
    for first, last in spans:
        if joined and first == joined[-1][1] + 1:
            joined[-1] = joined[-1][0], last
        else:
            joined.append((first, last))
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in joined)


def in_order(seeds: Sequence[int]) -> str:
    """As `format_seeds`, in the order of the seeds: the inverse of `parse_seeds`."""
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in runs(seeds))
