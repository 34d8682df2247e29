"""The plan of an interpolation between pictures of one's own: each is inverted, and frames lie between the latents."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from ddim_cli.config.layers import Layer
from ddim_cli.errors import UsageError
from ddim_cli.experiments.between import LINE_FRAMES, check_total, checked_count
from ddim_cli.experiments.inversion import resolve_inversion
from ddim_cli.sampling.init import located
from ddim_cli.sampling.items import Between as BetweenLatents
from ddim_cli.sampling.items import Choices, Inversion, Item, picture_frame_item
from ddim_cli.sampling.pictures import Input, read_input
from ddim_cli.sampling.resolve import Run

_SEEDS = re.compile(r"[0-9,\s-]*", re.ASCII)


def names_pictures(text: str) -> bool:
    """Whether a value of --between names files, and not seeds."""
    return _SEEDS.fullmatch(text) is None


@dataclass(frozen=True)
class BetweenPictures:
    """A path through ``pictures``, ``count`` frames from one to the next, both included."""

    pictures: tuple[Input, ...]
    count: int
    square = False

    def __len__(self) -> int:
        return (len(self.pictures) - 1) * (self.count - 1) + 1

    def frames(self) -> list[tuple[int, float]]:
        """All frames in their order: between which picture and the next, and at which weight."""
        weights = [i / (self.count - 1) for i in range(self.count)]
        return [(0, 0.0), *((leg, weight) for leg in range(len(self.pictures) - 1) for weight in weights[1:])]

    @property
    def stops(self) -> tuple[str, ...]:
        """What the way leads through."""
        return tuple(picture.name for picture in self.pictures)

    def labels(self) -> list[str]:
        """A label a frame."""
        return [self.stops[leg + int(w)] if w in (0.0, 1.0) else f"{w:.2g}" for leg, w in self.frames()]

    def at_stops(self) -> list[bool]:
        """Of each frame, whether it is what comes back of a picture."""
        return [weight in (0.0, 1.0) for _, weight in self.frames()]

    def items_of(self, run: Run) -> list[Item]:
        """The items of a run of `resolve_pictures`."""
        conditioning = Choices.of(run.config).of_all()
        ends = [Inversion(picture.path, conditioning) for picture in self.pictures]
        facts = [located(picture) for picture in self.pictures]
        return [
            picture_frame_item(
                f"frame_{n:03d}", BetweenLatents((ends[leg], ends[leg + 1]), w), facts[leg : leg + 2], conditioning
            )
            for n, (leg, w) in enumerate(self.frames())
        ]

    def caption(self) -> str:
        """What the strip says above its frames."""
        shown = self.stops if len(self.stops) <= 4 else (*self.stops[:2], "...", self.stops[-1])
        *others, last = shown
        return f"between {', '.join(others)} and {last}"

    def facts(self) -> dict[str, Any]:
        """What the strip says of itself."""
        hashes = [picture.pixels_sha256 for picture in self.pictures]
        shape = {"shape": "pictures", "pictures": list(self.stops), "pixels_sha256": hashes}
        return {**shape, "frames": len(self), "frames_a_side": self.count}

    def ending(self) -> str:
        """What the default folder's name ends with."""
        named = "-".join(self.stops)
        if len(named) > 40:
            named = f"{self.stops[0][:20]}-by-{len(self.stops) - 1}-others"
        # Pictures of one name may lie in many folders.
        hashes = "".join(picture.pixels_sha256 for picture in self.pictures)
        return f"-between-{named}-{hashlib.sha256(hashes.encode()).hexdigest()[:6]}-frames{self.count}"


def resolve_pictures(
    layers: Sequence[Layer], between: str, count: int | None = None
) -> tuple[Run, BetweenPictures, dict[str, str]]:
    """The run and the plan of frames between the files that ``between`` names, commas between them; and what was turned
    off so that they can be inverted.

    Raises:
        ConfigError: for settings that cannot work together.
        ModelError: for a model that is not there or cannot be sampled from.
        UsageError: for fewer than two files, one that is no picture, and an eta other than 0.
    """
    paths = [Path(name.strip()) for name in between.split(",") if name.strip()]
    if len(paths) < 2:
        raise UsageError(f"--between {between}: name at least two pictures, for example a.png,b.png, or two seeds")
    run, turned_off = resolve_inversion(layers)
    pictures = tuple(read_input(path, run.model.shape)[0] for path in paths)
    for a, b in pairwise(pictures):
        if a.pixels_sha256 == b.pixels_sha256:
            raise UsageError(
                f"--between {between}: from {a.path} to {b.path}, which is the same picture, there is nothing to see"
            )
    found = BetweenPictures(pictures, checked_count(count, LINE_FRAMES))
    check_total(len(found), found.count)
    return run, found, turned_off
