"""Classifier-free guidance (Ho and Salimans, arXiv:2207.12598), both halves in one batch."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

# (x [B, C, H, W], timesteps int64 [B], classes int64 [B]) -> the network's output [B, C, H, W]
ConditionalNetwork = Callable[[Tensor, Tensor, Tensor], Tensor]
# (x [B, C, H, W], the step int64 [1], what a text is to it [B, L, K]) -> the network's output [B, C, H, W]
StepNetwork = Callable[..., Tensor]


def rescale(guided: Tensor, conditional: Tensor, guidance_rescale: float) -> Tensor:
    """Bring the standard deviation of each image of ``guided`` towards that of ``conditional``, both [B, ...].

    From 0, not at all, to 1, all the way: ``guidance_rescale`` is phi of Lin et al., arXiv:2305.08891, eqs. 15 and 16.
    """
    dims = tuple(range(1, guided.ndim))
    factor = conditional.std(dims, keepdim=True) / guided.std(dims, keepdim=True)
    return guided * (guidance_rescale * factor + (1 - guidance_rescale))


def guide(both: Tensor, scale: float, guidance_rescale: float) -> Tensor:
    """Of predictions [2 B, ...], those without a condition first, o_null + scale (o - o_null), then rescaled."""
    unconditional, conditional = both.chunk(2)
    prediction = unconditional + scale * (conditional - unconditional)
    return rescale(prediction, conditional, guidance_rescale) if guidance_rescale > 0 else prediction


def with_text_guidance(network: StepNetwork, scale: float, guidance_rescale: float = 0.0) -> StepNetwork:
    """A network by step, its texts [2 B, L, K] the negative prompts before the prompts, guided from those to these.

    It is given x once, and answers for every text: [2 B, ...].

    The prediction is in float32, whatever the network's dtype.
    """

    def guided(x: Tensor, i: Tensor, texts: Tensor, *others: Tensor) -> Tensor:
        return guide(network(x, i, texts, *others).float(), scale, guidance_rescale)

    return guided


def with_guidance(
    network: ConditionalNetwork, null_class: int, scale: float, guidance_rescale: float = 0.0
) -> ConditionalNetwork:
    """A network whose output is o_null + scale (o_class - o_null), then rescaled (see `rescale`).

    The prediction is in float32, whatever the network's dtype.
    """

    def guided(x: Tensor, timesteps: Tensor, classes: Tensor) -> Tensor:
        null = torch.full_like(classes, null_class)
        both = network(torch.cat([x, x]), torch.cat([timesteps, timesteps]), torch.cat([null, classes])).float()
        return guide(both, scale, guidance_rescale)

    return guided
