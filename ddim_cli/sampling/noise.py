"""All randomness of a run: one CPU generator an item, seeded with the item's own seed.

First the initial noise is drawn from it, then, where a step adds noise, one draw a step. So the noise of a picture
depends on its seed alone, on every device and in every batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ddim_cli.sampling.items import Inversion, Item, Noise, Shape


class BatchNoise:
    """The initial states and the noise of a batch of ``rows`` rows; the last item pads it.

    ``shape`` is (C, H, W) of a state. ``encode`` makes a state of a picture that is to be inverted, [1, C', H', W'] ->
    [1, C, H, W], of ``picture_shape``.
    """

    def __init__(
        self,
        items: Sequence[Item],
        rows: int,
        shape: Shape,
        device: torch.device,
        encode: Callable[[Tensor], Tensor] = lambda picture: picture,
        picture_shape: Shape | None = None,
    ):
        self._items, self._rows, self._shape, self._device = items, rows, shape, device
        self._encode, self._picture_shape = encode, picture_shape or shape
        self._generators = [
            None if item.noise_seed is None else torch.Generator("cpu").manual_seed(item.noise_seed) for item in items
        ]

    def initial(self) -> Tensor:
        """The states that the items start from, float32 [B, C, H, W] on the device. Call it once, and first."""
        states = self._normal()
        for row, item in zip(states, self._items, strict=False):
            # A stream's first draw is its initial noise, also where an item starts from something else.
            if isinstance(item.start, Inversion):
                row.copy_(self._encode(item.start.state(self._picture_shape)[None])[0])
            elif not (isinstance(item.start, Noise) and item.start.seed == item.noise_seed):
                row.copy_(item.start.state(self._shape))
        return self._padded(states)

    def draw(self) -> Tensor:
        """The noise of the next step, standard normal float32 [B, C, H, W] on the device; 0 for an item without."""
        return self._padded(self._normal())

    def _normal(self) -> Tensor:
        # From pinned memory a copy to a GPU does not wait for the steps before it: the host draws ahead of need.
        noise = torch.empty(self._rows, *self._shape, pin_memory=self._device.type == "cuda")
        for row, generator in zip(noise, self._generators, strict=False):
            if generator is None:
                row.zero_()
            else:
                torch.randn(self._shape, generator=generator, out=row)
        return noise

    def _padded(self, values: Tensor) -> Tensor:
        values[len(self._items) :] = values[len(self._items) - 1]
        return values.to(self._device, non_blocking=self._device.type == "cuda")
