"""Timestep grids: which of the T training timesteps a run visits, as plain integers in descending order."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

from ddim_cli.config.schema import SamplingSettings, SchedulerSettings
from ddim_cli.diffusion.rules import check_betas
from ddim_cli.diffusion.spacings import SPACINGS
from ddim_cli.errors import ConfigError


def check_list(timesteps: Sequence[int], num_train_timesteps: int) -> None:
    """Raise ConfigError unless an explicit list is strictly descending and inside [0, T-1]."""
    last = num_train_timesteps - 1
    for t in timesteps:
        if not 0 <= t <= last:
            raise ConfigError(f"sampling.timesteps has timestep {t}, outside 0..{last}")
    for t, following in pairwise(timesteps):
        if following >= t:
            what = "repeats" if following == t else "rises to"
            raise ConfigError(
                f"sampling.timesteps {what} {following} after {t}; list each timestep once, from the noisiest down"
            )


def _check_leading(steps: int, num_train_timesteps: int, offset: int) -> None:
    """Raise ConfigError if a leading grid leaves [0, T-1]: only its first entry can."""

    def first(n: int) -> int:
        return (n - 1) * (num_train_timesteps // n) + offset

    if first(steps) < num_train_timesteps:
        return
    most = next((n for n in range(steps, 0, -1) if first(n) < num_train_timesteps), 0)
    fewer = f"sampling.steps = {most} or fewer, " if most else ""
    raise ConfigError(
        f"the grid visits timestep {first(steps)}, outside 0..{num_train_timesteps - 1} (sampling.steps = {steps} "
        f"leading steps with scheduler.steps_offset = {offset}); use {fewer}scheduler.steps_offset = 0, or "
        'scheduler.timestep_spacing = "trailing"'
    )


def timestep_grid(scheduler: SchedulerSettings, sampling: SamplingSettings) -> list[int]:
    """The grid that runs: strictly descending integers in [0, T-1].

    Raises:
        ConfigError: for more steps than training timesteps, a grid that leaves [0, T-1], or an
            explicit list that does not descend; each with what to use instead.
    """
    total, steps, offset = scheduler.num_train_timesteps, sampling.steps, scheduler.steps_offset
    if sampling.timesteps is not None:
        check_list(sampling.timesteps, total)
        return list(sampling.timesteps)
    if steps > total:
        raise ConfigError(
            f"sampling.steps = {steps} is more than scheduler.num_train_timesteps = {total}; use at most {total}"
        )
    if scheduler.timestep_spacing == "leading":
        _check_leading(steps, total, offset)
    return SPACINGS[scheduler.timestep_spacing].grid(steps, total, offset, lambda: _log_snrs(scheduler))


def first_step(count: int, strength: float) -> int:
    """The step of a grid of ``count`` steps at which sampling begins that changes a picture by ``strength``.

    As diffusers has it: of N steps the last int(N strength) run. 0 of strength 1; ``count``, so that none is left, of a
    strength below 1 / N.
    """
    return count - min(int(count * strength), count)


def _log_snrs(scheduler: SchedulerSettings) -> list[float]:
    """Half the log-SNR of each timestep, falling. Raises ConfigError for betas that add no noise."""
    # Of the grids that go by levels alone: the others need no torch.
    from ddim_cli.diffusion.betas import make_alpha_bars
    from ddim_cli.diffusion.levels import half_log_snr

    check_betas(scheduler)
    levels: list[float] = half_log_snr(make_alpha_bars(scheduler)).tolist()
    if sum(map(math.isfinite, levels)) < 2:
        raise ConfigError(
            'scheduler.timestep_spacing = "logsnr" needs betas that add noise in two timesteps or more; use another '
            "spacing"
        )
    return levels
