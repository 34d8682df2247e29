"""What the recipes of the bundled models share: the pictures, the optimizers, the learning rate, checkpoints."""

from __future__ import annotations

import math
import os
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

NUM_TRAIN_TIMESTEPS = 1000
COOLDOWN = 0.25
WARMUP_IMAGES = 20_000
EMA_DECAY = 0.999


def load_images(data: Path, split: str = "train") -> tuple[Tensor, Tensor]:
    """Read ``x_SPLIT`` and ``y_SPLIT`` of an .npz file: images uint8 [N, 1, 32, 32], labels [N]."""
    with np.load(data) as archive:
        images = torch.from_numpy(archive[f"x_{split}"])
        labels = torch.from_numpy(archive[f"y_{split}"]).long()
    return nn.functional.pad(images.unsqueeze(1), (2, 2, 2, 2)), labels


def to_model_range(images: Tensor) -> Tensor:
    """uint8 0..255 -> float32 [-1, 1]."""
    return images.float() / 127.5 - 1.0


def stratified_timesteps(count: int, generator: torch.Generator) -> Tensor:
    """``count`` timesteps, one in each of ``count`` equal slices of [0, T): lower variance than independent draws."""
    position = torch.randperm(count, generator=generator) + torch.rand(count, generator=generator)
    return (position * (NUM_TRAIN_TIMESTEPS / count)).long().clamp_(max=NUM_TRAIN_TIMESTEPS - 1)


class Muon(torch.optim.Optimizer):
    """Momentum whose matrix updates are orthogonalised by five Newton-Schulz iterations.

    Jordan et al., "Muon: an optimizer for hidden layers in neural networks" (2024). A convolution's
    weight [O, I, H, W] is taken as the matrix [O, I*H*W]. Updates are scaled to the root mean
    square of AdamW's, so both share one learning rate.
    """

    def __init__(self, params, lr: float, momentum: float = 0.95):
        super().__init__(params, {"lr": lr, "momentum": momentum})

    @staticmethod
    def orthogonalise(matrix: Tensor) -> Tensor:
        wide = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
        x = wide / (wide.norm() + 1e-7)
        for _ in range(5):
            gram = x @ x.T
            x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
        return x if wide is matrix else x.T

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                buffer = self.state[p].setdefault("momentum", torch.zeros_like(p))
                buffer.lerp_(p.grad, 1 - group["momentum"])
                update = p.grad.lerp(buffer, group["momentum"]).flatten(1)
                scale = 0.2 * math.sqrt(max(update.shape))
                p.add_(self.orthogonalise(update).view(p.shape), alpha=-group["lr"] * scale)


def build_optimizers(network: nn.Module, lr: float) -> list[torch.optim.Optimizer]:
    """Muon for inner matrices and convolutions; AdamW for the first and last layer, gains and biases."""

    def is_inner(name: str, p: Tensor) -> bool:
        return p.ndim >= 2 and not name.startswith(("conv_in", "conv_out"))

    named = list(network.named_parameters())
    rest = [p for name, p in named if not is_inner(name, p)]
    opts: list[torch.optim.Optimizer] = [torch.optim.AdamW(rest, lr=lr, weight_decay=0.0, betas=(0.9, 0.99))]
    opts.append(Muon([p for name, p in named if is_inner(name, p)], lr=lr))
    return opts


def learning_rate_factor(images_seen: int, images_total: int) -> float:
    """Linear warm-up, a plateau at 1, a linear fall to 0 over the last quarter of the run."""
    warmup = min(1.0, (images_seen + 1) / WARMUP_IMAGES)
    cooldown = min(1.0, (images_total - images_seen) / (COOLDOWN * images_total))
    return max(0.0, min(warmup, cooldown))


def save_atomically(state: dict, path: Path) -> None:
    temporary = path.with_suffix(".tmp")
    torch.save(state, temporary)
    os.replace(temporary, path)
