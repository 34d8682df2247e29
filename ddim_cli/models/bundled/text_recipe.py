"""The recipe that trained the bundled ``mnist-text`` model.

    python -m ddim_cli.models.bundled.text_recipe mnist.npz --work-dir runs/mnist-text --export-to DIR

Stable Diffusion (Rombach et al., arXiv:2112.10752) in miniature, in two stages. First an autoencoder learns to write a
digit of 1x32x32 pixels as 4x8x8 latents and to read it back. Then, with the latents of all digits at hand, a
UNet2DConditionModel and a CLIPTextModel are trained together to predict v (Salimans and Ho, arXiv:2202.00512,
appendix D) from noisy latents and a caption. The betas are Stable Diffusion's, rescaled so that the last step holds
nothing but noise (Lin et al., arXiv:2305.08891, algorithm 1). Convolutions and projections are trained with Muon, the
rest with AdamW. The learning rate is held constant and then falls linearly to zero over the last half of each stage.

On a CPU, ``torchrun --nproc-per-node 2 -m`` in place of ``python -m`` lets two processes halve each batch, which is
faster than two threads, above all where others want the cores as well. Killing it loses at most ``--save-every`` images
of work: the same command goes on from the last checkpoint.
"""

from __future__ import annotations

import json
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.distributed as dist
import typer
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from ddim_cli.models.bundled.captions import WORDS, Thirds, full_caption, random_caption
from ddim_cli.models.bundled.training import (
    NUM_TRAIN_TIMESTEPS,
    fit,
    load_images,
    save_atomically,
    stratified_timesteps,
    this_process,
    to_model_range,
)
from ddim_cli.models.bundled.vocabulary import write_tokenizer

LATENT_CHANNELS, LATENT_SIZE = 4, 8
TEXT_WIDTH, TEXT_LENGTH = 64, 24
# Of the divergence from a standard normal, in nats a picture. Small: the latents should keep what they can.
KL_WEIGHT = 2e-6
COOLDOWN = 0.5


def build_autoencoder() -> AutoencoderKL:
    """A 0.4 M parameter autoencoder: [N, 1, 32, 32] in [-1, 1] <-> latents [N, 4, 8, 8]."""
    return AutoencoderKL(
        sample_size=32,
        in_channels=1,
        out_channels=1,
        latent_channels=LATENT_CHANNELS,
        block_out_channels=(16, 32, 48),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=1,
        norm_num_groups=8,
    )


def build_unet() -> UNet2DConditionModel:
    """A 3.2 M parameter UNet: latents [N, 4, 8, 8], timesteps [N] and text [N, 24, 64] -> v [N, 4, 8, 8].

    Residual branches start at zero, as in the original DDPM code.
    """
    network = UNet2DConditionModel(
        sample_size=LATENT_SIZE,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        block_out_channels=(64, 128),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=1,
        cross_attention_dim=TEXT_WIDTH,
        attention_head_dim=2,
        norm_num_groups=16,
    )
    for name, module in network.named_modules():
        if name == "conv_out" or name.endswith((".conv2", ".proj_out")):
            nn.init.zeros_(module.weight)
    return network


def build_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """A 0.15 M parameter text encoder: token numbers [N, 24] -> [N, 24, 64]."""
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=TEXT_WIDTH,
        intermediate_size=4 * TEXT_WIDTH,
        projection_dim=TEXT_WIDTH,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=TEXT_LENGTH,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return CLIPTextModel(config)


def build_scheduler() -> DDIMScheduler:
    """Stable Diffusion's betas, rescaled to no signal at the last step, which needs trailing timesteps and v."""
    return DDIMScheduler(
        num_train_timesteps=NUM_TRAIN_TIMESTEPS,
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
        clip_sample=False,
        # A step that leaves the last timestep behind arrives at the picture itself.
        set_alpha_to_one=True,
        steps_offset=1,
    )


class Denoiser(nn.Module):
    """The UNet and the text encoder, which are trained as one."""

    def __init__(self, unet: UNet2DConditionModel, text_encoder: CLIPTextModel) -> None:
        super().__init__()
        self.unet, self.text_encoder = unet, text_encoder

    def forward(self, latents: Tensor, timesteps: Tensor, tokens: Tensor) -> Tensor:
        """Noisy latents [N, 4, 8, 8], timesteps [N] and token numbers [N, 24] -> v [N, 4, 8, 8], float32."""
        text = self.text_encoder(tokens).last_hidden_state
        return self.unet(latents, timesteps, text, return_dict=False)[0].float()


