"""One run, from settings that are known to work to files on disk."""

from __future__ import annotations

import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ddim_cli.config.seeds import parse_classes
from ddim_cli.diffusion.coefficients import make_table
from ddim_cli.diffusion.step import X0Treatment
from ddim_cli.errors import InterruptedRunError, RunError, UsageError
from ddim_cli.models.load import load_described
from ddim_cli.outputs.folder import OutputFolder
from ddim_cli.outputs.sidecar import identity, identity_hash
from ddim_cli.outputs.writer import PictureWriter
from ddim_cli.sampling.closing import close_folder, collect_npz
from ddim_cli.sampling.guidance import with_guidance
from ddim_cli.sampling.loop import Network, Sampler, run_batches
from ddim_cli.sampling.plan import Shard
from ddim_cli.sampling.precision import (
    choose_batch_size,
    choose_device,
    choose_dtype,
    runtime_record,
    set_tf32,
)
from ddim_cli.sampling.record import make_record
from ddim_cli.sampling.resolve import Run


@dataclass(frozen=True)
class Job:
    """A run on this machine: ``seeds`` are this process's share of the plan, before what is done is taken out."""

    run: Run
    seeds: tuple[int, ...]
    shard: Shard
    device: torch.device
    dtype: torch.dtype
    batch_size: int
    record: Mapping[str, Any]
    folder: OutputFolder

    @property
    def identity(self) -> dict[str, Any]:
        return identity(self.record)


@dataclass(frozen=True)
class Summary:
    """What a run did.

    ``made`` images now, ``present`` ones were there already; ``seconds`` from the first batch to the
    last file; ``left`` images of the folder's plan that other shards or runs have still to make;
    ``npz`` the array that was written, if one was.
    """

    made: int
    present: int
    seconds: float
    folder: Path
    grid: Path | None
    left: int
    npz: Path | None = None

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
            "grid": str(self.grid) if self.grid else None,
            "npz": str(self.npz) if self.npz else None,
            "finished": self.left == 0,
            "left": self.left,
        }


class Reporter:
    """Told what a run is doing. This one says nothing."""

    def loading(self, job: Job) -> None:
        """The weights are about to be loaded."""

    def started(self, job: Job, todo: Sequence[int]) -> None:
        """Sampling begins with these seeds."""

    def step(self, done: int) -> None:
        """A step of the current batch has been launched; ``done`` of them so far."""

    def batch(self, images: int) -> None:
        """A batch of this many images has been handed to the writers."""

    def stopped(self) -> None:
        """No more of the above follows."""

    def interrupted(self) -> None:
        """Ctrl-C: what was denoised is being written."""

    def closing(self, what: str) -> None:
        """All is made; something that takes a while follows."""


def make_sampler(
    run: Run, network: Network, device: torch.device, dtype: torch.dtype, shape: tuple[int, int, int]
) -> Sampler:
    """What the denoising loop needs. Raises ConfigError for a grid whose coefficients cannot be computed."""
    config = run.config
    guidance = config.sampling.guidance_scale
    if guidance != 1:
        network = with_guidance(network, config.model.null_class, guidance, config.sampling.guidance_rescale)
    return Sampler(
        network=network,
        table=make_table(config.scheduler, config.sampling, run.timesteps, device),
        treatment=X0Treatment.of(config.scheduler, config.sampling),
        shape=shape,
        device=device,
        dtype=dtype,
        draws_noise=config.sampling.eta > 0 or config.sampling.variance == "large",
        classes=parse_classes(config.sampling.classes) if config.sampling.classes is not None else (),
    )


def make_job(run: Run, shard: Shard = Shard()) -> Job:
    """Settle device, dtype, batch size and folder. Reads the weights only to hash them.

    Raises:
        UsageError: for a device that is not there, or a folder that cannot be used.
        ConfigError: for coefficients that cannot be computed.
    """
    config = run.config
    device = choose_device(config.runtime.device)
    dtype = choose_dtype(config.runtime.dtype, device)
    make_table(config.scheduler, config.sampling, run.timesteps)
    seeds = shard.of(config.seeds())
    # From the whole plan, so that its shards see batches of one size, and equal pictures.
    batch_size = choose_batch_size(config.sampling.batch_size, len(config.seeds()), run.model, device, dtype)
    record = make_record(run, runtime_record(config.runtime, device, dtype, batch_size))
    name = f"{run.model.name}-{record['sampling']['steps']}steps-{identity_hash(record)}"
    try:
        path = Path(config.output.dir).expanduser() if config.output.dir else Path("outputs") / name
    except RuntimeError as error:
        raise UsageError(f"output folder {config.output.dir}: {error}") from None
    folder = OutputFolder(path, config.output.subdirs, config.output.fsync)
    folder.check_usable()
    return Job(run, seeds, shard, device, dtype, batch_size, record, folder)


