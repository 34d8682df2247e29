"""The run of pictures that are inverted: settings without what has no inverse. Needs no torch."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

from ddim_cli.config.layers import Layer
from ddim_cli.experiments.rules import check_deterministic
from ddim_cli.sampling.items import Choices
from ddim_cli.sampling.resolve import Run, refuse_init, resolve, writes_png

WHY_ETA_0 = (
    "inversion needs eta 0. Only then does one latent lead to one picture, and a picture back to its latent; fresh "
    "noise in each step cannot be undone"
)
GUIDANCE = "sampling.guidance_scale"
# Each would make a step one that has no inverse.
NEVER = ("scheduler.clip_sample", "scheduler.thresholding", "sampling.use_clipped_model_output")
GUIDED = (
    "inversion with guidance drifts: a step up is guided at another state than the step down that is to undo it, and "
    "reconstructions are further from their pictures; --refine brings them back, in more iterations the larger the "
    "guidance, and --guidance-scale 1 turns it off"
)


def resolve_inversion(layers: Sequence[Layer]) -> tuple[Run, dict[str, str]]:
    """The run, without what has no inverse; and what had to be turned off for that, with where it was set.

    Guidance that a text-to-image model has by default is turned off too, and is what ``sampling.guidance_scale`` among
    the latter says: guided steps up lead to latents that lead elsewhere. Guidance that is asked for stays, with a
    warning among the run's.

    Raises:
        ConfigError: for settings that cannot work together.
        ModelError: for a model that is not there or cannot be sampled from.
        UsageError: for an eta other than 0, and for several classes.
    """
    run, on = resolve_invertible(layers)
    refuse_init(run, "an inversion begins from the picture itself")
    if run.config.sampling.guidance_scale != 1 and not any(GUIDANCE in layer.values for layer in layers):
        on[GUIDANCE] = run.resolved.origin(GUIDANCE)
        run = writes_png(resolve([*layers, _turned_off(on)]))
    check_deterministic(run, WHY_ETA_0)
    Choices.of(run.config).of_all()
    if run.config.sampling.guidance_scale != 1 and not run.config.sampling.refine:
        run = replace(run, warnings=(*run.warnings, GUIDED))
    return run, on


def resolve_invertible(layers: Sequence[Layer], conditions_follow: bool = False) -> tuple[Run, dict[str, str]]:
    """The run, without what has no inverse whatever it is guided by; and what had to be turned off, as above.

    Raises ConfigError and ModelError as `resolve`.
    """
    run, on = writes_png(resolve(layers, conditions_follow=conditions_follow)), {}
    settings = run.config.model_dump()
    for key in NEVER:
        section, name = key.split(".")
        if settings[section][name]:
            on[key] = run.resolved.origin(key)
    if on:
        run = writes_png(resolve([*layers, _turned_off(on)], conditions_follow=conditions_follow))
    return run, on


def _turned_off(on: Iterable[str]) -> Layer:
    values: dict[str, Any] = {key: 1.0 if key == GUIDANCE else False for key in on}
    return Layer(values, dict.fromkeys(values, "inversion"))
