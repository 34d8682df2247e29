"""The plan of an interpolation: between which seeds or prompts, in which frames, at which weights. Needs no torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from ddim_cli.config.labels import label_of
from ddim_cli.config.layers import Layer, merge, validate_layer
from ddim_cli.config.seeds import parse_list
from ddim_cli.errors import UsageError
from ddim_cli.experiments.rules import check_deterministic
from ddim_cli.models.conditions import Blend, Conditioning
from ddim_cli.outputs.figures import quoted
from ddim_cli.sampling.items import Choices, Item, Slerp, blend_item, frame_item
from ddim_cli.sampling.resolve import Run, refuse_init, resolve, writes_png

LINE_FRAMES, SQUARE_FRAMES = 11, 8
# Beyond this a strip is no picture that anything opens.
MOST_FRAMES = 10_000


def checked_count(count: int | None, usual: int) -> int:
    """The frames from one end to the next; None: as many as is usual. Raises UsageError."""
    if count is None:
        return usual
    if count < 2:
        raise UsageError(f"--frames {count}: it takes at least 2, the two ends")
    return count


def check_total(total: int, count: int) -> None:
    if total > MOST_FRAMES:
        raise UsageError(f"--frames {count}: that makes {total:,} frames, and {MOST_FRAMES:,} is the most")


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
        found = cls(seeds, checked_count(count, SQUARE_FRAMES if square else LINE_FRAMES), square)
        check_total(len(found), found.count)
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

    @property
    def stops(self) -> tuple[int, ...]:
        """What the way leads through."""
        return self.seeds

    def labels(self) -> list[str]:
        """A label a frame."""
        return [frame.label for frame in self.frames()]

    def at_stops(self) -> list[bool]:
        """Of each frame, whether it is a seed's own picture."""
        return [frame.seed is not None for frame in self.frames()]

    def items(self, conditioning: Conditioning) -> list[Item]:
        return [frame_item(f"frame_{n:03d}", frame, conditioning) for n, frame in enumerate(self.frames())]

    def items_of(self, run: Run) -> list[Item]:
        """The items of a run of `resolve_interpolation`."""
        return self.items(Choices.of(run.config).of_all(self.seeds))

    def caption(self) -> str:
        """What the strip says above its frames."""
        shown = self.seeds if len(self.seeds) <= 8 else [*self.seeds[:4], "...", *self.seeds[-3:]]
        return f"between seeds {', '.join(map(str, shown))}"

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


@dataclass(frozen=True)
class BetweenPrompts:
    """A path through ``prompts``, ``count`` frames from one to the next, both included, all with the noise of ``seed``.

    The embeddings are interpolated linearly.
    """

    prompts: tuple[str, ...]
    count: int
    seed: int
    square = False

    @classmethod
    def of(cls, prompts: Sequence[str], count: int | None, seed: int) -> BetweenPrompts:
        """The plan of --prompt, --to-prompt, --frames and --seed. Raises UsageError, with a sentence."""
        for a, b in pairwise(prompts):
            if a == b:
                raise UsageError(f"--to-prompt {b!r}: from a prompt to itself there is nothing to see")
        found = cls(tuple(prompts), checked_count(count, LINE_FRAMES), seed)
        check_total(len(found), found.count)
        return found

    def __len__(self) -> int:
        return (len(self.prompts) - 1) * (self.count - 1) + 1

    def frames(self) -> list[Blend]:
        """All frames in their order. A prompt on the way is the end of the way to it."""
        weights = [i / (self.count - 1) for i in range(self.count)]
        legs = list(pairwise(self.prompts))
        return [Blend(legs[0], 0.0), *(Blend(leg, weight) for leg in legs for weight in weights[1:])]

    @property
    def stops(self) -> tuple[str, ...]:
        """What the way leads through."""
        return self.prompts

    def labels(self) -> list[str]:
        """A label a frame."""
        ends = {0.0: 0, 1.0: 1}
        return [label_of(f.prompts[ends[f.weight]]) if f.weight in ends else f"{f.weight:.2g}" for f in self.frames()]

    def at_stops(self) -> list[bool]:
        """Of each frame, whether it is a prompt's own picture."""
        return [frame.weight in (0.0, 1.0) for frame in self.frames()]

    def items_of(self, run: Run) -> list[Item]:
        """The items of a run of `resolve_prompts`."""
        negative = run.config.sampling.negative_prompt
        return [blend_item(f"frame_{n:03d}", self.seed, frame, negative) for n, frame in enumerate(self.frames())]

    def caption(self) -> str:
        """What the strip says above its frames."""
        shown = self.prompts if len(self.prompts) <= 4 else [*self.prompts[:2], "...", self.prompts[-1]]
        *others, last = (prompt if prompt == "..." else quoted(prompt, 40) for prompt in shown)
        return f"seed {self.seed}, between {', '.join(others)} and {last}"

    def facts(self) -> dict[str, Any]:
        """What the strip says of itself."""
        shape = {"shape": "prompts", "prompts": list(self.prompts)}
        return {**shape, "seed": self.seed, "frames": len(self), "frames_a_side": self.count}

    def ending(self) -> str:
        """What the default folder's name ends with; the prompts are in the hash before it."""
        return f"-between-prompts-seed{self.seed}-frames{self.count}"


WHY_NO_INIT = "the frames of an interpolation begin from noise, or from pictures named with --between"
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
    run = writes_png(resolve(layers))
    refuse_init(run, WHY_NO_INIT)
    check_deterministic(run, WHY_ETA_0)
    Choices.of(run.config).of_all(between.seeds)
    return run


def resolve_prompts(
    layers: Sequence[Layer], to: Sequence[str], count: int | None = None, seed: int | None = None
) -> tuple[Run, BetweenPrompts]:
    """The run and the plan of frames from the prompt of ``layers`` to each of ``to``.

    ``seed`` None stands for the first of the settings. Noise of steps is of that seed too, the same in every frame: so
    any eta goes.

    Raises:
        ConfigError: for settings that cannot work together.
        ModelError: for a model that is not there or cannot be sampled from.
        UsageError: unless there is one prompt to begin with, and for prompts or a number of frames that make no path.
    """
    if seed is not None:
        said = Layer({"sampling.seed": seed}, {"sampling.seed": "--seed"})
        validate_layer(said)
        layers = [*layers, said]
    config = merge(layers).config
    prompts = config.sampling.prompts
    if len(prompts) != 1:
        told = "none is given" if not prompts else f"{len(prompts)} are given"
        raise UsageError(f"--to-prompt needs the one prompt to begin with, as --prompt, and {told}")
    plan = BetweenPrompts.of([*prompts, *to], count, config.seeds()[0])
    said = Layer({"sampling.prompt": list(plan.prompts)}, {"sampling.prompt": "--to-prompt"})
    run = writes_png(resolve([*layers, said]))
    refuse_init(run, WHY_NO_INIT)
    return run, plan
