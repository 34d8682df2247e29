"""What a model is, and what running it costs, without its weights on a device."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from ddim_cli.errors import ModelError, first_line
from ddim_cli.models.describe import ModelDescription

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

    from ddim_cli.models.conditional_unet import ConditionalUNet
    from ddim_cli.models.unet import UNet

# Of the largest tensor that an autoencoder makes on the way to a picture, as many lie in memory at a time: measured
# with Stable Diffusion's at 512 x 512.
DECODING_TENSORS = 4


def activation_bytes(model: ModelDescription, itemsize: int) -> int:
    """Rough memory one image takes in a forward pass: the skip connections, and a dozen tensors of the widest level."""
    _, height, width = model.state_shape
    widths, layers = model.network["block_out_channels"], model.network["layers_per_block"]
    layers = max(layers) if isinstance(layers, (list, tuple)) else layers
    levels = [channels * (height >> i) * (width >> i) for i, channels in enumerate(widths)]
    return (sum(levels) * (layers + 1) + 12 * max(levels)) * itemsize


def decoding_bytes(model: ModelDescription) -> int:
    """Rough memory that the autoencoder of a latent model takes for a picture, in float32; 0 of one in pixel space."""
    if model.latents is None:
        return 0
    widths = model.latents.autoencoder.config.get("block_out_channels", [64])
    # The finest level is entered with the channels of the one before it.
    return DECODING_TENSORS * max(widths[:2]) * model.size[0] * model.size[1] * 4


def flops(model: ModelDescription) -> int:
    """Floating-point operations (two a multiplication and addition) of one image and step, counted on no device.

    Those of convolutions and of products of matrices, attention's among them, as torch's FlopCounterMode has it. Of a
    text-to-image network they are those of one text: guidance takes twice as many.

    Raises:
        ModelError: for a config that builds no network, or one that cannot be run.
    """
    from ddim_cli.models.load import build_unet, is_ours

    # Our own is added up: to watch it run without a device, torch would import its compiler, which takes a second.
    return _sum(build_unet(model), model) if is_ours(model) else _watched(model)


def _sum(network: UNet | ConditionalUNet, model: ModelDescription) -> int:
    """Of each layer, from the size of its weights and that of the state at its level."""
    from torch import nn

    from ddim_cli.models.blocks import SelfAttention
    from ddim_cli.models.conditional_unet import CrossAttention

    levels, (_, height, width) = len(model.network["block_out_channels"]), model.state_shape
    tokens, total = _tokens(model), 0
    for name, layer in network.named_modules():
        level = _level(name, levels)
        pixels = _halved(height, level) * _halved(width, level)
        if isinstance(layer, nn.Conv2d):
            total += pixels * layer.weight.numel()
        elif isinstance(layer, nn.Linear):
            # What sees the timestep alone is computed once, not for every pixel; what sees the text, for every token.
            of_text = name.endswith((".attn2.to_k", ".attn2.to_v"))
            rows = tokens if of_text else pixels if ".attentions." in name else 1
            total += rows * layer.weight.numel()
        elif isinstance(layer, (SelfAttention, CrossAttention)):
            seen = tokens if isinstance(layer, CrossAttention) else pixels
            total += 2 * pixels * seen * layer.to_q.out_features
    return 2 * total


def _tokens(model: ModelDescription) -> int:
    """How many tokens a text-to-image network is given; 0 of another."""
    text = model.latents.text if model.latents is not None else None
    return text.limit if text is not None else 0


def _halved(side: int, times: int) -> int:
    """What is left of a side; a remainder counts as a whole."""
    return -(-side // 2**times)


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
    x = torch.empty(1, *model.input_shape, device="meta")
    t = torch.zeros(1, dtype=torch.int64, device="meta")
    condition: Tensor | None = None
    if model.latents is not None and model.latents.text is not None:
        condition = torch.empty(1, model.latents.text.limit, model.latents.text.width, device="meta")
    elif model.network.get("num_class_embeds") or model.network.get("class_embed_type"):
        condition = t
    try:
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            network(x, t, condition)
    except Exception as error:
        # Diffusers builds networks of blocks that do not go together, which fail in as many ways once they are called.
        raise ModelError(
            f"{model.where}: its config builds a network that cannot be run: {first_line(error)}"
        ) from error
    return counter.get_total_flops()


def dtypes(model: ModelDescription) -> dict[str, int]:
    """dtype -> number of elements stored in it, of the network's weights."""
    from ddim_cli.models.stored import read_weights

    return _counted(tensor for _, tensor in read_weights(model))


def _counted(tensors: Iterable[Tensor]) -> dict[str, int]:
    elements: Counter[str] = Counter()
    for tensor in tensors:
        elements[str(tensor.dtype).removeprefix("torch.")] += tensor.numel()
    return dict(elements.most_common())


