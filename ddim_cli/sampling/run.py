"""One run, from settings that are known to work to files on disk."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ddim_cli.config.seeds import parse_classes
from ddim_cli.diffusion.coefficients import StepTable, make_inverse_table, make_table
from ddim_cli.diffusion.step import X0Treatment
from ddim_cli.errors import InterruptedRunError, UsageError
from ddim_cli.models.device import choose_device, choose_dtype
from ddim_cli.models.load import SamplingNetwork
from ddim_cli.outputs.folder import OutputFolder
from ddim_cli.outputs.named import NamedFile
from ddim_cli.outputs.sidecar import identity, identity_hash
from ddim_cli.outputs.writer import PictureWriter
from ddim_cli.sampling.closing import close_folder, collect_npz
from ddim_cli.sampling.compiled import Target, is_kept
from ddim_cli.sampling.guidance import with_guidance
from ddim_cli.sampling.host import keep_memory
from ddim_cli.sampling.loop import Sampler, run_batches
from ddim_cli.sampling.network import Network, as_network, at_steps, load_network, with_projections
from ddim_cli.sampling.plan import Shard
from ddim_cli.sampling.precision import (
    choose_batch_size,
    halve_to_fit,
    runtime_record,
    set_tf32,
)
from ddim_cli.sampling.record import make_record
from ddim_cli.sampling.resolve import Run


@dataclass(frozen=True)
class Job:
    """A run on this machine: ``seeds`` are this process's share of the plan, before what is done is taken out."""

    run: Run
    seeds: Sequence[int]
    shard: Shard
    device: torch.device
    dtype: torch.dtype
    batch_size: int
    record: Mapping[str, Any]
    folder: OutputFolder

    @property
    def identity(self) -> dict[str, Any]:
        return identity(self.record)

    @property
    def target(self) -> Target:
        """What its network would be compiled for."""
        return network_target(self.run, self.device, self.dtype, self.batch_size)


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

    def started(self, job: Job, todo: Sequence[int], passes: int = 1) -> None:
        """Sampling begins with these seeds; each image goes over the grid as often as ``passes`` says."""

    def step(self, done: int) -> None:
        """A step of the current batch has been launched; ``done`` of them so far."""

    def batch(self, images: int) -> None:
        """A batch of this many images has been handed to the writers."""

    def compiling(self, job: Job) -> None:
        """The network is about to be compiled."""

    def note(self, text: str) -> None:
        """Something that a person who looks closer wants to know."""

    def halved(self, batch_size: int) -> None:
        """Memory did not suffice; from here on batches are of this size."""

    def stopped(self) -> None:
        """No more of the above follows."""

    def interrupted(self) -> None:
        """Ctrl-C: what was denoised is being written."""

    def closing(self, what: str) -> None:
        """All is made; something that takes a while follows."""


def make_sampler(
    run: Run,
    network: SamplingNetwork | Network,
    device: torch.device,
    dtype: torch.dtype,
    shape: tuple[int, int, int],
    keeps_x0: bool = True,
    inverse: bool = False,
) -> Sampler:
    """What the denoising loop needs; with ``inverse`` what the way up the same grid needs, without clipping.

    Raises:
        ConfigError: for a grid whose coefficients cannot be computed.
    """
    config = run.config
    make = make_inverse_table if inverse else make_table
    table = make(config.scheduler, config.sampling, run.timesteps, device)
    asked = starting_timesteps(run, table) if inverse else table.timesteps
    guidance = config.sampling.guidance_scale
    if hasattr(network, "project") and config.sampling.classes is None:
        step = with_projections(network, asked)
    else:
        network = as_network(network) if hasattr(network, "project") else network
        if guidance != 1:
            network = with_guidance(network, config.model.null_class, guidance, config.sampling.guidance_rescale)
        step = at_steps(network, asked)
    return Sampler(
        network=step,
        table=table,
        treatment=X0Treatment() if inverse else X0Treatment.of(config.scheduler, config.sampling),
        shape=shape,
        device=device,
        dtype=dtype,
        draws_noise=config.sampling.eta > 0 or config.sampling.variance == "large",
        classes=parse_classes(config.sampling.classes) if config.sampling.classes is not None else (),
        keeps_x0=keeps_x0,
    )


