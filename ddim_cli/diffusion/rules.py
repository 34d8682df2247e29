"""Combinations of settings that cannot work, each refused with the reason and the remedy. Needs no torch."""

from __future__ import annotations

import math
from collections.abc import Sequence

from ddim_cli.config.schema import SamplingSettings, SchedulerSettings
from ddim_cli.diffusion.schedules import SCHEDULES
from ddim_cli.errors import ConfigError


def check_betas(scheduler: SchedulerSettings) -> None:
    """Raise ConfigError unless the settings give T betas in [0, 1], none but the last equal to 1."""
    betas, total = scheduler.trained_betas, scheduler.num_train_timesteps
    if betas is not None:
        if len(betas) != total:
            raise ConfigError(
                f"scheduler.trained_betas has {len(betas)} values, but scheduler.num_train_timesteps = {total}; "
                "they must be as many"
            )
        for t, beta in enumerate(betas):
            # Beta 1 is complete noise, which only the last step may reach.
            if not (0 <= beta < 1 or (beta == 1 and t == total - 1)):
                raise ConfigError(f"scheduler.trained_betas[{t}] = {beta}: a beta lies in [0, 1)")
    elif SCHEDULES[scheduler.beta_schedule].bounded and scheduler.beta_start > scheduler.beta_end:
        raise ConfigError(
            f"scheduler.beta_start = {scheduler.beta_start} is above scheduler.beta_end = {scheduler.beta_end}; "
            "betas grow with t: exchange them"
        )
    if scheduler.rescale_betas_zero_snr and total < 2:
        raise ConfigError("scheduler.rescale_betas_zero_snr needs at least 2 training timesteps")


def _reaches_zero_snr(scheduler: SchedulerSettings) -> bool:
    return scheduler.rescale_betas_zero_snr or (
        scheduler.trained_betas is not None and scheduler.trained_betas[-1] == 1
    )


def _first_beta(scheduler: SchedulerSettings) -> float:
    if scheduler.trained_betas is not None:
        return scheduler.trained_betas[0]
    return scheduler.beta_start if SCHEDULES[scheduler.beta_schedule].starts_exactly else math.inf


def check_combination(scheduler: SchedulerSettings, sampling: SamplingSettings, timesteps: Sequence[int]) -> None:
    """Raise ConfigError where the step would divide by zero or the settings contradict each other."""
    check_betas(scheduler)
    last = scheduler.num_train_timesteps - 1
    if scheduler.prediction_type == "epsilon" and last in timesteps and _reaches_zero_snr(scheduler):
        raise ConfigError(
            f"at timestep {last} alpha_bar is 0, where x0 cannot be derived from a predicted epsilon; use a network "
            f'with prediction_type = "v_prediction", or a grid without {last} (timestep_spacing = "leading")'
        )
    if 0 in timesteps and _first_beta(scheduler) == 0:
        for reason, holds in (
            ('prediction_type = "sample"', scheduler.prediction_type == "sample"),
            ("use_clipped_model_output", sampling.use_clipped_model_output),
        ):
            if holds:
                raise ConfigError(
                    f"at timestep 0 beta is 0 and alpha_bar 1, where {reason} cannot derive epsilon from x0; use a "
                    "beta_start above 0, or a grid without timestep 0"
                )
    if sampling.variance == "large" and sampling.eta != 1:
        raise ConfigError(
            f'sampling.variance = "large" implies eta 1, but sampling.eta = {sampling.eta}; '
            "leave eta out, or set it to 1"
        )
    _check_beginning(sampling)
    if sampling.order > 1:
        _check_order(scheduler, sampling, timesteps)


def _check_beginning(sampling: SamplingSettings) -> None:
    """Raise ConfigError for noise that is turned towards no other."""
    if sampling.variation_strength > 0 and sampling.variation_seed is None:
        raise ConfigError(
            f"sampling.variation_strength = {sampling.variation_strength} turns noise towards that of another seed; "
            "name it with sampling.variation_seed"
        )


def _check_order(scheduler: SchedulerSettings, sampling: SamplingSettings, timesteps: Sequence[int]) -> None:
    """Raise ConfigError for what a solver of higher order has no meaning for, or no room."""
    order = sampling.order
    if len(timesteps) < order:
        raise ConfigError(
            f"sampling.order = {order} needs a grid of {order} steps or more, and this one has {len(timesteps)}; use "
            f"more steps, or sampling.order = {len(timesteps)}"
        )
    if sampling.refine:
        raise ConfigError(
            f"sampling.refine is for order 1, and sampling.order = {order}: it undoes single steps, and a step of "
            "higher order depends on those before; set sampling.refine = 0, or sampling.order = 1"
        )
    if sampling.resample > 1:
        raise ConfigError(
            f"sampling.resample is for order 1, and sampling.order = {order}: a step of higher order remembers steps "
            "that a jump makes untrue; set sampling.resample = 1, or sampling.order = 1"
        )
    if sampling.use_clipped_model_output:
        raise ConfigError(
            f"sampling.use_clipped_model_output is for order 1, and sampling.order = {order}: a step of higher order "
            "uses x0 alone, so epsilon always follows from the clipped x0; leave it out"
        )
    if sampling.variance == "large":
        raise ConfigError(
            f'sampling.variance = "large" is for order 1, and sampling.order = {order}: no SDE adds that noise; '
            "use eta 1"
        )
    if scheduler.previous_timestep == "diffusers":
        raise ConfigError(
            f'scheduler.previous_timestep = "diffusers" is for order 1, and sampling.order = {order}: a step of higher '
            "order starts where the last one ended; leave it out"
        )
