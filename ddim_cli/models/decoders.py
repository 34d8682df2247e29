"""Decoders: from the states of the loop to pictures in [-1, 1], and back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ddim_cli.errors import ModelError, first_line

if TYPE_CHECKING:
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
    from diffusers.models.autoencoders.vq_model import VQModel

    from ddim_cli.models.latent import Latents


@dataclass(frozen=True)
class Distribution:
    """What an encoder makes of one picture: a normal distribution of states, float32 [C, H, W] on the host.

    ``deviation`` is None where there is one state alone, the mean; both come times ``scale``.
    """

    mean: Tensor
    deviation: Tensor | None = None
    scale: float = 1.0

    def draw(self, generator: torch.Generator | None) -> Tensor:
        """A state of it, drawn from ``generator``; the most probable one for None."""
        if self.deviation is None or generator is None:
            return self.mean * self.scale
        return (self.mean + self.deviation * torch.randn(self.mean.shape, generator=generator)) * self.scale


class Decoder:
    """Of a model in pixel space: the state is the picture."""

    def decode(self, x: Tensor) -> Tensor:
        """States float32 [B, C, H, W] -> pictures float32 [B, C', H', W'] in about [-1, 1]."""
        return x

    def distribution(self, picture: Tensor) -> Distribution:
        """A picture float32 [1, C', H', W'] in [-1, 1] -> the states it may have."""
        return Distribution(picture[0])

    def prepare(self) -> None:
        """Load what is needed, where it is to stay in memory. Raises ModelError."""

    def release(self) -> None:
        """Give back memory that is not needed until the next batch is there."""


class AutoencoderDecoder(Decoder):
    """The autoencoder of a latent model, in float32 whatever the network's dtype, loaded when it is first needed.

    States are latents times the model's scale (Rombach et al., arXiv:2112.10752, section G). It takes one image at a
    time: the memory is that of one, and no picture depends on its batch. With ``tile`` it decodes large ones in tiles.
    With ``reclaim`` its weights go when a batch is there, and that is called to give their memory back.
    """

    def __init__(
        self,
        latents: Latents,
        device: torch.device | str = "cpu",
        tile: bool = False,
        reclaim: Callable[[], None] | None = None,
    ):
        self._latents, self._device, self._tile, self._reclaim = latents, device, tile, reclaim
        self._network: AutoencoderKL | VQModel | None = None

    def _loaded(self) -> AutoencoderKL | VQModel:
        if self._network is None:
            self._network = load_autoencoder(self._latents, self._device)
            for module in self._network.modules():
                if isinstance(module, torch.nn.SiLU):
                    # What it is given is a norm's own output, at full size a quarter of a gigabyte.
                    module.inplace = True
            if self._tile and hasattr(self._network, "enable_tiling"):
                self._network.enable_tiling()
        return self._network

    def prepare(self) -> None:
        if self._reclaim is None:
            self._loaded()

    @torch.no_grad()
    def decode(self, x: Tensor) -> Tensor:
        if self._reclaim is not None:
            # What the network's steps leave unused is not in blocks of the size that is needed now.
            self._reclaim()
        network = self._loaded()
        decoded = [network.decode(each / self._latents.scale, return_dict=False)[0] for each in x.split(1)]
        return torch.cat(decoded).contiguous()

    @torch.no_grad()
    def distribution(self, picture: Tensor) -> Distribution:
        found = self._loaded().encode(picture.to(self._device))
        if not hasattr(found, "latent_dist"):
            return Distribution(found.latents[0].cpu(), None, self._latents.scale)
        return Distribution(found.latent_dist.mean[0].cpu(), found.latent_dist.std[0].cpu(), self._latents.scale)

    def release(self) -> None:
        if self._reclaim is not None:
            self._network = None
            self._reclaim()


def load_autoencoder(
    latents: Latents,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    layout: torch.memory_format = torch.channels_last,
) -> Any:
    """Diffusers' AutoencoderKL or VQModel in ``dtype`` and with its weights in ``layout``, for use.

    Raises:
        ModelError: for a config that builds none, or weights that do not fit.
    """
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
    from diffusers.models.autoencoders.vq_model import VQModel

    from ddim_cli.models.stored import modern
    from ddim_cli.models.weights import load_into, read_tensors

    part = latents.autoencoder
    kind = {"AutoencoderKL": AutoencoderKL, "VQModel": VQModel}[part.class_name]
    try:
        with torch.device("meta"):
            network = kind.from_config(dict(part.config))
    except Exception as error:
        # A config can be wrong in as many ways as the class has arguments; it says which in its own words.
        raise ModelError(f"{part.where}: its config builds no {part.class_name}: {first_line(error)}") from None
    weights = {}
    for path in part.weights:
        for stored_name, tensor in read_tensors(path):
            name, tensor = modern(stored_name, tensor)
            weights[name] = tensor.to(device, dtype)
    load_into(network, weights, part.weights[0])
    return network.eval().requires_grad_(False).to(memory_format=layout)
