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

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

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
ACTIVATIONS = {"silu": F.silu, "swish": F.silu, "mish": F.mish, "relu": F.relu}
# These see the timestep and class alone: float32 costs nothing there.
EMBEDDING = ("time_proj.", "time_embedding.", "class_embedding.")
EMBEDDING_END = (".time_emb_proj.weight", ".time_emb_proj.bias")


def is_of_embedding(name: str) -> bool:
    """Whether a parameter belongs to `UNet.project`."""
    return name.startswith(EMBEDDING) or name.endswith(EMBEDDING_END)


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


def sinusoid(timesteps: Tensor, width: int, flip_sin_to_cos: bool, freq_shift: float) -> Tensor:
    """The positional embedding of timesteps, [N] -> float32 [N, width] (DDPM, appendix B)."""
    half = width // 2
    exponent = -math.log(10_000) * torch.arange(half, dtype=torch.float32, device=timesteps.device)
    angles = timesteps[:, None].float() * torch.exp(exponent / (half - freq_shift))
    parts = [angles.cos(), angles.sin()] if flip_sin_to_cos else [angles.sin(), angles.cos()]
    return F.pad(torch.cat(parts, dim=1), (0, width % 2))


class PackedConv2d(nn.Module):
    """A convolution on the CPU whose weights lie as oneDNN wants them, which else it arranges anew in every call.

    They are arranged in the first call, for the shape that it sees, and again where the shape changes.
    """

    def __init__(self, conv: nn.Conv2d):
        super().__init__()
        self.weight, self.bias = conv.weight, conv.bias
        self._geometry = (conv.padding, conv.stride, conv.dilation, conv.groups)
        self._shape: torch.Size | None = None

    def _pack(self, shape: torch.Size) -> None:
        weight = self.weight.to_dense() if self.weight.is_mkldnn else self.weight
        packed = torch.ops.mkldnn._reorder_convolution_weight(weight, *self._geometry, shape)
        self.weight, self._shape = nn.Parameter(packed, requires_grad=False), shape

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """The convolution of x, with ``residual`` added while the result is written."""
        if x.shape != self._shape:
            self._pack(x.shape)
        pointwise = torch.ops.mkldnn._convolution_pointwise
        if residual is None:
            return pointwise(x, self.weight, self.bias, *self._geometry, "none", [], "")
        return pointwise.binary(x, residual, self.weight, self.bias, *self._geometry, "add", None, None, [], None)


def can_pack(conv: nn.Conv2d) -> bool:
    """Whether `PackedConv2d` works here: on a CPU with oneDNN, in a dtype that its packed convolutions take."""
    return (
        conv.weight.device.type == "cpu"
        and conv.weight.dtype in (torch.float32, torch.bfloat16)
        and torch.backends.mkldnn.is_available()
        and hasattr(torch.ops.mkldnn, "_reorder_convolution_weight")
        and (conv.weight.dtype == torch.float32 or torch.ops.mkldnn._is_mkldnn_bf16_supported())
    )


def pack_convolutions(module: nn.Module) -> None:
    """Replace every convolution within ``module`` by a packed one, where that is possible."""
    for name, child in list(module.named_children()):
        if isinstance(child, nn.Conv2d):
            if can_pack(child):
                setattr(module, name, PackedConv2d(child))
        else:
            pack_convolutions(child)


def convolve_and_add(conv: nn.Module, x: Tensor, residual: Tensor) -> Tensor:
    return conv(x, residual) if isinstance(conv, PackedConv2d) else conv(x).add_(residual)


class TimeEmbedding(nn.Module):
    """Two linear layers with SiLU between them: [N, width] -> [N, dim]."""

    def __init__(self, width: int, dim: int):
        super().__init__()
        self.linear_1, self.linear_2 = nn.Linear(width, dim), nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear_2(F.silu(self.linear_1(x)))


