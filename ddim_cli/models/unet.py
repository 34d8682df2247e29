"""The UNet of DDPM (Ho et al., arXiv:2006.11239, appendix B), built to be sampled from.

It has the parameters of diffusers' UNet2DModel under the same names, and computes the same function. What
it does differently is for speed:

- What depends on the timestep and class alone is apart (`UNet.project`), so that a run computes it once
  for its whole grid; in float32, whatever the dtype of the rest.
- Activations are channels-last, so that convolutions need no change of layout, and attention none either.
- Norm outputs are activated and residuals added in place; queries, keys and values are one product.
- It imports torch alone: diffusers takes longer to import than a small model to sample.

`supports` says for which configs; the rare others (skip blocks, Fourier time embeddings) are diffusers' own.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from torch import Tensor, nn

from ddim_cli.models.blocks import (
    ACTIVATIONS,
    Attention,
    Backbone,
    LevelKind,
    PackedConv2d,
    TimeEmbedding,
    is_of_embedding,
    pack_convolutions,
    sinusoid,
)

__all__ = ["DEFAULTS", "Attention", "PackedConv2d", "UNet", "is_of_embedding", "pack_convolutions", "supports"]

# What diffusers takes where a config leaves these out.
DEFAULTS: dict[str, Any] = {
    "in_channels": 3,
    "out_channels": 3,
    "center_input_sample": False,
    "time_embedding_type": "positional",
    "time_embedding_dim": None,
    "freq_shift": 0,
    "flip_sin_to_cos": True,
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"),
    "mid_block_type": "UNetMidBlock2D",
    "up_block_types": ("AttnUpBlock2D", "AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
    "block_out_channels": (224, 448, 672, 896),
    "layers_per_block": 2,
    "mid_block_scale_factor": 1,
    "downsample_padding": 1,
    "downsample_type": "conv",
    "upsample_type": "conv",
    "act_fn": "silu",
    "attention_head_dim": 8,
    "norm_num_groups": 32,
    "attn_norm_num_groups": None,
    "norm_eps": 1e-5,
    "resnet_time_scale_shift": "default",
    "add_attention": True,
    "class_embed_type": None,
    "num_class_embeds": None,
    "num_train_timesteps": None,
}
# Block type -> (has attention, changes size by a residual block instead of a plain convolution).
DOWN_BLOCKS = {
    "DownBlock2D": (False, False),
    "AttnDownBlock2D": (True, False),
    "ResnetDownsampleBlock2D": (False, True),
}
UP_BLOCKS = {"UpBlock2D": (False, False), "AttnUpBlock2D": (True, False), "ResnetUpsampleBlock2D": (False, True)}


def _kind(block: str) -> str:
    # An old prefix that diffusers drops too.
    return block.removeprefix("UNetRes")


def supports(config: Mapping[str, Any]) -> bool:
    """Whether `UNet` computes what diffusers' UNet2DModel of this config does."""
    c = {**DEFAULTS, **config}
    try:
        widths, head, groups = list(c["block_out_channels"]), c["attention_head_dim"], c["norm_num_groups"]
        blocks = [*c["down_block_types"], *reversed(c["up_block_types"])]
        attending = [n for n, block in zip([*widths, *widths], blocks, strict=True) if "Attn" in block]
        if c["mid_block_type"] is not None and c["add_attention"]:
            attending.append(widths[-1])
        whole = [c["in_channels"], c["out_channels"], c["layers_per_block"], groups, *widths]
        return (
            all(type(n) is int and n > 0 for n in whole)
            and len(widths) == len(c["down_block_types"]) == len(c["up_block_types"])
            and all(_kind(b) in DOWN_BLOCKS for b in c["down_block_types"])
            and all(_kind(b) in UP_BLOCKS for b in c["up_block_types"])
            and c["mid_block_type"] in (None, "UNetMidBlock2D")
            and c["time_embedding_type"] in ("positional", "learned")
            and c["class_embed_type"] is None
            and c["resnet_time_scale_shift"] in ("default", "scale_shift")
            and str(c["act_fn"]).lower() in ACTIVATIONS
            and c["downsample_type"] in ("conv", "resnet")
            and c["upsample_type"] in ("conv", "resnet")
            and c["downsample_padding"] in (0, 1)
            and all(n % groups == 0 for n in widths)
            and (head is None or (type(head) is int and head > 0 and all(n % head == 0 for n in attending)))
        )
    except (TypeError, KeyError, ValueError):
        return False


