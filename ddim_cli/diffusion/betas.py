"""Noise schedules: the T betas of training and their alpha_bars, in float64 on the host."""

from __future__ import annotations

import torch
from torch import Tensor

from ddim_cli.config.schema import SchedulerSettings
from ddim_cli.diffusion.schedules import SCHEDULES
from ddim_cli.errors import ConfigError


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
    if settings.trained_betas is not None:
        betas = torch.tensor(settings.trained_betas, dtype=torch.float64)
    else:
        schedule = SCHEDULES[settings.beta_schedule]
        betas = schedule.betas(settings.num_train_timesteps, settings.beta_start, settings.beta_end)
    return rescale_zero_terminal_snr(betas) if settings.rescale_betas_zero_snr else betas


def make_alpha_bars(settings: SchedulerSettings) -> Tensor:
    """alpha_bar_t = prod_{s<=t} (1 - beta_s), float64 [T]."""
    return torch.cumprod(1 - make_betas(settings), 0)
