"""The weights of a described model as its files hold them, under the names of UNet2DModel."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import TYPE_CHECKING

from torch import Tensor

from ddim_cli.errors import ModelError
from ddim_cli.models.weights import read_tensors

if TYPE_CHECKING:
    from ddim_cli.models.describe import ModelDescription

# The attention of checkpoints from before diffusers 0.15, under its names of today.
_OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
_OLD_NAME = re.compile(r"(.*attentions\.\d+)\.(query|key|value|proj_attn)\.(weight|bias)")


def modern(name: str, tensor: Tensor) -> tuple[str, Tensor]:
    """A tensor under the name that diffusers of today has for it, and in its shape."""
    match = _OLD_NAME.fullmatch(name)
    if match is None:
        return name, tensor
    squeezed = tensor[:, :, 0, 0] if tensor.ndim == 4 else tensor
    return f"{match[1]}.{_OLD_ATTENTION[match[2]]}.{match[3]}", squeezed


def read_weights(description: ModelDescription) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of all weights under the names of UNet2DModel, one at a time. Raises ModelError."""
    for name, tensor in _stored_weights(description):
        if description.learned_variance and name.startswith("conv_out."):
            _check_variance(description, tensor)
            # The channels of the variance lie behind those of the prediction.
            tensor = tensor[: description.channels]
        yield name, tensor


def _check_variance(description: ModelDescription, head: Tensor) -> None:
    """Raise ModelError where the config speaks of a learned variance, and the weights of ``conv_out`` have none."""
    stored, said = len(head) if head.ndim else 0, description.network["out_channels"]
    if stored != said:
        raise ModelError(
            f"{description.weights[0]}: the config says out_channels = {said}, a learned variance, but conv_out of the "
            f"weights has {stored}; set out_channels to {stored} in the config"
        )


def _stored_weights(description: ModelDescription) -> Iterator[tuple[str, Tensor]]:
    if description.kind == "checkpoint":
        from ddim_cli.models import original

        [path] = description.weights
        levels = len(description.network["block_out_channels"])
        yield from original.to_diffusers(original.read_checkpoint(path, description.ema), levels).items()
        return
    for path in description.weights:
        for name, tensor in read_tensors(path):
            yield modern(name, tensor)
