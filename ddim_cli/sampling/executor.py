"""The one executor: from a job to its product on disk. Every command that makes pictures goes this way."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ddim_cli.errors import InterruptedRunError
from ddim_cli.models.load import SamplingNetwork
from ddim_cli.outputs.files import Place
from ddim_cli.outputs.named import NamedFile
from ddim_cli.outputs.writer import BackgroundWriter, not_written
from ddim_cli.sampling.host import keep_memory
from ddim_cli.sampling.items import Item, Kind, SeedItems
from ddim_cli.sampling.job import Job
from ddim_cli.sampling.loop import Denoiser, run_batches
from ddim_cli.sampling.network import Networks
from ddim_cli.sampling.precision import tf32
from ddim_cli.sampling.product import Product
from ddim_cli.sampling.reporter import Reporter
from ddim_cli.sampling.rows import RowItems
from ddim_cli.sampling.sampler import make_sampler


@dataclass(frozen=True)
class Summary:
    """What a run did.

    ``made`` images now, ``present`` ones were there already; ``seconds`` from the first batch to the last file;
    ``left`` images of the plan that other shards or runs have still to make; ``sheet`` the picture that shows the
    plan, and ``npz`` the array that was written, where there is one.
    """

    made: int
    present: int
    seconds: float
    folder: Place
    sheet: Place | None
    left: int
    npz: NamedFile | None = None

    @property
    def images_per_second(self) -> float | None:
        return self.made / self.seconds if self.made and self.seconds > 0 else None

    def as_json(self) -> dict[str, Any]:
        rate = self.images_per_second
        return {
            "images": self.made + self.present,
            "made": self.made,
            "present": self.present,
            "seconds": round(self.seconds, 3),
            "images_per_second": round(rate, 3) if rate else None,
            "folder": str(self.folder),
            "grid": str(self.sheet) if self.sheet else None,
            "npz": str(self.npz) if self.npz else None,
            "finished": self.left == 0,
            "left": self.left,
        }


def pending(job: Job, product: Product, overwrite: bool = False) -> Sequence[Item]:
    """The items of the job that are to be made.

    Raises:
        UsageError: if the folder holds pictures of other settings and ``overwrite`` is false, or cannot be written to
            though something is to be made.
    """
    product.check(job)
    if overwrite:
        todo = job.items
    else:
        job.folder.check_settings(job.identity)
        todo = product.missing(job, job.items)
    if todo:
        job.folder.check_writable()
    return todo


def by_kind(items: Sequence[Item], block: int | None = None) -> Sequence[Item]:
    """Items that can share a batch beside each other, otherwise in their order; of rows, within their ``block``."""
    if isinstance(items, RowItems):
        return items.by_kind(block)
    if isinstance(items, SeedItems):
        return items
    kinds: dict[Kind, int] = {}
    return sorted(items, key=lambda item: kinds.setdefault(item.kind, len(kinds)))


def execute(
    job: Job,
    product: Product,
    reporter: Reporter | None = None,
    overwrite: bool = False,
    networks: Networks | None = None,
    anew: bool = False,
) -> Summary:
    """Make what is missing of a job. ``networks`` loads its network where something is to be made.

    With ``anew`` all items are made, also those that are there, if they are of the same settings.

    Raises:
        UsageError: as `pending` does.
        ConfigError: for settings that the product cannot be made with.
        RunError: if the run fails; what was finished stays.
        InterruptedRunError: on Ctrl-C; likewise.
    """
    reporter, networks = reporter or Reporter(), networks or Networks()
    todo = pending(job, product, overwrite)
    if anew:
        todo = job.items
        job.folder.check_writable()
    denoiser = None
    with tf32(job.run.config.runtime.tf32):
        if todo:
            todo = by_kind(todo, job.block)
            job, denoiser = load(job, product, len(todo), networks, reporter)
        job.folder.create()
        with product.claimed(job, overwrite, complete=not todo), job.folder.working():
            if anew:
                product.remove(job)
            started, made = time.perf_counter(), 0
            if denoiser is not None:
                reporter.started(job, product, len(todo))
                try:
                    made = _make(job, product, todo, denoiser, reporter)
                finally:
                    reporter.stopped()
            return conclude(job, product, made, time.perf_counter() - started, reporter)


def load(job: Job, product: Product, images: int, networks: Networks, reporter: Reporter) -> tuple[Job, Denoiser]:
    """The job as it will run, for so many ``images``, and what makes them. Raises as `Networks.load` and ModelError."""
    job = job.fitted(reporter)
    reporter.loading(job)
    network, compiled = networks.load(job.use(images), reporter)
    job = job.with_compiled(compiled)
    denoiser = make_denoiser(job, product, network, reporter)
    # Only now: what loading frees is not what steps need again.
    keep_memory()
    return job, denoiser


def make_denoiser(job: Job, product: Product, network: SamplingNetwork, reporter: Reporter) -> Denoiser:
    """What makes the pictures of a job, its text encoder and autoencoder loaded too. Raises ModelError."""
    sampler = make_sampler(
        job.run,
        network,
        job.device,
        job.dtype,
        keeps_x0=product.keeps_x0,
        warn=reporter.warn,
    )
    sampler.prepare()
    return Denoiser(sampler, product.watch, reporter.slower)


def _make(job: Job, product: Product, todo: Sequence[Item], denoiser: Denoiser, reporter: Reporter) -> int:
    """Make the pictures of ``todo``; how many there are now. On Ctrl-C, what was denoised is still written."""
    made = 0
    with BackgroundWriter(job.folder.path) as writer:

        def on_step(done: int) -> None:
            # A full disk ends the run now, and not after a batch that cannot be written.
            writer.check()
            reporter.step(done)

        try:
            for pictures in run_batches(denoiser, todo, job.batch_size, on_step, reporter.halved):
                for picture in pictures:
                    writer.submit(product.save, job, picture)
                made += len(pictures)
                reporter.batch(len(pictures))
        except KeyboardInterrupt:
            reporter.stopped()
            reporter.interrupted()
            there = "are" if job.folder.keeps_all else "are, where their shards are whole,"
            raise InterruptedRunError(
                f"interrupted: {made} of {len(todo)} images were made and {there} in {job.folder.path}; "
                "the same command goes on from there"
            ) from None
    return made


def conclude(job: Job, product: Product, made: int, seconds: float, reporter: Reporter) -> Summary:
    """Do what is to be done once the job's own items are there. Raises RunError."""
    try:
        ending = product.close(job, made, seconds, reporter)
    except OSError as error:
        raise not_written(error, job.folder.path) from None
    reporter.stopped()
    present = len(job.items) - made
    return Summary(made, present, seconds, job.folder.path, ending.sheet, ending.left, ending.npz)
