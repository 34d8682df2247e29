"""What a batch begins from: noise, latents, or pictures with noise added; and what of these pictures stays."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ddim_cli.diffusion.coefficients import StepTable
from ddim_cli.diffusion.forward import noised, risen
from ddim_cli.diffusion.slerp import slerp
from ddim_cli.errors import UsageError
from ddim_cli.models.decoders import Decoder, Distribution
from ddim_cli.sampling.items import Between, Canvas, Inversion, Item, Noise, Shape, Slerp, seed_noise
from ddim_cli.sampling.noise import BatchNoise
from ddim_cli.sampling.pictures import Input, read_input, read_mask

# Encoded pictures that are kept for the batches that follow: those of a run have often one in common.
KEPT = 16


class Climb(NamedTuple):
    """What the way up made of a picture: its latent, float32 [C, H, W] on the host, and how far the refinement got.

    ``states`` are those on the way, the picture's own first and the latent last, where they were kept.
    """

    latent: Tensor
    residual: Tensor | None = None
    states: tuple[Tensor, ...] = ()


Climbs = Mapping[Inversion, Climb]


class Encoded(NamedTuple):
    """A canvas as a network takes it, on the host: the picture float32 [C', H', W'] in [-1, 1], and its states.

    ``mask`` is float32 [1, H', W'] from 0 to 1, None of a canvas without a mask; ``masked`` the states of the picture
    without what is made anew, for a network that takes them.
    """

    picture: Tensor
    states: Distribution
    mask: Tensor | None = None
    masked: Distribution | None = None


@dataclass
class Canvases:
    """Reads and encodes pictures, and keeps the last of them; what is known of them too for a network that inpaints."""

    decoder: Decoder
    picture_shape: Shape
    inpaints: bool = False
    # By what the files held, too: a program that sends rows may write other pictures under the same names.
    _kept: OrderedDict[tuple[Canvas, str | None, str | None], Encoded] = field(default_factory=OrderedDict)

    def of(self, canvas: Canvas) -> Encoded:
        """Raises UsageError for a file that cannot be read as a picture."""
        key = canvas, canvas.pixels_sha256, canvas.mask_sha256
        if key not in self._kept:
            self._kept[key] = self._encoded(canvas)
            if len(self._kept) > KEPT:
                self._kept.popitem(last=False)
        return self._kept[key]

    def _encoded(self, canvas: Canvas) -> Encoded:
        read, values = read_input(canvas.picture, self.picture_shape)
        _check_same(canvas.picture, canvas.pixels_sha256, read)
        picture = torch.from_numpy(values)
        states = self.decoder.distribution(picture[None])
        if canvas.mask is None:
            return Encoded(picture, states)
        read, values = read_mask(canvas.mask, read, self.picture_shape, canvas.keeps)
        _check_same(canvas.mask, canvas.mask_sha256, read)
        mask = torch.from_numpy(values)
        if not self.inpaints:
            return Encoded(picture, states, mask)
        return Encoded(picture, states, mask, self.decoder.distribution((picture * (mask < 0.5))[None]))


def _check_same(path: Path, pixels_sha256: str | None, read: Input) -> None:
    if pixels_sha256 not in (None, read.pixels_sha256):
        raise UsageError(f"{path}: has changed since it was first read; run the same command again")


class Frame(NamedTuple):
    """The pictures of a batch, float32 [B, C', H', W'], and their masks [B, 1, H', W'], on the device."""

    pictures: Tensor
    masks: Tensor

    def around(self, made: Tensor) -> Tensor:
        """``made`` where the mask is white, the picture itself where it is black, float32 [B, C', H', W']."""
        rows = len(made)
        return self.masks[:rows] * made + (1 - self.masks[:rows]) * self.pictures[:rows]


class Kept:
    """What stays of the pictures of a batch: known states, put back at each level of noise.

    ``masks`` [B, 1, H, W] are 1 for what is made anew, ``states`` float32 [B, C, H, W] the pictures without noise,
    ``noise`` what is added to them, the same at all levels unless `put_back` is given another. Levels are those of
    ``table``, by its alpha_bars. Of pictures that were inverted, ``climbed`` gives the states after so many steps up,
    and these are put back.
    """

    def __init__(
        self,
        masks: Tensor,
        states: Tensor,
        noise: Tensor,
        table: StepTable,
        climbed: Callable[[int], Tensor] | None = None,
    ):
        self._masks, self._states, self._noise, self._climbed = masks, states, noise, climbed
        self._last = len(table) - 1
        # Where each step starts: the next one takes a state for one of its own level, also where a stride off the grid
        # has led elsewhere. Behind them, where the last one ends.
        self._levels = [*map(float, table.alpha_bar), float(table.prev_alpha_bar[-1])]

    def put_back(self, i: int, x: Tensor, drawn: Tensor | None = None) -> None:
        """Change the states ``x`` after step ``i`` in place: what is known is there with the noise of its level.

        That is new where it was ``drawn``.
        """
        if drawn is not None:
            self._noise = drawn
        x.copy_(self._around(x, i))

    def x0(self, predicted: Tensor) -> Tensor:
        """A predicted x0 with what is known in its place."""
        return self._around(predicted, self._last)

    def rise(self, x: Tensor, before: int, to: int, noise: Tensor) -> None:
        """Add noise in place to the states ``x`` after step ``before``, until step ``to`` can start there again.

        What is known goes up with them.
        """
        low, high = self._levels[before + 1], self._levels[to]
        x.copy_(risen(x, noise, low, high))
        if high < 1:
            # What of the risen state is not the picture is its noise from here on.
            own = risen(self._known(before), noise, low, high)
            self._noise = (own - high**0.5 * self._states) / (1 - high) ** 0.5

    def _around(self, x: Tensor, i: int) -> Tensor:
        # In the end the picture itself is laid over, and blends what is grey: once is enough.
        masks = self._masks if i < self._last else (self._masks > 0).to(x.dtype)
        return (1 - masks) * self._known(i) + masks * x

    def _known(self, i: int) -> Tensor:
        """The known states after step ``i``: in the end the pictures, even where the grid ends above alpha_bar 1."""
        if i == self._last:
            return self._states
        if self._climbed is not None:
            return self._climbed(self._last - i)
        return noised(self._states, self._noise, self._levels[i + 1])


class Beginning(NamedTuple):
    """The states of a batch before its first step, float32 [B, C, H, W], and what of its pictures stays.

    ``channels`` float32 [B, C + 1, H, W] is what a network for inpainting is given beside them: the mask, and the
    states of what is known.
    """

    states: Tensor
    kept: Kept | None = None
    frame: Frame | None = None
    channels: Tensor | None = None


@dataclass(frozen=True)
class Beginnings:
    """Begins batches of one kind (`Item.kind`). ``table`` is that of the whole grid, down it.

    Where the network inpaints, it is given mask and known states as channels, and nothing is put back between steps.
    """

    shape: Shape
    device: torch.device
    canvases: Canvases
    table: StepTable

    def picture(self, inversion: Inversion) -> Tensor:
        """The state from which a picture goes up the grid, float32 [C, H, W] on the host. Raises UsageError."""
        picture = inversion.state(self.canvases.picture_shape)
        return self.canvases.decoder.distribution(picture[None]).draw(None)

    def of(self, items: Sequence[Item], rows: int, noise: BatchNoise, climbs: Climbs) -> Beginning:
        """Raises UsageError for a start or a picture that cannot be read.

        Each item draws from its own stream what diffusers' pipelines draw from theirs, in their order: what its
        picture's latent is drawn with, if it is drawn, then the initial noise, then what the latent of the known part
        is drawn with.
        """
        if items[0].canvas is None:
            return Beginning(
                noise.padded([self._start(item, noise.draw_of(n), climbs) for n, item in enumerate(items)])
            )
        encoded = [self.canvases.of(item.canvas) for item in items if item.canvas is not None]
        masked = items[0].is_masked
        # From pure noise, diffusers' pipeline for such networks has no use for the picture's own latent.
        unseen = self.canvases.inpaints and items[0].begin == 0
        states = [each.states.draw(None if unseen else noise.stream(n)) for n, each in enumerate(encoded)]
        drawn = [self._start(item, noise.draw_of(n), climbs) for n, item in enumerate(items)]
        # Drawn also where no network takes it, so that the streams go on as theirs.
        known = [(each.masked or each.states).draw(noise.stream(n)) for n, each in enumerate(encoded)] if masked else []
        clean, start = noise.padded(states), noise.padded(drawn)
        inverted = isinstance(items[0].start, Inversion)
        x = start
        if not inverted and not (masked and items[0].begin == 0):
            x = noised(clean, start, float(self.table.alpha_bar[items[0].begin]))
        if not masked:
            return Beginning(x)
        masks = noise.padded([each.mask for each in encoded if each.mask is not None])
        frame = Frame(noise.padded([each.picture for each in encoded]), masks)
        small = F.interpolate(masks, size=self.shape[1:])
        if self.canvases.inpaints:
            small = (small >= 0.5).float()
            self._check_mask(items, small)
            return Beginning(x, None, frame, torch.cat([small, noise.padded(known)], dim=1))
        self._check_mask(items, small)
        climbed = None
        if inverted:
            ways = [climbs[item.inversions[0]].states for item in items]

            def climbed(steps: int) -> Tensor:
                # One level at a time: all of them are as large as so many batches.
                return noise.padded([states[steps] for states in ways])

        return Beginning(x, Kept(small, clean, start, self.table, climbed), frame)

    def _start(self, item: Item, drawn: Tensor, climbs: Climbs) -> Tensor:
        """The state that an item starts from before its picture comes in, of which ``drawn`` is the stream's noise."""
        start = item.start
        if isinstance(start, Inversion):
            return climbs[start].latent
        if isinstance(start, Between):
            first, second = (climbs[end].latent for end in start.ends)
            return slerp(first, second, start.weight)
        if isinstance(start, Noise) and start.seed == item.noise_seed:
            return drawn
        # A variation: from the stream's own noise, wherever in the stream that is.
        if isinstance(start, Slerp) and len(start.seeds) == 2 and start.seeds[0] == item.noise_seed:
            return slerp(drawn, seed_noise(start.seeds[1], self.shape), start.weights[0])
        return start.state(self.shape)

    def _check_mask(self, items: Sequence[Item], small: Tensor) -> None:
        for item, mask in zip(items, small, strict=False):
            if not mask.any():
                assert item.canvas is not None
                path: Path | None = item.canvas.mask
                raise UsageError(
                    f"{path}: what the mask lets change is too small for this model, whose latents are "
                    f"{self.shape[1]} x {self.shape[2]}; make it larger"
                )
