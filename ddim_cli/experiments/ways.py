"""Which way an interpolation goes: between seeds, prompts, or pictures of one's own. Needs no torch."""

from __future__ import annotations

from collections.abc import Sequence

from ddim_cli.config.layers import Layer
from ddim_cli.errors import UsageError
from ddim_cli.experiments.between import Between, BetweenPrompts, resolve_interpolation, resolve_prompts
from ddim_cli.experiments.between_pictures import BetweenPictures, names_pictures, resolve_pictures
from ddim_cli.sampling.resolve import Run

Plan = Between | BetweenPrompts | BetweenPictures


def resolve_plan(
    layers: Sequence[Layer],
    between: str | None,
    to: Sequence[str] = (),
    seed: int | None = None,
    frames: int | None = None,
    square: bool = False,
) -> tuple[Run, Plan, dict[str, str]]:
    """The run and the plan of an interpolation; and, between pictures, what was turned off so that they are inverted.

    Raises UsageError where it is between nothing or two things, and what `resolve_interpolation`, `resolve_prompts` and
    `resolve_pictures` raise.
    """
    if between is None and not to:
        raise UsageError(
            "say between what: seeds, --between 3,8; pictures, --between a.png,b.png; or prompts, --prompt TEXT "
            "--to-prompt TEXT"
        )
    if between is None:
        if square:
            raise UsageError("--square is of four seeds; between prompts there is a path")
        return *resolve_prompts(layers, to, frames, seed), {}
    if to:
        raise UsageError("--between and --to-prompt: frames lie between seeds, pictures or prompts; keep one")
    if seed is not None:
        raise UsageError("--seed is for frames between prompts; --between names the seeds")
    if names_pictures(between):
        if square:
            raise UsageError("--square is of four seeds; between pictures there is a path")
        return resolve_pictures(layers, between, frames)
    plan = Between.parse(between, frames, square)
    return resolve_interpolation(layers, plan), plan, {}
