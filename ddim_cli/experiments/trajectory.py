"""How a picture comes about: the predicted x0, or the state x_t, along the steps of chosen seeds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from torch import Tensor

from ddim_cli.errors import UsageError
from ddim_cli.models.decoders import Decoder
from ddim_cli.outputs.atomic import write_atomically
from ddim_cli.outputs.figures import quoted
from ddim_cli.outputs.files import File, here
from ddim_cli.outputs.picture import encode_png, to_image
from ddim_cli.outputs.provenance import strip_inside
from ddim_cli.outputs.sidecar import describe_strip, to_text
from ddim_cli.outputs.strip import Row, draw_strip, encode_gif
from ddim_cli.sampling.items import Item
from ddim_cli.sampling.job import Job, make_job
from ddim_cli.sampling.loop import Observer, Picture, to_host, to_uint8
from ddim_cli.sampling.plan import Shard
from ddim_cli.sampling.product import Product
from ddim_cli.sampling.record import item_record
from ddim_cli.sampling.resolve import Run

ABOUT_FRAMES = 10
Shown = Literal["x0", "xt"]
NAMES = {"x0": "predicted x0", "xt": "state x_t"}


def chosen_steps(show: Shown, every: int | None, count: int, begin: int = 0) -> tuple[int, ...]:
    """The steps ``begin`` ... count - 1 that are shown: every ``every``-th (None: about ten in all).

    Of x0 the last is always among them: it is the result.

    Raises:
        UsageError: for an ``every`` below 1.
    """
    if every is not None and every < 1:
        raise UsageError(f"--every {every}: it takes an integer of at least 1")
    chosen = range(begin, count, every or max(1, round((count - begin) / ABOUT_FRAMES)))
    return tuple(sorted({*chosen, count - 1})) if show == "x0" else tuple(chosen)


@dataclass(frozen=True)
class Selection:
    """What of a trajectory over ``grid`` is kept: x0 after each of ``steps``, or x_t before each and the result."""

    show: Shown
    grid: tuple[int, ...]
    steps: tuple[int, ...]

    @classmethod
    def of_facts(cls, facts: Mapping[str, Any], grid: tuple[int, ...]) -> Selection:
        """The selection of a strip that says these facts of itself. Raises ValueError for timesteps off the grid."""
        return cls(facts["show"], grid, tuple(grid.index(t) for t in facts["timesteps"]))

    def labels(self) -> list[str]:
        """A label a frame. Of x_t the last frame is what the last step makes."""
        labels = [f"t = {self.grid[i]}" for i in self.steps]
        return labels if self.show == "x0" else [*labels, "result"]

    def facts(self) -> dict[str, Any]:
        """What a strip says of itself."""
        return {"show": self.show, "timesteps": [self.grid[i] for i in self.steps]}


class FrameObserver(Observer):
    """Keeps the frames of one batch."""

    def __init__(self, selection: Selection, rows: int, decoder: Decoder | None = None):
        self._decoder = decoder or Decoder()
        self._show, self._steps, self._rows = selection.show, frozenset(selection.steps), rows
        self._last = len(selection.grid) - 1
        self._frames: list[Tensor] = []

    def _keep(self, x: Tensor) -> None:
        self._frames.append(to_host(to_uint8(self._decoder.decode(x[: self._rows]))))

    def begin(self, x: Tensor) -> None:
        if self._show == "xt":
            self._keep(x)

    def step(self, i: int, x: Tensor, x0: Tensor) -> None:
        if self._show == "x0":
            if i in self._steps:
                self._keep(x0)
        elif i + 1 in self._steps or i == self._last:
            self._keep(x)

    def seen(self, row: int) -> list[np.ndarray]:
        """The frames of an item, uint8 [H, W, C]."""
        return [frame[row].numpy() for frame in self._frames]


@dataclass(frozen=True)
class Strips(Product):
    """For each seed a strip of frames along its steps and, with ``gif``, an animation."""

    selection: Selection
    gif: bool = False

    def watch(self, items: Sequence[Item], decoder: Decoder) -> FrameObserver:
        return FrameObserver(self.selection, len(items), decoder)

    def missing(self, job: Job, items: Sequence[Item]) -> list[Item]:
        return [item for item in items if not self._is_there(job, item)]

    def _is_there(self, job: Job, item: Item) -> bool:
        """Whether a strip is there, shows the same steps, and has its animation if that is asked for."""
        path, text = self.picture(job, item), strip_inside(self.picture(job, item))
        if text is None:
            return False
        job.folder.check_same(text, job.identity, path)
        same = text.get("strip") == self.selection.facts()
        return same and (not self.gif or path.with_suffix(".gif").exists())

    def picture(self, job: Job, item: Item) -> Path:
        """Where the strip of an item belongs: 000003.x0.png. Its animation ends in .gif."""
        return here(job.folder.path) / f"{item.name}.{self.selection.show}.png"

    def files(self, job: Job, item: Item) -> list[File]:
        path = self.picture(job, item)
        return [path, path.with_suffix(".gif")] if self.gif else [path]

    def count(self, job: Job) -> int:
        return sum(self.picture(job, item).exists() for item in job.plan)

    def remove(self, job: Job) -> None:
        """Nothing goes before it is replaced: a strip's own text tells whether it is the one that is asked for."""

    def save(self, job: Job, picture: Picture) -> None:
        """Write the animation, then the strip, whose presence means that both are there."""
        item, fsync, path = picture.item, job.folder.fsync, self.picture(job, picture.item)
        images, labels = [to_image(frame) for frame in picture.seen], self.selection.labels()
        if self.gif:
            animation = encode_gif(images, labels, rests=[len(images) - 1])
            write_atomically(path.with_suffix(".gif"), animation, fsync)
        shown, settings = NAMES[self.selection.show], job.run.config.sampling
        prompt = item.conditioning.prompt
        label = f"{item.label}, {quoted(prompt)}" if isinstance(prompt, str) and prompt else item.label
        order = f" of order {settings.order}" if settings.order > 1 else ""
        about = f"{job.run.model.name}, {len(self.selection.grid)} steps{order}, eta {settings.eta:g}"
        caption = f"{label}: {shown} ({about})"
        strip = draw_strip([Row(images, labels)], caption)
        described = describe_strip(
            item_record(job.record, item, picture.known), item.seed, self.selection.facts(), np.asarray(strip)
        )
        write_atomically(path, encode_png(strip, to_text(described)), fsync)


def select(run: Run, show: Shown, every: int | None) -> Selection:
    """What is kept of a run's trajectories. Raises UsageError for an ``every`` below 1, and for jumps."""
    if run.config.sampling.resample > 1:
        raise UsageError(
            f"sampling.resample = {run.config.sampling.resample}: a trajectory that jumps back up is no row of frames; "
            "leave it out"
        )
    begin = run.init.begin if run.init is not None else 0
    return Selection(show, run.timesteps, chosen_steps(show, every, len(run.timesteps), begin))


def prepare(run: Run, selection: Selection, gif: bool = False, shard: Shard = Shard()) -> tuple[Job, Strips]:
    return make_job(run, shard=shard, ending="-trajectory"), Strips(selection, gif)
