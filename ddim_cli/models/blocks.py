"""What the UNets here are built of: residual blocks, attention over the pixels, levels, and packed convolutions."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, cast

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


class PackedLinear(nn.Module):
    """A linear layer on the CPU, as `PackedConv2d` is a convolution: arranged for the number of rows that it sees."""

    def __init__(self, layer: nn.Linear):
        super().__init__()
        self.weight, self.bias, self.out_features = layer.weight, layer.bias, layer.out_features
        self._rows = 0

    def _pack(self, rows: int) -> None:
        weight = self.weight.to_dense() if self.weight.is_mkldnn else self.weight.flatten(1)
        packed = torch.ops.mkldnn._reorder_linear_weight(weight, rows)
        self.weight, self._rows = nn.Parameter(packed, requires_grad=False), rows

    def forward(self, x: Tensor, then: str = "", other: Tensor | None = None) -> Tensor:
        """The product with x, put through "gelu", or with ``other`` joined by "add" or "mul", as it is written."""
        rows = x.shape[:-1].numel()
        if rows != self._rows:
            self._pack(rows)
        pointwise = torch.ops.mkldnn._linear_pointwise
        if other is not None:
            return pointwise.binary(x, other, self.weight, self.bias, then)
        return pointwise(x, self.weight, self.bias, then or "none", [], "none" if then else "")


def can_pack(layer: nn.Conv2d | nn.Linear) -> bool:
    """Whether `PackedConv2d` and `PackedLinear` work here: on a CPU with oneDNN, in a dtype that these take."""
    return (
        layer.weight.device.type == "cpu"
        and layer.weight.dtype in (torch.float32, torch.bfloat16)
        and torch.backends.mkldnn.is_available()
        and hasattr(torch.ops.mkldnn, "_reorder_convolution_weight")
        and (layer.weight.dtype == torch.float32 or torch.ops.mkldnn._is_mkldnn_bf16_supported())
    )


def pack_convolutions(module: nn.Module, linear: bool = False) -> None:
    """Replace every convolution within ``module`` by a packed one, where that is possible.

    So are linear layers, with ``linear``, and within modules that have ``packs_linear``.
    """
    linear = linear or getattr(module, "packs_linear", False)
    for name, child in list(module.named_children()):
        if isinstance(child, nn.Conv2d):
            if can_pack(child):
                setattr(module, name, PackedConv2d(child))
        elif linear and isinstance(child, nn.Linear):
            if can_pack(child):
                setattr(module, name, PackedLinear(child))
        else:
            pack_convolutions(child, linear)


def convolve_and_add(conv: nn.Module, x: Tensor, residual: Tensor) -> Tensor:
    return conv(x, residual) if isinstance(conv, PackedConv2d) else conv(x).add_(residual)


def multiply_then(layer: nn.Module, x: Tensor, then: str, other: Tensor | None = None) -> Tensor:
    """A linear layer, its result put through "gelu", or with ``other`` joined by "add" or "mul"."""
    if isinstance(layer, PackedLinear):
        return layer(x, then, other)
    h = layer(x)
    return F.gelu(h) if other is None else h.add_(other) if then == "add" else h.mul_(other)


def repeat_rows(x: Tensor, rows: int) -> Tensor:
    """As many rows as asked for, a multiple of those of x, all of x one time after the other; its layout is kept."""
    return x if len(x) == rows else torch.cat([x] * (rows // len(x)))


class TimeEmbedding(nn.Module):
    """Two linear layers with an activation between them: [N, width] -> [N, dim]."""

    def __init__(self, width: int, dim: int, activation: Callable[[Tensor], Tensor] = F.silu):
        super().__init__()
        self.linear_1, self.linear_2, self.activation = nn.Linear(width, dim), nn.Linear(dim, dim), activation

    def forward(self, x: Tensor) -> Tensor:
        return self.linear_2(self.activation(self.linear_1(x)))


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
        if len(projection) > 1:
            projection = repeat_rows(projection, len(x))
        if self.scale_shift:
            scale, shift = projection.chunk(2, dim=1)
            h = self.norm2(h) * (1 + scale) + shift
        else:
            h = self.norm2(h.add_(projection))
        h = self.activation(h, inplace=True)
        h = convolve_and_add(self.conv2, h, x if self.conv_shortcut is None else self.conv_shortcut(x))
        return h if self.divisor == 1 else h / self.divisor


def attend(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
    """Attention of queries [B, L, C] to keys and values [B, S, C], of C // ``heads`` channels a head: [B, L, C]."""
    dtype = q.dtype
    if dtype == torch.bfloat16 and q.device.type == "cpu" and not torch.cpu._is_amx_tile_supported():
        # Without AMX, torch's attention is slower in bfloat16 than in float32.
        q, k, v = q.float(), k.float(), v.float()
    q, k, v = (p.unflatten(2, (heads, -1)).transpose(1, 2) for p in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2).to(dtype)


