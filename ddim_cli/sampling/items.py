"""Items: the pictures of a plan, one by one. Needs no torch until the first state is drawn.

An item says where its x_T comes from, which noise its steps draw, its condition, and what its sidecar says besides
the run's record. A seed is one way to say an item; a latent, a slerp of noises and a picture to invert are others.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

from ddim_cli.config.seeds import parse_classes
from ddim_cli.errors import UsageError

if TYPE_CHECKING:
    from torch import Tensor

    from ddim_cli.config.schema import Config
    from ddim_cli.outputs.latents import LatentFile

Shape = tuple[int, int, int]


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


@dataclass(frozen=True)
class Inversion:
    """x_T is what DDIM inversion makes of a picture (DDIM, section 5.4): the batch first goes up the grid."""

    path: Path

    def state(self, shape: Shape) -> Tensor:
        """The picture as x0, float32 [C, H, W] in [-1, 1]. Raises UsageError for a file that is no picture."""
        import torch

        from ddim_cli.sampling.pictures import read_input

        return torch.from_numpy(read_input(self.path, shape)[1])


Start = Noise | Slerp | Latent | Inversion


@lru_cache(maxsize=16)
def seed_noise(seed: int, shape: Shape) -> Tensor:
    """The initial noise that a seed gives its picture, float32 [C, H, W] on the host."""
    import torch

    return torch.randn(shape, generator=torch.Generator("cpu").manual_seed(seed))


@dataclass(frozen=True)
class Item:
    """One picture to be made.

    ``name`` is its file's stem; ``label`` what messages call it; ``seed`` what its sidecar names, None for a picture
    that no single seed makes; ``noise_seed`` the stream that its steps draw from, None for none; ``class_number`` its
    class, None of an unconditional network; ``about`` what the sidecar's section ``sampling`` says besides.
    """

    name: str
    label: str
    start: Start
    seed: int | None = None
    noise_seed: int | None = None
    class_number: int | None = None
    about: Mapping[str, Any] = field(default_factory=dict)


def class_of_seed(classes: Sequence[int], seed: int) -> int | None:
    """The class of a seed's picture: classes[seed mod their number]; None where there are none."""
    return classes[seed % len(classes)] if classes else None


def classes_of(config: Config) -> tuple[int, ...]:
    """The classes that a plan draws from; empty for an unconditional network."""
    return parse_classes(config.sampling.classes) if config.sampling.classes is not None else ()


def seed_item(seed: int, classes: Sequence[int] = ()) -> Item:
    return Item(f"{seed:06d}", f"seed {seed}", Noise(seed), seed, seed, class_of_seed(classes, seed))


def frame_item(name: str, start: Slerp, class_number: int | None) -> Item:
    """The item of an interpolation's frame, whose sidecar says in ``sampling.between`` what it lies between."""
    weight = start.weights[0] if len(start.weights) == 1 else list(start.weights)
    about = {"between": {"seeds": list(start.seeds), "weight": weight}}
    return Item(name, name.replace("_", " "), start, class_number=class_number, about=about)


def latent_item(start: Latent, class_number: int | None) -> Item:
    """The item of a latent from a file, whose sidecar says in ``sampling.latent`` which it is.

    Raises:
        UsageError: for a latent that cannot be read, or has values that are not finite.
    """
    from ddim_cli.outputs.latents import latent_sha256, read_latent

    index = {} if start.index is None else {"index": start.index}
    sha256 = latent_sha256(read_latent(start.file, start.index))
    about = {"latent": {"file": start.file.path.name, **index, "sha256": sha256}}
    return Item(f"{start.name}.latent", start.name, start, class_number=class_number, about=about)


def reconstruction_item(
    name: str, label: str, start: Start, facts: Mapping[str, Any], class_number: int | None
) -> Item:
    """The item of a picture that is inverted, whose sidecar says in ``sampling.inverted`` what it was (``facts``)."""
    return Item(f"{name}.recon", label, start, class_number=class_number, about={"inverted": dict(facts)})


@dataclass(frozen=True)
class SeedItems(Sequence["Item"]):
    """The items of seeds, made as they are asked for: a plan of millions takes no memory for them."""

    seeds: Sequence[int]
    classes: tuple[int, ...] = ()

    @classmethod
    def of(cls, config: Config) -> SeedItems:
        """The plan of a config's seeds."""
        return cls(config.seeds(), classes_of(config))

    def __len__(self) -> int:
        return len(self.seeds)

    @overload
    def __getitem__(self, index: int) -> Item: ...

    @overload
    def __getitem__(self, index: slice) -> SeedItems: ...

    def __getitem__(self, index: int | slice) -> Item | SeedItems:
        if isinstance(index, slice):
            return SeedItems(self.seeds[index], self.classes)
        return seed_item(self.seeds[index], self.classes)


def seeds_of(items: Sequence[Item]) -> Sequence[int]:
    """The seeds of items that have one."""
    return items.seeds if isinstance(items, SeedItems) else [item.seed for item in items if item.seed is not None]


def one_class(config: Config, of_seeds: Sequence[int] | None = None) -> int | None:
    """The class that all pictures of a plan share, None of an unconditional network.

    With ``of_seeds`` it is the class of these seeds, else the only one named.

    Raises:
        UsageError: where there are several.
    """
    classes = classes_of(config)
    if of_seeds is None:
        if len(set(classes)) > 1:
            raise UsageError(
                f"--classes {config.sampling.classes}: pictures that start from no seed take one class for all; "
                "name one"
            )
        return classes[0] if classes else None
    by_class: dict[int | None, int] = {}
    for seed in of_seeds:
        by_class.setdefault(class_of_seed(classes, seed), seed)
    if len(by_class) > 1:
        (a, first), (b, second) = list(by_class.items())[:2]
        raise UsageError(
            f"--classes {config.sampling.classes}: the seeds {first} and {second} have the classes {a} and {b}, "
            "and there is none between them; name one class"
        )
    return next(iter(by_class))
