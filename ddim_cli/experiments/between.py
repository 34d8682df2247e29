"""The plan of an interpolation: which seeds, in which frames, at which weights. Needs no torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from ddim_cli.config.layers import Layer
from ddim_cli.config.seeds import parse_list
from ddim_cli.errors import UsageError
from ddim_cli.experiments.rules import check_deterministic
from ddim_cli.models.conditions import Conditioning
from ddim_cli.sampling.items import Choices, Item, Slerp, frame_item
from ddim_cli.sampling.resolve import Run, resolve

LINE_FRAMES, SQUARE_FRAMES = 11, 8
# Beyond this a strip is no picture that anything opens.
MOST_FRAMES = 10_000


@dataclass(frozen=True)
class Between:
    """A path through ``seeds``, ``count`` frames from one to the next, both included; or a square of count x count."""

    seeds: tuple[int, ...]
    count: int
    square: bool = False

    @classmethod
    def parse(cls, text: str, count: int | None = None, square: bool = False) -> Between:
        """The plan of --between, --frames (None: as many as suits the shape) and --square.

        Raises:
            UsageError: with a sentence, for seeds or a number of frames that make no path or square.
        """
        try:
            seeds = parse_list(text, "seed")
        except ValueError as error:
            raise UsageError(f"--between {text}: {error}") from None
        if square and (len(seeds) != 4 or len(set(seeds)) != 4):
            raise UsageError(f"--between {text}: a square has four different seeds as its corners")
        if len(seeds) < 2:
            raise UsageError(f"--between {text}: name at least two seeds, for example 3,8")
        for a, b in pairwise(seeds):
            if a == b:
                raise UsageError(f"--between {text}: from seed {a} to itself there is nothing to see")
        if count is None:
            count = SQUARE_FRAMES if square else LINE_FRAMES
        if count < 2:
            raise UsageError(f"--frames {count}: it takes at least 2, the two ends")
        found = cls(seeds, count, square)
        if len(found) > MOST_FRAMES:
            raise UsageError(f"--frames {count}: that makes {len(found):,} frames, and {MOST_FRAMES:,} is the most")
        return found

    def __len__(self) -> int:
        return self.count**2 if self.square else (len(self.seeds) - 1) * (self.count - 1) + 1

    def frames(self) -> list[Slerp]:
        """All frames: of a path in its order, of a square row by row. A seed on a path is one frame."""
        weights = [i / (self.count - 1) for i in range(self.count)]
        if self.square:
            return [Slerp(self.seeds, (across, down)) for down in weights for across in weights]
        legs = list(pairwise(self.seeds))
        # A seed on the way is the end of the way to it, so that a longer path begins with the same frames.
        return [Slerp(legs[0], (0.0,)), *(Slerp(leg, (weight,)) for leg in legs for weight in weights[1:])]

    def items(self, conditioning: Conditioning) -> list[Item]:
        return [frame_item(f"frame_{n:03d}", frame, conditioning) for n, frame in enumerate(self.frames())]

    def facts(self) -> dict[str, Any]:
        """What the strip says of itself."""
        shape = "square" if self.square else "path"
        return {"shape": shape, "seeds": list(self.seeds), "frames": len(self), "frames_a_side": self.count}

    def ending(self) -> str:
        """What the default folder's name ends with."""
        named = "-".join(map(str, self.seeds))
        if len(named) > 40:
            named = f"{self.seeds[0]}-to-{self.seeds[-1]}-by-{len(self.seeds) - 2}-others"
        return f"-between-{named}-{'square' if self.square else 'frames'}{self.count}"


WHY_ETA_0 = (
    "interpolation needs eta 0. Only then is a picture a function of its initial noise alone; fresh noise in each step "
    "would make the frames jump, and none would lie between two others"
)


def resolve_interpolation(layers: Sequence[Layer], between: Between) -> Run:
    """The run that makes the frames.

    Raises:
        ConfigError: for settings that cannot work together.
        ModelError: for a model that is not there or cannot be sampled from.
        UsageError: for an eta other than 0, and for seeds of several classes.
    """
    run = resolve(layers)
    check_deterministic(run, WHY_ETA_0)
    Choices.of(run.config).of_all(between.seeds)
    return run
