"""Networks of published shape with random weights: for measuring speed where no checkpoint is at hand."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ddim_cli.config.layers import nearest
from ddim_cli.config.schema import ModelSettings, SchedulerSettings
from ddim_cli.errors import UsageError
from ddim_cli.evaluation import text_architectures
from ddim_cli.evaluation.random_weights import write_random
from ddim_cli.models.describe import BUNDLED, ModelDescription
from ddim_cli.models.latent import checked_latent_network
from ddim_cli.models.networks import checked_network
from ddim_cli.models.original import unet_config
from ddim_cli.models.parts import read_json
from ddim_cli.models.text import check_installed

SEED = 0
# The network of DDPM and DDIM (Ho et al., arXiv:2006.11239, appendix B) in its published sizes: (image size, channel
# multipliers, the level that has attention). All have 128 channels and two layers a level.
SHAPES: dict[str, tuple[int, list[int], int]] = {
    "cifar10": (32, [1, 2, 2, 2], 1),
    "celeba64": (64, [1, 2, 2, 2, 4], 2),
    "lsun256": (256, [1, 1, 2, 2, 4, 4], 4),
}
NAMES = (*SHAPES, "mnist", *text_architectures.NAMES)


@dataclass(frozen=True)
class Architecture(ModelDescription):
    """A model without a checkpoint. Its hash is of what its weights are made from."""

    @property
    def sha256(self) -> str:
        return hashlib.sha256(f"random {SEED} torch {torch.__version__} {self.config_sha256}".encode()).hexdigest()


def architecture_config(name: str) -> dict[str, Any]:
    """The UNet2DModel config of a published shape. Raises UsageError for a name that is none."""
    if name == "mnist":
        return read_json(BUNDLED / "mnist" / "unet" / "config.json", "the network's config")
    if name not in SHAPES:
        raise UsageError(f"--architecture {name}: it takes one of {', '.join(NAMES)}{nearest(name, NAMES)}")
    size, multipliers, attention = SHAPES[name]
    return unet_config(
        channels=128,
        multipliers=multipliers,
        layers=2,
        attention={attention},
        in_channels=3,
        out_channels=3,
        size=size,
    )


def _write_weights(config: dict[str, Any], path: Path) -> tuple[Path, ...]:
    """The weights that diffusers' constructor draws, always the same ones, as a safetensors file."""
    from diffusers.models.unets.unet_2d import UNet2DModel
    from safetensors.torch import save_file

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        save_file(UNet2DModel.from_config(config).state_dict(), path)
    return (path,)


def describe_architecture(name: str, folder: Path, settings: ModelSettings | None = None) -> ModelDescription:
    """A published shape as a model; its weights are drawn when they are first asked for, into ``folder``.

    Raises:
        UsageError: for a name that is none.
        ModelError: for an image size that the shape cannot have, and a text-to-image model without transformers.
    """
    where = f"architecture {name}"
    if name in text_architectures.NAMES:
        return _describe_text(name, folder, where, settings)
    network = checked_network(architecture_config(name), settings.image_size if settings else None, where)
    return Architecture(
        source=where,
        name=name,
        kind="architecture",
        where=where,
        network=network,
        fetch_weights=lambda: _write_weights(network, folder / f"{name}.safetensors"),
        # All of these were trained with the linear schedule.
        scheduler=SchedulerSettings().model_dump(
            include={"num_train_timesteps", "beta_schedule", "beta_start", "beta_end", "prediction_type"}
        ),
        scheduler_name="linear schedule",
    )


def _describe_text(name: str, folder: Path, where: str, settings: ModelSettings | None) -> ModelDescription:
    check_installed()
    latents = text_architectures.describe_parts(name, folder, SEED)
    size = settings.image_size if settings else None
    network = checked_latent_network(text_architectures.unet_config(name), latents, size, where)

    def write_weights() -> tuple[Path, ...]:
        return write_random(text_architectures.unet_shapes(network), folder / f"{name}-unet.safetensors", SEED)

    return Architecture(
        source=where,
        name=name,
        kind="architecture",
        where=where,
        network=network,
        fetch_weights=write_weights,
        scheduler=text_architectures.scheduler_keys(name),
        scheduler_name="scaled linear schedule",
        latents=latents,
    )