def blocks(model: ModelDescription) -> list[str]:
    """The network's blocks from the finest level down and up again, one line each."""
    network = _with_defaults(model)
    widths, (_, height, width) = network["block_out_channels"], model.state_shape
    levels = len(widths)
    layers, heads = _of_each_level(network["layers_per_block"], levels), _heads(model, levels)

    def line(kind: str, level: int, count: int) -> str:
        attends = f", {heads[level]} heads" if heads is not None and "CrossAttn" in kind else ""
        size = f"{_halved(height, level)}x{_halved(width, level)}"
        return f"{kind}: {count} layers, {widths[level]} channels{attends}, {size}"

    down = [line(kind, i, layers[i]) for i, kind in enumerate(network.get("down_block_types") or ())]
    up = [
        line(kind, levels - 1 - i, layers[levels - 1 - i] + 1)
        for i, kind in enumerate(network.get("up_block_types") or ())
    ]
    middle = network.get("mid_block_type", "UNetMidBlock2D")
    return [*down, *([f"{middle}: {widths[-1]} channels"] if middle else []), *up]


def _with_defaults(model: ModelDescription) -> dict[str, Any]:
    if not model.takes_text:
        return dict(model.network)
    from ddim_cli.models.conditional_unet import DEFAULTS

    return {**DEFAULTS, **model.network}


def _of_each_level(value: Any, levels: int) -> list[Any]:
    """A setting of every level, which a config may give once for all."""
    return list(value) if isinstance(value, (list, tuple)) else [value] * levels


def _heads(model: ModelDescription, levels: int) -> list[int] | None:
    """How many heads the attention of each level of a text-to-image network has."""
    if not model.takes_text:
        return None
    network = _with_defaults(model)
    # As diffusers has it: what is called the dimension of a head is the number of heads.
    return _of_each_level(network["num_attention_heads"] or network["attention_head_dim"], levels)


def parts(model: ModelDescription) -> list[dict[str, Any]]:
    """The parts of a latent model, its network first: name, class, parameters, files, bytes, dtypes and sha256 each.

    Raises:
        ModelError: for weights that cannot be read.
    """
    from ddim_cli.models.weights import read_tensors

    if model.latents is None:
        return []
    network = {
        **_files(model.network_class, model.weights),
        "parameters": model.parameters,
        "dtypes": dtypes(model),
        "sha256": model.weights_sha256,
    }
    found = {"unet": network}
    for name, part in model.latents.weighted_parts().items():
        stored = _counted(tensor for path in part.weights for _, tensor in read_tensors(path))
        facts = {"parameters": part.parameters, "dtypes": stored, "sha256": part.weights_sha256}
        found[name] = {**_files(part.class_name, part.weights), **facts}
    if model.latents.text is not None:
        tokenizer = model.latents.text.tokenizer
        # Of files alone.
        facts = {"parameters": 0, "dtypes": {}, "sha256": tokenizer.sha256}
        found["tokenizer"] = {**_files("CLIPTokenizer", tokenizer.files), **facts}
    return [{"name": name, **facts} for name, facts in found.items()]


def _files(class_name: str, paths: Sequence[Path]) -> dict[str, Any]:
    return {
        "class": class_name,
        "files": [str(path) for path in paths],
        "bytes": sum(path.stat().st_size for path in paths),
    }


def facts(model: ModelDescription) -> dict[str, Any]:
    """What ``ddim inspect --json`` prints of a model. Raises ModelError where it cannot be read or built."""
    batch = 8
    found = parts(model)
    stored: Counter[str] = Counter()
    for kinds in [part["dtypes"] for part in found] or [dtypes(model)]:
        stored.update(kinds)
    files = [file for part in found for file in part["files"]] or [str(path) for path in model.weights]
    channels, height, width = model.shape
    guidance = model.settings_layer().values.get("sampling.guidance_scale", 1.0)
    return {
        "source": model.source,
        "kind": model.kind,
        "revision": model.revision,
        "class": model.network_class,
        "channels": channels,
        "height": height,
        "width": width,
        "state": list(model.state_shape),
        "latent_scale": model.latents.scale if model.latents is not None else None,
        "prompt_tokens": _tokens(model) or None,
        "guidance_scale": guidance,
        "classes": model.classes,
        "learned_variance": model.learned_variance,
        **({"inpaints": True} if model.inpaints else {}),
        "blocks": blocks(model),
        "parameters": model.all_parameters,
        "weights": {
            "files": files,
            "bytes": sum(part["bytes"] for part in found) or sum(path.stat().st_size for path in model.weights),
            "dtypes": dict(stored.most_common()),
            "sha256": model.sha256,
        },
        "parts": found or None,
        "scheduler": dict(model.scheduler) if model.scheduler is not None else None,
        "flops_per_image_and_step": flops(model),
        "memory": {
            "batch": batch,
            "float32_bytes": memory(model, batch, 4),
            "bfloat16_bytes": memory(model, batch, 2),
        },
        "notes": list(model.notes),
    }


def memory(model: ModelDescription, batch: int, itemsize: int) -> int:
    """Rough memory for a batch, in bytes, the network in a dtype of ``itemsize`` bytes and the other parts in float32.

    Of a text-to-image model it is with guidance, which runs two rows an image.
    """
    rows = 2 * batch if model.takes_text else batch
    others = model.latents.parameters * 4 if model.latents is not None else 0
    running = max(rows * activation_bytes(model, itemsize), decoding_bytes(model))
    return model.parameters * itemsize + others + running
