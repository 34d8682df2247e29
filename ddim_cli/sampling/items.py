"""Items: the pictures of a plan, one by one. Needs no torch until the first state is drawn.

An item says where its x_T comes from, which noise its steps draw, its condition, and what its sidecar says besides
the run's record. A seed is one way to say an item; a latent, a slerp of noises and a picture to invert are others.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

from ddim_cli.config.seeds import Seeds, parse_classes
from ddim_cli.errors import UsageError
from ddim_cli.models.conditions import NOTHING, Blend, Conditioning
from ddim_cli.outputs.sidecar import ROW

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from ddim_cli.config.schema import Config
    from ddim_cli.outputs.latents import LatentFile

Shape = tuple[int, int, int]
# Tells batches of items apart: what runs for one kind does not run for another.
Kind = tuple[Any, ...]


@dataclass(frozen=True)
class Noise:
    """x_T is the first draw of the stream of ``seed``; steps that draw from the same one go on from there."""

    seed: int

    def state(self, shape: Shape) -> Tensor:
        """float32 [C, H, W] on the host."""
        return seed_noise(self.seed, shape)


@dataclass(frozen=True)
class Slerp:
    """x_T lies between the noises of seeds, on the sphere on which noise lies.

    Two seeds and a weight from 0 (the first) to 1 (the second); or the corners of a square (top left, top right,
    bottom left, bottom right) and two weights, to the right and down.
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

    @property
    def label(self) -> str:
        return f"seed {self.seed}" if self.seed is not None else f"{self.weights[0]:.2g}"

    def state(self, shape: Shape) -> Tensor:
        """float32 [C, H, W] on the host."""
        from ddim_cli.diffusion.slerp import slerp

        ends = [seed_noise(seed, shape) for seed in self.seeds]
        across = self.weights[0]
        if len(self.weights) == 1:
            return slerp(ends[0], ends[1], across)
        top, bottom = slerp(ends[0], ends[1], across), slerp(ends[2], ends[3], across)
        return slerp(top, bottom, self.weights[1])


@dataclass(frozen=True)
class Latent:
    """x_T is read from a file: row ``index`` of it, or the only one (None)."""

    file: LatentFile
    index: int | None

    @property
    def name(self) -> str:
        """What its picture is named after: the file, and the row of one that holds several."""
        return self.file.stem if self.index is None else f"{self.file.stem}-{self.index:03d}"

    def state(self, shape: Shape) -> Tensor:
        """float32 [C, H, W] on the host. Raises UsageError for a file that cannot be read."""
        import torch

        from ddim_cli.outputs.latents import read_latent

        return torch.from_numpy(read_latent(self.file, self.index))


@dataclass(frozen=True, eq=False)
class GivenLatent:
    """x_T was handed over by a program: ``values``, float32 [C, H, W]."""

    values: np.ndarray

    def state(self, shape: Shape) -> Tensor:
        """float32 [C, H, W] on the host."""
        import torch

        return torch.tensor(self.values)


@dataclass(frozen=True)
class Inversion:
    """x_T is what DDIM inversion makes of a picture (DDIM, section 5.4): the batch first goes up the grid.

    It goes up to where step ``begin`` of the grid starts: 0 is all of it. ``conditioning`` is what the network is told
    on the way up.
    """

    path: Path
    conditioning: Conditioning = NOTHING
    begin: int = 0

    def state(self, shape: Shape) -> Tensor:
        """The picture as x0, float32 [C, H, W] in [-1, 1]. Raises UsageError for a file that is no picture."""
        import torch

        from ddim_cli.sampling.pictures import read_input

        return torch.from_numpy(read_input(self.path, shape)[1])


@dataclass(frozen=True)
class Between:
    """x_T lies between the latents of two inverted pictures, on the sphere, at ``weight`` from 0 (the first) to 1."""

    ends: tuple[Inversion, Inversion]
    weight: float


Start = Noise | Slerp | Latent | GivenLatent | Inversion | Between


@dataclass(frozen=True)
class Canvas:
    """A picture that sampling begins from, with noise added, and that stays where a mask is black.

    Without ``mask`` all of it changes (SDEdit, arXiv:2108.01073). ``keeps``: what is white in the mask is what stays.
    ``pixels_sha256`` and ``mask_sha256`` are of the files as they were when they were first read.
    """

    picture: Path
    mask: Path | None = None
    keeps: bool = False
    pixels_sha256: str | None = field(default=None, compare=False)
    mask_sha256: str | None = field(default=None, compare=False)


@dataclass(frozen=True)
class Begins:
    """How pictures of seeds begin: from noise, turned by ``variation`` (a seed, and how far towards its noise); and
    with a ``canvas`` from that picture, at the step ``begin`` of the grid."""

    variation: tuple[int, float] | None = None
    begin: int = 0
    canvas: Canvas | None = None

    def start(self, seed: int) -> Noise | Slerp:
        """Where the noise of a seed's picture comes from."""
        if self.variation is None:
            return Noise(seed)
        other, weight = self.variation
        return Slerp((seed, other), (weight,))


