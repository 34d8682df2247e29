"""All randomness of a run: one CPU generator an image, seeded with the image's seed.

First the initial noise is drawn from it, then, where a step adds noise, one draw a step. So an image's
noise depends on its seed alone, on every device and in every batch.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class ImageNoise:
    """The noise of a batch. ``draw()`` gives standard normal float32 [B, *shape] on ``device``."""

    def __init__(self, seeds: Sequence[int], shape: tuple[int, ...], device: torch.device):
        # A seed that pads the batch is drawn once and repeated.
        self._generators = {seed: torch.Generator("cpu").manual_seed(seed) for seed in seeds}
        self._seeds = tuple(seeds)
        self._shape = shape
        self._device = device

    def draw(self) -> Tensor:
        drawn = {seed: torch.randn(self._shape, generator=g) for seed, g in self._generators.items()}
        noise = torch.stack([drawn[seed] for seed in self._seeds])
        if self._device.type != "cuda":
            return noise.to(self._device)
        # From pinned memory, so that the host does not wait for the steps before this one.
        return noise.pin_memory().to(self._device, non_blocking=True)
