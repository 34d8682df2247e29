"""Pictures between pictures: the noises of seeds, interpolated on the sphere on which noise lies, and denoised."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ddim_cli.diffusion.slerp import slerp
from ddim_cli.errors import UsageError
from ddim_cli.experiments.batches import check_finite, denoise, ending_well, prepare
from ddim_cli.experiments.between import Between, Frame, class_of
from ddim_cli.outputs.atomic import write_atomically
from ddim_cli.outputs.frames import clear_frames, frame_path, missing_frames, read_frames
from ddim_cli.outputs.picture import encode_png
from ddim_cli.outputs.provenance import text_inside
from ddim_cli.outputs.sidecar import (
    STRIP_SCHEMA,
    describe_picture,
    describe_strip,
    first_difference,
    identity,
    to_text,
)
from ddim_cli.outputs.strip import Row, draw_strip, encode_gif
from ddim_cli.outputs.writer import write_pair
from ddim_cli.sampling.loop import Sampler, to_uint8
from ddim_cli.sampling.noise import ImageNoise
from ddim_cli.sampling.plan import batches
from ddim_cli.sampling.run import Job, Reporter, job_sampler

# Of a strip: a longer way from seed to seed goes on in the next row.
MOST_COLUMNS = 16


@dataclass(frozen=True)
class Interpolated:
    """What was done: frames made now, ``present`` ones that were there, and their files in the plan's order."""

    made: int
    present: int
    seconds: float
    folder: Path
    frames: tuple[Path, ...]
    strip: Path
    animation: Path | None


def frame_noise(frame: Frame, noise: Callable[[int], Tensor]) -> Tensor:
    """The initial noise of a frame, float32 [C, H, W]; ``noise`` gives that of a seed."""
    ends = [noise(seed) for seed in frame.seeds]
    across = frame.weights[0]
    if len(frame.weights) == 1:
        return slerp(*ends, across)
    top, bottom = slerp(ends[0], ends[1], across), slerp(ends[2], ends[3], across)
    return slerp(top, bottom, frame.weights[1])


def seed_noise(shape: tuple[int, int, int]) -> Callable[[int], Tensor]:
    """seed -> the initial noise that ``ddim sample`` gives it, float32 [C, H, W] on the host."""

    @lru_cache(maxsize=16)
    def noise(seed: int) -> Tensor:
        return ImageNoise((seed,), shape, torch.device("cpu")).draw()[0]

    return noise


def frame_record(job: Job, frame: Frame) -> dict[str, Any]:
    """The sections of a frame's sidecar: those of the run, and what the frame lies between."""
    found = class_of(job.run, frame.seeds)
    sampling = {**job.record["sampling"], **({} if found is None else {"class": found}), "between": frame.facts()}
    return {**job.record, "sampling": sampling}


def pending(job: Job, frames: Sequence[Frame], overwrite: bool = False) -> list[int]:
    """The numbers of the frames that are to be made.

    Raises:
        UsageError: if the folder holds pictures or frames of other settings and ``overwrite`` is false.
    """
    if overwrite:
        return list(range(len(frames)))
    job.folder.check_settings(job.identity)
    return missing_frames(job.folder, [identity(frame_record(job, frame)) for frame in frames])


def execute(
    job: Job, between: Between, gif: bool, reporter: Reporter | None = None, overwrite: bool = False
) -> Interpolated:
    """Make the frames that are missing, then the strip and the animation.

    The job's plan is to have as many images as ``between`` has frames; from these its batch size is chosen.

    Raises:
        UsageError: as `pending` does.
        RunError: if the run fails; what was finished stays.
        InterruptedRunError: on Ctrl-C; likewise.
    """
    reporter = reporter or Reporter()
    frames, folder = between.frames(), job.folder
    todo = pending(job, frames, overwrite)
    started = time.perf_counter()
    if todo:
        network, job = prepare(job, len(todo), reporter)
        if overwrite:
            clear_frames(folder)
        sampler = job_sampler(job, network)
        started = time.perf_counter()
        reporter.started(job, todo)
        with ending_well(job, reporter):
            _make(job, frames, todo, sampler, reporter)
    strip = folder.path / "strip.png"
    animation = strip.with_suffix(".gif")
    with ending_well(job, reporter):
        if todo or not _is_shown(job, between, strip) or (gif and not animation.exists()):
            reporter.closing("drawing the strip")
            # An animation that is there is to show what is there now.
            _draw(job, between, strip, gif or animation.exists())
    return Interpolated(
        made=len(todo),
        present=len(frames) - len(todo),
        seconds=time.perf_counter() - started,
        folder=folder.path,
        frames=tuple(frame_path(folder, n) for n in range(len(frames))),
        strip=strip,
        animation=animation if gif else None,
    )


