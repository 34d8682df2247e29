"""The plan of edits by inversion: of which pictures, from what to what, how strongly, what stays. Needs no torch."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ddim_cli.config.layers import Layer, merge, validate_layer
from ddim_cli.config.seeds import parse_classes
from ddim_cli.errors import ConfigError, UsageError
from ddim_cli.experiments.inversion import resolve_invertible
from ddim_cli.experiments.rules import check_deterministic
from ddim_cli.models.conditions import Conditioning
from ddim_cli.sampling.init import begin_of, located, named
from ddim_cli.sampling.items import Canvas, Inversion, Item, edit_item
from ddim_cli.sampling.pictures import Input, find_pictures, read_input, read_mask
from ddim_cli.sampling.resolve import Run, refuse_init

WHY_ETA_0 = (
    "an edit needs eta 0. It keeps what it can of a picture because no step adds noise that the way up did not find"
)
GUIDANCE = "sampling.guidance_scale"
# In bytes: of what a prompt gives to a file's name, and of a name as a whole.
LONGEST_SLUG = 60
LONGEST_NAME = 200


@dataclass(frozen=True)
class Edit:
    """One thing to make of a picture: what is to be seen, in words or as a class, and how strongly it is guided."""

    to: str
    conditioning: Conditioning

    @property
    def scale(self) -> float:
        given = self.conditioning.guidance_scale
        return 1.0 if given is None else given

    @property
    def slug(self) -> str:
        """What the picture's file is named after: a-bold-seven-7.5."""
        text = _slug(self.to)
        if text.replace("-", " ") != self.to:
            # Two prompts that differ in signs alone are two edits.
            text = f"{text}-{_digest(self.to)}".strip("-")
        return f"{text}-{self.scale:.10g}"


@dataclass(frozen=True)
class Edits:
    """The plan: each of ``pictures`` is reconstructed from ``source``, and made each of ``edits``.

    ``begin`` is the step of the grid down to whose start pictures are inverted, ``masks`` what stays of each.
    """

    pictures: tuple[Input, ...]
    source: Edit
    edits: tuple[Edit, ...]
    begin: int = 0
    masks: tuple[Input, ...] = ()
    keeps: bool = False

    def items(self, run: Run) -> list[Item]:
        """Reconstructions first, then the pictures of one edit after the other: those of a batch are alike."""
        found = []
        for edit in (self.source, *self.edits):
            for n, picture in enumerate(self.pictures):
                mask = self.masks[n] if self.masks else None
                canvas = None if mask is None else Canvas(picture.path, mask.path, self.keeps, picture.pixels_sha256)
                name = f"{picture.name}.recon" if edit is self.source else f"{picture.name}.{edit.slug}.edit"
                start = Inversion(picture.path, self.source.conditioning, self.begin)
                found.append(edit_item(name, start, edit.conditioning, self._facts(run, picture, mask), canvas))
        return found

    def _facts(self, run: Run, picture: Input, mask: Input | None) -> dict[str, Any]:
        """What a sidecar says of where an edit comes from."""
        source = self.source.conditioning
        said = {"prompt": source.prompt} if source.prompt is not None else {"class": source.class_number}
        masked = {} if mask is None else {"keep_mask" if self.keeps else "mask": located(mask)}
        return {"edit": {**located(picture), "from": said, "start_timestep": run.timesteps[self.begin], **masked}}

    def ending(self) -> str:
        """What the default folder's name ends with: what it is edited from decides all pictures in it."""
        kept = "".join(mask.pixels_sha256 for mask in self.masks)
        masked = f"-{'keep-mask' if self.keeps else 'mask'}-{_digest(kept)}" if kept else ""
        return f"-edit-{_slug(self.source.to)}-{_digest(self.source.to)}{masked}".replace("--", "-")


def _slug(text: str) -> str:
    """A text as a part of a file's name; much of it may be lost."""
    words = re.sub(r"\W+", "-", text.casefold()).strip("-")
    return words.encode()[:LONGEST_SLUG].decode(errors="ignore").strip("-")


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:6]


