"""From pictures to the latents that sampling leads back to them (DDIM, section 5.4)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ddim_cli.config.layers import Settings, layers_of
from ddim_cli.diffusion.solvers import solver_of
from ddim_cli.errors import UsageError
from ddim_cli.experiments.inversion import resolve_inversion
from ddim_cli.models.describe import ModelDescription
from ddim_cli.outputs.atomic import write_atomically
from ddim_cli.outputs.contact_sheet import SMALLEST_TILE, WIDEST
from ddim_cli.outputs.figures import quoted
from ddim_cli.outputs.files import File, here
from ddim_cli.outputs.latents import ENDING, describe_latent, encode_latent, holds_latent, open_latents, read_latent
from ddim_cli.outputs.picture import encode_png, read_own, to_image
from ddim_cli.outputs.provenance import shows_strip, strip_inside
from ddim_cli.outputs.sidecar import describe_strip, identity, to_text
from ddim_cli.outputs.store import read_json
from ddim_cli.outputs.strip import Row, draw_strip
from ddim_cli.sampling.executor import Summary, execute
from ddim_cli.sampling.items import Choices, Inversion, Item, reconstruction_item
from ddim_cli.sampling.job import Job, make_job
from ddim_cli.sampling.loop import Picture, to_uint8
from ddim_cli.sampling.pictures import Input, find_pictures, read_input
from ddim_cli.sampling.plan import Shard
from ddim_cli.sampling.product import Ending, Product, item_identity
from ddim_cli.sampling.record import item_record
from ddim_cli.sampling.reporter import Reporter
from ddim_cli.sampling.resolve import Run

# Of the picture that shows what came of it.
MOST_SHOWN, COLUMNS = 16, 8
FEWEST_FOR_A_CAPTION = 4
# Latents of a latent model are noise of about unit variance: so many standard deviations are shown as black and white.
DEVIATIONS = 3.0


@dataclass(frozen=True)
class Reconstruction:
    """One picture and what came of it; ``error`` is that of `reconstruction_error`.

    ``residual`` is by how much the last iteration moved a state, of an inversion with ``refine``: the root mean square
    of its values, in the step in which that was most.
    """

    input: Input
    latent: Path
    picture: Path
    error: float
    residual: float | None = None


def reconstruction_error(x0: Tensor, x: Tensor) -> float:
    """Mean squared difference a dimension, pictures scaled to [0, 1], as in DDIM's table 2.

    Args:
        x0: the picture, float32 [C, H, W] in [-1, 1].
        x: what came back, of the same shape, neither clipped nor rounded.
    """
    return ((x.double() - x0.double()) / 2).square().mean().item()


@dataclass(frozen=True)
class Reconstructions(Product):
    """For each picture its latent, what sampling makes of that, and a sheet of both beside the originals."""

    inputs: tuple[Input, ...]
    keeps_x0 = True

    def check(self, job: Job) -> None:
        """Raise UsageError if a picture lies where another's reconstruction, or the sheet, is to be written.

        Raises ConfigError for settings that allow no inversion, such as a network that predicts x0 where alpha_bar
        ends at 1.
        """
        config = job.run.config
        solver_of(config.sampling, inverse=True).table(config.scheduler, config.sampling, job.run.timesteps)
        sheet = sheet_path(job)
        if sheet.exists() and "inverted" not in (strip_inside(sheet) or {}).get("strip", {}):
            raise UsageError(
                f"{sheet}: is no sheet of ddim invert, and would be replaced; choose another folder with --out"
            )
        written = {here(job.folder.picture(f"{picture.name}.recon")).resolve(): picture for picture in self.inputs}
        for picture in self.inputs:
            other = written.get(picture.path.resolve())
            if other is not None:
                raise UsageError(
                    f"{picture.path}: the reconstruction of {other.path} would replace it; choose another folder with "
                    "--out"
                )

    def missing(self, job: Job, items: Sequence[Item]) -> list[Item]:
        return [item for item in items if not self._is_there(job, item)]

    def _is_there(self, job: Job, item: Item) -> bool:
        """Whether latent and reconstruction are there, whole. Raises UsageError if they are of something else."""
        path = job.folder.picture(item.name)
        sidecar = read_json(path.with_suffix(".json"))
        if sidecar is None:
            return False
        before, now = identity(sidecar).get("sampling.inverted"), item.about["inverted"]
        if before != now and isinstance(before, dict):
            same_pixels = before.get("pixels_sha256") == now["pixels_sha256"]
            what = "it in another conversion" if same_pixels else "another picture"
            raise UsageError(
                f"{item.label}: {path} is of {what}; choose another folder with --out, or replace what is there with "
                "--overwrite"
            )
        if not job.folder.is_done(item.name, item_identity(job, item)):
            return False
        told = _told_of(sidecar)
        return told is not None and holds_latent(latent_path(job, item), told[0])

    def save(self, job: Job, picture: Picture) -> None:
        """Write the latent, then the pair, whose sidecar means that all three are there."""
        item, path = picture.item, latent_path(job, picture.item)
        assert isinstance(item.start, Inversion)
        assert picture.latent is not None
        assert picture.x0 is not None
        latent = picture.latent.numpy()
        described = describe_latent(item_record(job.record, item), latent)
        job.folder.remove(item.name)
        write_atomically(path, encode_latent(latent, described), job.folder.fsync)
        error = reconstruction_error(item.start.state(job.run.model.shape), picture.x0)
        beside = {"file": path.name, "sha256": described["latent"]["sha256"]}
        residual = {} if picture.residual is None else {"residual": float(f"{picture.residual:.6g}")}
        self.save_pair(job, picture, inversion={"error": float(f"{error:.6g}"), **residual, "latent": beside})

    def files(self, job: Job, item: Item) -> list[File]:
        return [job.folder.picture(item.name), latent_path(job, item)]

    def draw(self, job: Job, made: int, reporter: Reporter) -> Ending:
        sheet, results = sheet_path(job), reconstructions(job, self.inputs, job.plan)
        if made or not shows_strip(sheet, _facts(results), job.identity):
            reporter.closing(f"drawing {sheet.name}")
            _draw(job, results, sheet)
        return Ending(0, sheet)


@dataclass(frozen=True)
class Inverted:
    """What was done: pictures inverted now, ``present`` ones that were there, all of them in the order given.

    ``left`` pictures are for other shards to invert; until they are there, ``sheet`` is None.
    """

    made: int
    present: int
    left: int
    seconds: float
    folder: Path
    reconstructions: tuple[Reconstruction, ...]
    sheet: Path | None

    @classmethod
    def of(cls, job: Job, product: Reconstructions, summary: Summary) -> Inverted:
        own = tuple(reconstructions(job, job.shard.of(product.inputs), job.items))
        folder, sheet = here(job.folder.path), None if summary.sheet is None else here(summary.sheet)
        return cls(summary.made, summary.present, summary.left, summary.seconds, folder, own, sheet)

    @property
    def mean_error(self) -> float:
        return float(np.mean([r.error for r in self.reconstructions])) if self.reconstructions else float("nan")


def prepare(run: Run, files: Sequence[Path], shard: Shard = Shard()) -> tuple[Job, Reconstructions]:
    """The job of an inversion of pictures, whose run is of `resolve_inversion`, and its product.

    Raises UsageError for a file that is no picture.
    """
    inputs = tuple(read_input(path, run.model.shape)[0] for path in files)
    conditioning = Choices.of(run.config).of_all()
    items = [
        reconstruction_item(p.name, str(p.path), Inversion(p.path, conditioning), p.facts(), conditioning)
        for p in inputs
    ]
    return make_job(run, items, shard, "-invert", passes=2), Reconstructions(inputs)


def invert(
    pictures: Sequence[str | Path],
    config: Settings = None,
    model: str | Path | None = None,
    out: str | Path | None = None,
    overwrite: bool = False,
) -> Inverted:
    """Find the latents of pictures by DDIM inversion, and what sampling makes of these, as ``ddim invert`` does.

    Args:
        pictures: files, or folders of them.
        config: settings, as `sample` takes them; clipping and thresholding are turned off, since a step with them has
            no inverse.
        model: a source, as ``--model`` takes it, in place of the config's.
        out: the folder of what is made, in place of the config's or the default.
        overwrite: replace what is in the folder.

    Raises:
        DdimError: (an ordinary exception with a sentence) for pictures that cannot be read, settings that cannot work,
            a model that cannot be loaded, a folder that cannot be used, and a run that fails.
    """
    files = find_pictures([Path(path) for path in pictures])
    run, _ = resolve_inversion(layers_of(config, model, out))
    job, product = prepare(run, files)
    return Inverted.of(job, product, execute(job, product, overwrite=overwrite))


def latent_path(job: Job, item: Item) -> Path:
    return here(job.folder.path) / f"{item.name.removesuffix('.recon')}{ENDING}"


def sheet_path(job: Job) -> Path:
    return here(job.folder.path) / "inverted.png"


def _told_of(sidecar: Mapping[str, Any]) -> tuple[str, float] | None:
    """The hash of the latent and the error, as the sidecar of a reconstruction has them."""
    try:
        return str(sidecar["inversion"]["latent"]["sha256"]), float(sidecar["inversion"]["error"])
    except (KeyError, TypeError, ValueError):
        return None


def reconstructions(job: Job, inputs: Sequence[Input], items: Sequence[Item]) -> list[Reconstruction]:
    """What came of pictures and their items, as the folder has it; an error is NaN where its sidecar tells none."""
    results = []
    for picture, item in zip(inputs, items, strict=True):
        path = here(job.folder.picture(item.name))
        sidecar = read_json(path.with_suffix(".json")) or {}
        told = _told_of(sidecar)
        _, error = told or ("", float("nan"))
        residual = (sidecar["inversion"] if told else {}).get("residual")
        results.append(Reconstruction(picture, latent_path(job, item), path, error, residual))
    return results


def _facts(results: Sequence[Reconstruction]) -> dict[str, Any]:
    """What inverted.png says of itself."""
    shown = [{"file": r.input.path.name, "pixels_sha256": r.input.pixels_sha256, "error": r.error} for r in results]
    return {"inverted": shown[:MOST_SHOWN]}


def drawn(values: np.ndarray) -> Image.Image:
    """What a network takes for a picture, float32 [C, H, W] in [-1, 1], as a picture."""
    return to_image(to_uint8(torch.from_numpy(values)[None])[0].numpy())


def draw_latent(latent: np.ndarray, model: ModelDescription) -> Image.Image:
    """A latent, float32 [C, H, W], as a picture of the size of the model's: one of pixel space as it is.

    Of a latent model its first three channels are red, green and blue, its values enlarged to squares.
    """
    if model.latents is None:
        return drawn(latent)
    channels = 3 if len(latent) >= 3 else 1
    height, width = model.size
    return drawn(latent[:channels] / np.float32(DEVIATIONS)).resize((width, height), Image.Resampling.NEAREST)


def _draw(job: Job, results: Sequence[Reconstruction], sheet: Path) -> None:
    """Above each other the original as the network takes it, the latent and the reconstruction. Raises OSError."""
    results, model = results[:MOST_SHOWN], job.run.model

    caption = "original, latent, reconstruction"
    if model.latents is not None:
        shown = min(model.channels, 3)
        caption = f"original, latent ({shown} of its {model.channels} channels), reconstruction"
    prompt = job.run.config.sampling.prompt
    settings = job.run.config.sampling
    about = (
        f"{model.name}, {len(job.run.timesteps)} steps"
        + (f" of order {settings.order}" if settings.order > 1 else "")
        + (f", {settings.refine} iterations each" if settings.refine else "")
        + (f", {quoted(prompt, 30)}" if isinstance(prompt, str) else "")
    )
    rows = []
    for start in range(0, len(results), COLUMNS):
        some = results[start : start + COLUMNS]
        originals = [drawn(read_input(r.input.path, model.shape)[1]) for r in some]
        latents = [draw_latent(read_latent(open_latents(r.latent), None), model) for r in some]
        rows += [
            Row(originals, [r.input.name for r in some], above=True),
            Row(latents),
            Row([read_own(r.picture) for r in some], [f"error {r.error:.2g}" for r in some]),
        ]
    wide = len(results) >= FEWEST_FOR_A_CAPTION or model.size[1] >= FEWEST_FOR_A_CAPTION * SMALLEST_TILE
    strip = draw_strip(rows, f"{caption} ({about})" if wide else "", widest=WIDEST)
    described = describe_strip(job.record, None, _facts(results), np.asarray(strip))
    write_atomically(sheet, encode_png(strip, to_text(described)), job.folder.fsync)
