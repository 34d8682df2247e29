"""Under torchrun each rank is a shard. No process group: images need no communication, the folder tells the rest."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from ddim_cli.errors import UsageError
from ddim_cli.sampling.plan import OF_ENVIRONMENT, Shard, shard_of_array
from ddim_cli.sampling.reporter import Reporter

if TYPE_CHECKING:
    from ddim_cli.sampling.executor import Summary
    from ddim_cli.sampling.job import Job
    from ddim_cli.sampling.product import Product

# Rank 0 waits for the others for as long as new images appear; this long without one, and it leaves.
SECONDS_WITHOUT_NEWS = 60.0
BATCHES_WITHOUT_NEWS = 10


@dataclass(frozen=True)
class Ranks:
    """What torchrun tells a process: its rank of ``size``, and its place ``local`` on its machine."""

    rank: int
    size: int
    local: int

    @classmethod
    def of(cls, environment: Mapping[str, str] = os.environ) -> Ranks | None:
        """None unless torchrun started this process: a stray RANK or WORLD_SIZE of something else means nothing.

        Raises UsageError for variables that torchrun would not have set so.
        """
        if not environment.get("TORCHELASTIC_RUN_ID"):
            return None
        try:
            rank, size, local = (int(environment[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
        except (KeyError, ValueError):
            raise UsageError(
                "TORCHELASTIC_RUN_ID is set, but RANK, WORLD_SIZE and LOCAL_RANK are not all numbers; start this with "
                "torchrun, or unset it"
            ) from None
        if not (0 <= rank < size and local >= 0):
            raise UsageError(f"RANK={rank}, WORLD_SIZE={size} and LOCAL_RANK={local} do not fit together")
        return cls(rank, size, local)

    @property
    def shard(self) -> Shard:
        return Shard(self.rank, self.size)

    def pick_gpu(self) -> None:
        """Make ``auto`` and ``cuda`` mean this rank's own GPU. Raises UsageError if there are fewer GPUs than ranks."""
        import torch

        if not torch.cuda.is_available():
            return
        count = torch.cuda.device_count()
        if self.local >= count:
            raise UsageError(
                f"rank {self.rank} is to use GPU {self.local}, but this machine shows {count}; give torchrun "
                f"--nproc-per-node={count}, or say --device"
            )
        torch.cuda.set_device(self.local)


def wait_for_others(
    count: Callable[[], int], wanted: int, seconds_a_batch: float, pause: Callable[[float], None] = time.sleep
) -> bool:
    """Wait until ``count()``, the images there are, reaches ``wanted``; False when no more appear.

    ``seconds_a_batch`` is what one of ours took: slower ranks get several times as long.
    """
    patience = max(SECONDS_WITHOUT_NEWS, BATCHES_WITHOUT_NEWS * seconds_a_batch)
    most, since = count(), time.monotonic()
    while most < wanted:
        if time.monotonic() - since > patience:
            return False
        pause(1.0)
        found = count()
        if found > most:
            most, since = found, time.monotonic()
    return True


def choose_shard(shard: str | None, ranks: Ranks | None, environment: Mapping[str, str] = os.environ) -> Shard:
    """The part of the plan that this process makes: as --shard says, or as torchrun's rank does.

    ``"env"`` is the rank, ``"env/N"`` the task of a job array. Raises UsageError.
    """
    if ranks is None:
        if shard is None:
            return Shard()
        of_array = shard.strip().startswith(OF_ENVIRONMENT)
        return shard_of_array(shard, environment) if of_array else Shard.parse(shard)
    if shard is not None and shard.strip() != OF_ENVIRONMENT:
        raise UsageError(
            f"--shard {shard}: under torchrun each rank is a shard already ({ranks.rank}/{ranks.size} here); leave "
            "--shard out, or start without torchrun"
        )
    return ranks.shard


def execute_ranks(
    job: Job, product: Product, ranks: Ranks, reporter: Reporter | None = None, overwrite: bool = False
) -> Summary:
    """As `executor.execute`, of one rank of several; what it made is its own share.

    Rank 0 stays to show the others' progress, and so knows what is left of the whole plan, and draws what shows it.
    """
    from ddim_cli.sampling.executor import conclude, execute

    reporter = reporter or Reporter()
    summary = execute(job, product, reporter, overwrite)
    if ranks.rank:
        return summary
    if not summary.left:
        # The others were quicker.
        if summary.made:
            reporter.others_done(len(job.plan), len(job.plan))
        return summary
    reporter.waiting_for_others(job, product)

    def count() -> int:
        reporter.step(0)
        return product.count(job)

    wait_for_others(count, len(job.plan), summary.seconds / max(1, -(-summary.made // job.batch_size)))
    reporter.stopped()
    whole = conclude(job, product, 0, summary.seconds, reporter)
    reporter.others_done(count(), len(job.plan))
    return replace(whole, made=summary.made, present=summary.present)
