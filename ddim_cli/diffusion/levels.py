"""Noise levels as a person reads them. Needs no torch."""

from __future__ import annotations

import math


def snr_db(alpha_bar: float) -> float:
    """10 log10(alpha_bar / (1 - alpha_bar)): the signal-to-noise ratio of x_t in dB."""
    if alpha_bar <= 0:
        return -math.inf
    return math.inf if alpha_bar >= 1 else 10 * math.log10(alpha_bar / (1 - alpha_bar))
