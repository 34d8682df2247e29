"""Any model that can be loaded -> a diffusers directory, which DDIMPipeline.from_pretrained loads."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from ddim_cli.config.layers import merge, validate_layer
from ddim_cli.errors import RunError, UsageError
from ddim_cli.models.describe import ModelDescription
from ddim_cli.models.load import load_described


def convert(model: ModelDescription, directory: Path, overwrite: bool = False) -> None:
    """Write unet/ (safetensors, float32), scheduler/ and model_index.json, all or nothing.

    Raises:
        UsageError: for a directory that is there already, or may not be made where it is named.
        ModelError: for weights that cannot be loaded.
        RunError: where writing it fails, as on a full disk.
    """
    from diffusers import DDIMPipeline, DDIMScheduler
    from safetensors import SafetensorError

    from ddim_cli.diffusion.betas import make_betas

    if directory.name in ("", ".."):
        raise UsageError(f"{directory}: name a directory to make, not one that you may be in")
    if directory.exists() and not overwrite and (not directory.is_dir() or any(directory.iterdir())):
        raise UsageError(f"{directory}: already there; replace it with --overwrite")
    layer = model.settings_layer()
    validate_layer(layer)
    settings = merge([layer]).config.scheduler
    keys = {k: v for k, v in settings.model_dump().items() if k != "previous_timestep"}
    if settings.beta_schedule not in ("linear", "scaled_linear", "squaredcos_cap_v2"):
        # Diffusers' DDIM has no such schedule; the betas themselves say the same.
        keys |= {"beta_schedule": "linear", "trained_betas": make_betas(settings).tolist()}
    if settings.trained_betas is not None:
        keys["trained_betas"] = list(settings.trained_betas)
    network = load_described(model).network
    temporary = directory.with_name(f".{directory.name}.{os.getpid()}.tmp")
    try:
        DDIMPipeline(network, DDIMScheduler(**keys)).save_pretrained(temporary, safe_serialization=True)
        if directory.exists():
            shutil.rmtree(directory) if directory.is_dir() else directory.unlink()
        temporary.rename(directory)
    except (OSError, SafetensorError) as error:
        # The weights' own writer tells of a full disk in an error of its own.
        kind = UsageError if isinstance(error, (PermissionError, NotADirectoryError)) else RunError
        raise kind(f"{directory}: cannot be written: {getattr(error, 'strerror', None) or error}") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