def tokenize(tokenizer: CLIPTokenizer, captions: list[str]) -> Tensor:
    """Token numbers, int64 [N, 24], cut or padded as StableDiffusionPipeline does it."""
    return tokenizer(captions, padding="max_length", truncation=True, return_tensors="pt").input_ids


def autoencoder_loss(network: Callable[..., Any], x: Tensor, noise: Tensor) -> Tensor:
    """Absolute and squared error of the reconstruction, and a little of the divergence of the latents."""
    restored, divergence = network(x, noise)
    error = restored.float() - x
    return error.abs().mean() + error.square().mean() + KL_WEIGHT * divergence.mean()


class Autoencoder(nn.Module):
    """An AutoencoderKL with the noise of its latents given from outside, so that a seed decides it."""

    def __init__(self, vae: AutoencoderKL) -> None:
        super().__init__()
        self.vae = vae

    def forward(self, x: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """Pictures [N, 1, 32, 32] and noise [N, 4, 8, 8] -> pictures [N, 1, 32, 32] and nats [N]."""
        moments = self.vae.quant_conv(self.vae.encoder(x)).float()
        posterior = DiagonalGaussianDistribution(moments)
        return self.vae.decode(posterior.mean + posterior.std * noise, return_dict=False)[0], posterior.kl()


@torch.no_grad()
def even_out(vae: AutoencoderKL, moments: Tensor) -> Tensor:
    """Centre the latents channel by channel and give every channel the spread of all, without a change to any picture.

    ``moments`` are what the encoder says of the data: means and logarithms of variances, [N, 8, 8, 8]. Returns what it
    says from now on. The 1x1 convolutions on both sides of the latents take the change up. The scaling factor becomes
    1 / spread.
    """
    mean, log_variance = moments.float().chunk(2, 1)
    centre = mean.mean((0, 2, 3))
    spread = ((mean - centre.view(1, -1, 1, 1)).square() + log_variance.exp()).mean((0, 2, 3)).sqrt()
    overall = spread.square().mean().sqrt()
    gain = overall / spread
    into, out_of = vae.quant_conv, vae.post_quant_conv
    assert into is not None
    assert out_of is not None
    # latents' = gain (latents - centre): first for the means, then for the logarithms of the variances.
    into.weight[:LATENT_CHANNELS].mul_(gain.view(-1, 1, 1, 1))
    into.bias[:LATENT_CHANNELS].sub_(centre).mul_(gain)
    into.bias[LATENT_CHANNELS:].add_(2 * gain.log())
    out_of.bias.add_((out_of.weight * centre.view(1, -1, 1, 1)).sum((1, 2, 3)))
    out_of.weight.div_(gain.view(1, -1, 1, 1))
    vae.register_to_config(scaling_factor=round(1 / overall.item(), 5))
    gain, centre = gain.view(-1, 1, 1), centre.view(-1, 1, 1)
    return torch.cat([gain * (mean - centre), log_variance + 2 * gain.log()], 1)


@torch.no_grad()
def encode(vae: AutoencoderKL, images: Tensor, device: torch.device) -> Tensor:
    """uint8 pictures [N, 1, 32, 32] -> means and logarithms of variances of their latents, [N, 8, 8, 8], on the CPU."""
    parts = [vae.encode(to_model_range(part.to(device))).latent_dist.parameters.cpu() for part in images.split(500)]
    return torch.cat(parts)


def draw_latents(moments: Tensor, noise: Tensor, scaling_factor: float) -> Tensor:
    """Latents as the UNet sees them, of unit spread: moments [N, 8, 8, 8] and noise [N, 4, 8, 8] -> [N, 4, 8, 8]."""
    posterior = DiagonalGaussianDistribution(moments.float())
    return (posterior.mean + posterior.std * noise) * scaling_factor


def velocity_loss(
    network: Callable[..., Any], x0: Tensor, noise: Tensor, timesteps: Tensor, tokens: Tensor, alpha_bar: Tensor
) -> Tensor:
    """Mean of ||v - v_theta(x_t, t, caption)||^2 with v = sqrt(alpha_bar) epsilon - sqrt(1 - alpha_bar) x_0."""
    a = alpha_bar[timesteps].view(-1, 1, 1, 1)
    x_t = a.sqrt() * x0 + (1 - a).sqrt() * noise
    v = a.sqrt() * noise - (1 - a).sqrt() * x0
    return (network(x_t, timesteps, tokens) - v).square().mean()


def save_half(network: nn.Module, path: Path, prefix: str = "") -> None:
    """Write the weights in float16."""
    tensors = {prefix + name: t.detach().cpu().half().contiguous() for name, t in network.state_dict().items()}
    save_file(tensors, path, metadata={"format": "pt"})


def export(vae: AutoencoderKL, denoiser: Denoiser, tokenizer_from: Path, directory: Path) -> None:
    """Write a directory that StableDiffusionPipeline loads, with weights in float16 safetensors."""
    unet, text_encoder = denoiser.unet, denoiser.text_encoder
    build_scheduler().save_pretrained(directory / "scheduler")
    (directory / "tokenizer").mkdir(parents=True, exist_ok=True)
    for file in sorted(tokenizer_from.iterdir()):
        (directory / "tokenizer" / file.name).write_bytes(file.read_bytes())
    for part, name in ((unet, "unet"), (vae, "vae")):
        part.save_config(directory / name)
        save_half(part, directory / name / "diffusion_pytorch_model.safetensors")
    # Without this, transformers 5 computes in the precision of the file, and the UNet does not.
    config = {**text_encoder.config.to_diff_dict(), "architectures": ["CLIPTextModel"], "torch_dtype": "float32"}
    config.pop("dtype", None)
    folder = directory / "text_encoder"
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    # transformers up to 5.5 keeps everything under this name, and later ones read it.
    prefixed = any(name.startswith("text_model.") for name in text_encoder.state_dict())
    save_half(text_encoder, folder / "model.safetensors", "" if prefixed else "text_model.")
    index = {
        "_class_name": "StableDiffusionPipeline",
        "feature_extractor": [None, None],
        "requires_safety_checker": False,
        "safety_checker": [None, None],
        "scheduler": ["diffusers", "DDIMScheduler"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    (directory / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")


def train(
    data: Annotated[Path, typer.Argument(help="An .npz with x_train, y_train, x_test, y_test.")],
    work_dir: Annotated[Path, typer.Option(help="Checkpoints and logs; continued if it has some.")] = Path(
        "runs/mnist-text"
    ),
    export_to: Annotated[
        Path | None, typer.Option(help="Write the averaged weights here as a diffusers directory.")
    ] = None,
    autoencoder_images: Annotated[int, typer.Option(help="Training images of the autoencoder.")] = 49_152,
    images: Annotated[int, typer.Option(help="Training images of the UNet and the text encoder.")] = 288_000,
    autoencoder_batch_size: Annotated[int, typer.Option()] = 64,
    batch_size: Annotated[int, typer.Option()] = 128,
    lr: Annotated[float, typer.Option(help="Peak learning rate of both stages.")] = 2e-3,
    save_every: Annotated[int, typer.Option(help="Images between checkpoints and log lines.")] = 16_384,
    seed: Annotated[int, typer.Option()] = 0,
    bfloat16: Annotated[
        bool, typer.Option(help="Train under bfloat16 autocast: faster where the processor knows it.")
    ] = True,
) -> None:
    """Train the bundled text model, or go on with a run that was stopped."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    work_dir.mkdir(parents=True, exist_ok=True)
    if "TORCHELASTIC_RUN_ID" in os.environ and not dist.is_initialized():
        dist.init_process_group("gloo")
    rank, _ = this_process()
    torch.manual_seed(seed)
    x_train, y_train = load_images(data, "train")
    x_test, y_test = (part[:: len(part) // 1_000 or 1] for part in load_images(data, "test"))
    test_noise = torch.Generator().manual_seed(1)
    shared: dict[str, Any] = {"lr": lr, "save_every": save_every, "seed": seed, "bfloat16": bfloat16}
    shared["compiled"] = device.type == "cuda"

    def latent_noise(count: int, generator: torch.Generator) -> Tensor:
        return torch.randn(count, LATENT_CHANNELS, LATENT_SIZE, LATENT_SIZE, generator=generator).to(device)

    def autoencoder_batch(forward: Callable[..., Any], generator: torch.Generator, mine: slice) -> Tensor:
        index = torch.randint(len(x_train), (autoencoder_batch_size,), generator=generator)
        noise = latent_noise(autoencoder_batch_size, generator)[mine]
        return autoencoder_loss(forward, to_model_range(x_train[index[mine]].to(device)), noise)

    judged_x, judged_noise = to_model_range(x_test.to(device)), latent_noise(len(x_test), test_noise)
    autoencoder = fit(
        Autoencoder(build_autoencoder()).to(device),
        batch_loss=autoencoder_batch,
        test_loss=lambda judged: autoencoder_loss(judged, judged_x, judged_noise),
        checkpoint=work_dir / "autoencoder.pt",
        log=work_dir / "autoencoder.jsonl",
        images=autoencoder_images,
        batch_size=autoencoder_batch_size,
        cooldown=COOLDOWN,
        **shared,
    )
    vae = autoencoder.vae.eval()
    latents = work_dir / f"latents_{autoencoder_images}.pt"
    if rank == 0:
        write_tokenizer(WORDS, TEXT_LENGTH, work_dir / "tokenizer")
    if rank == 0 and not latents.exists():
        state: dict[str, Any] = {"train": even_out(vae, encode(vae, x_train, device))}
        state |= {"test": encode(vae, x_test, device), "vae": vae.state_dict()}
        state["scaling_factor"] = vae.config.scaling_factor
        save_atomically(state, latents)
    if dist.is_initialized():
        dist.barrier()
    moments = torch.load(latents, map_location="cpu", weights_only=True)
    vae.load_state_dict(moments["vae"])
    scaling_factor = moments["scaling_factor"]
    vae.register_to_config(scaling_factor=scaling_factor)

    tokenizer = CLIPTokenizer.from_pretrained(work_dir / "tokenizer")
    thirds = Thirds.of(to_model_range(x_train), y_train)
    traits, test_traits = thirds.traits(to_model_range(x_train), y_train), thirds.traits(to_model_range(x_test), y_test)
    alpha_bar = build_scheduler().alphas_cumprod.to(device)

    def denoiser_batch(forward: Callable[..., Any], generator: torch.Generator, mine: slice) -> Tensor:
        index = torch.randint(len(x_train), (batch_size,), generator=generator)
        rng = random.Random(int(torch.randint(2**31, (), generator=generator)))
        captions = [random_caption(int(y_train[i]), traits[i], rng) for i in index.tolist()]
        x0 = draw_latents(moments["train"][index].to(device), latent_noise(batch_size, generator), scaling_factor)
        noise = latent_noise(batch_size, generator)
        timesteps = stratified_timesteps(batch_size, generator).to(device)
        tokens = tokenize(tokenizer, captions).to(device)
        return velocity_loss(forward, x0[mine], noise[mine], timesteps[mine], tokens[mine], alpha_bar)

    described = [full_caption(int(y), words) for y, words in zip(y_test, test_traits, strict=True)]
    judged_batch = (
        draw_latents(moments["test"].to(device), latent_noise(len(x_test), test_noise), scaling_factor),
        latent_noise(len(x_test), test_noise),
        stratified_timesteps(len(x_test), test_noise).to(device),
        tokenize(tokenizer, described).to(device),
    )
    torch.manual_seed(seed)
    denoiser = fit(
        Denoiser(build_unet(), build_text_encoder(tokenizer)).to(device),
        batch_loss=denoiser_batch,
        test_loss=lambda judged: velocity_loss(judged, *judged_batch, alpha_bar),
        checkpoint=work_dir / "denoiser.pt",
        log=work_dir / "denoiser.jsonl",
        images=images,
        batch_size=batch_size,
        cooldown=COOLDOWN,
        **shared,
    )
    if export_to is not None and rank == 0:
        export(vae, denoiser, work_dir / "tokenizer", export_to)


if __name__ == "__main__":
    typer.run(train)
