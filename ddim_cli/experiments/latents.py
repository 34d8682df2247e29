"""Pictures from latents: ``ddim sample --latents``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ddim_cli.experiments.start import folder_ending
from ddim_cli.outputs.files import Place
from ddim_cli.outputs.named import NamedFile
from ddim_cli.outputs.sidecar import identity
from ddim_cli.outputs.store import read_json
from ddim_cli.sampling.items import Choices, Item, Latent, latent_item
from ddim_cli.sampling.job import Job, make_job
from ddim_cli.sampling.plan import Shard
from ddim_cli.sampling.product import Ending, Product, check_npz, collect_npz
from ddim_cli.sampling.reporter import Reporter
from ddim_cli.sampling.resolve import Run


@dataclass(frozen=True)
class LatentPictures(Product):
    """A picture for each latent, a contact sheet and, if ``npz`` is given, one array in the order of the latents."""

    npz: NamedFile | None = None

    def check(self, job: Job) -> None:
        check_npz(job, self.npz)

    def draw(self, job: Job, made: int, reporter: Reporter) -> Ending:
        sheet = self._sheet(job, made)
        if self.npz is not None:
            reporter.closing(f"writing {self.npz}")
            collect_npz(job, job.plan, self.npz)
        return Ending(0, sheet, self.npz)

    def plan(self, job: Job) -> dict[str, Any]:
        return {
            "latents": list(dict.fromkeys(str(i.start.file.path) for i in job.items if isinstance(i.start, Latent)))
        }

    def _sheet(self, job: Job, made: int) -> Place | None:
        """None where no sheet is wanted, or the folder has one of seeds."""
        path = job.folder.grid
        if not job.run.config.output.grid or job.folder.manifest.exists():
            return None
        if made or not path.exists():
            job.folder.write_grid([item.name for item in job.plan])
        return path


def prepare(
    run: Run, starts: Sequence[Latent], shard: Shard = Shard(), npz: NamedFile | None = None
) -> tuple[Job, LatentPictures]:
    """The job of latents, whose run is of `start.resolve_latents`, and its product.

    Raises UsageError for latents that cannot be read, or have values that are not finite.
    """
    conditioning = Choices.of(run.config).of_all()
    items = [latent_item(start, conditioning) for start in starts]
    job = make_job(run, items, shard, "-latents")
    if run.config.output.dir is None and _holds_others(job):
        job = make_job(run, items, shard, folder_ending(start.file for start in starts))
    return job, LatentPictures(npz)


def _holds_others(job: Job) -> bool:
    """Whether the job's folder has a picture of another latent under one of these names."""

    def is_other(item: Item) -> bool:
        sidecar = read_json(job.folder.sidecar(item.name))
        return sidecar is not None and identity(sidecar).get("sampling.latent") != item.about["latent"]

    return any(map(is_other, job.plan))
