"""Keeping the predicted x0 in range: static clipping and dynamic thresholding."""

from __future__ import annotations

import math

from torch import Tensor


def image_quantile(values: Tensor, ratio: float) -> Tensor:
    """The ``ratio`` quantile of each row, linearly interpolated; [B, n] -> [B, 1].

    As torch.quantile, which refuses inputs of more than 16 M elements; only the values above the
    quantile are sorted, which for ratios near 1 are few.
    """
    position = ratio * (values.shape[1] - 1)
    below = math.floor(position)
    # topk is in descending order: the last is the value below the quantile, the one before it the one above.
    top = values.topk(values.shape[1] - below, dim=1).values
    low, high = top[:, -1:], top[:, -2:-1] if top.shape[1] > 1 else top[:, -1:]
    return low + (high - low) * (position - below)


def dynamic_threshold(x0: Tensor, ratio: float, max_value: float) -> Tensor:
    """Clip each image to +-s and divide by s, s being the ``ratio`` quantile of its |x0|, in [1, max_value].

    Imagen, arXiv:2205.11487, section 2.3. x0 float32 [B, C, H, W] or any [B, ...].
    """
    s = image_quantile(x0.abs().flatten(1), ratio).clamp(1, max_value)
    s = s.view(-1, *[1] * (x0.ndim - 1))
    return x0.clamp(-s, s) / s
