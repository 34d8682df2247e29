"""Checkpoints of the original DDIM and DDPM code: their config, their layout, their names.

The network class of ermongroup/ddim (and, converted, of hojonathanho/diffusion) computes what a
UNet2DModel of one configuration computes, under other names. Training checkpoints (``ckpt.pth``)
are a list of model, optimizer, epoch, step and, where EMA was on, the EMA's weights; converted ones
(``model-790000.ckpt``) a plain state dict.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml
from torch import Tensor

from ddim_cli.errors import ModelError
from ddim_cli.models.weights import read_pickle, state_dict_of

_NAMESPACE = "tag:yaml.org,2002:python/object:argparse.Namespace"

# Prefixes that only the named code gives its tensors: a refusal can say whose checkpoint it is.
_FOREIGN = (
    ("input_blocks.", "guided-diffusion or improved-diffusion", "its network is another class"),
    ("model.diffusion_model.", "latent diffusion or Stable Diffusion", "it works on latents, not on pixels"),
    ("inner_model.", "k-diffusion", "its network is another class"),
    ("denoise_fn.", "denoising-diffusion-pytorch", "its network is another class"),
    ("all_modules.", "score_sde", "its network is another class"),
    ("model.map_noise.", "edm", "its network is another class"),
)


class _ConfigLoader(yaml.SafeLoader):
    """YAML's safe types, and argparse.Namespace as a mapping: what the original training run writes. No other tag."""


# Of a node that is no mapping, construct_mapping says so itself.
_ConfigLoader.add_constructor(_NAMESPACE, lambda loader, node: loader.construct_mapping(node, deep=True))  # type: ignore[arg-type]


def read_config(path: Path) -> dict[str, Any]:
    """The original code's config.yml. Raises ModelError for what is no such file, or has other Python tags."""
    try:
        config = yaml.load(path.read_bytes(), Loader=_ConfigLoader)
    except (OSError, UnicodeDecodeError, yaml.YAMLError, RecursionError, ValueError) as error:
        text = " ".join(str(error).split())
        raise ModelError(f"{path}: not a config of the original code: {text[:300]}") from None
    if not isinstance(config, dict) or not all(isinstance(config.get(k), dict) for k in ("model", "data", "diffusion")):
        raise ModelError(f"{path}: not a config of the original code: it has no model, data and diffusion")
    return config


