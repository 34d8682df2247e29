"""All randomness of a run: one CPU generator an item, seeded with the item's own seed.

First the initial noise is drawn from it, then, where a step adds noise, one draw a step. So the noise of a picture
depends on its seed alone, on every device and in every batch.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ddim_cli.sampling.items import Item, Shape


class BatchNoise:
    """The noise of a batch of ``rows`` rows; the last item pads it. ``shape`` is (C, H, W) of a state."""

    def __init__(self, items: Sequence[Item], rows: int, shape: Shape, device: torch.device):
        self._rows, self._shape, self._device = rows, shape, device
        self._generators = [
            None if item.noise_seed is None else torch.Generator("cpu").manual_seed(item.noise_seed) for item in items
        ]

    def stream(self, row: int) -> torch.Generator | None:
        """What the item in this row draws from; None for one that draws nothing."""
        return self._generators[row]

    def draw_of(self, row: int) -> Tensor:
        """The next noise of one item, standard normal float32 [C, H, W] on the host; 0 for one that draws nothing."""
        generator = self._generators[row]
        return torch.zeros(self._shape) if generator is None else torch.randn(self._shape, generator=generator)

    def draw(self) -> Tensor:
        """The noise of the next step, standard normal float32 [B, C, H, W] on the device; 0 for an item without."""
        # From pinned memory a copy to a GPU does not wait for the steps before it: the host draws ahead of need.
        noise = torch.empty(self._rows, *self._shape, pin_memory=self._device.type == "cuda")
        for row, generator in zip(noise, self._generators, strict=False):
            if generator is None:
                row.zero_()
            else:
                torch.randn(self._shape, generator=generator, out=row)
        noise[len(self._generators) :] = noise[len(self._generators) - 1]
        return noise.to(self._device, non_blocking=self._device.type == "cuda")

    def padded(self, values: Sequence[Tensor]) -> Tensor:
        """One value an item, [...] on the host, as a batch [B, ...] on the device."""
        batch = torch.stack([*values, *list(values)[-1:] * (self._rows - len(values))])
        if self._device.type == "cuda":
            batch = batch.pin_memory()
        return batch.to(self._device, non_blocking=self._device.type == "cuda")
