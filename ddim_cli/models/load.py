"""From a description to a network on a device: diffusers' UNet2DModel with weights from safetensors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers.models.unets.unet_2d import UNet2DModel
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from ddim_cli.config.schema import ModelSettings
from ddim_cli.errors import ModelError
from ddim_cli.models.describe import ModelDescription, describe_model


@dataclass(frozen=True)
class LoadedModel:
    """A network with what is known of it. Called as ``model(x, t)``: [B, C, H, W], int64 [B] -> [B, C, H, W]."""

    network: nn.Module
    description: ModelDescription

    @property
    def parameters(self) -> int:
        return sum(p.numel() for p in self.network.parameters())

    def __call__(self, x: Tensor, timesteps: Tensor) -> Tensor:
        return self.network(x, timesteps, return_dict=False)[0]


def _build(description: ModelDescription) -> UNet2DModel:
    """The network without memory for its weights."""
    config = {k: v for k, v in description.network.items() if not k.startswith("_")}
    try:
        with torch.device("meta"):
            return UNet2DModel.from_config(config)
    except Exception as error:
        # A config can be wrong in as many ways as UNet2DModel has arguments; it says which in its own words.
        raise ModelError(f"{description.directory}: its config.json builds no UNet2DModel: {error}") from None


def _read_weights(path: Path, dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
    """Tensors of a safetensors file, each converted as it is read, so that there is no second full copy."""
    try:
        with safe_open(path, framework="pt", device="cpu") as stream:
            return {name: stream.get_tensor(name).to(device, dtype) for name in stream.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{path}: not a whole safetensors file: {error}") from None


def _check_keys(path: Path, expected: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> None:
    """ModelError with the first three keys that are missing, extra or of the wrong shape, and how many there are."""

    def some(keys: list[str]) -> str:
        return f"{', '.join(keys[:3])}{' ...' if len(keys) > 3 else ''} ({len(keys)} in all)"

    missing = sorted(expected.keys() - found.keys())
    extra = sorted(found.keys() - expected.keys())
    shapes = [
        f"{k} {list(found[k].shape)} instead of {list(expected[k].shape)}"
        for k in sorted(expected.keys() & found.keys())
        if expected[k].shape != found[k].shape
    ]
    broken = [k for k in sorted(expected.keys() & found.keys()) if not bool(found[k].isfinite().all())]
    problems = [
        f"{what} {some(keys)}"
        for what, keys in (("lacks", missing), ("has unknown", extra), ("has shapes", shapes), ("has NaN in", broken))
        if keys
    ]
    if problems:
        raise ModelError(f"{path}: the weights do not fit config.json: {'; '.join(problems)}")


def load_described(
    description: ModelDescription, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> LoadedModel:
    """Load the weights of a described model to ``device`` in ``dtype``, in evaluation mode.

    Raises:
        ModelError: for a config that builds no network, a damaged file, or weights that do not fit.
    """
    network = _build(description)
    weights: dict[str, Tensor] = {}
    for path in description.weights:
        weights |= _read_weights(path, dtype, torch.device(device))
    _check_keys(description.weights[0], network.state_dict(), weights)
    network.load_state_dict(weights, assign=True)
    return LoadedModel(network.eval().requires_grad_(False), description)


def load_model(
    source: str = "mnist",
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    variant: str | None = None,
    subfolder: str | None = None,
) -> LoadedModel:
    """Load a bundled model by name or a diffusers directory by path.

    Args:
        source: ``"mnist"`` or a directory (a pipeline with ``unet/``, a bare UNet folder, or flat).
        device: where the weights go.
        dtype: what they are converted to.
        variant: of the weights file, as in ``diffusion_pytorch_model.VARIANT.safetensors``.
        subfolder: the network's folder inside the directory.

    Raises:
        ModelError: (an ordinary exception with a sentence) where that cannot be done.
    """
    settings = ModelSettings(source=str(source), variant=variant, subfolder=subfolder)
    return load_described(describe_model(settings), device, dtype)