def network_from_config(config: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """The UNet2DModel config of a config.yml. Raises ModelError for settings a UNet2DModel does not have."""
    model, data = config["model"], config["data"]
    try:
        if not model.get("resamp_with_conv", True):
            raise ModelError(f"{path}: resamp_with_conv is false, which a UNet2DModel does not have")
        if data.get("logit_transform"):
            raise ModelError(f"{path}: logit_transform is on: the network's images are not pixels")
        size, multipliers = data["image_size"], list(model["ch_mult"])
        resolutions = {size // 2**i for i in range(len(multipliers))} & set(model["attn_resolutions"])
        return unet_config(
            channels=model["ch"],
            multipliers=multipliers,
            layers=model["num_res_blocks"],
            attention={i for i in range(len(multipliers)) if size // 2**i in resolutions},
            in_channels=model["in_channels"],
            out_channels=model["out_ch"],
            size=size,
            dropout=float(model.get("dropout", 0.0)),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise ModelError(f"{path}: not a config of the original code: {error!r}") from None


def network_from_shapes(shapes: Mapping[str, tuple[int, ...]], size: int | None, path: Path) -> dict[str, Any]:
    """The UNet2DModel config that these tensors fit. Raises ModelError where ``size`` is needed and None."""
    if size is None:
        raise ModelError(
            f"{path}: there is no config.yml beside it, and weights do not tell the size of an image; give --image-size"
        )
    try:
        channels, in_channels = shapes["conv_in.weight"][:2]
        levels = 1 + max(int(m[1]) for m in _matches(r"down\.(\d+)\.block", shapes))
        layers = 1 + max(int(m[1]) for m in _matches(r"down\.0\.block\.(\d+)\.", shapes))
        widths = [shapes[f"down.{i}.block.0.conv1.weight"][0] for i in range(levels)]
        return unet_config(
            channels=channels,
            multipliers=[width // channels for width in widths],
            layers=layers,
            attention={int(m[1]) for m in _matches(r"down\.(\d+)\.attn\.", shapes)},
            in_channels=in_channels,
            out_channels=shapes["conv_out.weight"][0],
            size=size,
        )
    except (KeyError, ValueError, IndexError):
        raise ModelError(f"{path}: its tensors are not those of the original DDIM network") from None


def _matches(pattern: str, names: Iterable[str]) -> Iterable[re.Match]:
    return (m for m in (re.match(pattern, name) for name in names) if m)


def unet_config(
    *,
    channels: int,
    multipliers: list[int],
    layers: int,
    attention: set[int],
    in_channels: int,
    out_channels: int,
    size: int,
    dropout: float = 0.0,
) -> dict[str, Any]:
    """The one configuration of UNet2DModel that computes what the original network does.

    ``attention`` are the levels, 0 the finest, that have attention.
    """
    levels = len(multipliers)
    return {
        "_class_name": "UNet2DModel",
        "sample_size": size,
        "in_channels": in_channels,
        "out_channels": out_channels,
        "block_out_channels": [channels * m for m in multipliers],
        "down_block_types": ["AttnDownBlock2D" if i in attention else "DownBlock2D" for i in range(levels)],
        "up_block_types": ["AttnUpBlock2D" if i in attention else "UpBlock2D" for i in reversed(range(levels))],
        "layers_per_block": layers,
        "attention_head_dim": None,
        "center_input_sample": False,
        "downsample_padding": 0,
        "dropout": dropout,
        "flip_sin_to_cos": False,
        "freq_shift": 1,
        "norm_eps": 1e-06,
        "norm_num_groups": 32,
        "act_fn": "silu",
        "time_embedding_type": "positional",
    }


def scheduler_from_config(config: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """The scheduler keys of a config.yml. Raises ModelError for a schedule that is not the original code's."""
    diffusion = config["diffusion"]
    try:
        total = int(diffusion["num_diffusion_timesteps"])
        start, end = float(diffusion["beta_start"]), float(diffusion["beta_end"])
        kind = diffusion["beta_schedule"]
    except (KeyError, TypeError, ValueError) as error:
        raise ModelError(f"{path}: not a config of the original code: {error!r}") from None
    keys: dict[str, Any] = {"num_train_timesteps": total, "beta_start": start, "beta_end": end}
    names = {"linear": "linear", "quad": "scaled_linear", "sigmoid": "sigmoid"}
    if kind in names:
        return {**keys, "beta_schedule": names[kind]}
    if kind == "const":
        return {**keys, "trained_betas": [end] * total}
    if kind == "jsd":
        return {**keys, "trained_betas": [1 / (total - i) for i in range(total)]}
    raise ModelError(f"{path}: beta_schedule {kind!r} is not one of linear, quad, sigmoid, const, jsd")


def read_checkpoint(path: Path, ema: bool) -> dict[str, Tensor]:
    """The network's weights of a checkpoint, without the prefix ``module.``.

    Of a training checkpoint the EMA's weights, or the raw ones where ``ema`` is false.

    Raises:
        ModelError: for a file that is not such a checkpoint, naming what it is where that can be told.
    """
    checkpoint = read_pickle(path)
    if isinstance(checkpoint, (list, tuple)):
        if len(checkpoint) not in (4, 5):
            raise ModelError(
                f"{path}: a list of {len(checkpoint)}; the original training checkpoints hold 4 or 5 entries"
            )
        if ema and len(checkpoint) == 4:
            raise ModelError(f"{path}: it has no EMA weights; take the raw ones with --set model.ema=false")
        checkpoint = checkpoint[4] if ema else checkpoint[0]
    elif isinstance(checkpoint, Mapping) and not ema and isinstance(checkpoint.get("conv_in.weight"), Tensor):
        raise ModelError(f"{path}: it holds one set of weights; model.ema = false is for training checkpoints")
    weights = state_dict_of(path, checkpoint)
    weights = {name.removeprefix("module."): tensor for name, tensor in weights.items()}
    refuse_foreign(path, weights)
    return weights


def refuse_foreign(path: Path, names: Iterable[str]) -> None:
    """Raise ModelError, by name, for the weights of a network that this tool cannot build."""
    for prefix, whose, why in _FOREIGN:
        if any(name.startswith(prefix) for name in names):
            raise ModelError(f"{path}: a checkpoint of {whose}, which cannot be loaded: {why}")


_RULES = (
    (r"temb\.dense\.0\.", "time_embedding.linear_1."),
    (r"temb\.dense\.1\.", "time_embedding.linear_2."),
    (r"norm_out\.", "conv_norm_out."),
    (r"down\.(\d+)\.block\.(\d+)\.", r"down_blocks.\1.resnets.\2."),
    (r"down\.(\d+)\.attn\.(\d+)\.", r"down_blocks.\1.attentions.\2."),
    (r"down\.(\d+)\.downsample\.conv\.", r"down_blocks.\1.downsamplers.0.conv."),
    (r"up\.(\d+)\.block\.(\d+)\.", r"up_blocks.\1.resnets.\2."),
    (r"up\.(\d+)\.attn\.(\d+)\.", r"up_blocks.\1.attentions.\2."),
    (r"up\.(\d+)\.upsample\.conv\.", r"up_blocks.\1.upsamplers.0.conv."),
    (r"mid\.block_1\.", "mid_block.resnets.0."),
    (r"mid\.block_2\.", "mid_block.resnets.1."),
    (r"mid\.attn_1\.", "mid_block.attentions.0."),
)
_IN_RESNET = (("temb_proj.", "time_emb_proj."), ("nin_shortcut.", "conv_shortcut."))
_IN_ATTENTION = (
    ("norm.", "group_norm."),
    ("q.", "to_q."),
    ("k.", "to_k."),
    ("v.", "to_v."),
    ("proj_out.", "to_out.0."),
)


def diffusers_name(name: str, levels: int) -> str:
    """A tensor's name in a UNet2DModel of ``levels`` levels; the original counts up-blocks from the finest."""
    for pattern, replacement in _RULES:
        renamed, count = re.subn(f"^{pattern}", replacement, name)
        if not count:
            continue
        if renamed.startswith("up_blocks."):
            _, level, rest = renamed.split(".", 2)
            renamed = f"up_blocks.{levels - 1 - int(level)}.{rest}"
        parts = _IN_RESNET if ".resnets." in renamed else _IN_ATTENTION if ".attentions." in renamed else ()
        head, dot, tail = renamed.rpartition(".")
        base, _, last = head.rpartition(".")
        for old, new in parts:
            if f"{last}." == old:
                return f"{base}.{new}{tail}"
        return f"{head}{dot}{tail}"
    return name


def to_diffusers(weights: Mapping[str, Tensor], levels: int) -> dict[str, Tensor]:
    """Rename all, and make the 1x1 convolutions of attention the linear maps they are."""
    renamed = {}
    for name, tensor in weights.items():
        new = diffusers_name(name, levels)
        if ".attentions." in new and new.endswith(".weight") and tensor.ndim == 4:
            tensor = tensor[:, :, 0, 0]
        renamed[new] = tensor
    return renamed
