"""A job: a run settled on this machine, with the items that this process makes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ddim_cli.diffusion.resampling import stretches
from ddim_cli.diffusion.solvers import solver_of
from ddim_cli.errors import UsageError
from ddim_cli.models.device import choose_device, choose_dtype
from ddim_cli.models.text import check_installed
from ddim_cli.outputs.files import Place
from ddim_cli.outputs.folder import OutputFolder
from ddim_cli.outputs.picture import Encoding
from ddim_cli.outputs.sidecar import identity, identity_hash
from ddim_cli.outputs.tar_folder import TarFolder
from ddim_cli.sampling.compiled import Target, is_kept
from ddim_cli.sampling.items import Item, SeedItems
from ddim_cli.sampling.network import Use
from ddim_cli.sampling.plan import Shard
from ddim_cli.sampling.precision import choose_batch_size, halve_to_fit, runtime_record
from ddim_cli.sampling.record import make_record
from ddim_cli.sampling.reporter import Reporter
from ddim_cli.sampling.resolve import Run, without_refinement
from ddim_cli.sampling.rows import RowItems
from ddim_cli.stores.objects import is_url, open_url


@dataclass(frozen=True)
class Job:
    """A run on this machine.

    ``plan`` are all items, ``items`` this process's share of them, before what is done is taken out; ``record`` the
    sections that all sidecars share; ``passes`` how often an item goes over the grid.
    """

    run: Run
    plan: Sequence[Item]
    shard: Shard
    device: torch.device
    dtype: torch.dtype
    batch_size: int
    record: Mapping[str, Any]
    folder: OutputFolder
    passes: int = 1
    items: Sequence[Item] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "items", part_of(self.plan, self.shard, self.block))

    @property
    def block(self) -> int | None:
        """How many positions of the plan belong together, in a tar shard; None where each stands for itself."""
        return self.folder.shard_size if isinstance(self.folder, TarFolder) else None

    @cached_property
    def identity(self) -> dict[str, Any]:
        return identity(self.record)

    @property
    def target(self) -> Target:
        """What its network would be compiled for."""
        return network_target(self.run, self.device, self.dtype, self.batch_size)

    @property
    def steps_down(self) -> int:
        """How many steps make an item's picture; of rows, which may begin anywhere, those of the whole grid."""
        count, first = len(self.run.timesteps), next(iter(self.plan[:1]), None)
        if first is None or self.run.of_rows:
            return count
        resample = self.run.config.sampling.resample if first.is_masked else 1
        return sum(map(len, stretches(count - first.begin, resample)))

    @property
    def steps(self) -> int:
        """How many steps an item takes, on all its ways together."""
        first = next(iter(self.plan[:1]), None)
        begin = 0 if first is None else first.begin
        return self.steps_down + (self.passes - 1) * (len(self.run.timesteps) - begin)

    def use(self, images: int) -> Use:
        """What its network is wanted for, to make so many images."""
        # On the way up each step asks once more an iteration.
        more = self.run.config.sampling.refine * len(self.run.timesteps) if self.passes > 1 else 0
        calls = (self.steps + more) * -(-images // self.batch_size)
        return Use(self.target, self.run.config.runtime.compile, calls)

    def fitted(self, reporter: Reporter) -> Job:
        """The job, in batches for which the host's memory suffices by an estimate."""
        batch_size = halve_to_fit(self.batch_size, self.run.model, self.device, self.dtype, rows_an_image(self.run))
        if batch_size == self.batch_size:
            return self
        reporter.halved(batch_size)
        return replace(self._recording(batch_size=batch_size), batch_size=batch_size)

    def with_compiled(self, compiled: bool) -> Job:
        return self._recording(compile=compiled)

    def _recording(self, **runtime: Any) -> Job:
        return replace(self, record={**self.record, "runtime": {**self.record["runtime"], **runtime}})


def network_target(run: Run, device: torch.device, dtype: torch.dtype, batch_size: int) -> Target:
    """What a run's network would be compiled for."""
    rows = rows_an_image(run)
    texts = rows if run.model.takes_text else 1
    return Target(run.model, device, dtype, batch_size * rows, run.config.runtime.tf32, texts)


def rows_an_image(run: Run) -> int:
    """How many rows the network sees for an image: with guidance, also one without a class or prompt."""
    return 1 if run.config.sampling.guidance_scale == 1 else 2


def make_job(
    run: Run,
    plan: Sequence[Item] | None = None,
    shard: Shard = Shard(),
    ending: str = "",
    passes: int = 1,
    pads: bool = False,
) -> Job:
    """Settle device, dtype, batch size and folder. Reads local weights to hash them, and none of a model on the Hub.

    ``plan`` is by default the items of the run's seeds; ``ending`` is that of the default folder's name, for what is
    not the pictures of seeds. With ``pads`` the network sees as many rows as were asked for though the plan has fewer
    items: so are equal hashes had again.

    Raises:
        UsageError: for a device that is not there, or a folder that cannot be used.
        ConfigError: for coefficients that cannot be computed, and pictures that have no room in files of their format.
    """
    config = run.config
    if run.model.takes_text:
        check_installed()
    plan = SeedItems.of(config, run.begins) if plan is None else plan
    if not any(item.inversions or "inverted" in item.about for item in plan[:1]):
        run = without_refinement(run)
        config = run.config
    device = choose_device(config.runtime.device)
    dtype = choose_dtype(config.runtime.dtype, device)
    begin = run.init.begin if run.init is not None else 0
    solver_of(config.sampling).table(config.scheduler, config.sampling, run.timesteps[begin:])
    # From the whole plan, so that its shards see batches of one size, and equal pictures.
    batch_size = config.sampling.batch_size
    if not pads or batch_size == "auto":
        batch_size = choose_batch_size(batch_size, most_alike(plan), run.model, device, dtype)
    # As far as can be told before the network is there.
    compiled = config.runtime.compile is True or (
        config.runtime.compile == "auto" and is_kept(network_target(run, device, dtype, batch_size))
    )
    record = make_record(run, runtime_record(config.runtime, device, dtype, batch_size, compiled))
    folder = make_folder(run, plan, record, ending)
    folder.check_usable()
    return Job(run, plan, shard, device, dtype, batch_size, record, folder, passes)


def part_of(plan: Sequence[Item], shard: Shard, block: int | None) -> Sequence[Item]:
    """A process's share of a plan whose positions come in blocks, or by themselves."""
    if block is None or shard.count == 1:
        return shard.of(plan)
    assert isinstance(plan, (SeedItems, RowItems))
    return plan.take(shard.blocks(len(plan), block))


def make_folder(run: Run, plan: Sequence[Item], record: Mapping[str, Any], ending: str) -> OutputFolder:
    """Where the files of a run go. Raises UsageError for settings that do not go together there."""
    output, path, encoding = run.config.output, output_path(run, record, ending), Encoding.of(run.config.output)
    encoding.check(run.model.shape)
    facts = (path, output.subdirs, output.fsync, run.model.size, output.parameters, encoding)
    of_a_plan = isinstance(plan, (SeedItems, RowItems))
    if not of_a_plan and not isinstance(path, Path):
        raise UsageError(f"output folder {path}: only the pictures of seeds and of job files can go to an object store")
    if output.format == "files":
        return OutputFolder(*facts)
    if not isinstance(plan, (SeedItems, RowItems)):
        raise UsageError(
            "--format tar is for the pictures of seeds and of job files, whose plan is known; leave it out"
        )
    if output.subdirs:
        raise UsageError("output.subdirs is for files; shards need no folders: leave it out, or say --format files")
    if isinstance(plan, RowItems) and plan.file.dotted is not None:
        row = plan.file.dotted
        raise UsageError(
            f"{plan.file.where(row)}: the name {plan.file.name(row)!r} has a dot, and WebDataset takes what is before "
            "it for the key; rename it, or write files with --format files"
        )
    return TarFolder(*facts, shard_size=output.shard_size, names=plan, settings=identity(record))


def most_alike(plan: Sequence[Item]) -> int:
    """How many items of a plan one batch could hold at most: those of one kind."""
    if isinstance(plan, RowItems):
        return len(plan) if plan.kinds is None else int(np.bincount(plan.kinds).max())
    if isinstance(plan, list):
        return max(Counter(item.kind for item in plan).values(), default=0)
    return len(plan)


def output_path(run: Run, record: Mapping[str, Any], ending: str = "") -> Place:
    """Where a run's files go: output.dir, else outputs/MODEL-Nsteps-HASH with this ending. Raises UsageError.

    Behind it stand the formats, where they are not PNG and files: so that each has a folder of its own.
    """
    if not run.config.output.dir:
        steps, encoding = record["sampling"]["steps"], Encoding.of(run.config.output)
        name = f"{run.model.name}-{steps}steps-{identity_hash(record)}{ending}{encoding.suffix}"
        if run.config.output.format == "tar":
            name += "-tar"
        return Path("outputs") / name
    if is_url(run.config.output.dir):
        return open_url(run.config.output.dir)
    try:
        return Path(run.config.output.dir).expanduser()
    except RuntimeError as error:
        raise UsageError(f"output folder {run.config.output.dir}: {error}") from None
