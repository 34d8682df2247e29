"""Text-to-image models of published shape with random weights, and a tokenizer made on the spot.

Stable Diffusion 1.5 and 2.1 (Rombach et al., arXiv:2112.10752): UNet, autoencoder and text encoder. The first takes the
texts of CLIP's ViT-L/14, the second those of OpenCLIP's ViT-H/14, of which it leaves the last layer out.
"""

from __future__ import annotations

import json
import string
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ddim_cli.evaluation.random_weights import write_random
from ddim_cli.models.latent import Latents
from ddim_cli.models.networks import TEXT_NETWORK_CLASS
from ddim_cli.models.parts import MERGES, TOKENIZER_SETTINGS, VOCABULARY, Part, TextParts, Tokenizer

# The prompt where none is given: random weights make nothing of it, and every prompt costs the same.
DEFAULT_PROMPT = "a photograph of an astronaut riding a horse"
_UNET: dict[str, Any] = {
    "_class_name": TEXT_NETWORK_CLASS,
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": [320, 640, 1280, 1280],
    "layers_per_block": 2,
    "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
    "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
    "norm_num_groups": 32,
}
_AUTOENCODER: dict[str, Any] = {
    "_class_name": "AutoencoderKL",
    "in_channels": 3,
    "out_channels": 3,
    "latent_channels": 4,
    "block_out_channels": [128, 256, 512, 512],
    "layers_per_block": 2,
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "norm_num_groups": 32,
    "scaling_factor": 0.18215,
}
_TEXT: dict[str, Any] = {
    "architectures": ["CLIPTextModel"],
    "vocab_size": 49408,
    "max_position_embeddings": 77,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 1,
}
# What differs: of the network, and of the text encoder.
UNETS: dict[str, dict[str, Any]] = {
    "sd15": {"sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8},
    "sd21": {
        "sample_size": 96,
        "cross_attention_dim": 1024,
        "attention_head_dim": [5, 10, 20, 20],
        "use_linear_projection": True,
    },
}
TEXTS: dict[str, dict[str, Any]] = {
    "sd15": {
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "hidden_act": "quick_gelu",
    },
    "sd21": {
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 23,
        "num_attention_heads": 16,
        "hidden_act": "gelu",
    },
}
PREDICTIONS = {"sd15": "epsilon", "sd21": "v_prediction"}
NAMES = tuple(UNETS)


def unet_config(name: str) -> dict[str, Any]:
    return {**_UNET, **UNETS[name]}


def scheduler_keys(name: str) -> dict[str, Any]:
    """The schedule that these were trained with."""
    return {
        "num_train_timesteps": 1000,
        "beta_schedule": "scaled_linear",
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "prediction_type": PREDICTIONS[name],
        "clip_sample": False,
        "set_alpha_to_one": False,
        "steps_offset": 1,
    }


def unet_shapes(config: Mapping[str, Any]) -> dict[str, torch.Size]:
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

    return _shapes(lambda: UNet2DConditionModel.from_config({k: v for k, v in config.items() if k[0] != "_"}))


def describe_parts(name: str, folder: Path, seed: int) -> Latents:
    """The parts beside the network; their weights and the tokenizer are made in ``folder`` when they are asked for."""
    text, where = {**_TEXT, **TEXTS[name]}, f"architecture {name}"

    def write_autoencoder() -> tuple[Path, ...]:
        from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

        shapes = _shapes(lambda: AutoencoderKL.from_config(_AUTOENCODER))
        return write_random(shapes, folder / f"{name}-vae.safetensors", seed + 1)

    def write_encoder() -> tuple[Path, ...]:
        from transformers import CLIPTextConfig, CLIPTextModel

        shapes = _shapes(lambda: CLIPTextModel(CLIPTextConfig.from_dict(dict(text))))
        return write_random(shapes, folder / f"{name}-text_encoder.safetensors", seed + 2)

    encoder = Part(f"{where}: text_encoder", text, write_encoder)
    tokenizer = Tokenizer(f"{where}: tokenizer", lambda: write_tokenizer(folder / f"{name}-tokenizer"))
    autoencoder = Part(f"{where}: vae", _AUTOENCODER, write_autoencoder)
    return Latents(
        autoencoder,
        scale=_AUTOENCODER["scaling_factor"],
        factor=8,
        picture_channels=3,
        text=TextParts(encoder, tokenizer),
    )


def _shapes(build: Callable[[], nn.Module]) -> dict[str, torch.Size]:
    with torch.device("meta"):
        network = build()
    return {name: tensor.shape for name, tensor in network.state_dict().items()}


def write_tokenizer(folder: Path) -> tuple[Path, ...]:
    """A tokenizer of single letters, digits and marks, as a prompt of ASCII needs it."""
    letters = [*string.ascii_lowercase, *string.digits, *string.punctuation]
    words = ["<|startoftext|>", "<|endoftext|>", *letters, *(letter + "</w>" for letter in letters)]
    files = {
        VOCABULARY: json.dumps({word: i for i, word in enumerate(words)}),
        MERGES: "#version: 0.2\n",
        TOKENIZER_SETTINGS[0]: json.dumps({"tokenizer_class": "CLIPTokenizer", "model_max_length": 77}),
    }
    folder.mkdir()
    for file, content in files.items():
        (folder / file).write_text(content)
    return tuple(folder / file for file in files)