class UNet(Backbone):
    """(x [B, C, H, W], timesteps [B], classes int64 [B] where it is conditional) -> prediction [B, C', H, W].

    ``forward`` is ``body(x, project(timesteps, classes))``. Args of the constructor: a UNet2DModel config that
    `supports` accepts.
    """

    def __init__(self, config: Mapping[str, Any]):
        c = {**DEFAULTS, **config}
        widths, norm_groups = list(c["block_out_channels"]), c["norm_num_groups"]
        dim = c["time_embedding_dim"] or widths[0] * 4

        def attention(width: int, groups: int | None = norm_groups, divisor: float = 1) -> Attention:
            return Attention(width, c["attention_head_dim"] or width, groups, c["norm_eps"], divisor)

        def kind(width: int, attends: bool, by_resnet: bool, resize_type: str) -> LevelKind:
            by_resnet |= attends and resize_type == "resnet"
            return LevelKind(partial(attention, width) if attends else None, by_resnet)

        down = [
            kind(width, *DOWN_BLOCKS[_kind(block)], c["downsample_type"])
            for block, width in zip(c["down_block_types"], widths, strict=True)
        ]
        up = [
            kind(width, *UP_BLOCKS[_kind(block)], c["upsample_type"])
            for block, width in zip(c["up_block_types"], reversed(widths), strict=True)
        ]
        middle: list[Attention] | None = None
        if c["mid_block_type"] is not None:
            groups = c["attn_norm_num_groups"]
            if groups is None and c["resnet_time_scale_shift"] == "default":
                groups = norm_groups
            middle = [attention(widths[-1], groups, c["mid_block_scale_factor"])] if c["add_attention"] else []
        super().__init__(c, [c["layers_per_block"]] * len(widths), dim, down, up, middle)
        self.time_proj: nn.Embedding | None = None
        if c["time_embedding_type"] == "learned":
            self.time_proj = nn.Embedding(c["num_train_timesteps"], widths[0])
        else:
            self._sinusoid = (widths[0], c["flip_sin_to_cos"], c["freq_shift"])
        self.time_embedding = TimeEmbedding(widths[0], dim)
        self.class_embedding = nn.Embedding(c["num_class_embeds"], dim) if c["num_class_embeds"] is not None else None

    def fuse(self) -> UNet:
        """Ready to sample: the products of one input are one, and the layout is channels-last.

        The state dict is another then.
        """
        self._fuse_products()
        return self

    def project(self, timesteps: Tensor, classes: Tensor | None = None) -> Tensor:
        """What the residual blocks take of timesteps [N] and classes [N]: float32 [N, P], one part a block."""
        embedded = self.time_proj(timesteps) if self.time_proj is not None else sinusoid(timesteps, *self._sinusoid)
        hidden = self.time_embedding(embedded.to(self.time_embedding.linear_1.weight.dtype))
        if self.class_embedding is not None:
            hidden = hidden + self.class_embedding(classes)
        return self._project(hidden)

    def body(self, x: Tensor, projections: Tensor) -> Tensor:
        """The prediction at x [B, C, H, W] for projections [B, P], or [1, P] where all rows share them."""
        return self._predict(x, projections)

    def forward(self, x: Tensor, timesteps: Tensor, classes: Tensor | None = None) -> Tensor:
        return self.body(x, self.project(timesteps, classes))
