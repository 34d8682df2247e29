"""The recipe that trained the bundled ``mnist`` model.

    python -m ddim_cli.models.bundled.recipe mnist.npz --work-dir runs/mnist --export-to DIR

An unconditional pixel-space UNet2DModel on the MNIST digits (28x28 padded to 32x32, values in
[-1, 1]), trained to predict epsilon over 1000 steps of the linear schedule of DDPM
(Ho et al., arXiv:2006.11239), with the loss weighted by min(SNR, 5) / SNR (Hang et al.,
arXiv:2303.09556, eq. 9). Convolutions and projections are trained with Muon, the rest with AdamW.

Killing it loses at most ``--save-every`` images of work: the same command goes on from the last
checkpoint. The learning rate is held constant and then falls linearly to zero over the last
quarter, so a run whose ``--images`` is raised before that quarter continues as if it had been so
from the start. ``--start-from`` begins a new run from weights that were exported before.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from diffusers import DDIMPipeline, DDIMScheduler, UNet2DModel
from torch import Tensor, nn

from ddim_cli.models.bundled.training import NUM_TRAIN_TIMESTEPS, fit, load_images, stratified_timesteps, to_model_range
from ddim_cli.models.load import load_model

BETA_START, BETA_END = 1e-4, 0.02
SNR_CAP = 5.0


def build_network() -> UNet2DModel:
    """A 2.2 M parameter UNet, [N, 1, 32, 32] and [N] timesteps -> epsilon [N, 1, 32, 32].

    Nearly all of its arithmetic is at 8x8 with 128 channels, where digits are composed; the two
    finer levels only carry strokes. Residual branches start at zero, as in the original DDPM code.
    """
    network = UNet2DModel(
        sample_size=32,
        in_channels=1,
        out_channels=1,
        block_out_channels=(16, 32, 128),
        down_block_types=("DownBlock2D", "DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        attention_head_dim=32,
        norm_num_groups=8,
    )
    for name, module in network.named_modules():
        if name == "conv_out" or name.endswith((".conv2", ".to_out.0")):
            nn.init.zeros_(module.weight)
    return network


def alpha_bars(device: torch.device) -> Tensor:
    """Cumulative products of 1 - beta for the linear schedule, float32 [T]."""
    betas = torch.linspace(BETA_START, BETA_END, NUM_TRAIN_TIMESTEPS, dtype=torch.float64)
    return torch.cumprod(1.0 - betas, 0).float().to(device)


def weighted_loss(
    network: Callable[..., Any], x0: Tensor, noise: Tensor, timesteps: Tensor, alpha_bar: Tensor
) -> Tensor:
    """Mean of min(SNR, 5) / SNR * ||epsilon - epsilon_theta(x_t, t)||^2 over the batch."""
    a = alpha_bar[timesteps].view(-1, 1, 1, 1)
    x_t = a.sqrt() * x0 + (1 - a).sqrt() * noise
    snr = a / (1 - a)
    weight = snr.clamp(max=SNR_CAP) / snr
    epsilon = network(x_t, timesteps, return_dict=False)[0].float()
    return (weight * (epsilon - noise).square()).mean()


def export(network: UNet2DModel, directory: Path) -> None:
    """Write a diffusers directory: unet/ in float16 safetensors, scheduler/, model_index.json."""
    scheduler = DDIMScheduler(
        num_train_timesteps=NUM_TRAIN_TIMESTEPS, beta_start=BETA_START, beta_end=BETA_END, beta_schedule="linear"
    )
    half = copy.deepcopy(network).to("cpu", torch.float16)
    DDIMPipeline(unet=half, scheduler=scheduler).save_pretrained(directory, safe_serialization=True)


def train(
    data: Annotated[Path, typer.Argument(help="An .npz with x_train, x_test: uint8 [N, 28, 28].")],
    work_dir: Annotated[Path, typer.Option(help="Checkpoint and log; continued if it has one.")] = Path("runs/mnist"),
    export_to: Annotated[
        Path | None, typer.Option(help="Write the averaged weights here as a diffusers directory.")
    ] = None,
    start_from: Annotated[
        Path | None, typer.Option(help="Begin a new run from the weights of this diffusers directory.")
    ] = None,
    images: Annotated[int, typer.Option(help="Training images in all, repeats counted.")] = 3_600_000,
    batch_size: Annotated[int, typer.Option()] = 64,
    lr: Annotated[float, typer.Option(help="Peak learning rate.")] = 2e-3,
    save_every: Annotated[int, typer.Option(help="Images between checkpoints and log lines.")] = 16_384,
    seed: Annotated[int, typer.Option()] = 0,
) -> None:
    """Train the bundled model, or go on with a run that was stopped."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    work_dir.mkdir(parents=True, exist_ok=True)

    torch.manual_seed(seed)
    x_train = load_images(data, "train")[0].to(device)
    x_test = to_model_range(load_images(data, "test")[0][:: 10_000 // 1_000].to(device))
    test_noise = torch.randn(x_test.shape, generator=torch.Generator().manual_seed(1)).to(device)
    test_timesteps = stratified_timesteps(len(x_test), torch.Generator().manual_seed(1)).to(device)
    alpha_bar = alpha_bars(device)

    network = build_network()
    if start_from is not None:
        network.load_state_dict(load_model(str(start_from)).network.state_dict())
    network = network.to(device, memory_format=torch.channels_last)

    def batch_loss(forward: Callable[..., Any], generator: torch.Generator, mine: slice) -> Tensor:
        index = torch.randint(len(x_train), (batch_size,), generator=generator)
        x0 = to_model_range(x_train[index.to(device)])
        noise = torch.randn(x0.shape, generator=generator).to(device)
        timesteps = stratified_timesteps(batch_size, generator).to(device)
        return weighted_loss(forward, x0[mine], noise[mine], timesteps[mine], alpha_bar)

    average = fit(
        network,
        batch_loss=batch_loss,
        test_loss=lambda judged: weighted_loss(judged, x_test, test_noise, test_timesteps, alpha_bar),
        checkpoint=work_dir / "checkpoint.pt",
        log=work_dir / "log.jsonl",
        images=images,
        batch_size=batch_size,
        lr=lr,
        save_every=save_every,
        seed=seed,
        bfloat16=device.type == "cuda",
        compiled=device.type == "cuda",
    )
    if export_to is not None:
        export(average, export_to)


if __name__ == "__main__":
    typer.run(train)
