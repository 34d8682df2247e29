"""Timestep spacings, each registered once: how N of the T training timesteps are chosen. Plain integers, no torch."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

# (steps N, num_train_timesteps T, offset) -> descending timesteps
Grid = Callable[[int, int, int], list[int]]


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
def leading(steps: int, num_train_timesteps: int, offset: int = 0) -> list[int]:
    """Multiples of T // N, plus ``offset`` (arXiv:2305.08891, table 2): 0 is visited, T-1 is not."""
    stride = num_train_timesteps // steps
    return [i * stride + offset for i in reversed(range(steps))]


@register("down from T-1 by T / N: T-1 is visited, 0 is not", in_diffusers=True)
def trailing(steps: int, num_train_timesteps: int, offset: int = 0) -> list[int]:
    """N timesteps down from T-1 by T / N, rounded half to even (arXiv:2305.08891, table 2)."""
    stride = num_train_timesteps / steps
    # As a sum of one exact difference, which is how numpy.arange and so diffusers break ties.
    difference = (num_train_timesteps - stride) - num_train_timesteps
    return [round(num_train_timesteps + i * difference) - 1 for i in range(steps)]


@register("evenly from T-1 to 0, both visited", in_diffusers=True)
def linspace(steps: int, num_train_timesteps: int, offset: int = 0) -> list[int]:
    """N evenly spaced timesteps from T-1 to 0, both included, rounded half to even (arXiv:2305.08891, table 2)."""
    if steps == 1:
        return [0]
    stride = (num_train_timesteps - 1) / (steps - 1)
    return [round(i * stride) for i in reversed(range(steps))]


@register("denser near 0 (DDIM, appendix D.2)")
def quadratic(steps: int, num_train_timesteps: int, offset: int = 0) -> list[int]:
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
def uniform(steps: int, num_train_timesteps: int, offset: int = 0) -> list[int]:
    """range(0, T, T // N), descending, as the original DDIM code has it; its length can differ from N."""
    return list(reversed(range(0, num_train_timesteps, num_train_timesteps // steps)))
