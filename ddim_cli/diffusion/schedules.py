"""Noise schedules, each registered once: its function, a line of help, and what else of the project asks about it.

Names and help are read by the settings, the command line and the benchmark, so nothing here needs torch until a
schedule is computed.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

MAX_BETA = 0.999


@dataclass(frozen=True)
class Schedule:
    """A schedule of betas.

    ``betas(T, beta_start, beta_end)`` gives float64 [T] in [0, 1); ``about`` is its line of help; ``in_diffusers``
    whether diffusers' DDIMScheduler has it; ``bounded`` whether it runs from beta_start to beta_end, and
    ``starts_exactly`` whether its first beta is beta_start itself.
    """

    betas: Callable[[int, float, float], Tensor]
    about: str
    in_diffusers: bool
    bounded: bool
    starts_exactly: bool


SCHEDULES: dict[str, Schedule] = {}


def register(
    about: str, in_diffusers: bool = False, bounded: bool = False, starts_exactly: bool = False
) -> Callable[[Callable[[int, float, float], Tensor]], Callable[[int, float, float], Tensor]]:
    """Register a schedule under its function's name."""

    def add(betas: Callable[[int, float, float], Tensor]) -> Callable[[int, float, float], Tensor]:
        SCHEDULES[betas.__name__] = Schedule(betas, about, in_diffusers, bounded, starts_exactly)
        return betas

    return add


def _linspace(start: float, end: float, count: int) -> Tensor:
    import torch

    return torch.linspace(start, end, count, dtype=torch.float64)


def betas_from_alpha_bar(alpha_bar: Callable[[float], float], num_train_timesteps: int) -> Tensor:
    """beta_t = min(1 - alpha_bar((t+1)/T) / alpha_bar(t/T), 0.999) for a continuous alpha_bar on [0, 1]; [T]."""
    import torch

    edges = [alpha_bar(i / num_train_timesteps) for i in range(num_train_timesteps + 1)]
    betas = [min(1 - after / before, MAX_BETA) for before, after in pairwise(edges)]
    return torch.tensor(betas, dtype=torch.float64)


@register("beta grows evenly (DDPM)", in_diffusers=True, bounded=True, starts_exactly=True)
def linear(total: int, start: float, end: float) -> Tensor:
    return _linspace(start, end, total)


@register("sqrt(beta) grows evenly (latent diffusion)", in_diffusers=True, bounded=True, starts_exactly=True)
def scaled_linear(total: int, start: float, end: float) -> Tensor:
    return _linspace(math.sqrt(start), math.sqrt(end), total).square()


@register("alpha_bar falls as a squared cosine (arXiv:2102.09672)", in_diffusers=True)
def squaredcos_cap_v2(total: int, start: float, end: float) -> Tensor:
    """Nichol and Dhariwal, arXiv:2102.09672, eq. 17, up to a constant factor."""
    return betas_from_alpha_bar(lambda u: math.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2, total)


@register("beta grows along a sigmoid (GeoDiff)", bounded=True)
def sigmoid(total: int, start: float, end: float) -> Tensor:
    return _linspace(-6, 6, total).sigmoid() * (end - start) + start


@register("log SNR follows a Laplace distribution (arXiv:2407.03297)")
def laplace(total: int, start: float, end: float) -> Tensor:
    """Hang et al., arXiv:2407.03297: log SNR drawn from a Laplace distribution with mean 0 and scale 0.5."""

    def alpha_bar(u: float) -> float:
        log_snr = -0.5 * math.copysign(1, 0.5 - u) * math.log(1 - 2 * abs(0.5 - u) + 1e-6)
        snr = math.exp(log_snr)
        return math.sqrt(snr / (1 + snr))

    return betas_from_alpha_bar(alpha_bar, total)


@register("alpha_bar falls exponentially")
def exp(total: int, start: float, end: float) -> Tensor:
    return betas_from_alpha_bar(lambda u: math.exp(-12.0 * u), total)
