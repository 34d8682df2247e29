"""From a description to a network on a device, with the described weights.

`load_model` gives diffusers' UNet2DModel, for whoever wants to do more with it than sample; `load_sampling_network`
gives what the denoising loop runs: `UNet` or `ConditionalUNet` where they can, and diffusers is imported only where
they cannot.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, TypeVar, runtime_checkable

import torch
from torch import Tensor, nn

from ddim_cli.config.layers import merge, table_layer
from ddim_cli.errors import ModelError, first_line
from ddim_cli.models import conditional_unet, unet
from ddim_cli.models.blocks import is_of_embedding, pack_convolutions, repeat_rows
from ddim_cli.models.conditional_unet import ConditionalUNet
from ddim_cli.models.describe import ModelDescription, describe_model
from ddim_cli.models.device import DTYPES, choose_device, choose_dtype
from ddim_cli.models.stored import read_weights
from ddim_cli.models.unet import UNet
from ddim_cli.models.weights import check_fit

if TYPE_CHECKING:
    from diffusers.models.unets.unet_2d import UNet2DModel
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

AnyModule = TypeVar("AnyModule", bound=nn.Module)
# More than [runtime] has: whoever loads a network may want to do more with it than sample.
_LOADED_DTYPES = {**DTYPES, "float64": torch.float64}


@dataclass(frozen=True)
class LoadedModel:
    """A network with what is known of it.

    Called as ``model(x, t)``, as ``model(x, t, classes)`` where it is class-conditional, and as ``model(x, t, text)``
    where it takes text, the text encoder's last hidden state: [B, C, H, W], int64 [B], int64 [B] or [B, L, D] ->
    [B, C, H, W].
    """

    network: nn.Module
    description: ModelDescription

    @property
    def parameters(self) -> int:
        return sum(p.numel() for p in self.network.parameters())

    def __call__(self, x: Tensor, timesteps: Tensor, condition: Tensor | None = None) -> Tensor:
        if self.description.takes_text:
            return self.network(x, timesteps, encoder_hidden_states=condition, return_dict=False)[0]
        return self.network(x, timesteps, class_labels=condition, return_dict=False)[0]


@runtime_checkable
class SamplingNetwork(Protocol):
    """A network in two parts, so that what depends on timestep and class alone is computed apart.

    ``project(timesteps [N], classes int64 [N] or None) -> float32 [N, P]``;
    ``body(x [B, C, H, W], projections [B or 1, P]) -> prediction [B, C, H, W]``. One that takes text has a third
    part, `TextNetwork.attend`, and its body takes what that gives.
    """

    def project(self, timesteps: Tensor, classes: Tensor | None = None) -> Tensor: ...

    @property
    def body(self) -> Callable[..., Tensor]: ...


@runtime_checkable
class TextNetwork(SamplingNetwork, Protocol):
    """A network that is conditioned on text.

    ``attend(text [N, L, D], the text encoder's last hidden state) -> [N, L, K]``, computed once a prompt. ``body`` may
    be given several texts for each image, n B rows for x of B: it predicts for n times x, one after the other.
    """

    def attend(self, text: Tensor) -> Tensor: ...


class WholeNetwork(nn.Module):
    """Diffusers' network as a `SamplingNetwork` that has nothing apart: its projections are timestep and class."""

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network

    def project(self, timesteps: Tensor, classes: Tensor | None = None) -> Tensor:
        columns = [timesteps] if classes is None else [timesteps, classes]
        return torch.stack(columns, dim=1).float()

    def body(self, x: Tensor, projections: Tensor, *context: Tensor) -> Tensor:
        rows = projections.long().expand(len(x), -1)
        classes = rows[:, 1] if rows.shape[1] > 1 else None
        return self.network(x, rows[:, 0], class_labels=classes, return_dict=False)[0]


class WholeTextNetwork(WholeNetwork):
    """Diffusers' UNet2DConditionModel as a `TextNetwork`: it takes the embedding as it is."""

    def attend(self, text: Tensor) -> Tensor:
        return text

    def body(self, x: Tensor, projections: Tensor, *context: Tensor) -> Tensor:
        [texts] = context
        x = repeat_rows(x, len(texts))
        rows = projections.long().expand(len(x), -1)
        return self.network(x, rows[:, 0], encoder_hidden_states=texts.to(x.dtype), return_dict=False)[0]


def network_config(description: ModelDescription) -> dict[str, Any]:
    """The config to build, without a head for a learned variance."""
    config = {k: v for k, v in description.network.items() if not k.startswith("_")}
    return {**config, "out_channels": description.channels}


def build_network(description: ModelDescription) -> UNet2DModel | UNet2DConditionModel:
    """Diffusers' network without memory for its weights.

    Raises:
        ModelError: for a config that builds none.
    """
    kind: Any
    if description.takes_text:
        from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

        kind = UNet2DConditionModel
    else:
        from diffusers.models.unets.unet_2d import UNet2DModel

        kind = UNet2DModel

    config = network_config(description)
    try:
        with torch.device("meta"):
            network = kind.from_config(config)
        # Constants that are no part of the weights would have no values: the rare networks with such are built whole.
        constants = {name for name, _ in network.named_buffers()} - network.state_dict().keys()
        return kind.from_config(config) if constants else network
    except Exception as error:
        # A config can be wrong in as many ways as its class has arguments; it says which in its own words.
        raise ModelError(
            f"{description.where}: its config builds no {description.network_class}: {first_line(error)}"
        ) from None


def _check_keys(description: ModelDescription, expected: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> None:
    """Raise ModelError where the weights do not fit; of those of another kind of model, it says of which."""
    if not expected.keys() & weights.keys():
        from ddim_cli.models import original

        original.refuse_foreign(description.weights[0], sorted(weights.keys() - expected.keys()))
    check_fit(expected, weights, description.weights[0])


def load_described(
    description: ModelDescription, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> LoadedModel:
    """Load the weights of a described model to ``device`` in ``dtype``, in evaluation mode.

    Each tensor is converted as it is read, so that there is no second full copy.

    Raises:
        ModelError: for a config that builds no network, a damaged file, or weights that do not fit.
    """
    network = _with_weights(build_network(description), description, device, lambda name: dtype)
    return LoadedModel(network, description)


def _with_weights(
    network: AnyModule,
    description: ModelDescription,
    device: torch.device | str,
    dtype_of: Callable[[str], torch.dtype],
    wanted: Callable[[str], bool] = lambda name: True,
) -> AnyModule:
    """Give ``network`` those weights that are ``wanted``, on ``device``. Raises ModelError if they do not fit."""
    weights = {name: tensor.to(device, dtype_of(name)) for name, tensor in read_weights(description) if wanted(name)}
    _check_keys(description, {k: v for k, v in network.state_dict().items() if wanted(k)}, weights)
    network.load_state_dict(weights, assign=True, strict=False)
    return network.eval().requires_grad_(False)


def is_ours(description: ModelDescription) -> bool:
    """Whether a network of our own, `UNet` or `ConditionalUNet`, computes what this one does."""
    kind = conditional_unet if description.takes_text else unet
    return kind.supports(network_config(description))


def build_unet(description: ModelDescription) -> UNet | ConditionalUNet:
    """Our own network without memory for its weights, of a model that `is_ours`."""
    config = network_config(description)
    with torch.device("meta"):
        return ConditionalUNet(config) if description.takes_text else UNet(config)


def _whole(network: nn.Module, description: ModelDescription) -> WholeNetwork:
    return (WholeTextNetwork if description.takes_text else WholeNetwork)(network)


def load_sampling_network(
    description: ModelDescription,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    packed: bool = True,
) -> SamplingNetwork:
    """Load a described model to be sampled from: our own network, fused, where it `is_ours`, else diffusers'.

    On a CPU its convolutions are ``packed`` (see `blocks.PackedConv2d`), unless the network is to be exported.

    Raises:
        ModelError: as `load_described`.
    """
    if not is_ours(description):
        return _whole(load_described(description, device, dtype).network, description)
    network = _with_weights(build_unet(description), description, device, _mixed(dtype))
    network.fuse()
    if packed:
        pack_convolutions(network)
    return network


def load_projection(
    description: ModelDescription, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> SamplingNetwork:
    """As `load_sampling_network`, but only ``project`` and ``attend`` can be called: no other weights are read.

    Raises:
        ModelError: as `load_described`.
    """
    if not is_ours(description):
        return _whole(nn.Identity(), description)
    return _with_weights(build_unet(description), description, device, _mixed(dtype), _is_apart).fuse()


def _is_apart(name: str) -> bool:
    """Whether a parameter has no part in the body: it belongs to ``project`` or to ``attend``."""
    return is_of_embedding(name) or name.endswith((".attn2.to_k.weight", ".attn2.to_v.weight"))


def as_sampling_network(model: LoadedModel) -> SamplingNetwork:
    """A model that was loaded with `load_described`, ready to be sampled from; it shares the weights."""
    if not is_ours(model.description):
        return _whole(model.network, model.description)
    network = build_unet(model.description)
    dtype_of = _mixed(next(model.network.parameters()).dtype)
    weights = {name: tensor.to(dtype_of(name)) for name, tensor in model.network.state_dict().items()}
    network.load_state_dict(weights, assign=True)
    network.eval().requires_grad_(False).fuse()
    pack_convolutions(network)
    return network


def _mixed(dtype: torch.dtype) -> Callable[[str], torch.dtype]:
    """What sees the timestep alone is computed once: float32 costs nothing there."""
    return lambda name: torch.float32 if is_of_embedding(name) and dtype != torch.float64 else dtype


def load_model(
    source: str = "mnist",
    device: torch.device | str = "cpu",
    dtype: torch.dtype | str = torch.float32,
    **settings: object,
) -> LoadedModel:
    """Load a model from wherever ``ddim sample --model`` takes one.

    Args:
        source: a bundled name, a diffusers directory, a checkpoint or safetensors file, either of these by its URL
            (s3://...), or a Hub id.
        device: where the weights go: cpu, cuda, cuda:N, mps, or auto, which means what runtime.device = "auto" does.
        dtype: what they are converted to: float32, bfloat16, float16, float64, or auto, as runtime.dtype has it.
        settings: other keys of [model]: revision, variant, subfolder, ema, image_size, null_class.

    Raises:
        ModelError: (an ordinary exception with a sentence) where there is no such model, or it is damaged.
        ConfigError: (likewise) for a setting that is unknown or wrong.
        UsageError: (likewise) for a device that is not there.
    """
    table = {"model": {"source": str(source), **settings}, "runtime": {"device": str(device)}}
    config = merge([table_layer(table, "load_model")]).config
    place = choose_device(config.runtime.device)
    kind = choose_dtype("auto", place) if dtype == "auto" else _LOADED_DTYPES.get(str(dtype).removeprefix("torch."))
    if kind is None:
        raise ModelError(f"load_model: dtype is {dtype!r}; it must be one of auto, {', '.join(_LOADED_DTYPES)}")
    return load_described(describe_model(config.model), place, kind)
