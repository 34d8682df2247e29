"""Noise levels: the log-SNR in which solvers reckon, and the SNR as a person reads it. Needs no torch to import."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


def snr_db(alpha_bar: float) -> float:
    """10 log10(alpha_bar / (1 - alpha_bar)): the signal-to-noise ratio of x_t in dB."""
    if alpha_bar <= 0:
        return -math.inf
    return math.inf if alpha_bar >= 1 else 10 * math.log10(alpha_bar / (1 - alpha_bar))


def half_log_snr(alpha_bar: Tensor) -> Tensor:
    """lambda = log(sqrt(alpha_bar) / sqrt(1 - alpha_bar)): -inf for alpha_bar 0, inf for 1. Any shape, float64."""
    return (alpha_bar.log() - (-alpha_bar).log1p()) / 2
