"""What the UNets here are built of: residual blocks, attention over the pixels, levels, and packed convolutions."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ACTIVATIONS = {"silu": F.silu, "swish": F.silu, "mish": F.mish, "relu": F.relu}
# These see the timestep and class alone: float32 costs nothing there.
EMBEDDING = ("time_proj.", "time_embedding.", "class_embedding.")
EMBEDDING_END = (".time_emb_proj.weight", ".time_emb_proj.bias")


def is_of_embedding(name: str) -> bool:
    """Whether a parameter belongs to `UNet.project`."""
    return name.startswith(EMBEDDING) or name.endswith(EMBEDDING_END)


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
        self.to_qkv = stacked(parts)
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


def stacked(layers: Sequence[nn.Linear]) -> nn.Linear:
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
