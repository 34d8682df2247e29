"""From pictures to the latents that sampling leads back to them (DDIM, section 5.4)."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ddim_cli.diffusion.coefficients import make_inverse_table
from ddim_cli.errors import UsageError
from ddim_cli.experiments.batches import check_finite, denoise, encode, ending_well, prepare
from ddim_cli.experiments.rules import one_class
from ddim_cli.outputs.atomic import write_atomically
from ddim_cli.outputs.folder import read_json
from ddim_cli.outputs.latents import ENDING, describe_latent, encode_latent, holds_latent, open_latents, read_latent
from ddim_cli.outputs.picture import encode_png, read_own, to_image
from ddim_cli.outputs.provenance import text_inside
from ddim_cli.outputs.sidecar import STRIP_SCHEMA, describe_picture, describe_strip, first_difference, identity, to_text
from ddim_cli.outputs.strip import Row, draw_strip
from ddim_cli.outputs.writer import write_pair
from ddim_cli.sampling.loop import Sampler, to_uint8
from ddim_cli.sampling.pictures import Input, read_input
from ddim_cli.sampling.plan import batches
from ddim_cli.sampling.run import Job, Reporter, job_sampler

# Of the picture that shows what came of it.
MOST_SHOWN, COLUMNS = 16, 8
FEWEST_FOR_A_CAPTION = 4


@dataclass(frozen=True)
class Reconstruction:
    """One picture and what came of it; ``error`` is that of `reconstruction_error`."""

    input: Input
    latent: Path
    picture: Path
    error: float


@dataclass(frozen=True)
class Inverted:
    """What was done: pictures inverted now, ``present`` ones that were there, all of them in the order given."""

    made: int
    present: int
    seconds: float
    folder: Path
    reconstructions: tuple[Reconstruction, ...]
    sheet: Path

    @property
    def mean_error(self) -> float:
        return float(np.mean([r.error for r in self.reconstructions]))


def latent_path(job: Job, picture: Input) -> Path:
    return job.folder.path / f"{picture.name}{ENDING}"


def reconstruction_path(job: Job, picture: Input) -> Path:
    """Where the PNG belongs; its sidecar has the ending .json."""
    return job.folder.path / f"{picture.name}.recon.png"


def sheet_path(job: Job) -> Path:
    return job.folder.path / "inverted.png"


def _is_sheet(path: Path) -> bool:
    try:
        text = text_inside(path)
    except UsageError:
        return False
    return isinstance(text, Mapping) and text.get("schema") == STRIP_SCHEMA and "inverted" in text.get("strip", {})


def check_outputs(job: Job, pictures: Sequence[Input]) -> None:
    """UsageError if a picture lies where the reconstruction of another, or the sheet, is to be written."""
    sheet = sheet_path(job)
    if sheet.exists() and not _is_sheet(sheet):
        raise UsageError(
            f"{sheet}: is no sheet of ddim invert, and would be replaced; choose another folder with --out"
        )
    written = {reconstruction_path(job, p).resolve(): p for p in pictures}
    for picture in pictures:
        other = written.get(picture.path.resolve())
        if other is not None:
            raise UsageError(
                f"{picture.path}: the reconstruction of {other.path} would replace it; choose another folder with --out"
            )


def reconstruction_error(x0: Tensor, x: Tensor) -> list[float]:
    """Mean squared difference a dimension, pictures scaled to [0, 1], as in DDIM's table 2; one a row.

    Args:
        x0: the pictures, float32 [B, C, H, W] in [-1, 1].
        x: what came back, of the same shape, neither clipped nor rounded.
    """
    return ((x.double() - x0.double()) / 2).square().flatten(1).mean(1).tolist()


def picture_record(job: Job, picture: Input) -> dict[str, Any]:
    """The sections of a reconstruction's sidecar: those of the run, and which picture was inverted."""
    found = one_class(job.run)
    own = {**({} if found is None else {"class": found}), "inverted": picture.facts()}
    return {**job.record, "sampling": {**job.record["sampling"], **own}}


def is_there(job: Job, picture: Input) -> bool:
    """Whether latent and reconstruction of a picture are there, whole.

    Raises:
        UsageError: if they are of other settings, or of another picture of that name.
    """
    path = reconstruction_path(job, picture)
    sidecar = read_json(path.with_suffix(".json"))
    if sidecar is None:
        return False
    settings = identity(picture_record(job, picture))
    before = identity(sidecar).get("sampling.inverted")
    if before != settings["sampling.inverted"] and isinstance(before, dict):
        what = "another picture" if before.get("pixels_sha256") != picture.pixels_sha256 else "it in another conversion"
        raise UsageError(
            f"{picture.path}: {path} is of {what}; choose another folder with --out, or replace what is there with "
            "--overwrite"
        )
    if not job.folder.is_pair(str(path.with_suffix(".json")), settings):
        return False
    return _told_of(sidecar) is not None and holds_latent(latent_path(job, picture), _told_of(sidecar)[0])


def _told_of(sidecar: Mapping[str, Any]) -> tuple[str, float] | None:
    """The hash of the latent and the error, as the sidecar of a reconstruction has them."""
    try:
        return str(sidecar["inversion"]["latent"]["sha256"]), float(sidecar["inversion"]["error"])
    except (KeyError, TypeError, ValueError):
        return None


def pending(job: Job, pictures: Sequence[Input], overwrite: bool = False) -> list[Input]:
    """Those that are to be inverted.

    Raises:
        UsageError: if the folder holds pictures of other settings and ``overwrite`` is false.
    """
    if overwrite:
        return list(pictures)
    job.folder.check_settings(job.identity)
    return [picture for picture in pictures if not is_there(job, picture)]


