"""Which part of a plan a process makes, and how many items a batch has. Needs no torch."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

from ddim_cli.errors import UsageError

T = TypeVar("T")


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

    def of(self, plan: Sequence[T]) -> Sequence[T]:
        """This part of a plan, in its order."""
        return plan if self.count == 1 else plan[self.index % self.count :: self.count]


def even_batch_size(count: int, most: int) -> int:
    """The smallest batch size that needs no more batches than ``most`` does: 100 images at most 64 -> 50."""
    batches = -(-count // most)
    return -(-count // batches)
