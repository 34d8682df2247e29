"""The UNet of latent diffusion (Rombach et al., arXiv:2112.10752, section 3.3), built to be sampled from.

As `unet` is for diffusers' UNet2DModel, this is for its UNet2DConditionModel: the same parameters under the same
names, the same function, and of the same building blocks. Behind its residual blocks are transformers: self-attention
over the pixels, cross-attention to a text, and a gated feed-forward layer. What depends on the text alone, the keys and
values of all cross-attentions, is apart (`ConditionalUNet.attend`): it is computed once a prompt, not in every step.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ddim_cli.models.blocks import (
    ACTIVATIONS,
    Backbone,
    LevelKind,
    SelfAttention,
    TimeEmbedding,
    attend,
    is_of_embedding,
    linear_of,
    multiply_then,
    pack_convolutions,
    pixels_to_tokens,
    repeat_rows,
    sinusoid,
    stacked,
    tokens_to_pixels,
)

__all__ = ["DEFAULTS", "ConditionalUNet", "is_of_embedding", "pack_convolutions", "supports"]

# What diffusers takes where a config leaves these out.
DEFAULTS: dict[str, Any] = {
    "in_channels": 4,
    "out_channels": 4,
    "center_input_sample": False,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
    "mid_block_type": "UNetMidBlock2DCrossAttn",
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    "block_out_channels": (320, 640, 1280, 1280),
    "layers_per_block": 2,
    "downsample_padding": 1,
    "mid_block_scale_factor": 1,
    "act_fn": "silu",
    "norm_num_groups": 32,
    "norm_eps": 1e-5,
    "cross_attention_dim": 1280,
    "transformer_layers_per_block": 1,
    "attention_head_dim": 8,
    "num_attention_heads": None,
    "use_linear_projection": False,
    "resnet_time_scale_shift": "default",
    "time_embedding_dim": None,
}
# Of no meaning when sampling with the blocks that are supported.
_IGNORED = {"sample_size", "dropout", "upcast_attention", "addition_embed_type_num_heads"}
# Supported as they are by default only. Whatever else a config has is so too, where it is None or False.
_FIXED: dict[str, tuple[Any, ...]] = {
    "time_embedding_type": ("positional",),
    "attention_type": ("default",),
    "conv_in_kernel": (3,),
    "conv_out_kernel": (3,),
    "resnet_out_scale_factor": (1,),
}
# Block type -> whether it has transformers.
DOWN_BLOCKS = {"DownBlock2D": False, "CrossAttnDownBlock2D": True}
UP_BLOCKS = {"UpBlock2D": False, "CrossAttnUpBlock2D": True}


def _each(value: Any, levels: int) -> list[Any]:
    """A setting of every level, which a config may give once for all. ValueError for another number of them."""
    values = list(value) if isinstance(value, Sequence) and not isinstance(value, str) else [value] * levels
    if len(values) != levels:
        raise ValueError(f"{len(values)} values for {levels} levels")
    return values


def _count(value: Any) -> bool:
    return type(value) is int and value > 0


def supports(config: Mapping[str, Any]) -> bool:
    """Whether `ConditionalUNet` computes what diffusers' UNet2DConditionModel of this config does.

    A key that is not known is refused, unless it is None or False: it may change the function.
    """
    given = {k: v for k, v in config.items() if not k.startswith("_") and k not in _IGNORED}
    if not all(v in _FIXED.get(k, (None, False)) for k, v in given.items() if k not in DEFAULTS):
        return False
    c = {**DEFAULTS, **given}
    try:
        widths = list(c["block_out_channels"])
        levels, groups = len(widths), c["norm_num_groups"]
        heads = _each(c["num_attention_heads"] or c["attention_head_dim"], levels)
        layers, depths = (_each(c[k], levels) for k in ("layers_per_block", "transformer_layers_per_block"))
        texts = _each(c["cross_attention_dim"], levels)
        attending = [
            i
            for i, (down, up) in enumerate(zip(c["down_block_types"], reversed(c["up_block_types"]), strict=True))
            if DOWN_BLOCKS[down] or UP_BLOCKS[up]
        ]
        if c["mid_block_type"] is not None:
            attending.append(levels - 1)
        counts = [c["in_channels"], c["out_channels"], groups, *widths, *layers, *heads, *depths, *texts]
        return (
            all(map(_count, counts))
            and levels == len(c["down_block_types"])
            and c["mid_block_type"] in (None, "UNetMidBlock2DCrossAttn")
            and c["resnet_time_scale_shift"] in ("default", "scale_shift")
            and (c["time_embedding_dim"] is None or _count(c["time_embedding_dim"]))
            and str(c["act_fn"]).lower() in ACTIVATIONS
            and c["downsample_padding"] in (0, 1)
            and all(n % groups == 0 for n in widths)
            and all(widths[i] % heads[i] == 0 for i in attending)
            # All are given the same text.
            and len({texts[i] for i in attending}) == 1
        )
    except (TypeError, KeyError, ValueError):
        return False


class CrossAttention(nn.Module):
    """Attention of tokens [B, L, C] to a text; of the keys and values of all blocks it takes its own ``part``."""

    part = slice(None)

    def __init__(self, width: int, heads: int, text: int):
        super().__init__()
        self.width, self.heads = width, heads
        self.to_q = nn.Linear(width, width, bias=False)
        self.to_k, self.to_v = (nn.Linear(text, width, bias=False) for _ in range(2))
        self.to_out = nn.ModuleList([nn.Linear(width, width)])

    def mix(self, h: Tensor, keys_values: Tensor) -> Tensor:
        """Attention without the product behind it."""
        k, v = keys_values[:, :, self.part].chunk(2, dim=2)
        return attend(self.to_q(h), k, v, self.heads)


class GatedProjection(nn.Module):
    """Half of a product, times the other half through GELU (GEGLU; Shazeer, arXiv:2002.05202)."""

    def __init__(self, width: int, inner: int):
        super().__init__()
        self.proj: nn.Linear | None = nn.Linear(width, 2 * inner)
        self.linear: nn.Module
        self.gate: nn.Module

    def fuse(self) -> None:
        """Make it two products, so that each is whole in memory and what follows it is done as it is written."""
        if self.proj is None:
            return
        self.linear, self.gate = (
            linear_of(weight, bias)
            for weight, bias in zip(self.proj.weight.chunk(2), self.proj.bias.chunk(2), strict=True)
        )
        self.proj = None

    def forward(self, h: Tensor) -> Tensor:
        if self.proj is None:
            return multiply_then(self.linear, h, "mul", multiply_then(self.gate, h, "gelu"))
        h, gate = self.proj(h).chunk(2, dim=2)
        return F.gelu(gate).mul_(h)


class FeedForward(nn.Module):
    """Two layers on every token by itself, four times as wide between them, where it is gated."""

    def __init__(self, width: int):
        super().__init__()
        # The second one was for dropout in training.
        self.net = nn.ModuleList([GatedProjection(width, 4 * width), nn.Identity(), nn.Linear(4 * width, width)])

    def forward(self, h: Tensor, residual: Tensor) -> Tensor:
        return multiply_then(self.net[2], self.net[0](h), "add", residual)


class TransformerBlock(nn.Module):
    """Self-attention, cross-attention and feed-forward on tokens [B, L, C], each behind a norm and with a residual."""

    def __init__(self, width: int, heads: int, text: int):
        super().__init__()
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(width) for _ in range(3))
        self.attn1, self.attn2 = SelfAttention(width, heads, bias=False), CrossAttention(width, heads, text)
        self.ff = FeedForward(width)

    def forward(self, h: Tensor, keys_values: Tensor) -> Tensor:
        h = multiply_then(self.attn1.to_out[0], self.attn1.mix(self.norm1(h)), "add", h)
        h = repeat_rows(h, len(keys_values))
        h = multiply_then(self.attn2.to_out[0], self.attn2.mix(self.norm2(h), keys_values), "add", h)
        return self.ff(self.norm3(h), h)


class PointwiseConv2d(nn.Linear):
    """A linear layer whose weight has the shape of a 1x1 convolution's, which computes the same."""

    def __init__(self, width: int, outer: int):
        super().__init__(width, outer)
        self.weight = nn.Parameter(self.weight.detach()[:, :, None, None])

    def forward(self, h: Tensor) -> Tensor:
        return F.linear(h, self.weight.flatten(1), self.bias)