class SelfAttention(nn.Module):
    """Self-attention of tokens [B, L, C]."""

    def __init__(self, width: int, heads: int, bias: bool = True):
        super().__init__()
        self.heads = heads
        self.to_q, self.to_k, self.to_v = (nn.Linear(width, width, bias) for _ in range(3))
        self.to_out = nn.ModuleList([nn.Linear(width, width)])
        self.to_qkv: nn.Linear | None = None

    def fuse(self) -> None:
        """Make queries, keys and values one product."""
        self.to_qkv = stacked((self.to_q, self.to_k, self.to_v))
        del self.to_q, self.to_k, self.to_v

    def mix(self, h: Tensor) -> Tensor:
        """Attention without the product behind it."""
        parts = (
            self.to_qkv(h).chunk(3, dim=2) if self.to_qkv is not None else (self.to_q(h), self.to_k(h), self.to_v(h))
        )
        q, k, v = parts
        return attend(q, k, v, self.heads)


class Attention(SelfAttention):
    """Self-attention over the pixels, with a residual. Nothing but them is attended to."""

    def __init__(self, width: int, head: int, groups: int | None, eps: float, divisor: float = 1):
        super().__init__(width, width // head)
        self.group_norm = nn.GroupNorm(groups, width, eps) if groups else None
        self.divisor = divisor

    def forward(self, x: Tensor, keys_values: Tensor | None = None) -> Tensor:
        h = pixels_to_tokens(x if self.group_norm is None else self.group_norm(x))
        h = tokens_to_pixels(self.to_out[0](self.mix(h)), x)
        h = h.add_(x)
        return h if self.divisor == 1 else h / self.divisor


def pixels_to_tokens(x: Tensor) -> Tensor:
    """[B, C, H, W] -> [B, H W, C]: a view, if the tensor is channels-last."""
    return x.permute(0, 2, 3, 1).flatten(1, 2)


def tokens_to_pixels(h: Tensor, like: Tensor) -> Tensor:
    """[B, H W, C] -> [B, C, H, W], channels-last, of the height and width of ``like``."""
    return h.unflatten(1, like.shape[2:]).permute(0, 3, 1, 2)


class Downsample(nn.Module):
    """A convolution of stride 2; with ``padding`` 0 it is padded to the right and below, as in DDPM's code."""

    def __init__(self, width: int, padding: int):
        super().__init__()
        self.conv, self.padding = nn.Conv2d(width, width, 3, stride=2, padding=padding), padding

    def forward(self, x: Tensor, projections: Tensor) -> Tensor:
        return self.conv(x if self.padding else F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Every pixel four times, or as often as fills ``size``, then a convolution."""

    def __init__(self, width: int):
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor, projections: Tensor, size: Sequence[int] | None = None) -> Tensor:
        return self.conv(double(x) if size is None else F.interpolate(x, size=size, mode="nearest"))


def double(x: Tensor) -> Tensor:
    return F.interpolate(x, scale_factor=2.0, mode="nearest")


def stacked(layers: Sequence[nn.Linear]) -> nn.Linear:
    """Linear layers of one input as one, their outputs one after the other."""
    weight = torch.cat([m.weight for m in layers])
    return linear_of(weight, None if layers[0].bias is None else torch.cat([m.bias for m in layers]))


def linear_of(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    """A linear layer of these parameters, without memory of its own."""
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, device="meta")
    layer.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        layer.bias = nn.Parameter(bias, requires_grad=False)
    return layer


class LevelKind(NamedTuple):
    """What a block type of diffusers' is made of besides residual blocks."""

    attention: Callable[[], nn.Module] | None
    resizes_by_resnet: bool = False


class Level(nn.Module):
    """The residual blocks of one resolution, each with attention behind it where it has any, and a resize at the end.

    ``inner`` are the input widths of the blocks.
    """

    def __init__(
        self, c: Mapping[str, Any], inner: Sequence[int], outer: int, dim: int, kind: LevelKind, resize: str = ""
    ):
        super().__init__()
        self.resnets = nn.ModuleList(Resnet(c, n, outer, dim) for n in inner)
        if kind.attention is not None:
            self.attentions = nn.ModuleList(kind.attention() for _ in inner)
        if not resize:
            return
        change: nn.Module
        if kind.resizes_by_resnet:
            change = Resnet(c, outer, outer, dim, resize)
        else:
            change = Upsample(outer) if resize == "up" else Downsample(outer, c["downsample_padding"])
        setattr(self, f"{resize}samplers", nn.ModuleList([change]))

    def __len__(self) -> int:
        return len(self.resnets)

    def at(self, i: int, x: Tensor, projections: Tensor, keys_values: Tensor | None) -> Tensor:
        """Block ``i`` with its attention."""
        x = self.resnets[i](x, projections)
        return self.attentions[i](x, keys_values) if hasattr(self, "attentions") else x

    def resizer(self) -> nn.Module | None:
        for name in ("downsamplers", "upsamplers"):
            if hasattr(self, name):
                return getattr(self, name)[0]
        return None


class Middle(nn.Module):
    """Two residual blocks at the coarsest resolution, with ``attentions`` between them."""

    def __init__(self, c: Mapping[str, Any], width: int, dim: int, attentions: Iterable[nn.Module]):
        super().__init__()
        divisor = c["mid_block_scale_factor"]
        self.resnets = nn.ModuleList(Resnet(c, width, width, dim, divisor=divisor) for _ in range(2))
        self.attentions = nn.ModuleList(attentions)

    def forward(self, x: Tensor, projections: Tensor, keys_values: Tensor | None) -> Tensor:
        first, second = self.resnets
        x = first(x, projections)
        for attention in self.attentions:
            x = attention(x, keys_values)
        return second(x, projections)


class Backbone(nn.Module):
    """Down through the levels and up again, each level going up with the outputs of that going down (U-Net).

    Args:
        c: a config with the keys that both of diffusers' networks have.
        layers: the number of residual blocks of each level going down; one more going up.
        dim: the width of the time embedding.
        down, up: what the levels are made of, in the order in which they are run.
        middle: the attentions of the middle block, None where there is no such block.
    """

    def __init__(
        self,
        c: Mapping[str, Any],
        layers: Sequence[int],
        dim: int,
        down: Sequence[LevelKind],
        up: Sequence[LevelKind],
        middle: Iterable[nn.Module] | None,
    ):
        super().__init__()
        widths = list(c["block_out_channels"])
        self.centers = c["center_input_sample"]
        self.conv_in = nn.Conv2d(c["in_channels"], widths[0], 3, padding=1)
        downward, upward = list[Level](), list[Level]()
        skips = [widths[0]]
        for i, (kind, width, count) in enumerate(zip(down, widths, layers, strict=True)):
            last = i == len(widths) - 1
            inner = [skips[-1], *[width] * (count - 1)]
            downward.append(Level(c, inner, width, dim, kind, "" if last else "down"))
            skips += [width] * (count if last else count + 1)
        self.mid_block = Middle(c, widths[-1], dim, middle) if middle is not None else None
        above = widths[-1]
        for i, (kind, width, count) in enumerate(zip(up, reversed(widths), reversed(layers), strict=True)):
            last = i == len(widths) - 1
            inner = [n + skips.pop() for n in [above, *[width] * count]]
            upward.append(Level(c, inner, width, dim, kind, "" if last else "up"))
            above = width
        self.down_blocks, self.up_blocks = nn.ModuleList(downward), nn.ModuleList(upward)
        self.conv_norm_out = nn.GroupNorm(c["norm_num_groups"], widths[0], c["norm_eps"])
        self.conv_out = nn.Conv2d(widths[0], c["out_channels"], 3, padding=1)

        self._activation: Callable[..., Tensor] = ACTIVATIONS[c["act_fn"].lower()]
        self._last_activation: Callable[..., Tensor] = F.silu
        self.projection: nn.Linear | None = None
        start = 0
        for resnet in self._resnets():
            stop = start + resnet.time_emb_proj.out_features
            resnet.part, start = slice(start, stop), stop

    def _resnets(self) -> list[Resnet]:
        return [m for m in self.modules() if isinstance(m, Resnet)]

    def _fuse_products(self) -> None:
        for module in list(self.modules()):
            if isinstance(module, SelfAttention):
                module.fuse()
        self._fuse_projection()
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch knows no such overload

    def _fuse_projection(self) -> None:
        self.projection = stacked([r.time_emb_proj for r in self._resnets()])
        for resnet in self._resnets():
            del resnet.time_emb_proj

    def _project(self, hidden: Tensor) -> Tensor:
        """What the residual blocks take of the embedding [N, dim]: [N, P]."""
        hidden = self._activation(hidden)
        if self.projection is not None:
            return self.projection(hidden)
        return torch.cat([r.time_emb_proj(hidden) for r in self._resnets()], dim=1)

    def _predict(self, x: Tensor, projections: Tensor, keys_values: Tensor | None = None) -> Tensor:
        p = projections.to(x.dtype)
        x = x.contiguous(memory_format=torch.channels_last)
        h = self.conv_in(2 * x - 1 if self.centers else x)
        skips = [h]
        for level in cast("Iterable[Level]", self.down_blocks):
            for i in range(len(level)):
                h = level.at(i, h, p, keys_values)
                skips.append(h)
            if (resize := level.resizer()) is not None:
                h = resize(h, p)
                skips.append(h)
        if self.mid_block is not None:
            h = self.mid_block(h, p, keys_values)
        for level in cast("Iterable[Level]", self.up_blocks):
            for i in range(len(level)):
                h = level.at(i, torch.cat([h, repeat_rows(skips.pop(), len(h))], dim=1), p, keys_values)
            if (resize := level.resizer()) is not None:
                # What was halved with a remainder is not the double of its half.
                h = resize(h, p, skips[-1].shape[2:]) if isinstance(resize, Upsample) else resize(h, p)
        return self.conv_out(self._last_activation(self.conv_norm_out(h), inplace=True))
