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
        on_gpu = self._device.type == "cuda"
        # From pinned memory a copy to a GPU does not wait for the steps before it: the host draws ahead of need.
        noise = torch.empty(len(self._seeds), *self._shape, pin_memory=on_gpu)
        for row, generator in zip(noise, self._generators.values(), strict=False):
            torch.randn(self._shape, generator=generator, out=row)
        noise[len(self._generators) :] = noise[len(self._generators) - 1]
        return noise.to(self._device, non_blocking=on_gpu)
