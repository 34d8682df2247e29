"""Timestep grids: which of the T training timesteps a run visits, as plain integers in descending order."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

from ddim_cli.config.schema import SamplingSettings, SchedulerSettings
from ddim_cli.errors import ConfigError


def leading(steps: int, num_train_timesteps: int, offset: int = 0) -> list[int]:
    """Multiples of T // N, plus ``offset`` (arXiv:2305.08891, table 2): 0 is visited, T-1 is not."""
    stride = num_train_timesteps // steps
    return [i * stride + offset for i in reversed(range(steps))]


def trailing(steps: int, num_train_timesteps: int) -> list[int]:
    """N timesteps down from T-1 by T / N, rounded half to even (arXiv:2305.08891, table 2)."""
    stride = num_train_timesteps / steps
    # As a sum of one exact difference, which is how numpy.arange and so diffusers break ties.
    difference = (num_train_timesteps - stride) - num_train_timesteps
    return [round(num_train_timesteps + i * difference) - 1 for i in range(steps)]


def linspace(steps: int, num_train_timesteps: int) -> list[int]:
    """N evenly spaced timesteps from T-1 to 0, both included, rounded half to even (arXiv:2305.08891, table 2)."""
    if steps == 1:
        return [0]
    stride = (num_train_timesteps - 1) / (steps - 1)
    return [round(i * stride) for i in reversed(range(steps))]


def quadratic(steps: int, num_train_timesteps: int) -> list[int]:
    """The integers of linspace(0, sqrt(0.8 T), N)^2 (DDIM, appendix D.2), each once.

    From about N = 30 on the formula repeats timestep 0; such a step would change nothing.
    """
    if steps == 1:
        return [0]
    stride = math.sqrt(num_train_timesteps * 0.8) / (steps - 1)
    # The last point is the root itself, not a multiple of the rounded stride, as numpy.linspace has it.
    roots = [i * stride for i in range(steps - 1)] + [math.sqrt(num_train_timesteps * 0.8)]
    return sorted({int(root**2) for root in roots}, reverse=True)


def uniform(steps: int, num_train_timesteps: int) -> list[int]:
    """range(0, T, T // N), descending, as the original DDIM code has it; its length can differ from N."""
    return list(reversed(range(0, num_train_timesteps, num_train_timesteps // steps)))


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
        return leading(steps, total, offset)
    spacings = {"trailing": trailing, "linspace": linspace, "quadratic": quadratic, "uniform": uniform}
    return spacings[scheduler.timestep_spacing](steps, total)
