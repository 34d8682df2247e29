"""What a model is, and what running it costs, without its weights on a device."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

from ddim_cli.errors import ModelError, first_line
from ddim_cli.models.describe import ModelDescription

if TYPE_CHECKING:
    from ddim_cli.models.unet import UNet


def activation_bytes(model: ModelDescription, itemsize: int) -> int:
    """Rough memory one image takes in a forward pass: the skip connections, and a dozen tensors of the widest level."""
    _, height, width = model.state_shape
    widths, layers = model.network["block_out_channels"], model.network["layers_per_block"]
    layers = max(layers) if isinstance(layers, (list, tuple)) else layers
    levels = [channels * (height >> i) * (width >> i) for i, channels in enumerate(widths)]
    return (sum(levels) * (layers + 1) + 12 * max(levels)) * itemsize


def flops(model: ModelDescription) -> int:
    """Floating-point operations (two a multiplication and addition) of one image and step, counted on no device.

    Those of convolutions and of products of matrices, attention's among them, as torch's FlopCounterMode has it.

    Raises:
        ModelError: for a config that builds no network, or one that cannot be run.
    """
    from ddim_cli.models.load import build_unet, network_config
    from ddim_cli.models.unet import supports

    # Our own is added up: to watch it run without a device, torch would import its compiler, which takes a second.
    return _sum(build_unet(model), model) if supports(network_config(model)) else _watched(model)


def _sum(network: UNet, model: ModelDescription) -> int:
    """Of each layer, from the size of its weights and that of the image at its level."""
    from torch import nn

    from ddim_cli.models.unet import Attention

    levels, (height, width) = len(model.network["block_out_channels"]), model.size
    total = 0
    for name, layer in network.named_modules():
        level = _level(name, levels)
        pixels = (height >> level) * (width >> level)
        if isinstance(layer, nn.Conv2d):
            total += pixels * layer.weight.numel()
        elif isinstance(layer, nn.Linear):
            # What sees the timestep alone is computed once, not for every pixel.
            total += (pixels if ".attentions." in name else 1) * layer.weight.numel()
        elif isinstance(layer, Attention):
            total += 2 * pixels * pixels * layer.to_q.out_features
    return 2 * total


def _level(name: str, levels: int) -> int:
    """How often the image is halved where the layer of this name writes."""
    block, _, rest = name.partition(".")
    index = int(rest.partition(".")[0] or 0) if block in ("down_blocks", "up_blocks") else 0
    if block == "down_blocks":
        return index + (".downsamplers." in name)
    if block == "up_blocks":
        return levels - 1 - index - (".upsamplers." in name)
    return levels - 1 if block == "mid_block" else 0


def _watched(model: ModelDescription) -> int:
    """Of a network of diffusers, by running it on no device. Raises ModelError where it cannot be run."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from ddim_cli.models.load import build_network

    # One with constants comes with their values.
    network = build_network(model).eval().to("meta")
    x = torch.empty(1, model.channels, *model.size, device="meta")
    t = torch.zeros(1, dtype=torch.int64, device="meta")
    conditional = model.network.get("num_class_embeds") or model.network.get("class_embed_type")
    try:
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            network(x, t, t if conditional else None)
    except Exception as error:
        # Diffusers builds networks of blocks that do not go together, which fail in as many ways once they are called.
        raise ModelError(
            f"{model.where}: its config builds a network that cannot be run: {first_line(error)}"
        ) from error
    return counter.get_total_flops()


def dtypes(model: ModelDescription) -> dict[str, int]:
    """dtype -> number of elements stored in it."""
    from ddim_cli.models.stored import read_weights

    elements: Counter[str] = Counter()
    for _, tensor in read_weights(model):
        elements[str(tensor.dtype).removeprefix("torch.")] += tensor.numel()
    return dict(elements.most_common())


def blocks(model: ModelDescription) -> list[str]:
    """The network's blocks from the finest level down and up again, one line each."""
    network = model.network
    widths, layers = network["block_out_channels"], network["layers_per_block"]
    height, width = model.size
    down = [
        f"{kind}: {layers} layers, {widths[i]} channels, {height >> i}x{width >> i}"
        for i, kind in enumerate(network.get("down_block_types") or ())
    ]
    levels = len(widths)
    up = [
        f"{kind}: {layers + 1} layers, {widths[levels - 1 - i]} channels, "
        f"{height >> (levels - 1 - i)}x{width >> (levels - 1 - i)}"
        for i, kind in enumerate(network.get("up_block_types") or ())
    ]
    middle = network.get("mid_block_type", "UNetMidBlock2D")
    return [*down, *([f"{middle}: {widths[-1]} channels"] if middle else []), *up]


def facts(model: ModelDescription) -> dict[str, Any]:
    batch = 8
    return {
        "source": model.source,
        "kind": model.kind,
        "revision": model.revision,
        "class": "UNet2DModel",
        "channels": model.channels,
        "height": model.size[0],
        "width": model.size[1],
        "classes": model.classes,
        "learned_variance": model.learned_variance,
        "blocks": blocks(model),
        "parameters": model.parameters,
        "weights": {
            "files": [str(path) for path in model.weights],
            "bytes": sum(path.stat().st_size for path in model.weights),
            "dtypes": dtypes(model),
            "sha256": model.sha256,
        },
        "scheduler": dict(model.scheduler) if model.scheduler is not None else None,
        "flops_per_image_and_step": flops(model),
        "memory": {
            "batch": batch,
            "float32_bytes": model.parameters * 4 + batch * activation_bytes(model, 4),
            "bfloat16_bytes": model.parameters * 2 + batch * activation_bytes(model, 2),
        },
        "notes": list(model.notes),
    }