@lru_cache(maxsize=16)
def seed_noise(seed: int, shape: Shape) -> Tensor:
    """The initial noise that a seed gives its picture, float32 [C, H, W] on the host."""
    import torch

    return torch.randn(shape, generator=torch.Generator("cpu").manual_seed(seed))


@dataclass(frozen=True)
class Item:
    """One picture to be made.

    ``name`` is its file's stem; ``label`` what messages call it; ``seed`` what its sidecar names, None for a picture
    that no single seed makes; ``noise_seed`` the stream that its steps draw from, None for none; ``conditioning`` its
    class or prompt; ``about`` what the sidecar's section ``sampling`` says besides; ``begin`` the first step of the
    grid that runs; ``canvas`` the picture it begins from, or whose parts it keeps.
    """

    name: str
    label: str
    start: Start
    seed: int | None = None
    noise_seed: int | None = None
    conditioning: Conditioning = NOTHING
    about: Mapping[str, Any] = field(default_factory=dict)
    begin: int = 0
    canvas: Canvas | None = None

    @property
    def inversions(self) -> tuple[Inversion, ...]:
        """What has to be inverted before it can start."""
        if isinstance(self.start, Between):
            return self.start.ends
        return (self.start,) if isinstance(self.start, Inversion) else ()

    @property
    def is_masked(self) -> bool:
        """Whether a mask says what of its picture is made anew."""
        return self.canvas is not None and self.canvas.mask is not None

    @property
    def kind(self) -> Kind:
        """What the items of a batch have in common."""
        up = [(i.begin, i.conditioning.guidance_scale) for i in self.inversions]
        return (self.begin, self.canvas is not None, self.is_masked, self.conditioning.guidance_scale, tuple(up))

    @property
    def class_number(self) -> int | None:
        return self.conditioning.class_number

    @property
    def is_of_a_seed(self) -> bool:
        """Whether its seed alone tells it from the others of its plan, and names it."""
        return self.seed is not None and self.name == f"{self.seed:06d}"


@dataclass(frozen=True)
class Choices:
    """What the pictures of a plan are conditioned on: that of a seed is at seed mod their number.

    ``classes`` is empty for a network without classes, ``prompts`` for one without text.
    """

    classes: tuple[int, ...] = ()
    prompts: tuple[str, ...] = ()
    negative_prompt: str | None = None

    @classmethod
    def of(cls, config: Config) -> Choices:
        settings = config.sampling
        classes = parse_classes(settings.classes) if settings.classes is not None else ()
        return cls(tuple(classes), settings.prompts, settings.negative_prompt)

    def of_seed(self, seed: int) -> Conditioning:
        return Conditioning(
            self.classes[seed % len(self.classes)] if self.classes else None,
            self.prompts[seed % len(self.prompts)] if self.prompts else None,
            self.negative_prompt,
        )

    def of_all(self, seeds: Sequence[int] | None = None) -> Conditioning:
        """What all pictures of a plan share: that of these ``seeds``, else the only one there is.

        Raises:
            UsageError: where there are several.
        """
        by_condition: dict[Conditioning, int] = {}
        for seed in range(max(len(self.classes), 1) * max(len(self.prompts), 1)) if seeds is None else seeds:
            by_condition.setdefault(self.of_seed(seed), seed)
        if len(by_condition) == 1:
            return next(iter(by_condition))
        one, other = list(by_condition.items())[:2]
        what = "classes" if one[0].class_number != other[0].class_number else "prompt"
        a, b = (each[0].class_number if what == "classes" else repr(each[0].prompt) for each in (one, other))
        named, plural = ("class", "classes") if what == "classes" else ("prompt", "prompts")
        if seeds is None:
            raise UsageError(
                f"--{what} names {a} and {b}: pictures that start from no seed take one {named} for all; name one"
            )
        raise UsageError(
            f"--{what}: the seeds {one[1]} and {other[1]} have the {plural} {a} and {b}, "
            f"and there is none between them; name one "
            f"{named}"
        )


def seed_item(seed: int, conditioning: Conditioning = NOTHING, begins: Begins = Begins()) -> Item:
    return Item(
        f"{seed:06d}",
        f"seed {seed}",
        begins.start(seed),
        seed,
        seed,
        conditioning,
        begin=begins.begin,
        canvas=begins.canvas,
    )


def frame_item(name: str, start: Slerp, conditioning: Conditioning) -> Item:
    """The item of an interpolation's frame, whose sidecar says in ``sampling.between`` what it lies between."""
    weight = start.weights[0] if len(start.weights) == 1 else list(start.weights)
    about = {"between": {"seeds": list(start.seeds), "weight": weight}}
    return Item(name, name.replace("_", " "), start, conditioning=conditioning, about=about)


