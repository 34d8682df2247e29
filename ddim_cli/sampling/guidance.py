"""Classifier-free guidance (Ho and Salimans, arXiv:2207.12598), both halves in one batch."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

# (x [B, C, H, W], timesteps int64 [B], classes int64 [B]) -> the network's output [B, C, H, W]
ConditionalNetwork = Callable[[Tensor, Tensor, Tensor], Tensor]


def rescale(guided: Tensor, conditional: Tensor, share: float) -> Tensor:
    """Give ``guided`` the standard deviation of ``conditional``, an image at a time, to the extent of ``share``.

    Lin et al., arXiv:2305.08891, eqs. 15 and 16. Both [B, ...].
    """
    dims = tuple(range(1, guided.ndim))
    factor = conditional.std(dims, keepdim=True) / guided.std(dims, keepdim=True)
    return guided * (share * factor + (1 - share))


def with_guidance(network: ConditionalNetwork, null_class: int, scale: float, share: float = 0.0) -> ConditionalNetwork:
    """A network whose output is o_null + scale (o_class - o_null), then rescaled by ``share`` (see `rescale`).

    The prediction is in float32, whatever the network's dtype.
    """

    def guided(x: Tensor, timesteps: Tensor, classes: Tensor) -> Tensor:
        null = torch.full_like(classes, null_class)
        both = network(torch.cat([x, x]), torch.cat([timesteps, timesteps]), torch.cat([null, classes])).float()
        unconditional, conditional = both.chunk(2)
        found = unconditional + scale * (conditional - unconditional)
        return rescale(found, conditional, share) if share > 0 else found

    return guided