class Resnet(nn.Module):
    """A residual block: norm, activation, convolution, twice, with the timestep between; `resize` "up" or "down" first.

    Of the projections of all blocks, [1 or B, P], it takes its own ``part``: one number a channel, or two for scale and
    shift.
    """

    part = slice(None)

    def __init__(self, c: Mapping[str, Any], inner: int, outer: int, dim: int, resize: str = "", divisor: float = 1):
        super().__init__()
        groups, eps = c["norm_num_groups"], c["norm_eps"]
        self.scale_shift = c["resnet_time_scale_shift"] == "scale_shift"
        self.norm1, self.conv1 = nn.GroupNorm(groups, inner, eps), nn.Conv2d(inner, outer, 3, padding=1)
        self.time_emb_proj = nn.Linear(dim, outer * (2 if self.scale_shift else 1))
        self.norm2, self.conv2 = nn.GroupNorm(groups, outer, eps), nn.Conv2d(outer, outer, 3, padding=1)
        self.conv_shortcut = nn.Conv2d(inner, outer, 1) if inner != outer else None
        self.activation, self.resize, self.divisor = ACTIVATIONS[c["act_fn"].lower()], resize, divisor

    def forward(self, x: Tensor, projections: Tensor) -> Tensor:
        h = self.activation(self.norm1(x), inplace=True)
        if self.resize == "up":
            x, h = double(x), double(h)
        elif self.resize == "down":
            x, h = F.avg_pool2d(x, 2), F.avg_pool2d(h, 2)
        h = self.conv1(h)
        projection = projections[:, self.part, None, None]
        if self.scale_shift:
            scale, shift = projection.chunk(2, dim=1)
            h = self.norm2(h) * (1 + scale) + shift
        else:
            h = self.norm2(h.add_(projection))
        h = self.activation(h, inplace=True)
        h = convolve_and_add(self.conv2, h, x if self.conv_shortcut is None else self.conv_shortcut(x))
        return h if self.divisor == 1 else h / self.divisor


