"""Pictures between pictures: between noises of seeds or latents of pictures, on the sphere, or prompts, linearly."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from ddim_cli.config.layers import Settings, layers_of, table_layer
from ddim_cli.errors import UsageError
from ddim_cli.experiments.between import BetweenPrompts
from ddim_cli.experiments.between_pictures import BetweenPictures
from ddim_cli.experiments.ways import Plan, resolve_plan
from ddim_cli.outputs.atomic import write_atomically
from ddim_cli.outputs.files import here
from ddim_cli.outputs.folder import OutputFolder
from ddim_cli.outputs.picture import encode_png, read_own
from ddim_cli.outputs.provenance import shows_strip
from ddim_cli.outputs.sidecar import SCHEMA, describe_strip, to_text
from ddim_cli.outputs.store import names_in, read_json, remove_pair
from ddim_cli.outputs.strip import Row, draw_strip, encode_gif
from ddim_cli.sampling.executor import Summary, execute
from ddim_cli.sampling.items import Item
from ddim_cli.sampling.job import Job, make_job
from ddim_cli.sampling.plan import Shard
from ddim_cli.sampling.product import Ending, Product
from ddim_cli.sampling.reporter import Reporter
from ddim_cli.sampling.resolve import Run

_FRAME = re.compile(r"frame_(\d{3,})\.json", re.ASCII)
# Of a strip: a longer way from seed to seed goes on in the next row.
MOST_COLUMNS = 16
# In pixels: sixteen frames of 256 fit. The frames are there in full beside it.
WIDEST = 4400


@dataclass(frozen=True)
class Frames(Product):
    """A picture for each frame of an interpolation, strip.png and, with ``gif``, an animation."""

    between: Plan
    gif: bool = False

    def missing(self, job: Job, items: Sequence[Item]) -> Sequence[Item]:
        self._check_seed(job)
        left = super().missing(job, items)
        beyond = next((path for n, path in kept_frames(job.folder).items() if n >= len(self.between)), None)
        if beyond is not None:
            raise UsageError(
                f"{beyond} is of a longer interpolation than these {len(self.between)} frames; choose another folder "
                "with --out, or replace what is there with --overwrite"
            )
        return left

    def _check_seed(self, job: Job) -> None:
        """UsageError for frames between prompts that have the noise of another seed: their settings are the same."""
        if not isinstance(self.between, BetweenPrompts):
            return
        for path in kept_frames(job.folder).values():
            seed = (read_json(path) or {}).get("seed")
            if seed != self.between.seed:
                raise UsageError(
                    f"{path} was made with seed {seed}, this run has {self.between.seed}; choose another folder with "
                    "--out, or replace what is there with --overwrite"
                )

    @contextmanager
    def claimed(self, job: Job, overwrite: bool, complete: bool) -> Iterator[None]:
        if overwrite:
            for number, sidecar in kept_frames(job.folder).items():
                if number >= len(self.between):
                    remove_pair(sidecar)
        with super().claimed(job, overwrite, complete):
            yield

    def draw(self, job: Job, made: int, reporter: Reporter) -> Ending:
        strip = here(job.folder.path) / "strip.png"
        animation = strip.with_suffix(".gif")
        if made or not shows_strip(strip, self.between.facts(), job.identity) or (self.gif and not animation.exists()):
            reporter.closing("drawing the strip")
            # An animation that is there is to show what is there now.
            _draw(job, self.between, strip, self.gif or animation.exists())
        return Ending(0, strip)


@dataclass(frozen=True)
class Interpolated:
    """What was done: frames made now, ``present`` ones that were there, and the files of all, in their order.

    ``left`` frames are for other shards to make; until they are there, ``strip`` and ``animation`` are None.
    """

    made: int
    present: int
    left: int
    seconds: float
    folder: Path
    frames: tuple[Path, ...]
    strip: Path | None
    animation: Path | None

    @classmethod
    def of(cls, job: Job, summary: Summary, gif: bool) -> Interpolated:
        strip = None if summary.sheet is None else here(summary.sheet)
        frames = tuple(here(job.folder.picture(item.name)) for item in job.items)
        animation = strip.with_suffix(".gif") if strip is not None and gif else None
        return cls(
            summary.made,
            summary.present,
            summary.left,
            summary.seconds,
            here(job.folder.path),
            frames,
            strip,
            animation,
        )


def prepare(run: Run, between: Plan, gif: bool = False, shard: Shard = Shard()) -> tuple[Job, Frames]:
    """The job of an interpolation, whose run is of `ways.resolve_plan`, and its product."""
    passes = 2 if isinstance(between, BetweenPictures) else 1
    return make_job(run, between.items_of(run), shard, between.ending(), passes), Frames(between, gif)


def interpolate(
    between: str | None = None,
    frames: int | None = None,
    square: bool = False,
    config: Settings = None,
    model: str | Path | None = None,
    out: str | Path | None = None,
    gif: bool = False,
    overwrite: bool = False,
    prompts: Sequence[str] = (),
    seed: int | None = None,
) -> Interpolated:
    """Make pictures between the pictures of seeds, or of prompts, as ``ddim interpolate`` does.

    Args:
        between: two seeds ``"3,8"``, a path ``"3,8,5"`` or ``"0-4"``, or with ``square`` four corners; or pictures,
            ``"a.png,b.png"``; None with ``prompts``.
        frames: how many from one seed or prompt to the next, both included; by default 11, along a square's side 8.
        square: make a square of frames x frames.
        config: settings, as `sample` takes them.
        model: a source, as ``--model`` takes it, in place of the config's.
        out: the folder of the frames, in place of the config's or the default.
        gif: write an animation too.
        overwrite: replace what is in the folder.
        prompts: two prompts or more, in place of ``between``: the embeddings are interpolated, the noise is the same.
        seed: of that noise; None: the config's first.

    Raises:
        DdimError: (an ordinary exception with a sentence) for settings that cannot work, a model that cannot be
            loaded, a folder that cannot be used, and a run that fails.
    """
    layers = layers_of(config, model, out)
    if prompts:
        if len(prompts) < 2:
            raise UsageError("interpolate: name at least two prompts")
        layers.append(table_layer({"sampling": {"prompt": prompts[0]}}, "prompts"))
    run, plan, _ = resolve_plan(layers, between, prompts[1:], seed, frames, square)
    job, product = prepare(run, plan, gif)
    return Interpolated.of(job, execute(job, product, overwrite=overwrite), gif)


def kept_frames(folder: OutputFolder) -> dict[int, Path]:
    """The sidecars of frames that are there, by number; pairs of seeds may lie beside them."""
    sidecars = {int(m[1]): here(folder.path) / name for name in names_in(folder.path) if (m := _FRAME.fullmatch(name))}
    return {n: sidecars[n] for n in sorted(sidecars) if (read_json(sidecars[n]) or {}).get("schema") == SCHEMA}


def strip_rows(between: Plan, images: Sequence[Image.Image]) -> list[Row]:
    """A row for each way from stop to stop, or the rows of the square, its corners named."""
    all_labels, at_stops, count = between.labels(), between.at_stops(), between.count
    if between.square:
        rows = []
        for start in range(0, len(between), count):
            own, ends = range(start, start + count), start in (0, len(between) - count)
            labels = [all_labels[n] if at_stops[n] else "" for n in own] if ends else []
            rows.append(Row(images[start : start + count], labels, above=start == 0))
        return rows
    columns = math.ceil(count / math.ceil(count / MOST_COLUMNS))
    rows = []
    for leg in range(len(between.stops) - 1):
        # A stop on the way ends one row and begins the next.
        first = leg * (count - 1)
        for start in range(first, first + count, columns):
            stop = min(start + columns, first + count)
            rows.append(Row(images[start:stop], all_labels[start:stop]))
    return rows


def animation_order(between: Plan) -> list[int]:
    """The frames of the animation by number: a path there and back, a square row by row, each from the last's end."""
    total, count = len(between), between.count
    if not between.square:
        closed = between.stops[0] == between.stops[-1]
        return list(range(total - 1)) if closed else [*range(total), *range(total - 2, 0, -1)]
    rows = [list(range(start, start + count)) for start in range(0, total, count)]
    return [n for i, row in enumerate(rows) for n in (row if i % 2 == 0 else row[::-1])]


def _draw(job: Job, between: Plan, path: Path, gif: bool) -> None:
    """Write the animation, then the strip, whose presence means that both are there. Raises OSError."""
    images = [read_own(job.folder.picture(item.name)) for item in job.plan]
    all_labels, at_stops, fsync = between.labels(), between.at_stops(), job.folder.fsync
    if gif:
        order = animation_order(between)
        rests = [i for i, n in enumerate(order) if at_stops[n]]
        labels = [] if between.square else [all_labels[n] for n in order]
        write_atomically(path.with_suffix(".gif"), encode_gif([images[n] for n in order], labels, rests), fsync)
    name, steps = job.run.model.name, len(job.run.timesteps)
    strip = draw_strip(strip_rows(between, images), f"{between.caption()} ({name}, {steps} steps)", widest=WIDEST)
    described = describe_strip(job.record, None, between.facts(), np.asarray(strip))
    write_atomically(path, encode_png(strip, to_text(described)), fsync)