def picture_frame_item(
    name: str, start: Between, pictures: Sequence[Mapping[str, Any]], conditioning: Conditioning
) -> Item:
    """As `frame_item`, between two pictures of which sidecars say ``pictures``."""
    about = {"between": {"pictures": [dict(each) for each in pictures], "weight": start.weight}}
    return Item(name, name.replace("_", " "), start, conditioning=conditioning, about=about)


def blend_item(name: str, seed: int, blend: Blend, negative_prompt: str | None) -> Item:
    """The item of a frame between two prompts: the noise of its seed, and what its sidecar says it lies between."""
    about = {"between_prompts": {"prompts": list(blend.prompts), "weight": blend.weight}}
    conditioning = Conditioning(None, blend, negative_prompt)
    return Item(name, name.replace("_", " "), Noise(seed), seed, seed, conditioning, about)


def latent_item(start: Latent, conditioning: Conditioning) -> Item:
    """The item of a latent from a file, whose sidecar says in ``sampling.latent`` which it is.

    Raises:
        UsageError: for a latent that cannot be read, or has values that are not finite.
    """
    about = {"latent": latent_facts(start)}
    return Item(f"{start.name}.latent", start.name, start, conditioning=conditioning, about=about)


def row_item(
    name: str,
    label: str,
    start: Noise | Slerp | Latent | GivenLatent,
    seed: int | None,
    conditioning: Conditioning,
    facts: Mapping[str, Any],
    begins: Begins = Begins(),
) -> Item:
    """The item of a job file's row, whose sidecar says in ``sampling.row`` its seed.

    ``facts`` are what it says of the latent or the picture that the row begins from.
    """
    return Item(
        name,
        label,
        start,
        seed,
        seed,
        conditioning,
        {ROW: {"seed": seed}, **facts},
        begin=begins.begin,
        canvas=begins.canvas,
    )


def latent_facts(start: Latent) -> dict[str, Any]:
    """What a sidecar says of a latent: its file, row and hash. Raises UsageError as `latent_item`."""
    from ddim_cli.outputs.latents import latent_sha256, read_latent

    index = {} if start.index is None else {"index": start.index}
    sha256 = latent_sha256(read_latent(start.file, start.index))
    return {"file": start.file.path.name, **index, "sha256": sha256}


def reconstruction_item(
    name: str, label: str, start: Start, facts: Mapping[str, Any], conditioning: Conditioning
) -> Item:
    """The item of a picture that is inverted, whose sidecar says in ``sampling.inverted`` what it was (``facts``)."""
    return Item(f"{name}.recon", label, start, conditioning=conditioning, about={"inverted": dict(facts)})


def edit_item(
    name: str, start: Inversion, conditioning: Conditioning, about: Mapping[str, Any], canvas: Canvas | None
) -> Item:
    """The item of an inverted picture that is sampled as something else, whose sidecar says ``about`` of that."""
    return Item(name, name, start, conditioning=conditioning, about=about, begin=start.begin, canvas=canvas)


@dataclass(frozen=True)
class SeedItems(Sequence["Item"]):
    """The items of seeds, made as they are asked for: a plan of millions takes no memory for them."""

    seeds: Sequence[int]
    choices: Choices = Choices()
    begins: Begins = Begins()

    @classmethod
    def of(cls, config: Config, begins: Begins = Begins()) -> SeedItems:
        """The plan of a config's seeds."""
        return cls(config.seeds(), Choices.of(config), begins)

    def __len__(self) -> int:
        return len(self.seeds)

    @overload
    def __getitem__(self, index: int) -> Item: ...

    @overload
    def __getitem__(self, index: slice) -> SeedItems: ...

    def __getitem__(self, index: int | slice) -> Item | SeedItems:
        if isinstance(index, slice):
            return replace(self, seeds=self.seeds[index])
        seed = self.seeds[index]
        return seed_item(seed, self.choices.of_seed(seed), self.begins)

    def take(self, parts: Iterable[range]) -> SeedItems:
        """Those of these positions."""
        return replace(self, seeds=Seeds(run for part in parts for run in Seeds.of(self.seeds[_slice(part)]).parts))

    def between(self, start: int, stop: int) -> list[str]:
        """The names of the positions from ``start`` to before ``stop``."""
        return [f"{seed:06d}" for seed in self.seeds[start:stop]]

    def position(self, name: str) -> int | None:
        """Where the item of a name stands; None for one that is not among these."""
        seed = int(name) if name.isdecimal() else -1
        return Seeds.of(self.seeds).index(seed) if seed in self.seeds else None


def _slice(part: range) -> slice:
    return slice(part.start, part.stop, part.step)


def seeds_of(items: Sequence[Item]) -> Sequence[int]:
    """The seeds of items that have one."""
    return items.seeds if isinstance(items, SeedItems) else [item.seed for item in items if item.seed is not None]
