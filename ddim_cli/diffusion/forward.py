"""The forward process: from a picture to noise, and from one level of noise to a higher one."""

from __future__ import annotations

import math

from torch import Tensor


def noised(x0: Tensor, noise: Tensor, alpha_bar: float) -> Tensor:
    """x_t = sqrt(alpha_bar) x0 + sqrt(1 - alpha_bar) noise (DDIM, eq. 4).

    Args:
        x0: pictures or latents, [B, C, H, W].
        noise: standard normal, of the same shape.
        alpha_bar: of timestep t, from 0 to 1.
    """
    return math.sqrt(alpha_bar) * x0 + math.sqrt(1 - alpha_bar) * noise


def risen(x: Tensor, noise: Tensor, alpha_bar: float, higher: float) -> Tensor:
    """A state of level ``alpha_bar`` with noise added until its level is ``higher`` (RePaint, arXiv:2201.09865, eq. 7).

    All forward steps between the two levels at once: their noises add up to one.

    Args:
        x: states, [B, C, H, W].
        noise: standard normal, of the same shape.
        alpha_bar: the level of ``x``, above 0.
        higher: the noisier level, from 0 to ``alpha_bar``.
    """
    return noised(x, noise, higher / alpha_bar)
