"""Any model that can be loaded -> a diffusers directory, which diffusers' own pipelines load.

That is DDIMPipeline for a model in pixel space, LDMPipeline for an unconditional latent one, and
StableDiffusionPipeline for a text-to-image model.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch

from ddim_cli.config.layers import merge, validate_layer
from ddim_cli.errors import RunError, UsageError
from ddim_cli.models.decoders import load_autoencoder
from ddim_cli.models.describe import ModelDescription
from ddim_cli.models.directory import CONFIG, PIPELINE
from ddim_cli.models.load import load_described
from ddim_cli.models.parts import Part, TextParts

# What StableDiffusionPipeline takes beside the parts that make a picture, and does without.
_LEFT_OUT = ("safety_checker", "feature_extractor", "image_encoder")


def convert(
    model: ModelDescription, directory: Path, overwrite: bool = False, dtype: torch.dtype = torch.float32
) -> None:
    """Write all parts (safetensors, in ``dtype``), the scheduler and model_index.json, all or nothing.

    Raises:
        UsageError: for a directory that is there already, or may not be made where it is named.
        ModelError: for weights that cannot be loaded.
        RunError: where writing it fails, as on a full disk.
    """
    from safetensors import SafetensorError

    if directory.name in ("", ".."):
        raise UsageError(f"{directory}: name a directory to make, not one that you may be in")
    if directory.exists() and not overwrite and (not directory.is_dir() or any(directory.iterdir())):
        raise UsageError(f"{directory}: already there; replace it with --overwrite")
    temporary = directory.with_name(f".{directory.name}.{os.getpid()}.tmp")
    try:
        _write(model, temporary, dtype)
        if directory.exists():
            shutil.rmtree(directory) if directory.is_dir() else directory.unlink()
        temporary.rename(directory)
    except (OSError, SafetensorError) as error:
        # The weights' own writer tells of a full disk in an error of its own.
        kind = UsageError if isinstance(error, (PermissionError, NotADirectoryError)) else RunError
        raise kind(f"{directory}: cannot be written: {getattr(error, 'strerror', None) or error}") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _write(model: ModelDescription, directory: Path, dtype: torch.dtype) -> None:
    from diffusers import DDIMScheduler
    from diffusers import __version__ as version

    # The network first: what is wrong with it is said before anything is there.
    network: Any = load_described(model, dtype=dtype).network
    network.save_pretrained(directory / "unet", safe_serialization=True)
    del network
    DDIMScheduler(**_scheduler_keys(model)).save_pretrained(directory / "scheduler")
    index = {"unet": ["diffusers", model.network_class], "scheduler": ["diffusers", "DDIMScheduler"]}
    pipeline = "DDIMPipeline"
    if model.latents is not None:
        pipeline, name = ("LDMPipeline", "vqvae") if model.latents.text is None else ("StableDiffusionPipeline", "vae")
        autoencoder = load_autoencoder(model.latents, dtype=dtype, layout=torch.contiguous_format)
        # Said here too where the scale is the user's, or diffusers' default.
        autoencoder.register_to_config(scaling_factor=model.latents.scale)
        autoencoder.save_pretrained(directory / name, safe_serialization=True)
        del autoencoder
        index[name] = ["diffusers", model.latents.autoencoder.class_name]
        if model.inpaints:
            pipeline = "StableDiffusionInpaintPipeline"
        if model.latents.text is not None:
            index |= _write_text(model.latents.text, directory, dtype)
    (directory / PIPELINE).write_text(
        json.dumps({"_class_name": pipeline, "_diffusers_version": version, **index}, indent=2) + "\n"
    )


def _scheduler_keys(model: ModelDescription) -> dict[str, Any]:
    """The arguments of diffusers' DDIMScheduler."""
    from ddim_cli.diffusion.betas import make_betas

    layer = model.settings_layer()
    validate_layer(layer)
    settings = merge([layer]).config.scheduler
    keys = {k: v for k, v in settings.model_dump().items() if k != "previous_timestep"}
    if settings.beta_schedule not in ("linear", "scaled_linear", "squaredcos_cap_v2"):
        # Diffusers' DDIM has no such schedule; the betas themselves say the same.
        keys |= {"beta_schedule": "linear", "trained_betas": make_betas(settings).tolist()}
    if settings.trained_betas is not None:
        keys["trained_betas"] = list(settings.trained_betas)
    return keys


def _write_text(text: TextParts, directory: Path, dtype: torch.dtype) -> dict[str, Any]:
    """Write text encoder and tokenizer; their entries of model_index.json."""
    from ddim_cli.models.text import load_text_encoder, load_tokenizer

    # Whatever is wrong with them is said now.
    load_text_encoder(text.encoder)
    load_tokenizer(text.tokenizer)
    _write_encoder(text.encoder, directory / "text_encoder", dtype)
    (directory / "tokenizer").mkdir()
    for path in text.tokenizer.files:
        shutil.copyfile(path, directory / "tokenizer" / path.name)
    return {
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        **{name: [None, None] for name in _LEFT_OUT},
        "requires_safety_checker": False,
    }


def _write_encoder(part: Part, folder: Path, dtype: torch.dtype) -> None:
    """Write a text encoder's weights under the names that they have, which transformers' versions all read."""
    from safetensors.torch import save_file

    from ddim_cli.models.weights import read_tensors

    folder.mkdir()
    tensors = {
        name: tensor.to(dtype).contiguous() if tensor.is_floating_point() else tensor
        for path in part.weights
        for name, tensor in read_tensors(path)
    }
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config = {k: v for k, v in part.config.items() if k not in ("torch_dtype", "dtype")}
    written = {**config, "torch_dtype": str(dtype).removeprefix("torch.")}
    (folder / CONFIG).write_text(json.dumps(written, indent=2) + "\n")