class Attention(nn.Module):
    """Self-attention over the pixels, with a residual."""

    def __init__(self, width: int, head: int, groups: int | None, eps: float, divisor: float = 1):
        super().__init__()
        self.heads, self.divisor = width // head, divisor
        self.group_norm = nn.GroupNorm(groups, width, eps) if groups else None
        self.to_q, self.to_k, self.to_v = (nn.Linear(width, width) for _ in range(3))
        self.to_out = nn.ModuleList([nn.Linear(width, width)])
        self.to_qkv: nn.Linear | None = None

    def fuse(self) -> None:
        parts = (self.to_q, self.to_k, self.to_v)
        self.to_qkv = _stacked(parts)
        del self.to_q, self.to_k, self.to_v

    def forward(self, x: Tensor) -> Tensor:
        batch, width, height, columns = x.shape
        h = x if self.group_norm is None else self.group_norm(x)
        # A view, if the tensor is channels-last.
        h = h.permute(0, 2, 3, 1).reshape(batch, height * columns, width)
        parts = (
            self.to_qkv(h).chunk(3, dim=2) if self.to_qkv is not None else (self.to_q(h), self.to_k(h), self.to_v(h))
        )
        q, k, v = (p.view(batch, -1, self.heads, width // self.heads).transpose(1, 2) for p in parts)
        h = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(batch, -1, width)
        h = self.to_out[0](h).view(batch, height, columns, width).permute(0, 3, 1, 2)
        h = h.add_(x)
        return h if self.divisor == 1 else h / self.divisor


class Downsample(nn.Module):
    """A convolution of stride 2; with ``padding`` 0 it is padded to the right and below, as in DDPM's code."""

    def __init__(self, width: int, padding: int):
        super().__init__()
        self.conv, self.padding = nn.Conv2d(width, width, 3, stride=2, padding=padding), padding

    def forward(self, x: Tensor, projections: Tensor) -> Tensor:
        return self.conv(x if self.padding else F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Every pixel four times, then a convolution."""

    def __init__(self, width: int):
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor, projections: Tensor) -> Tensor:
        return self.conv(double(x))


def double(x: Tensor) -> Tensor:
    return F.interpolate(x, scale_factor=2.0, mode="nearest")


def _stacked(layers: Sequence[nn.Linear]) -> nn.Linear:
    """Linear layers of one input as one, their outputs one after the other."""
    weights, biases = torch.cat([m.weight for m in layers]), torch.cat([m.bias for m in layers])
    fused = nn.Linear(weights.shape[1], weights.shape[0], device="meta")
    fused.weight, fused.bias = (nn.Parameter(p, requires_grad=False) for p in (weights, biases))
    return fused


class Level(nn.Module):
    """The residual blocks of one resolution, each with attention behind it where ``attends``, and a resize at the end.

    ``inner`` are the input widths of the blocks. A resize is a residual block of its own where ``resizes_by_resnet``.
    """

    def __init__(
        self,
        c: Mapping[str, Any],
        inner: list[int],
        outer: int,
        dim: int,
        attends: bool,
        resize: str = "",
        resizes_by_resnet: bool = False,
    ):
        super().__init__()
        self.resnets = nn.ModuleList(Resnet(c, n, outer, dim) for n in inner)
        if attends:
            head, groups, eps = c["attention_head_dim"] or outer, c["norm_num_groups"], c["norm_eps"]
            self.attentions = nn.ModuleList(Attention(outer, head, groups, eps) for _ in inner)
        if not resize:
            return
        change: nn.Module
        if resizes_by_resnet:
            change = Resnet(c, outer, outer, dim, resize)
        else:
            change = Upsample(outer) if resize == "up" else Downsample(outer, c["downsample_padding"])
        setattr(self, f"{resize}samplers", nn.ModuleList([change]))

    def __len__(self) -> int:
        return len(self.resnets)

    def at(self, i: int, x: Tensor, projections: Tensor) -> Tensor:
        """Block ``i`` with its attention."""
        x = self.resnets[i](x, projections)
        return self.attentions[i](x) if hasattr(self, "attentions") else x

    def resizer(self) -> nn.Module | None:
        for name in ("downsamplers", "upsamplers"):
            if hasattr(self, name):
                return getattr(self, name)[0]
        return None


class Middle(nn.Module):
    """Two residual blocks at the coarsest resolution, with attention between them where the config has it."""

    def __init__(self, c: Mapping[str, Any], width: int, dim: int):
        super().__init__()
        divisor = c["mid_block_scale_factor"]
        groups = c["attn_norm_num_groups"]
        if groups is None and c["resnet_time_scale_shift"] == "default":
            groups = c["norm_num_groups"]
        self.resnets = nn.ModuleList(Resnet(c, width, width, dim, divisor=divisor) for _ in range(2))
        head = c["attention_head_dim"] or width
        attentions = [Attention(width, head, groups, c["norm_eps"], divisor)] if c["add_attention"] else []
        self.attentions = nn.ModuleList(attentions)

    def forward(self, x: Tensor, projections: Tensor) -> Tensor:
        first, second = self.resnets
        x = first(x, projections)
        for attention in self.attentions:
            x = attention(x)
        return second(x, projections)


class UNet(nn.Module):
    """(x [B, C, H, W], timesteps [B], classes int64 [B] where it is conditional) -> prediction [B, C', H, W].

    ``forward`` is ``body(x, project(timesteps, classes))``. Args of the constructor: a UNet2DModel config that
    `supports` accepts.
    """

    def __init__(self, config: Mapping[str, Any]):
        super().__init__()
        c = {**DEFAULTS, **config}
        widths, layers = list(c["block_out_channels"]), c["layers_per_block"]
        dim = c["time_embedding_dim"] or widths[0] * 4
        self.centers = c["center_input_sample"]
        self.time_proj: nn.Embedding | None = None
        self.conv_in = nn.Conv2d(c["in_channels"], widths[0], 3, padding=1)
        if c["time_embedding_type"] == "learned":
            self.time_proj = nn.Embedding(c["num_train_timesteps"], widths[0])
        else:
            self._sinusoid = (widths[0], c["flip_sin_to_cos"], c["freq_shift"])
        self.time_embedding = TimeEmbedding(widths[0], dim)
        self.class_embedding = nn.Embedding(c["num_class_embeds"], dim) if c["num_class_embeds"] is not None else None

        downward, upward = list[Level](), list[Level]()
        skips = [widths[0]]
        for i, (block, width) in enumerate(zip(c["down_block_types"], widths, strict=True)):
            attends, by_resnet = DOWN_BLOCKS[_kind(block)]
            last = i == len(widths) - 1
            by_resnet |= attends and c["downsample_type"] == "resnet"
            inner = [skips[-1], *[width] * (layers - 1)]
            downward.append(Level(c, inner, width, dim, attends, "" if last else "down", by_resnet))
            skips += [width] * (layers if last else layers + 1)
        self.mid_block = Middle(c, widths[-1], dim) if c["mid_block_type"] is not None else None
        above = widths[-1]
        for i, (block, width) in enumerate(zip(c["up_block_types"], reversed(widths), strict=True)):
            attends, by_resnet = UP_BLOCKS[_kind(block)]
            last = i == len(widths) - 1
            by_resnet |= attends and c["upsample_type"] == "resnet"
            inner = [n + skips.pop() for n in [above, *[width] * layers]]
            upward.append(Level(c, inner, width, dim, attends, "" if last else "up", by_resnet))
            above = width
        self.down_blocks, self.up_blocks = nn.ModuleList(downward), nn.ModuleList(upward)
        self.conv_norm_out = nn.GroupNorm(c["norm_num_groups"], widths[0], c["norm_eps"])
        self.conv_out = nn.Conv2d(widths[0], c["out_channels"], 3, padding=1)

        self._activation = ACTIVATIONS[c["act_fn"].lower()]
        self.projection: nn.Linear | None = None
        start = 0
        for resnet in self._resnets():
            stop = start + resnet.time_emb_proj.out_features
            resnet.part, start = slice(start, stop), stop

    def _resnets(self) -> list[Resnet]:
        return [m for m in self.modules() if isinstance(m, Resnet)]

    def fuse_projection(self) -> UNet:
        """Make what all residual blocks take of the embedding one product. The state dict is another then."""
        self.projection = _stacked([r.time_emb_proj for r in self._resnets()])
        for resnet in self._resnets():
            del resnet.time_emb_proj
        return self

    def fuse(self) -> UNet:
        """Ready to sample: the products of one input are one, and the layout is channels-last."""
        for module in list(self.modules()):
            if isinstance(module, Attention):
                module.fuse()
        return self.fuse_projection().to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch knows no such overload

    def project(self, timesteps: Tensor, classes: Tensor | None = None) -> Tensor:
        """What the residual blocks take of timesteps [N] and classes [N]: float32 [N, P], one part a block."""
        embedded = self.time_proj(timesteps) if self.time_proj is not None else sinusoid(timesteps, *self._sinusoid)
        hidden = self.time_embedding(embedded.to(self.time_embedding.linear_1.weight.dtype))
        if self.class_embedding is not None:
            hidden = hidden + self.class_embedding(classes)
        hidden = self._activation(hidden)
        if self.projection is not None:
            return self.projection(hidden)
        return torch.cat([r.time_emb_proj(hidden) for r in self._resnets()], dim=1)

    def body(self, x: Tensor, projections: Tensor) -> Tensor:
        """The prediction at x [B, C, H, W] for projections [B, P], or [1, P] where all rows share them."""
        p = projections.to(x.dtype)
        x = x.contiguous(memory_format=torch.channels_last)
        h = self.conv_in(2 * x - 1 if self.centers else x)
        skips = [h]
        for level in cast("Iterable[Level]", self.down_blocks):
            for i in range(len(level)):
                h = level.at(i, h, p)
                skips.append(h)
            if (resize := level.resizer()) is not None:
                h = resize(h, p)
                skips.append(h)
        if self.mid_block is not None:
            h = self.mid_block(h, p)
        for level in cast("Iterable[Level]", self.up_blocks):
            for i in range(len(level)):
                h = level.at(i, torch.cat([h, skips.pop()], dim=1), p)
            if (resize := level.resizer()) is not None:
                h = resize(h, p)
        return self.conv_out(F.silu(self.conv_norm_out(h), inplace=True))

    def forward(self, x: Tensor, timesteps: Tensor, classes: Tensor | None = None) -> Tensor:
        return self.body(x, self.project(timesteps, classes))
