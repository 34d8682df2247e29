"""Decoders: from the last state of the loop to a picture in [-1, 1]."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

# float32 [B, C, H, W] -> float32 [B, C', H', W'] in about [-1, 1]
Decoder = Callable[[Tensor], Tensor]


def identity(x: Tensor) -> Tensor:
    """Of a model in pixel space: the state is the picture."""
    return x
