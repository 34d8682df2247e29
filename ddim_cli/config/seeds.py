"""The list grammar of seeds: ``0-63,100`` is the seeds 0 to 63 and 100, in that order."""

from __future__ import annotations

import re
from collections.abc import Iterable

MAX_SEED = 2**63 - 1

_PART = re.compile(r"(\d+)(?:-(\d+))?")


def parse_seeds(text: str) -> tuple[int, ...]:
    """``"0-3,7"`` -> ``(0, 1, 2, 3, 7)``.

    Raises:
        ValueError: with a sentence, for a part that is no number or range, a range that runs
            backwards, a seed above 2**63 - 1, or a seed named twice.
    """
    seeds: list[int] = []
    for part in text.split(","):
        match = _PART.fullmatch(part.strip())
        if match is None:
            raise ValueError(f"{part.strip()!r} is neither a seed nor a range of seeds such as 0-63")
        first = int(match[1])
        last = int(match[2]) if match[2] is not None else first
        if last < first:
            raise ValueError(f"the range {part.strip()} runs backwards; write {last}-{first}")
        if last > MAX_SEED:
            raise ValueError(f"the seed {last} is above 2**63 - 1")
        seeds.extend(range(first, last + 1))
    if len(set(seeds)) != len(seeds):
        once: set[int] = set()
        twice = next(s for s in seeds if s in once or once.add(s))
        raise ValueError(f"the seed {twice} is named twice")
    return tuple(seeds)


def format_seeds(seeds: Iterable[int]) -> str:
    """The shortest text of the grammar for these seeds, ascending: the inverse of `parse_seeds` up to order."""
    parts: list[list[int]] = []
    for seed in sorted(seeds):
        if parts and seed == parts[-1][1] + 1:
            parts[-1][1] = seed
        else:
            parts.append([seed, seed])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in parts)