def compiled(network: torch.nn.Module, device: torch.device) -> torch.nn.Module:
    """The network through torch.compile. Raises UsageError where a CPU build has no C++ compiler."""
    if device.type == "cpu" and not any(shutil.which(name) for name in ("c++", "g++", "clang++", "cl")):
        raise UsageError("--compile needs a C++ compiler, and none was found; install one, or use --no-compile")
    return torch.compile(network)


def load_network(job: Job) -> Network:
    """The job's network on its device, in its dtype, compiled if asked for."""
    set_tf32(job.run.config.runtime.tf32)
    model = load_described(job.run.model, job.device, job.dtype)
    return replace(model, network=compiled(model.network, job.device)) if job.run.config.runtime.compile else model


def _sample_into(job: Job, todo: Sequence[int], network: Network, reporter: Reporter) -> int:
    """Make the pictures of ``todo``; how many there are now. On Ctrl-C, what was denoised is still written."""
    model = job.run.model
    sampler = make_sampler(job.run, network, job.device, job.dtype, (model.channels, *model.size))
    writer = PictureWriter(job.folder, job.record)
    made = 0

    def on_step(done: int) -> None:
        # A full disk ends the run now, and not after a batch that cannot be written.
        writer.check()
        reporter.step(done)

    try:
        for pictures in run_batches(sampler, todo, job.batch_size, on_step):
            for picture in pictures:
                writer.write(picture.seed, picture.pixels, picture.seconds)
            made += len(pictures)
            reporter.batch(len(pictures))
    except KeyboardInterrupt:
        reporter.stopped()
        reporter.interrupted()
        raise InterruptedRunError(
            f"interrupted: {made} of {len(todo)} images were made and are in {job.folder.path}; "
            "the same command goes on from there"
        ) from None
    except RuntimeError as error:
        # On a CPU, torch says so in a plain RuntimeError.
        if not isinstance(error, torch.OutOfMemoryError) and "can't allocate memory" not in str(error):
            raise
        raise RunError(
            f"out of memory on {job.device} with a batch of {job.batch_size}; use a smaller --batch-size"
        ) from None
    finally:
        writer.close()
    return made


def pending(job: Job, overwrite: bool = False) -> list[int]:
    """The seeds of the job that are to be made.

    Raises:
        UsageError: if the folder holds pictures of other settings and ``overwrite`` is false.
    """
    if overwrite:
        return list(job.seeds)
    job.folder.check_settings(job.identity)
    return job.folder.missing(job.seeds, job.identity)


def execute(job: Job, reporter: Reporter | None = None, overwrite: bool = False, npz: Path | None = None) -> Summary:
    """Make what is missing of a job; into ``npz``, once the whole plan is there, all its pictures as one array.

    Raises:
        UsageError: if the folder holds pictures of other settings and ``overwrite`` is false.
        RunError: if the run fails; what was finished stays.
        InterruptedRunError: on Ctrl-C; likewise.
    """
    reporter = reporter or Reporter()
    folder, settings = job.folder, job.identity
    plan, todo = job.run.config.seeds(), pending(job, overwrite)
    network = None
    if todo:
        reporter.loading(job)
        network = load_network(job)
    folder.create()
    if overwrite:
        folder.clear(job.seeds, settings)
    folder.start(plan, job.record, complete=not todo)
    started = time.perf_counter()
    made = 0
    if todo:
        reporter.started(job, todo)
        try:
            made = _sample_into(job, todo, network, reporter)
        finally:
            reporter.stopped()
    seconds = time.perf_counter() - started
    return conclude(job, made, seconds, reporter, npz)


def conclude(job: Job, made: int, seconds: float, reporter: Reporter, npz: Path | None) -> Summary:
    """What is to be done once the job's own images are there, and the summary."""
    folder, left = job.folder, close_folder(job, made, seconds)
    collected = False
    if npz is not None:
        reporter.closing(f"writing {npz}")
        collected = collect_npz(job, left, npz)
    grid = folder.grid if job.run.config.output.grid and folder.grid.exists() else None
    return Summary(made, len(job.seeds) - made, seconds, folder.path, grid, len(left), npz if collected else None)