def _make(job: Job, frames: Sequence[Frame], todo: Sequence[int], sampler: Sampler, reporter: Reporter) -> None:
    noise = seed_noise(sampler.shape)
    for numbers in batches(todo, job.batch_size):
        began = time.perf_counter()
        noises = [frame_noise(frames[n], noise) for n in numbers]
        x = denoise(sampler, noises, frames[0].seeds[0], job.batch_size, reporter.step)
        check_finite(x, [f"frame {n}" for n in numbers], job)
        pixels = to_uint8(x).cpu().numpy()
        seconds = (time.perf_counter() - began) / len(numbers)
        for n, own in zip(numbers, pixels, strict=True):
            record = frame_record(job, frames[n])
            described = describe_picture(record, None, own)
            write_pair(job.folder, frame_path(job.folder, n), described, own, seconds, identity(record))
        reporter.batch(len(numbers))


def _is_shown(job: Job, between: Between, strip: Path) -> bool:
    """Whether the strip is there and shows these frames."""
    try:
        text = text_inside(strip)
    except UsageError:
        return False
    return (
        isinstance(text, Mapping)
        and text.get("schema") == STRIP_SCHEMA
        and text.get("strip") == between.facts()
        and first_difference(identity(text), job.identity) is None
    )


def strip_rows(between: Between, images: Sequence[Image.Image]) -> list[Row]:
    """A row for each way from seed to seed, or the rows of the square, its corners named."""
    frames, count = between.frames(), between.count
    if between.square:
        rows = []
        for start in range(0, len(frames), count):
            ends = start in (0, len(frames) - count)
            own = frames[start : start + count]
            labels = [f.label() if f.seed is not None else "" for f in own] if ends else []
            rows.append(Row(images[start : start + count], labels, above=start == 0))
        return rows
    columns = math.ceil(count / math.ceil(count / MOST_COLUMNS))
    rows = []
    for leg in range(len(between.seeds) - 1):
        # A seed on the way ends one row and begins the next.
        first = leg * (count - 1)
        for start in range(first, first + count, columns):
            stop = min(start + columns, first + count)
            rows.append(Row(images[start:stop], [f.label() for f in frames[start:stop]]))
    return rows


def animation_order(between: Between) -> list[int]:
    """The frames of the animation by number: a path there and back, a square row by row, each from the last's end."""
    total, count = len(between), between.count
    if not between.square:
        closed = between.seeds[0] == between.seeds[-1]
        return list(range(total - 1)) if closed else [*range(total), *range(total - 2, 0, -1)]
    rows = [list(range(start, start + count)) for start in range(0, total, count)]
    return [n for i, row in enumerate(rows) for n in (row if i % 2 == 0 else row[::-1])]


def _draw(job: Job, between: Between, path: Path, gif: bool) -> None:
    """The animation, then the strip, whose presence means that both are there. Raises OSError."""
    images, frames, fsync = read_frames(job.folder, len(between)), between.frames(), job.folder.fsync
    if gif:
        order = animation_order(between)
        rests = [i for i, n in enumerate(order) if frames[n].seed is not None]
        labels = [] if between.square else [frames[n].label() for n in order]
        write_atomically(path.with_suffix(".gif"), encode_gif([images[n] for n in order], labels, rests), fsync)
    name, steps = job.run.model.name, len(job.run.timesteps)
    shown = between.seeds if len(between.seeds) <= 8 else [*between.seeds[:4], "...", *between.seeds[-3:]]
    caption = f"between seeds {', '.join(map(str, shown))} ({name}, {steps} steps)"
    strip = draw_strip(strip_rows(between, images), caption)
    described = describe_strip(job.record, None, between.facts(), np.asarray(strip))
    write_atomically(path, encode_png(strip, to_text(described)), fsync)
