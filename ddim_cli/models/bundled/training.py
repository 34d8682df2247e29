"""What the recipes of the bundled models share: the pictures, the optimizers, and training with checkpoints."""

from __future__ import annotations

import copy
import json
import math
import os
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

NUM_TRAIN_TIMESTEPS = 1000
COOLDOWN = 0.25
WARMUP_IMAGES = 20_000
EMA_DECAY = 0.999
# Parts of a network that meet the outside, by the names diffusers and transformers give them: AdamW trains them.
OUTER = frozenset({"conv_in", "conv_out", "quant_conv", "post_quant_conv", "token_embedding", "position_embedding"})

Network = TypeVar("Network", bound=nn.Module)


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
    """Muon for inner matrices and convolutions; AdamW for first and last layers, embeddings, gains and biases."""

    def is_inner(name: str, p: Tensor) -> bool:
        return p.ndim >= 2 and OUTER.isdisjoint(name.split("."))

    named = list(network.named_parameters())
    rest = [p for name, p in named if not is_inner(name, p)]
    opts: list[torch.optim.Optimizer] = [torch.optim.AdamW(rest, lr=lr, weight_decay=0.0, betas=(0.9, 0.99))]
    opts.append(Muon([p for name, p in named if is_inner(name, p)], lr=lr))
    return opts


def learning_rate_factor(images_seen: int, images_total: int, cooldown: float = COOLDOWN) -> float:
    """Linear warm-up, a plateau at 1, a linear fall to 0 over the last ``cooldown`` (0 to 1) of the run."""
    warmup = min(1.0, (images_seen + 1) / WARMUP_IMAGES)
    fall = min(1.0, (images_total - images_seen) / (cooldown * images_total))
    return max(0.0, min(warmup, fall))


def save_atomically(state: dict, path: Path) -> None:
    temporary = path.with_suffix(".tmp")
    torch.save(state, temporary)
    os.replace(temporary, path)


def this_process() -> tuple[int, int]:
    """Its number and the number of all: (0, 1) unless torchrun started several."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def average_over_processes(gradients: list[Tensor]) -> None:
    """Replace gradients by their means over all processes."""
    _, ranks = this_process()
    if ranks == 1:
        return
    # In one piece: small messages would cost more than what they carry.
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    dist.all_reduce(flat)
    parts = (flat / ranks).split([gradient.numel() for gradient in gradients])
    for gradient, part in zip(gradients, parts, strict=True):
        gradient.copy_(part.view_as(gradient))


def fit(
    network: Network,
    *,
    batch_loss: Callable[[Callable[..., Any], torch.Generator, slice], Tensor],
    test_loss: Callable[[Network], Tensor],
    checkpoint: Path,
    log: Path,
    images: int,
    batch_size: int,
    lr: float,
    save_every: int,
    seed: int,
    bfloat16: bool,
    compiled: bool,
    cooldown: float = COOLDOWN,
) -> Network:
    """Train ``network`` until it has seen ``images`` pictures, and return the average of its weights over time.

    ``batch_loss`` draws a batch of ``batch_size`` with the generator and gives the mean loss, a scalar, of the part of
    it that the slice says: that of this process, where torchrun started several. It is handed the network as something
    to call. ``test_loss`` judges the average. ``bfloat16`` computes ``batch_loss`` under autocast.

    Every ``save_every`` pictures a JSON line goes to standard output and to ``log``, and ``checkpoint`` is replaced;
    where it is there to begin with, training goes on from it.
    """
    device = next(network.parameters()).device
    rank, ranks = this_process()
    mine = slice(rank, None, ranks)
    average = copy.deepcopy(network).requires_grad_(False)
    optimizers = build_optimizers(network, lr)
    generator = torch.Generator().manual_seed(seed)
    seen, seconds = 0, 0.0
    if checkpoint.exists():
        state = torch.load(checkpoint, map_location="cpu", weights_only=True)
        network.load_state_dict(state["network"])
        average.load_state_dict(state["average"])
        for opt, saved in zip(optimizers, state["optimizers"], strict=True):
            opt.load_state_dict(saved)
        generator.set_state(state["generator"])
        seen, seconds = state["seen"], state["seconds"]

    forward = torch.compile(network) if compiled else network
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=bfloat16)
    started, running, batches = time.monotonic() - seconds, torch.zeros((), device=device), 0
    while seen < images:
        for opt in optimizers:
            for group in opt.param_groups:
                group["lr"] = lr * learning_rate_factor(seen, images, cooldown)
        # On a CPU the fused attention is slow backwards where sequences are as short as here.
        with autocast, sdpa_kernel(SDPBackend.MATH) if device.type == "cpu" else nullcontext():
            loss = batch_loss(forward, generator, mine)
        loss.backward()
        average_over_processes([p.grad for p in network.parameters() if p.grad is not None])
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        for opt in optimizers:
            opt.step()
            opt.zero_grad(set_to_none=True)
        seen += batch_size
        # Early on the average follows closely, so that it forgets the random start.
        decay = min(EMA_DECAY, 1 - 10 * batch_size / (seen + 10 * batch_size))
        with torch.no_grad():
            torch._foreach_lerp_(list(average.parameters()), list(network.parameters()), 1 - decay)
        running, batches = running + loss.detach(), batches + 1

        if rank == 0 and (seen // save_every != (seen - batch_size) // save_every or seen >= images):
            with torch.inference_mode():
                judged = test_loss(average).item()
            seconds = time.monotonic() - started
            line = {
                "images": seen,
                "seconds": round(seconds, 1),
                "train_loss": round(running.item() / batches, 5),
                "test_loss": round(judged, 5),
                "lr": optimizers[0].param_groups[0]["lr"],
            }
            running, batches = torch.zeros((), device=device), 0
            print(json.dumps(line), flush=True)
            with log.open("a") as stream:
                stream.write(json.dumps(line) + "\n")
            state = {
                "network": network.state_dict(),
                "average": average.state_dict(),
                "optimizers": [opt.state_dict() for opt in optimizers],
                "generator": generator.get_state(),
                "seen": seen,
                "seconds": seconds,
            }
            save_atomically(state, checkpoint)
    return average