def job_sampler(job: Job, network: SamplingNetwork, keeps_x0: bool = True, inverse: bool = False) -> Sampler:
    """`make_sampler` of a job. Raises ConfigError."""
    shape = (job.run.model.channels, *job.run.model.size)
    return make_sampler(job.run, network, job.device, job.dtype, shape, keeps_x0, inverse)


def starting_timesteps(run: Run, table: StepTable) -> Tensor:
    """At which timestep each step of an inverse table asks the network: that of the level at which it starts.

    So a step up is Euler's step of the ODE (DDIM, eq. 13), as a step down is. A picture without noise is asked about at
    timestep 0, the level nearest to it; a network that embeds log t, at the lowest of the grid. int64 [N] on the
    table's device.
    """
    embeds_log = run.model is not None and run.model.network.get("time_embedding_type") == "fourier"
    lowest = run.timesteps[-1] if embeds_log else 0
    return table.timesteps.new_tensor([lowest if t < 0 else t for t in table.prev_timesteps])


def make_job(run: Run, shard: Shard = Shard(), ending: str = "", pads: bool = False) -> Job:
    """Settle device, dtype, batch size and folder. Reads the weights only to hash them.

    ``ending`` is that of the default folder's name, for what is not the pictures of seeds. With ``pads`` the network
    sees as many rows as were asked for though the plan has fewer images: so are equal hashes had again.

    Raises:
        UsageError: for a device that is not there, or a folder that cannot be used.
        ConfigError: for coefficients that cannot be computed.
    """
    config = run.config
    device = choose_device(config.runtime.device)
    dtype = choose_dtype(config.runtime.dtype, device)
    set_tf32(config.runtime.tf32)
    make_table(config.scheduler, config.sampling, run.timesteps)
    seeds = shard.of(config.seeds())
    # From the whole plan, so that its shards see batches of one size, and equal pictures.
    batch_size = config.sampling.batch_size
    if not pads or batch_size == "auto":
        batch_size = choose_batch_size(batch_size, len(config.seeds()), run.model, device, dtype)
    record = make_record(run, runtime_record(config.runtime, device, dtype, batch_size))
    name = f"{run.model.name}-{record['sampling']['steps']}steps-{identity_hash(record)}{ending}"
    try:
        path = Path(config.output.dir).expanduser() if config.output.dir else Path("outputs") / name
    except RuntimeError as error:
        raise UsageError(f"output folder {config.output.dir}: {error}") from None
    folder = OutputFolder(path, config.output.subdirs, config.output.fsync, run.model.size)
    folder.check_usable()
    job = Job(run, seeds, shard, device, dtype, batch_size, record, folder)
    # As far as can be told before the network is there.
    record["runtime"]["compile"] = config.runtime.compile is True or (
        config.runtime.compile == "auto" and is_kept(job.target)
    )
    return job


def rows_an_image(run: Run) -> int:
    """How many rows the network sees for an image: with guidance, also one without a class."""
    return 1 if run.config.sampling.guidance_scale == 1 else 2


def network_target(run: Run, device: torch.device, dtype: torch.dtype, batch_size: int) -> Target:
    """What the run's network would be compiled for."""
    return Target(run.model, device, dtype, batch_size * rows_an_image(run))


def fit_in_memory(job: Job, reporter: Reporter) -> Job:
    """The job, in batches for which the host's memory suffices by an estimate."""
    batch_size = halve_to_fit(job.batch_size, job.run.model, job.device, job.dtype, rows_an_image(job.run))
    if batch_size == job.batch_size:
        return job
    reporter.halved(batch_size)
    runtime = {**job.record["runtime"], "batch_size": batch_size}
    return replace(job, batch_size=batch_size, record={**job.record, "runtime": runtime})


