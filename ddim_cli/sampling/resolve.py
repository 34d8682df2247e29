"""From layers of settings to a run that is known to work: the model's own scheduler joined in, the grid laid out.

Reads JSON and TOML only; torch and the weights come later.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

from ddim_cli.config.layers import Layer, Resolved, merge, validate_layer
from ddim_cli.config.schema import KEYS, Config, SchedulerSettings
from ddim_cli.diffusion.grids import timestep_grid
from ddim_cli.diffusion.rules import check_combination
from ddim_cli.errors import ConfigError, ModelError
from ddim_cli.models.describe import ModelDescription, describe_model

# A network only makes sense of the diffusion it was trained on.
TRAINED_KEYS = (
    "num_train_timesteps",
    "beta_schedule",
    "beta_start",
    "beta_end",
    "trained_betas",
    "rescale_betas_zero_snr",
    "prediction_type",
)
LOWEST_START = 0.75


@dataclass(frozen=True)
class Run:
    """Settings that hold together, the model they are for (None where it was not looked up) and the grid that runs."""

    resolved: Resolved
    model: ModelDescription | None
    timesteps: tuple[int, ...]
    warnings: tuple[str, ...] = ()

    @property
    def config(self) -> Config:
        return self.resolved.config


def _trained_differently(resolved: Resolved, layer: Layer, model: ModelDescription) -> list[str]:
    if model.scheduler is None:
        return []
    trained = merge([layer]).config.scheduler
    chosen = resolved.config.scheduler
    if chosen.trained_betas is not None and chosen.trained_betas == trained.trained_betas:
        return []
    return [
        f"scheduler.{key} = {getattr(chosen, key)!r} ({resolved.origin(f'scheduler.{key}')}) is not the "
        f"{getattr(trained, key)!r} that {model.name} was trained with; expect garbage"
        for key in TRAINED_KEYS
        if getattr(chosen, key) != getattr(trained, key)
    ]


def _starts_low(scheduler: SchedulerSettings, timesteps: Sequence[int]) -> list[str]:
    total = scheduler.num_train_timesteps
    if timesteps[0] >= LOWEST_START * total:
        return []
    return [
        f"the grid starts at timestep {timesteps[0]}, below {LOWEST_START} of the {total} of training: pure noise is "
        "not what the network expects there; expect garbage"
    ]


def _with_origins(problem: str, resolved: Resolved) -> str:
    """The problem, and where the values of the keys that it names come from."""
    named = [key for key in dict.fromkeys(re.findall(r"\w+\.\w+", problem)) if key in KEYS]
    origins = [f"{key}: {resolved.origin(key)}" for key in named if resolved.origin(key) != "default"]
    return f"{problem} ({', '.join(origins)})" if origins else problem


def judge(resolved: Resolved, model: ModelDescription | None = None, warnings: Sequence[str] = ()) -> Run:
    """Lay out the grid and refuse what cannot work. Raises ConfigError."""
    config = resolved.config
    try:
        timesteps = tuple(timestep_grid(config.scheduler, config.sampling))
        check_combination(config.scheduler, config.sampling, timesteps)
    except ConfigError as error:
        raise ConfigError(*(_with_origins(p, resolved) for p in error.problems)) from None
    return Run(resolved, model, timesteps, (*warnings, *_starts_low(config.scheduler, timesteps)))


def resolve(layers: Sequence[Layer]) -> Run:
    """Join ``layers`` (lowest first) and the model's own scheduler config into a run.

    Raises:
        ConfigError: for settings that cannot work together.
        ModelError: for a model that is not there or cannot be sampled from.
    """
    model = describe_model(merge(layers).config.model)
    layer = model.scheduler_layer()
    validate_layer(layer)
    resolved = merge([layer, *layers])
    return judge(resolved, model, _trained_differently(resolved, layer, model))


def resolve_loosely(layers: Sequence[Layer]) -> Run:
    """As `resolve`, but a model that cannot be opened is no error: the settings are judged without it."""
    try:
        return resolve(layers)
    except ModelError as error:
        run = judge(merge(layers))
        return replace(run, warnings=(*run.warnings, f"judged without the model's own scheduler settings: {error}"))