def execute(job: Job, pictures: Sequence[Input], reporter: Reporter | None = None, overwrite: bool = False) -> Inverted:
    """Invert the pictures that are not there yet, then draw what came of them.

    The job's plan is to have as many images as there are pictures; from these its batch size is chosen.

    Raises:
        UsageError: as `pending` and `check_outputs` do.
        ConfigError: for settings that allow no way up, such as a network that predicts x0 where alpha_bar ends at 1.
        RunError: if the run fails; what was finished stays.
        InterruptedRunError: on Ctrl-C; likewise.
    """
    reporter = reporter or Reporter()
    # The way up has coefficients of its own that can be impossible.
    make_inverse_table(job.run.config.scheduler, job.run.config.sampling, job.run.timesteps)
    check_outputs(job, pictures)
    todo = pending(job, pictures, overwrite)
    started = time.perf_counter()
    if todo:
        network, job = prepare(job, len(todo), reporter)
        up, down = job_sampler(job, network, inverse=True), job_sampler(job, network)
        started = time.perf_counter()
        reporter.started(job, todo, passes=2)
        with ending_well(job, reporter):
            for some in batches(todo, job.batch_size):
                _invert(job, some, up, down, reporter)
                reporter.batch(len(some))
    seconds = time.perf_counter() - started
    sheet = sheet_path(job)
    found = tuple(_found(job, picture) for picture in pictures)
    with ending_well(job, reporter):
        if todo or not _is_shown(job, found, sheet):
            reporter.closing("drawing inverted.png")
            _draw(job, found, sheet)
    return Inverted(len(todo), len(pictures) - len(todo), seconds, job.folder.path, found, sheet)


def _invert(job: Job, pictures: Sequence[Input], up: Sampler, down: Sampler, reporter: Reporter) -> None:
    began, steps = time.perf_counter(), len(up.table)
    # Read anew: of many pictures, those of one batch are in memory at a time.
    read = [read_input(picture.path, up.shape) for picture in pictures]
    x0 = [torch.from_numpy(values) for _, values in read]
    latents = encode(up, x0, 0, job.batch_size, reporter.step)
    x = denoise(down, list(latents), 0, job.batch_size, lambda done: reporter.step(steps + done))
    for states in (latents, x):
        check_finite(states, [str(picture.path) for picture in pictures], job)
    errors = reconstruction_error(torch.stack(x0), x.cpu())
    pixels = to_uint8(x).cpu().numpy()
    seconds = (time.perf_counter() - began) / len(pictures)
    for (picture, _), latent, own, error in zip(read, latents.cpu().numpy(), pixels, errors, strict=True):
        _write(job, picture, latent, own, error, seconds)


def _write(job: Job, picture: Input, latent: np.ndarray, pixels: np.ndarray, error: float, seconds: float) -> None:
    """The latent, then the pair, whose sidecar means that all three are there. Raises OSError."""
    record = picture_record(job, picture)
    described = describe_latent(record, latent)
    path = reconstruction_path(job, picture)
    path.with_suffix(".json").unlink(missing_ok=True)
    write_atomically(latent_path(job, picture), encode_latent(latent, described), job.folder.fsync)
    beside = {"file": latent_path(job, picture).name, "sha256": described["latent"]["sha256"]}
    told = {**record, "inversion": {"error": float(f"{error:.6g}"), "latent": beside}}
    write_pair(job.folder, path, describe_picture(told, None, pixels), pixels, seconds, identity(record))


def _found(job: Job, picture: Input) -> Reconstruction:
    path = reconstruction_path(job, picture)
    _, error = _told_of(read_json(path.with_suffix(".json")) or {}) or ("", float("nan"))
    return Reconstruction(picture, latent_path(job, picture), path, error)


def _facts(found: Sequence[Reconstruction]) -> dict[str, Any]:
    """What inverted.png says of itself."""
    shown = [{"file": r.input.path.name, "pixels_sha256": r.input.pixels_sha256, "error": r.error} for r in found]
    return {"inverted": shown[:MOST_SHOWN]}


def _is_shown(job: Job, found: Sequence[Reconstruction], sheet: Path) -> bool:
    """Whether the picture of what came of it is there and shows these."""
    try:
        text = text_inside(sheet)
    except UsageError:
        return False
    return (
        isinstance(text, Mapping)
        and text.get("schema") == STRIP_SCHEMA
        and text.get("strip") == _facts(found)
        and first_difference(identity(text), job.identity) is None
    )


def _draw(job: Job, found: Sequence[Reconstruction], sheet: Path) -> None:
    """Above each other the original as the network takes it, the latent and the reconstruction. Raises OSError."""
    found, model = found[:MOST_SHOWN], job.run.model
    shape = (model.channels, *model.size)

    def drawn(values: np.ndarray) -> Image.Image:
        return to_image(to_uint8(torch.from_numpy(values)[None])[0].numpy())

    rows = []
    for start in range(0, len(found), COLUMNS):
        some = found[start : start + COLUMNS]
        originals = [drawn(read_input(r.input.path, shape)[1]) for r in some]
        latents = [drawn(read_latent(open_latents(r.latent), None)) for r in some]
        rows += [
            Row(originals, [r.input.name for r in some], above=True),
            Row(latents),
            Row([read_own(r.picture) for r in some], [f"error {r.error:.2g}" for r in some]),
        ]
    wide = len(found) >= FEWEST_FOR_A_CAPTION
    caption = f"original, latent, reconstruction ({model.name}, {len(job.run.timesteps)} steps)" if wide else ""
    strip = draw_strip(rows, caption)
    described = describe_strip(job.record, None, _facts(found), np.asarray(strip))
    write_atomically(sheet, encode_png(strip, to_text(described)), job.folder.fsync)
