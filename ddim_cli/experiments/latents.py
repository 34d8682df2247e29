"""Pictures from latents: ``ddim sample --latents``."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ddim_cli.experiments.batches import check_finite, denoise, ending_well, prepare
from ddim_cli.experiments.rules import one_class
from ddim_cli.experiments.start import Start
from ddim_cli.outputs.atomic import write_atomically
from ddim_cli.outputs.contact_sheet import MOST_IMAGES, contact_sheet
from ddim_cli.outputs.folder import read_json
from ddim_cli.outputs.latents import latent_sha256, read_latent
from ddim_cli.outputs.named import NamedFile
from ddim_cli.outputs.npz import write_npz
from ddim_cli.outputs.picture import encode_png, read_own
from ddim_cli.outputs.sidecar import describe_picture, identity
from ddim_cli.outputs.writer import write_pair
from ddim_cli.sampling.loop import Sampler, to_uint8
from ddim_cli.sampling.plan import batches
from ddim_cli.sampling.run import Job, Reporter, Summary, job_sampler


def picture_path(job: Job, start: Start) -> Path:
    """Where the PNG belongs; its sidecar has the ending .json."""
    return job.folder.path / f"{start.name}.latent.png"


def picture_record(job: Job, start: Start) -> dict[str, Any]:
    """The sections of a picture's sidecar: those of the run, and the latent it began at.

    Raises:
        UsageError: for a file that cannot be read.
    """
    found = one_class(job.run)
    index = {} if start.index is None else {"index": start.index}
    latent = {"file": start.file.path.name, **index, "sha256": latent_sha256(read_latent(start.file, start.index))}
    own = {**({} if found is None else {"class": found}), "latent": latent}
    return {**job.record, "sampling": {**job.record["sampling"], **own}}


def missing(job: Job, starts: Sequence[Start], positions: Sequence[int]) -> list[int]:
    """Those of ``positions`` whose pictures are not there. Raises UsageError for pictures of other settings."""

    def is_there(start: Start) -> bool:
        path = picture_path(job, start).with_suffix(".json")
        return path.exists() and job.folder.is_pair(str(path), identity(picture_record(job, start)))

    return [p for p in positions if not is_there(starts[p])]


def holds_others(job: Job, starts: Sequence[Start]) -> bool:
    """Whether the job's folder has a picture of another latent under one of these names."""

    def is_other(start: Start) -> bool:
        sidecar = read_json(picture_path(job, start).with_suffix(".json"))
        latent = picture_record(job, start)["sampling"]["latent"]
        return sidecar is not None and identity(sidecar).get("sampling.latent") != latent

    return any(map(is_other, starts))


def pending(job: Job, starts: Sequence[Start], overwrite: bool = False) -> list[int]:
    """The positions of the latents, of those that are the job's share, whose pictures are to be made.

    Raises:
        UsageError: if the folder holds pictures of other settings and ``overwrite`` is false; for latents of these
            that cannot be read, or whose values are not finite.
    """
    if overwrite:
        found = list(job.seeds)
    else:
        job.folder.check_settings(job.identity)
        found = missing(job, starts, job.seeds)
    for position in found:
        # Now, and not after hours of others.
        read_latent(starts[position].file, starts[position].index)
    return found


def execute(
    job: Job,
    starts: Sequence[Start],
    reporter: Reporter | None = None,
    overwrite: bool = False,
    npz: NamedFile | None = None,
) -> Summary:
    """Make the pictures that are missing. The job's plan has as many images as there are latents, its seeds being
    their positions.

    Raises:
        UsageError: as `pending` does, and for latents that cannot be read.
        RunError: if the run fails; what was finished stays.
        InterruptedRunError: on Ctrl-C; likewise.
    """
    reporter = reporter or Reporter()
    todo = pending(job, starts, overwrite)
    started = time.perf_counter()
    if todo:
        network, job = prepare(job, len(todo), reporter)
        sampler = job_sampler(job, network)
        started = time.perf_counter()
        reporter.started(job, todo)
        with ending_well(job, reporter):
            for positions in batches(todo, job.batch_size):
                _make(job, [starts[p] for p in positions], sampler, overwrite, reporter)
                reporter.batch(len(positions))
    seconds = time.perf_counter() - started
    own = set(job.seeds)
    left = missing(job, starts, [p for p in range(len(starts)) if p not in own])
    with ending_well(job, reporter):
        grid = None if left else _sheet(job, starts, bool(todo))
        if npz is not None and not left:
            reporter.closing(f"writing {npz}")
            _collect(job, starts, npz)
    return Summary(
        made=len(todo),
        present=len(job.seeds) - len(todo),
        seconds=seconds,
        folder=job.folder.path,
        grid=grid,
        left=len(left),
        npz=npz.path if npz is not None and not left else None,
    )


def _make(job: Job, starts: Sequence[Start], sampler: Sampler, overwrite: bool, reporter: Reporter) -> None:
    began = time.perf_counter()
    latents = [torch.from_numpy(read_latent(start.file, start.index)) for start in starts]
    x = denoise(sampler, latents, 0, job.batch_size, reporter.step)
    check_finite(x, [start.name for start in starts], job)
    pixels = to_uint8(x).cpu().numpy()
    seconds = (time.perf_counter() - began) / len(starts)
    for start, own in zip(starts, pixels, strict=True):
        record, path = picture_record(job, start), picture_path(job, start)
        if overwrite:
            path.with_suffix(".json").unlink(missing_ok=True)
        write_pair(job.folder, path, describe_picture(record, None, own), own, seconds, identity(record))


def _sheet(job: Job, starts: Sequence[Start], changed: bool) -> Path | None:
    """The contact sheet; None where none is wanted, or the folder has one of seeds."""
    path = job.folder.grid
    if not job.run.config.output.grid or job.folder.manifest.exists():
        return None
    if changed or not path.exists():
        images = [read_own(picture_path(job, start)) for start in starts[:MOST_IMAGES]]
        write_atomically(path, encode_png(contact_sheet(images)), job.folder.fsync)
    return path


def _collect(job: Job, starts: Sequence[Start], npz: NamedFile) -> None:
    """All pictures as one array, in the order of the latents. Raises as `write_npz`."""
    found = one_class(job.run)
    labels = None if found is None else [found] * len(starts)
    write_npz(npz, (picture_path(job, start) for start in starts), len(starts), labels, job.folder.fsync)
