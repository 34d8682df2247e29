"""The picture that sampling begins from: read, checked, and what sidecars say of it. Needs no torch."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ddim_cli.diffusion.grids import first_step
from ddim_cli.errors import ConfigError, UsageError
from ddim_cli.sampling.items import Canvas, Shape

if TYPE_CHECKING:
    from ddim_cli.config.schema import SamplingSettings
    from ddim_cli.sampling.pictures import Input

# How much a picture changes where nobody says: as diffusers' pipelines have it.
STRENGTH, STRENGTH_IN_A_MASK = 0.8, 1.0


@dataclass(frozen=True)
class Init:
    """A picture that was read to begin from; ``about`` is what sidecars say of it, ``inputs`` the picture and mask."""

    canvas: Canvas
    begin: int
    about: Mapping[str, Any]
    inputs: tuple[Input, ...]


def begin_of(timesteps: Sequence[int], strength: float, order: int = 1) -> int:
    """The step of the grid at which sampling begins with this strength.

    Raises ConfigError where none is left, or fewer than a solver of this order needs.
    """
    count = len(timesteps)
    begin = first_step(count, strength)
    if count - begin < order:
        enough = (n / 100 for n in range(1, 101) if count - first_step(count, n / 100) >= order)
        use = f"{next(enough):g} or more" if count <= 100 else "a larger one"
        left, needs = count - begin or "none", f", and sampling.order = {order} needs {order}" if order > 1 else ""
        raise ConfigError(
            f"sampling.strength = {strength:g} leaves {left} of the {count} steps of the grid{needs}; use {use}, or "
            "more steps"
        )
    return begin


def read_init(
    timesteps: Sequence[int],
    shape: Shape,
    picture: Path,
    mask: Path | None = None,
    strength: float | None = None,
    order: int = 1,
) -> Init:
    """Read a picture to begin from, and its mask, for a network of pictures of ``shape`` (C, H, W).

    Raises:
        UsageError: for a file that cannot be read, and a mask that lets nothing change.
        ConfigError: for a strength of which no step is left, or too few for a solver of this ``order``.
    """
    # Most runs begin from no picture, and need nothing that reads one.
    from ddim_cli.sampling.pictures import read_input, read_mask

    if strength is None:
        strength = STRENGTH if mask is None else STRENGTH_IN_A_MASK
    begin = begin_of(timesteps, strength, order)
    read, _ = read_input(picture, shape)
    inputs = (read,) if mask is None else (read, read_mask(mask, read, shape)[0])
    about: dict[str, Any] = {key: located(each) for key, each in zip(("init", "mask"), inputs, strict=False)}
    about |= {"strength": strength, "start_timestep": timesteps[begin]}
    hashes = [each.pixels_sha256 for each in inputs]
    canvas = Canvas(picture, mask, pixels_sha256=hashes[0], mask_sha256=None if mask is None else hashes[1])
    return Init(canvas, begin, about, inputs)


def located(read: Input) -> dict[str, Any]:
    """What a sidecar says of a picture that replay has to find again; where it lies decides nothing."""
    return {**read.facts(), "path": os.path.abspath(read.path)}


def check_beginning(settings: SamplingSettings, inits_follow: bool) -> None:
    """Raise ConfigError for settings about a picture that is not named; with ``inits_follow`` rows may name it."""
    if settings.init is None and not inits_follow:
        if settings.mask is not None:
            raise ConfigError("sampling.mask says what of a picture is made anew; name the picture with sampling.init")
        if settings.strength is not None:
            raise ConfigError(
                "sampling.strength says how much a picture may change; name the picture with sampling.init"
            )
    if settings.resample > 1 and settings.mask is None and not inits_follow:
        raise ConfigError(
            f"sampling.resample = {settings.resample} joins what is made anew to what is kept of a picture; name a "
            "mask with sampling.mask"
        )


def named(text: str) -> Path:
    """The file that a setting names. Raises UsageError."""
    try:
        return Path(text).expanduser()
    except RuntimeError as error:
        raise UsageError(f"{text}: {error}") from None
