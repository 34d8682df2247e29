"""Which images a process makes, and in which batches: seeds -> shard -> batches, less what is done."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from ddim_cli.config.seeds import Seeds
from ddim_cli.errors import UsageError


@dataclass(frozen=True)
class Shard:
    """Part ``index`` of ``count``: the positions p of a plan with p mod count = index mod count.

    So 0..N-1 and 1..N both cover everything once.
    """

    index: int = 0
    count: int = 1

    @classmethod
    def parse(cls, text: str) -> Shard:
        """``"2/8"``. Raises UsageError for anything else, and for I above N."""
        match = re.fullmatch(r"(\d+)/(\d+)", text.strip())
        if match is None or int(match[2]) == 0:
            raise UsageError(f"--shard {text}: write I/N, for example 0/8; N is the number of parts")
        index, count = int(match[1]), int(match[2])
        if index > count:
            raise UsageError(
                f"--shard {text}: there is no part {index} of {count}; I counts from 0 to N-1 or from 1 to N"
            )
        return cls(index, count)

    def of(self, seeds: Sequence[int]) -> Seeds:
        return Seeds.of(seeds)[self.index % self.count :: self.count]


def even_batch_size(count: int, most: int) -> int:
    """The smallest batch size that needs no more batches than ``most`` does: 100 images at most 64 -> 50."""
    batches = -(-count // most)
    return -(-count // batches)


def batches(seeds: Sequence[int], batch_size: int) -> Iterator[tuple[int, ...]]:
    """Consecutive groups of ``batch_size`` seeds; the last may be smaller."""
    for start in range(0, len(seeds), batch_size):
        yield tuple(seeds[start : start + batch_size])


def padded(seeds: Sequence[int], batch_size: int) -> tuple[int, ...]:
    """``seeds`` made up to ``batch_size`` by repeating the last, so that the network always sees as many rows."""
    return (*seeds, *[seeds[-1]] * (batch_size - len(seeds)))
