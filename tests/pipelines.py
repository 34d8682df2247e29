"""Pipelines of latent models made on the spot: shapes of diffusers' own tests, random weights, a small tokenizer."""

from __future__ import annotations

import json
import string
from collections.abc import Sequence
from pathlib import Path

import torch

# Single letters are tokens, and so are these words: what it takes for prompts of a few tokens.
WORDS = ("a", "the", "bold", "thin", "seven", "zero", "one")


def make_tokenizer(folder: Path, limit: int = 77, words: Sequence[str] = WORDS):
    """A CLIPTokenizer of letters and ``words``, from files in ``folder``."""
    from transformers import CLIPTokenizer

    vocabulary = ["<|startoftext|>", "<|pad|>", "<|endoftext|>", *string.ascii_lowercase]
    vocabulary += [f"{letter}</w>" for letter in string.ascii_lowercase]
    merges = []
    for word in words:
        start = word[0]
        for letter in word[1:-1]:
            merges.append(f"{start} {letter}")
            start += letter
            vocabulary.append(start)
        if len(word) > 1:
            merges.append(f"{start} {word[-1]}</w>")
            vocabulary.append(f"{word}</w>")
    numbers = {token: number for number, token in enumerate(dict.fromkeys(vocabulary))}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps(numbers))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *dict.fromkeys(merges)]) + "\n")
    return CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=limit)


def text_scheduler(**changes):
    from diffusers import DDIMScheduler

    settings = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "clip_sample": False}
    return DDIMScheduler(**{**settings, "set_alpha_to_one": False, "steps_offset": 1, **changes})


def make_text_pipeline(
    folder: Path, shape: str = "sd1", limit: int = 77, words: Sequence[str] = WORDS, channels: int = 4, **scheduler
):
    """A random StableDiffusionPipeline of 64x64 pictures, ``shape`` "sd1" or "sd2", saved into ``folder``.

    With 9 ``channels`` a StableDiffusionInpaintPipeline, whose network takes a mask and what is known beside a latent.
    """
    from diffusers import AutoencoderKL, StableDiffusionInpaintPipeline, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    widths = {"sd1": (4, 8), "sd2": (32, 64)}[shape]
    blocks = {
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    }
    network = {
        "sd1": {"layers_per_block": 1, "cross_attention_dim": 8, "norm_num_groups": 2},
        "sd2": {"layers_per_block": 2, "cross_attention_dim": 32, "attention_head_dim": (2, 4)}
        | {"use_linear_projection": True},
    }[shape]
    text = {
        "sd1": {"hidden_size": 8, "intermediate_size": 16, "num_attention_heads": 2, "num_hidden_layers": 2},
        "sd2": {"hidden_size": 32, "intermediate_size": 37, "num_attention_heads": 4, "num_hidden_layers": 5}
        | {"hidden_act": "gelu", "projection_dim": 512},
    }[shape]
    groups = {"norm_num_groups": 2} if shape == "sd1" else {}
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        block_out_channels=widths, sample_size=32, in_channels=channels, out_channels=4, **blocks, **network
    )
    torch.manual_seed(0)
    vae = AutoencoderKL(
        block_out_channels=list(widths),
        down_block_types=["DownEncoderBlock2D"] * 2,
        up_block_types=["UpDecoderBlock2D"] * 2,
        latent_channels=4,
        **groups,
    )
    torch.manual_seed(0)
    marks = {"bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 1, "vocab_size": 1000}
    encoder = CLIPTextModel(CLIPTextConfig(**marks, **text, max_position_embeddings=limit))
    kind = StableDiffusionPipeline if channels == 4 else StableDiffusionInpaintPipeline
    pipeline = kind(
        unet=unet,
        vae=vae,
        text_encoder=encoder,
        tokenizer=make_tokenizer(folder.with_name(f"{folder.name}-tokenizer"), limit, words),
        scheduler=text_scheduler(**scheduler),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.save_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def make_latent_pipeline(folder: Path, scale: float = 0.18215):
    """A random LDMPipeline of 64x64 pictures, its codebook spread enough to tell one scale from another."""
    from diffusers import DDIMScheduler, LDMPipeline, UNet2DModel, VQModel

    torch.manual_seed(0)
    unet = UNet2DModel(
        block_out_channels=(32, 64),
        layers_per_block=2,
        sample_size=32,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )
    torch.manual_seed(0)
    autoencoder = VQModel(
        block_out_channels=[32, 64],
        down_block_types=["DownEncoderBlock2D"] * 2,
        up_block_types=["UpDecoderBlock2D"] * 2,
        latent_channels=3,
        scaling_factor=scale,
    )
    autoencoder.quantize.embedding.weight.data.normal_()
    scheduler = DDIMScheduler(beta_start=0.0015, beta_end=0.0195, beta_schedule="scaled_linear", clip_sample=False)
    pipeline = LDMPipeline(vqvae=autoencoder, unet=unet, scheduler=scheduler)
    pipeline.save_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
