"""How a picture comes about: the predicted x0, or the state x_t, along the steps of chosen seeds."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from ddim_cli.errors import UsageError
from ddim_cli.experiments.batches import check_finite, ending_well, prepare
from ddim_cli.outputs.atomic import write_atomically
from ddim_cli.outputs.picture import encode_png, to_image
from ddim_cli.outputs.provenance import text_inside
from ddim_cli.outputs.sidecar import STRIP_SCHEMA, describe_strip, to_text
from ddim_cli.outputs.strip import Row, draw_strip, encode_gif
from ddim_cli.sampling.loop import OnStep, Sampler, to_uint8, trajectory
from ddim_cli.sampling.noise import ImageNoise
from ddim_cli.sampling.plan import batches, padded
from ddim_cli.sampling.run import Job, Reporter, job_sampler

ABOUT_FRAMES = 10
NAMES = {"x0": "predicted x0", "xt": "state x_t"}


@dataclass(frozen=True)
class Watch:
    """What of a trajectory is kept: x0 or x_t, at every ``every``-th step (None: about ten frames in all)."""

    show: Literal["x0", "xt"] = "x0"
    every: int | None = None

    def steps(self, count: int) -> tuple[int, ...]:
        """The steps 0 ... count - 1 that are shown. Of x0 the last is always among them: it is the result.

        Raises:
            UsageError: for an ``every`` below 1.
        """
        if self.every is not None and self.every < 1:
            raise UsageError(f"--every {self.every}: it takes an integer of at least 1")
        chosen = range(0, count, self.every or max(1, round(count / ABOUT_FRAMES)))
        return tuple(sorted({*chosen, count - 1})) if self.show == "x0" else tuple(chosen)

    def labels(self, timesteps: Sequence[int]) -> list[str]:
        """A label a frame, given the grid that runs. Of x_t the last frame is what the last step makes."""
        labels = [f"t = {timesteps[i]}" for i in self.steps(len(timesteps))]
        return labels if self.show == "x0" else [*labels, "result"]

    def facts(self, timesteps: Sequence[int]) -> dict[str, Any]:
        """What a strip says of itself."""
        return {"show": self.show, "timesteps": [timesteps[i] for i in self.steps(len(timesteps))]}


@dataclass(frozen=True)
class Watched:
    """What was done: strips made now, ``present`` ones that were there, all their files in the order of the seeds."""

    made: int
    present: int
    seconds: float
    folder: Path
    strips: tuple[Path, ...]
    animations: tuple[Path, ...]


def strip_path(job: Job, seed: int, watch: Watch) -> Path:
    """Where the strip of a seed belongs: 000003.x0.png. Its animation ends in .gif."""
    return job.folder.path / f"{seed:06d}.{watch.show}.png"


@torch.inference_mode()
def watch_batch(
    sampler: Sampler, seeds: Sequence[int], batch_size: int, watch: Watch, on_step: OnStep = lambda done: None
) -> tuple[list[list[np.ndarray]], torch.Tensor]:
    """Sample ``seeds`` as one batch of ``batch_size`` rows.

    Returns:
        the frames of each seed, uint8 [H, W, C], and the final state, float32 [B, C, H, W] without the padding.
    """
    rows, count = padded(seeds, batch_size), len(seeds)
    shown = set(watch.steps(len(sampler.table)))
    kept = []
    # The same draw as the loop's own: a seed's generator begins anew here.
    before = ImageNoise(rows, sampler.shape, sampler.device).draw() if watch.show == "xt" else None
    for i, (x, x0) in enumerate(trajectory(sampler, rows)):
        if i in shown:
            kept.append(to_uint8((x0 if before is None else before)[:count]).cpu())
        before = x if before is not None else None
        on_step(i + 1)
    if before is not None:
        kept.append(to_uint8(x[:count]).cpu())
    frames = torch.stack(kept, dim=1).numpy()
    return [list(of_a_seed) for of_a_seed in frames], x[:count]


def is_there(job: Job, seed: int, watch: Watch, gif: bool) -> bool:
    """Whether the strip of ``seed`` is there, shows the same steps, and has its animation if that is asked for.

    Raises:
        UsageError: for a strip of other settings.
    """
    path = strip_path(job, seed, watch)
    try:
        text = text_inside(path)
    except UsageError:
        return False
    if not isinstance(text, dict) or text.get("schema") != STRIP_SCHEMA:
        return False
    job.folder.check_same(text, job.identity, path)
    same = text.get("strip") == watch.facts(job.run.timesteps)
    return same and (not gif or path.with_suffix(".gif").exists())


def pending(job: Job, watch: Watch, gif: bool, overwrite: bool = False) -> list[int]:
    """The seeds whose strips are to be made.

    Raises:
        UsageError: if the folder holds pictures or strips of other settings and ``overwrite`` is false.
    """
    if overwrite:
        return list(job.seeds)
    job.folder.check_settings(job.identity)
    return [seed for seed in job.seeds if not is_there(job, seed, watch, gif)]


def _write(job: Job, seed: int, frames: Sequence[np.ndarray], watch: Watch, gif: bool) -> None:
    """The animation, then the strip, whose presence means that both are there. Raises OSError."""
    timesteps, path, fsync = job.run.timesteps, strip_path(job, seed, watch), job.folder.fsync
    images, labels = [to_image(frame) for frame in frames], watch.labels(timesteps)
    if gif:
        animation = encode_gif(images, labels, rests=[len(images) - 1])
        write_atomically(path.with_suffix(".gif"), animation, fsync)
    eta = job.record["sampling"]["eta"]
    caption = f"seed {seed}: {NAMES[watch.show]} ({job.run.model.name}, {len(timesteps)} steps, eta {eta:g})"
    strip = draw_strip([Row(images, labels)], caption)
    described = describe_strip(job.record, seed, watch.facts(timesteps), np.asarray(strip))
    write_atomically(path, encode_png(strip, to_text(described)), fsync)


def execute(job: Job, watch: Watch, gif: bool, reporter: Reporter | None = None, overwrite: bool = False) -> Watched:
    """Make the strips of the job's seeds that are missing.

    Raises:
        UsageError: as `pending` does, and for steps that cannot be shown.
        RunError: if the run fails; what was finished stays.
        InterruptedRunError: on Ctrl-C; likewise.
    """
    reporter = reporter or Reporter()
    todo = pending(job, watch, gif, overwrite)
    started = time.perf_counter()
    if todo:
        network, job = prepare(job, len(todo), reporter)
        sampler = job_sampler(job, network)
        started = time.perf_counter()
        reporter.started(job, todo)
        with ending_well(job, reporter):
            for seeds in batches(todo, job.batch_size):
                frames, x = watch_batch(sampler, seeds, job.batch_size, watch, reporter.step)
                check_finite(x, [f"seed {seed}" for seed in seeds], job)
                for seed, of_a_seed in zip(seeds, frames, strict=True):
                    _write(job, seed, of_a_seed, watch, gif)
                reporter.batch(len(seeds))
    strips = tuple(strip_path(job, seed, watch) for seed in job.seeds)
    return Watched(
        made=len(todo),
        present=len(job.seeds) - len(todo),
        seconds=time.perf_counter() - started,
        folder=job.folder.path,
        strips=strips,
        animations=tuple(path.with_suffix(".gif") for path in strips) if gif else (),
    )
