"""How far two pictures are apart."""

from __future__ import annotations

import math

import numpy as np


def largest_difference(a: np.ndarray, b: np.ndarray) -> int:
    """The largest difference of two values, 0..255, of uint8 pictures of one shape."""
    return int(np.abs(a.astype(np.int16) - b.astype(np.int16)).max())


def psnr_db(a: np.ndarray, b: np.ndarray) -> float:
    """Peak signal-to-noise ratio of uint8 pictures of one shape, in dB; infinite for equal ones."""
    error = float(np.square(a.astype(np.float64) - b.astype(np.float64)).mean())
    return 10 * math.log10(255**2 / error) if error else math.inf


def size_text(shape: tuple[int, ...]) -> str:
    """``(32, 48, 3)`` -> ``48 x 32 RGB``."""
    height, width, channels = shape
    return f"{width} x {height} {({1: 'grey', 3: 'RGB', 4: 'RGBA'}).get(channels, f'{channels} channels')}"
