"""The list grammar of seeds and classes: ``0-63,100`` is 0 to 63 and 100, in that order."""

from __future__ import annotations

import re
from collections.abc import Iterable

MAX_SEED = 2**63 - 1
# Beyond this a list is a mistake, and would only fill the memory.
MAX_LENGTH = 10_000_000

_PART = re.compile(r"(\d+)(?:-(\d+))?", re.ASCII)


def parse_list(text: str, noun: str = "number", most: int = MAX_SEED) -> tuple[int, ...]:
    """``"0-3,7"`` -> ``(0, 1, 2, 3, 7)``.

    Raises:
        ValueError: with a sentence, for a part that is no number or range, a range that runs
            backwards, a number above ``most``, or more than ten million of them.
    """
    ranges: list[range] = []
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
        if sum(map(len, ranges)) > MAX_LENGTH:
            raise ValueError(f"these are more than {MAX_LENGTH:,}; split the job")
    return tuple(number for part in ranges for number in part)


def parse_seeds(text: str) -> tuple[int, ...]:
    """As `parse_list`, for seeds: none above 2**63 - 1, and none named twice, else ValueError."""
    seeds = parse_list(text, "seed")
    if len(set(seeds)) != len(seeds):
        once: set[int] = set()
        twice = next(s for s in seeds if s in once or once.add(s))
        raise ValueError(f"the seed {twice} is named twice")
    return seeds


def parse_classes(text: str) -> tuple[int, ...]:
    """As `parse_list`, for classes; one may be named twice, to be drawn twice as often."""
    return parse_list(text, "class", 2**31 - 1)


def format_seeds(seeds: Iterable[int]) -> str:
    """The shortest text of the grammar for these seeds, ascending: the inverse of `parse_seeds` up to order."""
    parts: list[list[int]] = []
    for seed in sorted(seeds):
        if parts and seed == parts[-1][1] + 1:
            parts[-1][1] = seed
        else:
            parts.append([seed, seed])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in parts)
