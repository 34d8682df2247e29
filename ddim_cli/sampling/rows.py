"""The rows of a job file as items, made as they are asked for; and what of them the run's model is asked before."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

import numpy as np

from ddim_cli.config.job_file import JobFile, name_of, seed_of
from ddim_cli.config.layers import Layer
from ddim_cli.errors import ConfigError, UsageError
from ddim_cli.models.conditions import Conditioning
from ddim_cli.sampling.init import Init, named, read_init
from ddim_cli.sampling.items import (
    Begins,
    Choices,
    GivenLatent,
    Item,
    Kind,
    Latent,
    Noise,
    Shape,
    Slerp,
    latent_facts,
    row_item,
)
from ddim_cli.sampling.resolve import Run, resolve

if TYPE_CHECKING:
    from ddim_cli.config.rows import Row
    from ddim_cli.config.schema import Config, SamplingSettings
    from ddim_cli.models.describe import ModelDescription
    from ddim_cli.sampling.pictures import Input

# Settings that a row may have instead, and that hold for those without.
_OF_A_ROW = ("prompt", "negative_prompt", "classes", "init", "mask", "strength")
Latents = dict[str, tuple[Latent | GivenLatent, dict[str, Any]]]
# Names what a row begins from: picture, mask and strength, as it says them or the run does.
InitKey = tuple[str, str | None, float | None]
# Reads a picture that rows begin from, as `read_init` does.
ReadInit = Callable[[Sequence[int], Shape, Path, Path | None, float | None, int], Init]


@dataclass(frozen=True, eq=False)
class RowItems(Sequence[Item]):
    """The items of the rows ``numbers`` of a job file; ``choices`` are the conditions of rows that name none.

    ``first_seed`` is what the seeds of rows that name none count from; ``latents`` has what latents are there by the
    paths that name them, each with what sidecars say of it; ``begins`` is how rows without a picture begin; ``inits``
    has the pictures of the others.
    """

    file: JobFile
    numbers: Sequence[int] | np.ndarray
    choices: Choices
    first_seed: int = 0
    latents: Latents = field(default_factory=dict, repr=False)
    begins: Begins = field(default_factory=Begins)
    inits: Inits | None = field(default=None, repr=False)

    def __len__(self) -> int:
        return len(self.numbers)

    @overload
    def __getitem__(self, index: int) -> Item: ...

    @overload
    def __getitem__(self, index: slice) -> RowItems: ...

    def __getitem__(self, index: int | slice) -> Item | RowItems:
        if isinstance(index, slice):
            return replace(self, numbers=self.numbers[index])
        return self.of(int(self.numbers[index]))

    def as_seeds(self, config: Config) -> Config:
        """The config of pictures of seeds that have the classes of these rows."""
        highest = None if self.file.highest_class is None else self.file[self.file.highest_class].class_number
        classes = [*self.choices.classes, *([] if highest is None else [highest])]
        sampling = config.sampling.model_copy(update={"classes": ",".join(map(str, classes)) or None})
        return config.model_copy(update={"sampling": sampling})

    def of(self, number: int) -> Item:
        """The item of row ``number`` of the file."""
        return self.item(self.file[number], number, self.file.where(number))

    def item(self, row: Row, number: int, where: str) -> Item:
        """The item of a row of the file as if it were its row ``number``; messages call its place ``where``."""
        name, seed = name_of(row, number), seed_of(row, number, self.first_seed)
        start: Noise | Slerp | Latent | GivenLatent
        facts: dict[str, Any] = {}
        begins = self.begins
        if row.latent is not None:
            start, latent = self.latents[row.latent]
            facts["latent"] = dict(latent)
        else:
            assert seed is not None
            start = begins.start(seed)
        init = self.inits.of(row) if self.inits is not None else None
        if init is not None:
            facts |= init.about
            begins = replace(begins, begin=init.begin, canvas=init.canvas)
        # Where no seed tells, there is one to choose from, or none is needed.
        others = self.choices.of_seed(seed or 0)
        conditioning = Conditioning(
            others.class_number if row.class_number is None else row.class_number,
            others.prompt if row.prompt is None else row.prompt,
            others.negative_prompt if row.negative_prompt is None else row.negative_prompt,
        )
        return row_item(name, f"{name} ({where})", start, seed, conditioning, facts, begins)

    def find(self, name: str) -> int | None:
        """The number of the row of this name, if it is among these."""
        number = self.file.find(name)
        if number is None:
            return None
        if isinstance(self.numbers, range):
            return number if number in self.numbers else None
        numbers = np.asarray(self.numbers)
        place = int(np.searchsorted(numbers, number))
        return number if place < len(numbers) and numbers[place] == number else None

    @cached_property
    def kinds(self) -> np.ndarray | None:
        """A number for each row, equal for rows that can share a batch (`Item.kind`); None where all can."""
        if self.inits is None or not self.inits.differ:
            return None
        found: dict[Kind, int] = {}
        return np.fromiter((found.setdefault(item.kind, len(found)) for item in self), np.int32, len(self))

    def by_kind(self, block: int | None = None) -> RowItems:
        """These, those of one kind together: so that batches are full though rows begin at different steps.

        With ``block`` only within as many rows of the file, so that those before are all made before the next begin.
        """
        if self.kinds is None:
            return self
        numbers = np.asarray(self.numbers, np.int64)
        blocks = np.zeros_like(numbers) if block is None else numbers // block
        return replace(self, numbers=numbers[np.lexsort((self.kinds, blocks))])

    def take(self, parts: Iterable[range]) -> RowItems:
        """Those of these positions."""
        chosen = [np.asarray(self.numbers[part.start : part.stop : part.step], np.int64) for part in parts]
        return replace(self, numbers=np.concatenate(chosen) if chosen else np.zeros(0, np.int64))

    def between(self, start: int, stop: int) -> list[str]:
        """The names of the positions from ``start`` to before ``stop``."""
        return [self.file.name(int(number)) for number in self.numbers[start:stop]]

    def position(self, name: str) -> int | None:
        """Where the row of a name stands; None for one that is not among these."""
        number = self.find(name)
        return None if number is None else int(np.searchsorted(np.asarray(self.numbers), number))

    def without(self, numbers: Sequence[int] | np.ndarray) -> RowItems:
        """These without the rows ``numbers``."""
        if not len(numbers):
            return self
        return replace(self, numbers=np.setdiff1d(np.asarray(self.numbers, np.int64), numbers))


def resolve_rows(file: JobFile, layers: Sequence[Layer]) -> tuple[Run, RowItems]:
    """The run of a job file, and its items; every row is checked against the model.

    Raises:
        ConfigError: for settings that cannot work together, and rows that the model cannot make, with file and line.
        ModelError: for a model that is not there or cannot be sampled from.
        UsageError: for a latent that cannot be read.
    """
    return rows_of(file, resolve(layers, conditions_follow=True))


def rows_of(file: JobFile, run: Run, shape: Shape | None = None) -> tuple[Run, RowItems]:
    """As `resolve_rows`, of a run that was resolved without knowing of the rows.

    ``shape`` (C, H, W) is of a state of a network from outside, where no model tells.
    """
    settings = run.config.sampling
    _check_of_use(file, settings)
    items = items_of(file, run, shape)
    classes = bool(items.choices.classes) or file.first("class") is not None
    return _settled(run, classes, nothing_to_lead_away_from(file, settings.guidance_scale)), items


def run_of_rows(run: Run) -> Run:
    """As `rows_of` has the run, of rows that are still to come: each of them by `items_of`."""
    return _settled(run, not run.model.takes_text and run.model.classes is not None)


def _settled(run: Run, classes: bool, warnings: Sequence[str] = ()) -> Run:
    own = run.config.sampling.model_copy(update=dict.fromkeys(_OF_A_ROW))
    resolved = replace(run.resolved, config=run.config.model_copy(update={"sampling": own}))
    warnings = (*run.warnings, *warnings)
    return replace(run, resolved=resolved, of_rows=True, classes_follow=classes, warnings=warnings, init=None)


def items_of(
    file: JobFile,
    run: Run,
    shape: Shape | None = None,
    read: ReadInit = read_init,
    latents: Mapping[str, np.ndarray] | None = None,
) -> RowItems:
    """The items of rows, each checked by itself. ``run`` and ``shape`` are as of `rows_of`, whose errors it raises.

    ``read`` reads what rows begin from; ``latents`` are those, float32, that a program hands over in place of files, by
    what rows call them.
    """
    settings, choices = run.config.sampling, Choices.of(run.config)
    name = "a callable" if run.described is None else run.model.name
    _check_prompts(file, name, run.described is not None and run.model.takes_text, choices)
    _check_classes(file, run.described, choices)
    _check_latents(file, settings.draws_noise, choices)
    inits = _read_inits(file, run, shape or run.model.shape, read)
    has_latents = file.first("latent") is not None
    found = _read_latents(file, name, shape or run.model.state_shape, latents or {}) if has_latents else {}
    return RowItems(file, range(len(file)), choices, settings.seed, found, Begins(run.begins.variation), inits)


def nothing_to_lead_away_from(file: JobFile, guidance_scale: float) -> list[str]:
    """What there is to warn of, where rows have negative prompts."""
    number = file.first("negative_prompt")
    if number is None or guidance_scale != 1:
        return []
    return [f"{file.where(number)}: a negative prompt has no effect at a guidance scale of 1, which turns guidance off"]


def _check_prompts(file: JobFile, model: str, takes_text: bool, choices: Choices) -> None:
    """ConfigError for a row without a prompt where the model takes one, and for prompts where it takes none."""
    if not takes_text:
        for key in ("prompt", "negative_prompt"):
            number = file.first(key)
            if number is not None:
                raise ConfigError(
                    f"{file.where(number)}: {key} is for text-to-image models, such as mnist-text; {model} takes no "
                    "text"
                )
        return
    number = file.first(without=("prompt",))
    if number is not None and not choices.prompts:
        raise ConfigError(
            f"{file.where(number)}: has no prompt, and {model} takes text; give the row one, or with --prompt all "
            "that have none"
        )


def _check_classes(file: JobFile, model: ModelDescription | None, choices: Choices) -> None:
    """ConfigError for a class that the model does not have, and for a row without one where it has some.

    Of a network from outside, no model, all rows have one or none has.
    """
    named, unnamed = file.first("class"), file.first(without=("class",))
    if model is not None and model.takes_text:
        if named is not None:
            raise ConfigError(f"{file.where(named)}: has a class, and {model.name} takes a prompt, not a class")
        return
    if model is not None and model.classes is None:
        if named is not None:
            raise ConfigError(f"{file.where(named)}: has a class, and {model.name} is not class-conditional")
        return
    wanted = named is not None if model is None else True
    if wanted and unnamed is not None and not choices.classes:
        which = "other rows have one" if model is None else f"{model.name} has the classes 0-{(model.classes or 1) - 1}"
        raise ConfigError(
            f"{file.where(unnamed)}: has no class, and {which}; give the row one, or with --classes all that have none"
        )
    if model is not None and model.classes is not None and file.highest_class is not None:
        highest = file[file.highest_class].class_number
        if highest is not None and highest >= model.classes:
            raise ConfigError(
                f"{file.where(file.highest_class)}: {model.name} has no class {highest}; it has 0-{model.classes - 1}"
            )


def _check_latents(file: JobFile, draws_noise: bool, choices: Choices) -> None:
    """ConfigError for a latent without a seed where noise is drawn, or where several conditions are to choose from."""
    number = file.first("latent", without=("seed",))
    if number is None:
        return
    if draws_noise:
        raise ConfigError(
            f"{file.where(number)}: has a latent and no seed, and the noise of each step comes from the seed; give the "
            "row one, or sample with eta 0"
        )
    for key, of_all in (("class", choices.classes), ("prompt", choices.prompts)):
        number = file.first("latent", without=("seed", key))
        if number is not None and len(of_all) > 1:
            raise ConfigError(
                f"{file.where(number)}: has a latent, no seed and no {key}, and there are several to choose from by "
                f"the seed; give the row a {key}"
            )


@dataclass(frozen=True)
class Inits:
    """The pictures that rows begin from, read; ``given`` is what the run says for rows that do not: picture, mask and
    strength."""

    folder: Path
    given: tuple[str | None, str | None, float | None]
    found: dict[InitKey, Init] = field(default_factory=dict)

    @property
    def differ(self) -> bool:
        """Whether rows may begin at different steps."""
        kinds = {(init.begin, init.canvas.mask is None) for init in self.found.values()}
        return len(kinds) > 1 or self.given[0] is None

    @property
    def inputs(self) -> list[Input]:
        """The pictures and masks, each once."""
        read = (each for init in self.found.values() for each in init.inputs)
        return list({(each.path, each.conversion): each for each in read}.values())

    def key(self, row: Row) -> InitKey | None:
        """None of a row that begins from noise."""
        picture, mask, strength = self.given
        if row.init is not None:
            picture = str(self.folder / named(row.init))
        if row.mask is not None:
            mask = str(self.folder / named(row.mask))
        return None if picture is None else (picture, mask, strength if row.strength is None else row.strength)

    def of(self, row: Row) -> Init | None:
        key = self.key(row)
        return None if key is None else self.found[key]


def _check_of_use(file: JobFile, settings: SamplingSettings) -> None:
    """ConfigError for settings about pictures to begin from that are of no use to any row."""
    if settings.init is None and file.first("init") is None:
        for said in ("mask", "strength"):
            if getattr(settings, said) is not None:
                raise ConfigError(f"sampling.{said} is for rows that begin from a picture, and none does")
    if settings.resample > 1 and settings.mask is None and file.first("mask") is None:
        raise ConfigError(f"sampling.resample = {settings.resample} is for rows with a mask, and none has one")


def _read_inits(file: JobFile, run: Run, shape: Shape, read: ReadInit) -> Inits | None:
    """What rows begin from, None where all begin from noise or latents. Raises ConfigError with file and line."""
    settings = run.config.sampling
    _check_inits(file, run)
    if settings.init is None and file.first("init") is None:
        return None
    picture, mask = (None if said is None else str(named(said)) for said in (settings.init, settings.mask))
    inits = Inits(file.folder, (picture, mask, settings.strength))
    for number in range(len(file)):
        try:
            key = inits.key(file[number])
            if key is None or key in inits.found:
                continue
            picture, mask, strength = key
            inits.found[key] = read(
                run.timesteps, shape, Path(picture), None if mask is None else Path(mask), strength, settings.order
            )
        except UsageError as error:
            raise ConfigError(f"{file.where(number)}: {error}") from None
    return inits


def _check_inits(file: JobFile, run: Run) -> None:
    """ConfigError for rows that say how they begin from a picture, and name none, or name a latent besides."""
    settings, inpaints = run.config.sampling, run.described is not None and run.model.inpaints
    if settings.init is None:
        for key in ("mask", "strength"):
            number = file.first(key, without=("init",))
            if number is not None:
                raise ConfigError(f"{file.where(number)}: has a {key} and no init, the picture that it is about")
    number = file.first("latent", "init") if settings.init is None else file.first("latent")
    if number is not None:
        raise ConfigError(f"{file.where(number)}: has a latent and an init; a picture begins from one of them")
    if run.begins.variation is not None and (number := file.first("latent")) is not None:
        raise ConfigError(
            f"{file.where(number)}: has a latent, and sampling.variation_seed turns the noise of seeds; leave one out"
        )
    for key, said in (("init", settings.init), ("mask", settings.mask)):
        if inpaints and said is None and (number := file.first(without=(key,))) is not None:
            raise ConfigError(
                f"{file.where(number)}: has no {key}, and {run.model.name} fills in masks of pictures; give the row one"
            )


def _read_latents(file: JobFile, model: str, shape: Shape, given: Mapping[str, np.ndarray]) -> Latents:
    """The latents that rows name, by the paths that name them, or of ``given``. Raises ConfigError with file, line."""
    from ddim_cli.outputs.latents import latent_sha256, open_latents

    found: Latents = {}
    for number in range(len(file)):
        name = file[number].latent
        if name is None or name in found:
            continue
        try:
            if name in given:
                found[name] = _checked(given[name], model, shape), {"sha256": latent_sha256(given[name])}
                continue
            opened = open_latents(file.folder / Path(name).expanduser())
            if len(opened.indices) > 1:
                raise UsageError(f"{opened.path}: holds {len(opened.indices)} latents, and a row is of one")
            _check_shape(f"{opened.path}:", opened.shape[-3:], model, shape)
            # What a file says of how it came about is not needed any more.
            latent = Latent(replace(opened, record=None), opened.indices[0])
            found[name] = latent, latent_facts(latent)
        except (UsageError, RuntimeError) as error:
            raise ConfigError(f"{file.where(number)}: {error}") from None
    return found


def _checked(given: np.ndarray, model: str, shape: Shape) -> GivenLatent:
    """Raises UsageError for a latent that the model does not take."""
    _check_shape("its latent", given.shape, model, shape)
    if not np.isfinite(given).all():
        raise UsageError("its latent has values that are not finite")
    return GivenLatent(given)


def _check_shape(what: str, found: tuple[int, ...], model: str, shape: Shape) -> None:
    if found != shape:
        has, takes = (" x ".join(map(str, s)) or "a number" for s in (found, shape))
        raise UsageError(f"{what} is {has} (C x H x W), and {model} takes {takes}")
