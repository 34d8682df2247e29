"""The plan of an interpolation: which seeds, in which frames, at which weights. Needs no torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from ddim_cli.config.seeds import parse_classes, parse_list
from ddim_cli.errors import UsageError
from ddim_cli.sampling.resolve import Run

LINE_FRAMES, SQUARE_FRAMES = 11, 8
# Beyond this a strip is no picture that anything opens.
MOST_FRAMES = 10_000


@dataclass(frozen=True)
class Frame:
    """One frame: the noise of ``seeds`` at ``weights``.

    Two seeds and a weight w, from 0 for the first to 1 for the second; or the four corners of a square (top left, top
    right, bottom left, bottom right) and two weights, to the right and down.
    """

    seeds: tuple[int, ...]
    weights: tuple[float, ...]

    @property
    def seed(self) -> int | None:
        """The seed whose own noise this is, None between them."""
        if not set(self.weights) <= {0.0, 1.0}:
            return None
        across, down = (*self.weights, 0.0)[:2]
        return self.seeds[int(across) + 2 * int(down)]

    def facts(self) -> dict[str, Any]:
        """The entry ``sampling.between`` of its sidecar."""
        weight = {"weight": self.weights[0]} if len(self.weights) == 1 else {"weight": list(self.weights)}
        return {"seeds": list(self.seeds), **weight}

    def label(self) -> str:
        return f"seed {self.seed}" if self.seed is not None else f"{self.weights[0]:.2g}"


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

    def frames(self) -> list[Frame]:
        """All frames: of a path in its order, of a square row by row. A seed on a path is one frame."""
        weights = [i / (self.count - 1) for i in range(self.count)]
        if self.square:
            return [Frame(self.seeds, (across, down)) for down in weights for across in weights]
        legs = list(pairwise(self.seeds))
        # A seed on the way is the end of the way to it, so that a longer path begins with the same frames.
        return [Frame(legs[0], (0.0,)), *(Frame(leg, (weight,)) for leg in legs for weight in weights[1:])]

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


def class_of(run: Run, seeds: Sequence[int]) -> int | None:
    """The class of all frames, None of an unconditional network. UsageError where the seeds have several."""
    if run.config.sampling.classes is None:
        return None
    classes = parse_classes(run.config.sampling.classes)
    found: dict[int, int] = {}
    for seed in seeds:
        found.setdefault(classes[seed % len(classes)], seed)
    if len(found) > 1:
        (a, first), (b, second) = list(found.items())[:2]
        raise UsageError(
            f"--classes {run.config.sampling.classes}: the seeds {first} and {second} have the classes {a} and {b}, "
            "and there is none between them; name one class"
        )
    return next(iter(found))
