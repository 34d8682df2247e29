"""What the config of a denoising network must be, so that it can be sampled from."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from ddim_cli.errors import ModelError

NETWORK_CLASS, TEXT_NETWORK_CLASS = "UNet2DModel", "UNet2DConditionModel"
# What the two take where a config leaves these out.
_NETWORK_DEFAULTS = {
    "in_channels": 3,
    "out_channels": 3,
    "time_embedding_type": "positional",
    "block_out_channels": [224, 448, 672, 896],
    "layers_per_block": 2,
}
_TEXT_NETWORK_DEFAULTS = {
    "cross_attention_dim": 1280,
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": [320, 640, 1280, 1280],
    "layers_per_block": 2,
}
MOST_PIXELS = 16384
# One side of a square, or height and width.
Size = int | Sequence[int]


def _positive(value: Any) -> bool:
    return type(value) is int and value > 0


def is_for_inpainting(network: Mapping[str, Any]) -> bool:
    """Whether a text-to-image network takes, behind a state, a mask of one channel and a state of what is known."""
    taken, out = network.get("in_channels"), network.get("out_channels", 4)
    return type(taken) is int and type(out) is int and taken == 2 * out + 1


def checked_network(config: Mapping[str, Any], size: Size | None, where: str, in_pixels: bool = True) -> dict[str, Any]:
    """A UNet2DModel's config with what sampling needs filled in, for states of ``size``, by default its own.

    Raises ModelError for one that cannot be sampled from; ``in_pixels`` its states must be pictures.
    """
    network = {**_NETWORK_DEFAULTS, **config}
    name = network.get("_class_name", NETWORK_CLASS)
    if name == TEXT_NETWORK_CLASS:
        raise ModelError(f"{where}: the network is one part of a text-to-image pipeline; name the pipeline's directory")
    if name != NETWORK_CLASS:
        raise ModelError(f"{where}: the network is a {name}; this tool samples from a {NETWORK_CLASS}")
    _set_size(network, size, where)
    channels = _checked_channels(network, where)
    if in_pixels and channels not in (1, 3, 4):
        raise ModelError(f"{where}: the network makes {channels} channels; a picture has 1, 3 or 4")
    _check_shape(network, where)
    classes = network.get("num_class_embeds")
    if classes is not None and not _positive(classes):
        raise ModelError(f"{where}: num_class_embeds is {json.dumps(classes)}; it must be a positive number")
    return network


def checked_text_network(config: Mapping[str, Any], size: Size | None, where: str) -> dict[str, Any]:
    """As `checked_network`, of a UNet2DConditionModel, which takes states of any size."""
    network = {**_TEXT_NETWORK_DEFAULTS, **config}
    for key in ("class_embed_type", "num_class_embeds", "addition_embed_type"):
        if network.get(key) is not None:
            raise ModelError(
                f"{where}: {key} is {json.dumps(network[key])}: the network takes more than text, which this tool does "
                "not know"
            )
    _set_size(network, size, where)
    if not is_for_inpainting(network):
        _checked_channels(network, where)
    return network


def _set_size(network: dict[str, Any], size: Size | None, where: str) -> None:
    """Set ``sample_size``, where it is given. Raises ModelError for one that is none."""
    if size is not None:
        network["sample_size"] = size
    found = network.get("sample_size")
    sides = found if isinstance(found, (list, tuple)) and len(found) == 2 else (found,)
    if not all(map(_positive, sides)) or max(sides) > MOST_PIXELS:
        raise ModelError(f"{where}: sample_size is {json.dumps(found)}; give the size of an image with --image-size")


def _checked_channels(network: Mapping[str, Any], where: str) -> int:
    """The channels of a state. Raises ModelError where the network does not give as many as it takes."""
    channels, out = network["in_channels"], network["out_channels"]
    if not _positive(channels) or out not in (channels, 2 * channels):
        raise ModelError(f"{where}: the network takes {channels} channels and gives {out}; DDIM needs as many")
    return channels


def _check_shape(network: Mapping[str, Any], where: str) -> None:
    """ModelError for levels that cannot be, or an image that cannot be halved as often as there are levels."""
    widths, layers = network["block_out_channels"], network["layers_per_block"]
    if not (isinstance(widths, (list, tuple)) and widths and all(map(_positive, widths))):
        raise ModelError(f"{where}: block_out_channels is {json.dumps(widths)}; it must be a list of channels")
    if not _positive(layers):
        raise ModelError(f"{where}: layers_per_block is {json.dumps(layers)}; it must be a positive number")
    size, factor = network["sample_size"], 2 ** (len(widths) - 1)
    if any(s % factor for s in (size if isinstance(size, (list, tuple)) else (size,))):
        raise ModelError(
            f"{where}: an image of size {json.dumps(size)} cannot be halved at the network's {len(widths)} levels; "
            f"its sides must be multiples of {factor}"
        )