def resolve_edits(
    layers: Sequence[Layer],
    pictures: Sequence[Path],
    source: str | None,
    to: Sequence[str],
    guidance_scales: Sequence[float] = (),
    keep_mask: str | None = None,
) -> tuple[Run, Edits, dict[str, str]]:
    """The run and the plan of edits; and what was turned off so that pictures can be inverted.

    ``source`` says what the pictures show, by default what sampling.prompt says; ``to`` what they are to show, each at
    each of ``guidance_scales``, by default that of the settings. The way up is not guided.

    Raises:
        ConfigError: for settings that cannot work together.
        ModelError: for a model that is not there or cannot be sampled from.
        UsageError: for files that are no pictures, an eta other than 0, and texts or classes that the model does not
            take.
    """
    files = find_pictures(pictures)
    if not to:
        raise UsageError('say what the picture is to show, with --to "a bold seven"')
    settings = merge(layers).config.sampling
    if source is None:
        if len(settings.prompts) != 1:
            raise UsageError('say what the picture shows, with --from "a thin seven"')
        source = settings.prompts[0]
    if guidance_scales:
        # What a guided edit needs of a model is checked of a scale that guides, if there is one.
        guiding = next((scale for scale in guidance_scales if scale != 1), 1.0)
        said = Layer({GUIDANCE: float(guiding)}, {GUIDANCE: "--guidance-scale"})
        for scale in guidance_scales:
            validate_layer(replace(said, values={GUIDANCE: float(scale)}))
        layers = [*layers, said]
    # What the pictures show is said of each, not of the run.
    quiet = Layer(dict.fromkeys(("sampling.prompt", "sampling.classes")), {})
    run, turned_off = resolve_invertible([*layers, quiet], conditions_follow=True)
    _check_edits(run, keep_mask)
    check_deterministic(run, WHY_ETA_0)
    scales = list(guidance_scales) or [run.config.sampling.guidance_scale]
    shown = Edit(source, _conditioning(run, source, "--from", None, 1.0))
    negative = settings.negative_prompt
    edits = [Edit(each, _conditioning(run, each, "--to", negative, float(w))) for each in to for w in scales]
    for n, edit in enumerate(edits):
        if edit.slug in [other.slug for other in edits[:n]]:
            raise UsageError(f"--to {edit.to!r}: is given twice at guidance scale {edit.scale:g}")
    read = tuple(read_input(file, run.model.shape)[0] for file in files)
    mask, keeps = (run.config.sampling.mask, False) if keep_mask is None else (keep_mask, True)
    masks = tuple(read_mask(named(mask), each, run.model.shape, keeps)[0] for each in read) if mask is not None else ()
    begin = begin_of(run.timesteps, run.config.sampling.strength or 1.0, run.config.sampling.order)
    found = Edits(read, shown, tuple(edits), begin, masks, keeps)
    for item in found.items(run):
        if len(item.name.encode()) > LONGEST_NAME:
            raise UsageError(f"{item.name}: is too long for a file's name; rename the picture, or use fewer words")
    run = replace(_uncompiled(run, scales), of_edits=True, classes_follow=run.model.classes is not None)
    return run, found, turned_off


def _check_edits(run: Run, keep_mask: str | None) -> None:
    """ConfigError for a model that nothing can be said to, and for settings that an edit has no use for."""
    settings, model = run.config.sampling, run.model
    if model.inpaints:
        raise ConfigError(f"{model.name} fills in masks of pictures, and inverts none; use ddim sample --init --mask")
    if not model.takes_text and model.classes is None:
        raise ConfigError(
            f"{model.name} takes neither text nor classes: there is no way to say what a picture is to show; ddim "
            "sample --init begins from a picture with any model"
        )
    refuse_init(run, "an edit begins from the picture itself", but=("mask", "strength", "resample"))
    if settings.resample > 1:
        raise ConfigError("sampling.resample is for ddim sample: what an edit keeps fits, since it was inverted")
    if keep_mask is not None and settings.mask is not None:
        raise ConfigError("--mask says what is edited, --keep-mask what is kept; give one of them")


def _conditioning(run: Run, text: str, option: str, negative: str | None, scale: float) -> Conditioning:
    """What a picture is to show: a prompt, or the number of a class. Raises UsageError."""
    model = run.model
    try:
        text.encode()
    except UnicodeEncodeError:
        raise UsageError(f"{option}: is no UTF-8 text") from None
    if model.takes_text:
        return Conditioning(None, text, negative, scale)
    try:
        [number] = parse_classes(text)
    except ValueError:
        raise UsageError(
            f"{option} {text}: {model.name} takes a class, a number from 0 to {(model.classes or 1) - 1}"
        ) from None
    if number >= (model.classes or 0):
        raise UsageError(f"{option} {text}: {model.name} has the classes 0-{(model.classes or 1) - 1}")
    return Conditioning(number, None, None, scale)


def _uncompiled(run: Run, scales: Sequence[float]) -> Run:
    """The run without compiled code, which is for one number of rows: guided edits take two a picture, the way up one.

    Raises ConfigError where compiled code is asked for.
    """
    config = run.config
    if all(scale == 1 for scale in scales):
        return run
    if config.runtime.compile is True:
        raise ConfigError(
            "runtime.compile = true: compiled code is for batches of one size, and a guided edit has two; leave it out"
        )
    changed = config.model_copy(update={"runtime": config.runtime.model_copy(update={"compile": False})})
    return replace(run, resolved=replace(run.resolved, config=changed))