class Transformer(nn.Module):
    """``depth`` transformer blocks over the pixels [B, C, H, W], with a residual around them."""

    packs_linear = True

    def __init__(self, width: int, heads: int, text: int, groups: int, depth: int, linear: bool):
        super().__init__()
        projection = nn.Linear if linear else PointwiseConv2d
        # Not the epsilon of the config, nor that of the other norms.
        self.norm = nn.GroupNorm(groups, width, eps=1e-6)
        self.proj_in, self.proj_out = projection(width, width), projection(width, width)
        self.transformer_blocks = nn.ModuleList(TransformerBlock(width, heads, text) for _ in range(depth))

    def forward(self, x: Tensor, keys_values: Tensor) -> Tensor:
        h = self.proj_in(pixels_to_tokens(self.norm(x)))
        for block in self.transformer_blocks:
            h = block(h, keys_values)
        x = repeat_rows(x, len(h))
        return tokens_to_pixels(multiply_then(self.proj_out, h, "add", pixels_to_tokens(x)), x)


class ConditionalUNet(Backbone):
    """(x [B, C, H, W], timesteps [B], text [B, L, D]) -> prediction [B, C', H, W].

    ``forward`` is ``body(x, project(timesteps), attend(text))``.

    Args:
        config: of a UNet2DConditionModel, one that `supports` accepts. Keys that begin with _ are ignored. As diffusers
            has it, ``attention_head_dim`` is the number of heads, once or a level each.
    """

    def __init__(self, config: Mapping[str, Any]):
        c = {**DEFAULTS, **config}
        widths, groups = list(c["block_out_channels"]), c["norm_num_groups"]
        dim, levels = c["time_embedding_dim"] or widths[0] * 4, len(widths)
        heads = _each(c["num_attention_heads"] or c["attention_head_dim"], levels)
        depths, texts = (_each(c[k], levels) for k in ("transformer_layers_per_block", "cross_attention_dim"))

        def transformer(i: int) -> Transformer:
            return Transformer(widths[i], heads[i], texts[i], groups, depths[i], c["use_linear_projection"])

        def kind(i: int, attends: bool) -> LevelKind:
            return LevelKind(partial(transformer, i) if attends else None)

        down = [kind(i, DOWN_BLOCKS[block]) for i, block in enumerate(c["down_block_types"])]
        up = [kind(levels - 1 - i, UP_BLOCKS[block]) for i, block in enumerate(c["up_block_types"])]
        middle = [transformer(levels - 1)] if c["mid_block_type"] is not None else None
        super().__init__(c, _each(c["layers_per_block"], levels), dim, down, up, middle)
        self._last_activation = self._activation
        self._sinusoid = (widths[0], c["flip_sin_to_cos"], c["freq_shift"])
        self.time_embedding = TimeEmbedding(widths[0], dim, self._activation)
        self.text_projection: nn.Linear | None = None
        start = 0
        for attention in self._cross_attentions():
            stop = start + 2 * attention.width
            attention.part, start = slice(start, stop), stop

    def _cross_attentions(self) -> list[CrossAttention]:
        return [m for m in self.modules() if isinstance(m, CrossAttention)]

    def fuse(self) -> ConditionalUNet:
        """Ready to sample: the products of one input are one, and the layout is channels-last.

        The state dict is another then.
        """
        attentions = self._cross_attentions()
        self.text_projection = stacked([layer for a in attentions for layer in (a.to_k, a.to_v)])
        for attention in attentions:
            del attention.to_k, attention.to_v
        for module in list(self.modules()):
            if isinstance(module, GatedProjection):
                module.fuse()
        self._fuse_products()
        return self

    def project(self, timesteps: Tensor, classes: Tensor | None = None) -> Tensor:
        """What the residual blocks take of timesteps [N]: float32 [N, P], one part a block. It has no classes."""
        embedded = sinusoid(timesteps, *self._sinusoid)
        return self._project(self.time_embedding(embedded.to(self.time_embedding.linear_1.weight.dtype)))

    def attend(self, text: Tensor) -> Tensor:
        """Keys and values of a text [N, L, D] for every cross-attention: [N, L, K], one part a block."""
        if self.text_projection is not None:
            return self.text_projection(text)
        attentions = self._cross_attentions()
        return torch.cat([layer(text) for a in attentions for layer in (a.to_k, a.to_v)], dim=2)

    def body(self, x: Tensor, projections: Tensor, keys_values: Tensor) -> Tensor:
        """The prediction at x [B, C, H, W], [B, C', H, W].

        Several texts for one image, as guidance has them, need no copies of it: what comes before the first
        cross-attention is the same for all of them and computed once.

        Args:
            projections: of `project`, [B, P], or [1, P] where all rows share them.
            keys_values: of `attend`, [B, L, K]; or [n B, L, K], for the result of n times x, one after the other.
        """
        return self._predict(x, projections, keys_values)

    def forward(self, x: Tensor, timesteps: Tensor, text: Tensor) -> Tensor:
        return self.body(x, self.project(timesteps), self.attend(text))
