"""What a job makes of its items: files in its folder, and what is drawn once all of them are there.

`Product` is a picture and a sidecar for each item. `SeedPictures` adds what a folder of seeds has besides: run.json,
the contact sheet and an array. The experiments have products of their own.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ddim_cli.config.seeds import Seeds, format_seeds
from ddim_cli.errors import UsageError
from ddim_cli.outputs.files import File, Place
from ddim_cli.outputs.named import NamedFile, name_file
from ddim_cli.outputs.npz import PICTURES, write_npz
from ddim_cli.outputs.sidecar import describe_picture, identity
from ddim_cli.outputs.tar_folder import TarFolder
from ddim_cli.sampling.items import Choices, Item, SeedItems, seeds_of
from ddim_cli.sampling.job import Job
from ddim_cli.sampling.loop import Picture, Watch
from ddim_cli.sampling.record import item_record
from ddim_cli.sampling.reporter import Reporter


@dataclass(frozen=True)
class Ending:
    """What is left of a plan, and what was drawn or collected of it: None where it was not."""

    left: int
    sheet: Place | None = None
    npz: NamedFile | None = None


class Product:
    """A picture and a sidecar for each item, named after it."""

    # Whether `save` needs the final states, and the latents of inversions.
    keeps_x0 = False
    # Who watches a batch.
    watch: Watch | None = None

    def check(self, job: Job) -> None:
        """Refuse what could not be made or written in the end: better now than after hours. Raises DdimError."""

    def missing(self, job: Job, items: Sequence[Item]) -> Sequence[Item]:
        """Those of ``items`` that are not there, whole. Raises UsageError for files of other settings."""
        there = job.folder.sidecars()
        return [
            item
            for item in items
            if item.name not in there or not job.folder.is_done(item.name, item_identity(job, item), there[item.name])
        ]

    @contextmanager
    def claimed(self, job: Job, overwrite: bool, complete: bool) -> Iterator[None]:
        """The folder is this job's for as long as the block runs; nothing is to be made if it is ``complete``.

        With ``overwrite``, what is there of the job goes first. Raises UsageError.
        """
        if not complete:
            job.folder.remove_leftovers()
        if overwrite:
            self.remove(job)
        yield

    def remove(self, job: Job) -> None:
        for item in job.items:
            job.folder.remove(item.name)

    def save(self, job: Job, picture: Picture) -> None:
        """Write what belongs to a picture; called in a writer thread. Raises OSError."""
        self.save_pair(job, picture)

    def save_pair(self, job: Job, picture: Picture, **sections: Any) -> None:
        """Write picture and sidecar; ``sections`` of the sidecar come behind those of the run. Raises OSError."""
        item = picture.item
        record = {**item_record(job.record, item, picture.known), **sections}
        described = describe_picture(record, item.seed, picture.pixels, picture.batch_size)
        job.folder.write(item.name, described, picture.pixels, picture.seconds, item_identity(job, item))

    def close(self, job: Job, made: int, seconds: float, reporter: Reporter) -> Ending:
        """The job's own items are there: look at the rest of the plan, and draw what shows it if that is there too.

        Raises OSError, and RunError for a file that is damaged.
        """
        left = len(self.missing(job, others(job))) if job.shard.count > 1 else 0
        return Ending(left) if left else self.draw(job, made, reporter)

    def draw(self, job: Job, made: int, reporter: Reporter) -> Ending:
        """Draw what shows the whole plan, which is there. Raises as `close`."""
        return Ending(0)

    def plan(self, job: Job) -> dict[str, Any]:
        """What ``--dry-run --json`` says of the items."""
        return {}

    def files(self, job: Job, item: Item) -> list[File]:
        """The files of an item, its picture first."""
        return [job.folder.picture(item.name)]

    def count(self, job: Job) -> int:
        """How many items of the whole plan are there, by their names alone."""
        there = job.folder.sidecars()
        return sum(item.name in there for item in job.plan)


def others(job: Job) -> list[Item]:
    """The items of the plan that other shards make."""
    own = {item.name for item in job.items}
    return [item for item in job.plan if item.name not in own]


def item_identity(job: Job, item: Item) -> dict[str, Any]:
    """What decides the item's picture."""
    return identity(item_record(job.record, item)) if item.about else job.identity


def name_npz(path: Path, overwrite: bool) -> NamedFile:
    """The file of ``--npz``. UsageError for one that is not to be written, so that it is said before hours of sampling.

    ``overwrite`` is the one of the run, which makes the pictures anew too: so it is not the first thing to be advised.
    """
    remedy = "delete it (--overwrite replaces it, and makes the pictures anew)"
    return name_file(path, PICTURES, "--npz", overwrite, remedy)


def check_npz(job: Job, to: NamedFile | None) -> None:
    """UsageError where an array of the pictures in the folder would not be one of the pictures that were made."""
    if to is not None and not job.folder.coding.is_lossless:
        raise UsageError(
            "--npz collects the pixels from the files, and a JPEG's are not those that were made; take --image-format "
            "png or webp"
        )


def collect_npz(job: Job, items: Sequence[Item], to: NamedFile) -> None:
    """Write the pictures of ``items`` as one array. Raises RunError where it or a picture cannot be read or written."""
    labels = [item.class_number for item in items if item.class_number is not None]
    pictures = (job.folder.picture(item.name) for item in items)
    write_npz(to, pictures, len(items), labels or None, job.folder.fsync)


@dataclass(frozen=True)
class SeedPictures(Product):
    """The pictures of seeds, run.json and, if ``npz`` is given, all of them as one array in the order of the seeds."""

    npz: NamedFile | None = None

    def check(self, job: Job) -> None:
        check_npz(job, self.npz)

    @contextmanager
    def claimed(self, job: Job, overwrite: bool, complete: bool) -> Iterator[None]:
        folder = job.folder
        if overwrite:
            folder.clear(seeds_of(job.items), job.identity)
        with folder.claimed(seeds_of(job.plan), job.record, complete):
            yield

    def missing(self, job: Job, items: Sequence[Item]) -> Sequence[Item]:
        if isinstance(items, SeedItems):
            job.folder.check_plan(seeds_of(job.plan))
            return replace(items, seeds=job.folder.missing(items.seeds, job.identity))
        return super().missing(job, items)

    def plan(self, job: Job) -> dict[str, Any]:
        return {"seeds": format_seeds(seeds_of(job.items))}

    def count(self, job: Job) -> int:
        if isinstance(job.folder, TarFolder):
            return job.folder.count()
        seeds = Seeds.of(seeds_of(job.plan))
        return sum(seed in seeds for seed in job.folder.numbered("json"))

    def close(self, job: Job, made: int, seconds: float, reporter: Reporter) -> Ending:
        """What is left is of the folder's plan, which other runs may have extended."""
        folder, planned, grid = job.folder, job.folder.planned(), job.run.config.output.grid
        # A plan no longer than this run's own is all of it.
        rest = planned.without(set(seeds_of(job.items))) if len(planned) > len(job.items) else Seeds(())
        left = folder.left(rest, job.identity)
        if not left:
            folder.finish(made, seconds, grid, planned)
        sheet = folder.grid if grid and folder.grid.exists() else None
        plan = Seeds.of(seeds_of(job.plan))
        if self.npz is None or any(seed in plan for seed in left):
            return Ending(len(left), sheet)
        reporter.closing(f"writing {self.npz}")
        collect_npz(job, SeedItems(sorted(plan), Choices.of(job.run.config)), self.npz)
        return Ending(len(left), sheet, self.npz)
