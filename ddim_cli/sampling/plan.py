"""Which part of a plan a process makes, and how many items a batch has. Needs no torch."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from ddim_cli.errors import UsageError

T = TypeVar("T")
# What tells a process of a job array its number: of Slurm, and of an Indexed Job of Kubernetes, which counts from 0.
SLURM_INDEX, KUBERNETES_INDEX = "SLURM_ARRAY_TASK_ID", "JOB_COMPLETION_INDEX"
OF_ENVIRONMENT = "env"


@dataclass(frozen=True)
class Shard:
    """Part ``index`` of ``count``: the positions p of a plan with p mod count = index mod count.

    Where positions come in blocks of several, as in tar shards, the blocks b with b mod count = index mod count. So
    0..N-1 and 1..N both cover everything once.
    """

    index: int = 0
    count: int = 1

    @classmethod
    def parse(cls, text: str) -> Shard:
        """``"2/8"``. Raises UsageError for anything else, and for I above N."""
        match = re.fullmatch(r"(\d+)/(\d+)", text.strip())
        if match is None or int(match[2]) == 0:
            raise UsageError(
                f"--shard {text}: write I/N, for example 0/8, or env/N in a job array; N is the number of parts"
            )
        index, count = int(match[1]), int(match[2])
        if index > count:
            raise UsageError(
                f"--shard {text}: there is no part {index} of {count}; I counts from 0 to N-1 or from 1 to N"
            )
        return cls(index, count)

    def of(self, plan: Sequence[T]) -> Sequence[T]:
        """This part of a plan, in its order."""
        return plan if self.count == 1 else plan[self.index % self.count :: self.count]

    def blocks(self, length: int, size: int) -> list[range]:
        """This part of a plan of ``length`` positions in blocks of ``size``, the last of which may be shorter."""
        starts = range(self.index % self.count * size, length, self.count * size)
        return [range(start, min(start + size, length)) for start in starts]


def shard_of_array(text: str, environment: Mapping[str, str]) -> Shard:
    """``"env/8"``: the part whose number the environment tells, of 8.

    The number of parts is not read from there: a job array that is submitted again, for the parts that failed, has
    another one. Raises UsageError for anything else, and where no number is told, or none of a part.
    """
    match = re.fullmatch(rf"{OF_ENVIRONMENT}/([0-9]{{1,20}})", text.strip())
    if match is None or int(match[1]) == 0:
        raise UsageError(
            f"--shard {text[:40]}: write env/N, for example env/8; N is the number of parts, which the environment "
            "does not tell: an array that is submitted again for a few of its parts has another number of tasks"
        )
    told = {name: environment[name].strip() for name in (SLURM_INDEX, KUBERNETES_INDEX) if environment.get(name)}
    if not told:
        raise UsageError(
            f"--shard {text}: neither {SLURM_INDEX} nor {KUBERNETES_INDEX} is set, so this is no task of a job array; "
            "write I/N, for example 0/8"
        )
    if len(set(told.values())) > 1:
        both = " and ".join(f"{name} {value}" for name, value in told.items())
        raise UsageError(f"--shard {text}: {both} are both set, and differ; write I/N, for example 0/8")
    name, value = next(iter(told.items()))
    if re.fullmatch(r"[0-9]{1,20}", value) is None:
        raise UsageError(f"--shard {text}: {name} is {value[:40]!r}, which is no number of a part")
    index, count = int(value), int(match[1])
    if index > count - (name == KUBERNETES_INDEX):
        counts = "from 0 to N-1" if name == KUBERNETES_INDEX else "from 0 to N-1 or from 1 to N"
        raise UsageError(f"--shard {text}: {name} is {index}, and the numbers of {count} parts go {counts}")
    return Shard(index, count)


def even_batch_size(count: int, most: int) -> int:
    """The smallest batch size that needs no more batches than ``most`` does: 100 images at most 64 -> 50."""
    batches = -(-count // most)
    return -(-count // batches)
