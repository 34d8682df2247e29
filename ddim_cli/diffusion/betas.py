"""Noise schedules: the T betas of training and their alpha_bars, in float64 on the host."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor

from ddim_cli.config.schema import SchedulerSettings
from ddim_cli.errors import ConfigError

MAX_BETA = 0.999


def _cosine_alpha_bar(u: float) -> float:
    """Nichol and Dhariwal, arXiv:2102.09672, eq. 17, up to a constant factor."""
    return math.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2


def _laplace_alpha_bar(u: float) -> float:
    """Hang et al., arXiv:2407.03297: log SNR drawn from a Laplace distribution with mean 0 and scale 0.5."""
    log_snr = -0.5 * math.copysign(1, 0.5 - u) * math.log(1 - 2 * abs(0.5 - u) + 1e-6)
    snr = math.exp(log_snr)
    return math.sqrt(snr / (1 + snr))


def _exp_alpha_bar(u: float) -> float:
    return math.exp(-12.0 * u)


def betas_from_alpha_bar(alpha_bar: Callable[[float], float], num_train_timesteps: int) -> Tensor:
    """beta_t = min(1 - alpha_bar((t+1)/T) / alpha_bar(t/T), 0.999) for a continuous alpha_bar on [0, 1]; [T]."""
    edges = [alpha_bar(i / num_train_timesteps) for i in range(num_train_timesteps + 1)]
    betas = [min(1 - after / before, MAX_BETA) for before, after in pairwise(edges)]
    return torch.tensor(betas, dtype=torch.float64)


def rescale_zero_terminal_snr(betas: Tensor) -> Tensor:
    """Shift and scale sqrt(alpha_bar) so that it ends at 0 and starts where it did (arXiv:2305.08891, algorithm 1).

    Raises:
        ConfigError: for betas that add no noise, or whose alpha_bar reaches its end before the last of them.
    """
    root = torch.cumprod(1 - betas, 0).sqrt()
    root = (root - root[-1]) * root[0] / (root[0] - root[-1])
    alpha_bar = root.square()
    rescaled = 1 - torch.cat([alpha_bar[:1], alpha_bar[1:] / alpha_bar[:-1]])
    if not rescaled.isfinite().all():
        raise ConfigError(
            "scheduler.rescale_betas_zero_snr needs betas whose alpha_bar falls until the last of them; with these it "
            "has come to its end before, or never falls: choose others, or leave rescaling out"
        )
    return rescaled


def make_betas(settings: SchedulerSettings) -> Tensor:
    """The T betas of a schedule, float64 [T], in [0, 1]."""
    start, end, total = settings.beta_start, settings.beta_end, settings.num_train_timesteps
    if settings.trained_betas is not None:
        betas = torch.tensor(settings.trained_betas, dtype=torch.float64)
    elif settings.beta_schedule == "linear":
        betas = torch.linspace(start, end, total, dtype=torch.float64)
    elif settings.beta_schedule == "scaled_linear":
        betas = torch.linspace(math.sqrt(start), math.sqrt(end), total, dtype=torch.float64).square()
    elif settings.beta_schedule == "sigmoid":
        betas = torch.linspace(-6, 6, total, dtype=torch.float64).sigmoid() * (end - start) + start
    else:
        curves = {"squaredcos_cap_v2": _cosine_alpha_bar, "laplace": _laplace_alpha_bar, "exp": _exp_alpha_bar}
        betas = betas_from_alpha_bar(curves[settings.beta_schedule], total)
    return rescale_zero_terminal_snr(betas) if settings.rescale_betas_zero_snr else betas


def make_alpha_bars(settings: SchedulerSettings) -> Tensor:
    """alpha_bar_t = prod_{s<=t} (1 - beta_s), float64 [T]."""
    return torch.cumprod(1 - make_betas(settings), 0)
