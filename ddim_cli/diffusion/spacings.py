"""Timestep spacings, each registered once: how N of the T training timesteps are chosen. Plain integers, no torch."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass

# What log-SNR each of the T timesteps has; asked for by the one spacing that goes by it.
Levels = Callable[[], Sequence[float]]
# (steps N, num_train_timesteps T, offset, levels) -> descending timesteps
Grid = Callable[[int, int, int, Levels], list[int]]


@dataclass(frozen=True)
class Spacing:
    """A spacing; ``about`` is its line of help, ``in_diffusers`` whether diffusers' DDIMScheduler has it."""

    grid: Grid
    about: str
    in_diffusers: bool


SPACINGS: dict[str, Spacing] = {}


def register(about: str, in_diffusers: bool = False) -> Callable[[Grid], Grid]:
    """Register a spacing under its function's name."""

    def add(grid: Grid) -> Grid:
        SPACINGS[grid.__name__] = Spacing(grid, about, in_diffusers)
        return grid

    return add


@register("multiples of T // N, plus steps_offset: 0 is visited, T-1 is not", in_diffusers=True)
def leading(steps: int, num_train_timesteps: int, offset: int = 0, levels: Levels = tuple) -> list[int]:
    """Multiples of T // N, plus ``offset`` (arXiv:2305.08891, table 2): 0 is visited, T-1 is not."""
    stride = num_train_timesteps // steps
    return [i * stride + offset for i in reversed(range(steps))]


@register("down from T-1 by T / N: T-1 is visited, 0 is not", in_diffusers=True)
def trailing(steps: int, num_train_timesteps: int, offset: int = 0, levels: Levels = tuple) -> list[int]:
    """N timesteps down from T-1 by T / N, rounded half to even (arXiv:2305.08891, table 2)."""
    stride = num_train_timesteps / steps
    # As a sum of one exact difference, which is how numpy.arange and so diffusers break ties.
    difference = (num_train_timesteps - stride) - num_train_timesteps
    return [round(num_train_timesteps + i * difference) - 1 for i in range(steps)]


@register("evenly from T-1 to 0, both visited", in_diffusers=True)
def linspace(steps: int, num_train_timesteps: int, offset: int = 0, levels: Levels = tuple) -> list[int]:
    """N evenly spaced timesteps from T-1 to 0, both included, rounded half to even (arXiv:2305.08891, table 2)."""
    if steps == 1:
        return [0]
    stride = (num_train_timesteps - 1) / (steps - 1)
    return [round(i * stride) for i in reversed(range(steps))]


@register("denser near 0 (DDIM, appendix D.2)")
def quadratic(steps: int, num_train_timesteps: int, offset: int = 0, levels: Levels = tuple) -> list[int]:
    """The integers of linspace(0, sqrt(0.8 T), N)^2 (DDIM, appendix D.2), each once.

    From about N = 30 on the formula repeats timestep 0; such a step would change nothing.
    """
    if steps == 1:
        return [0]
    stride = math.sqrt(num_train_timesteps * 0.8) / (steps - 1)
    # The last point is the root itself, not a multiple of the rounded stride, as numpy.linspace has it.
    roots = [i * stride for i in range(steps - 1)] + [math.sqrt(num_train_timesteps * 0.8)]
    return sorted({int(root**2) for root in roots}, reverse=True)


@register("range(0, T, T // N), as in the original code; its length can differ from N")
def uniform(steps: int, num_train_timesteps: int, offset: int = 0, levels: Levels = tuple) -> list[int]:
    """range(0, T, T // N), descending, as the original DDIM code has it; its length can differ from N."""
    return list(reversed(range(0, num_train_timesteps, num_train_timesteps // steps)))


@register("evenly in log-SNR from T-1 down to one step above 0; for order 2 and 3")
def logsnr(steps: int, num_train_timesteps: int, offset: int = 0, levels: Levels = tuple) -> list[int]:
    """N timesteps evenly in log-SNR from T-1 down (DPM-Solver, arXiv:2206.00927, section 3.4), one step more being 0.

    0 itself is not among them, unless all T are: with ``set_alpha_to_one`` the last step goes to alpha_bar 1, else to
    its level.

    Each is the timestep of the nearest level, and no timestep comes twice: where the levels lie further apart than the
    steps are long, it is the next one up. A level of no signal, or of no noise, lies infinitely far away: the former
    is visited first, and the even steps begin after it.
    """
    # Ascending, from the noisiest on.
    found = [math.inf if math.isnan(level) else level for level in reversed(levels())]
    first = next((i for i, level in enumerate(found) if level > -math.inf), 0)
    finite = [level for level in found if math.isfinite(level)]
    even = steps - (first > 0)
    stride = (finite[-1] - finite[0]) / even if finite and even else 0.0
    wanted = [0] * (first > 0) + [first + _nearest(finite, finite[0] + i * stride) for i in range(even)]
    # From the noisiest on, each after the one before it; then, from the other end, each early enough for the rest.
    for i in range(1, steps):
        wanted[i] = max(wanted[i], wanted[i - 1] + 1)
    last = num_train_timesteps - (steps < num_train_timesteps)
    for i in range(1, steps + 1):
        wanted[-i] = min(wanted[-i], last - i)
    return [num_train_timesteps - 1 - i for i in wanted]


def _nearest(ascending: Sequence[float], value: float) -> int:
    above = min(bisect_left(ascending, value), len(ascending) - 1)
    return above - 1 if above and value - ascending[above - 1] < ascending[above] - value else above