def load_run_network(
    run: Run,
    device: torch.device,
    dtype: torch.dtype,
    batch_size: int,
    images: int,
    compiling: Callable[[], None] = lambda: None,
    note: Callable[[str], None] = lambda text: None,
) -> tuple[SamplingNetwork, bool]:
    """The run's network, to make ``images`` with, and whether it is compiled code; see `load_network`."""
    target = network_target(run, device, dtype, batch_size)
    calls = -(-images // batch_size) * len(run.timesteps)
    return load_network(target, run.config.runtime.compile, calls, compiling, note)


def load_job_network(job: Job, images: int, reporter: Reporter) -> tuple[SamplingNetwork, Job]:
    """The job's network, and the job that says whether it is compiled code."""
    network, compiled = load_run_network(
        job.run, job.device, job.dtype, job.batch_size, images, lambda: reporter.compiling(job), reporter.note
    )
    return network, says_compiled(job, compiled)


def says_compiled(job: Job, compiled: bool) -> Job:
    """The job with a record that says whether its network is compiled code."""
    return replace(job, record={**job.record, "runtime": {**job.record["runtime"], "compile": compiled}})


def _sample_into(job: Job, todo: Sequence[int], network: SamplingNetwork, reporter: Reporter) -> int:
    """Make the pictures of ``todo``; how many there are now. On Ctrl-C, what was denoised is still written."""
    sampler = job_sampler(job, network, keeps_x0=False)
    writer = PictureWriter(job.folder, job.record)
    made = 0

    def on_step(done: int) -> None:
        # A full disk ends the run now, and not after a batch that cannot be written.
        writer.check()
        reporter.step(done)

    try:
        for pictures in run_batches(sampler, todo, job.batch_size, on_step, reporter.halved):
            for picture in pictures:
                writer.write(picture.seed, picture.pixels, picture.seconds, picture.batch_size)
            made += len(pictures)
            reporter.batch(len(pictures))
    except KeyboardInterrupt:
        reporter.stopped()
        reporter.interrupted()
        raise InterruptedRunError(
            f"interrupted: {made} of {len(todo)} images were made and are in {job.folder.path}; "
            "the same command goes on from there"
        ) from None
    finally:
        writer.close()
    return made


def pending(job: Job, overwrite: bool = False) -> Sequence[int]:
    """The seeds of the job that are to be made.

    Raises:
        UsageError: if the folder holds pictures of other settings and ``overwrite`` is false, or cannot be written to
            though something is to be made.
    """
    if overwrite:
        found = job.seeds
    else:
        job.folder.check_settings(job.identity)
        found = job.folder.missing(job.seeds, job.identity)
    if found:
        job.folder.check_writable()
    return found


# (job, images to make, reporter) -> the job's network, and the job that says whether it is compiled code
Load = Callable[[Job, int, Reporter], tuple[SamplingNetwork, Job]]


def execute(
    job: Job,
    reporter: Reporter | None = None,
    overwrite: bool = False,
    npz: NamedFile | None = None,
    load: Load = load_job_network,
    anew: bool = False,
) -> Summary:
    """Make what is missing of a job; into ``npz``, once the whole plan is there, all its pictures as one array.

    ``load`` gives the network where something is to be made. With ``anew`` all images are made, also those that are
    there, if they are of the same settings.

    Raises:
        UsageError: as `pending` does.
        RunError: if the run fails; what was finished stays.
        InterruptedRunError: on Ctrl-C; likewise.
    """
    reporter = reporter or Reporter()
    keep_memory()
    folder, settings = job.folder, job.identity
    plan, todo = job.run.config.seeds(), pending(job, overwrite)
    if anew:
        todo = job.seeds
        folder.check_writable()
    network = None
    if todo:
        job = fit_in_memory(job, reporter)
        reporter.loading(job)
        network, job = load(job, len(todo), reporter)
    folder.create()
    if overwrite:
        folder.clear(job.seeds, settings)
    with folder.claimed(plan, job.record, complete=not todo):
        if anew:
            folder.remove(job.seeds)
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


def conclude(job: Job, made: int, seconds: float, reporter: Reporter, npz: NamedFile | None) -> Summary:
    """What is to be done once the job's own images are there, and the summary."""
    folder, left = job.folder, close_folder(job, made, seconds)
    collected = False
    if npz is not None:
        reporter.closing(f"writing {npz}")
        collected = collect_npz(job, left, npz)
    grid = folder.grid if job.run.config.output.grid and folder.grid.exists() else None
    return Summary(made, len(job.seeds) - made, seconds, folder.path, grid, len(left), npz.path if collected else None)
