"""Sampling from Python: pictures one at a time, without files."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor, nn

from ddim_cli.config.layers import Layer, merge, read_file, table_layer
from ddim_cli.config.schema import Config, RuntimeSettings
from ddim_cli.errors import UsageError
from ddim_cli.models.load import LoadedModel, SamplingNetwork, as_sampling_network
from ddim_cli.outputs.picture import to_image
from ddim_cli.outputs.sidecar import describe_picture
from ddim_cli.sampling.loop import run_batches
from ddim_cli.sampling.network import Network
from ddim_cli.sampling.precision import (
    choose_batch_size,
    choose_device,
    choose_dtype,
    halve_to_fit,
    runtime_record,
    set_tf32,
)
from ddim_cli.sampling.record import make_record
from ddim_cli.sampling.resolve import Run, judge, resolve
from ddim_cli.sampling.run import load_run_network, make_sampler, rows_an_image

Model = LoadedModel | nn.Module | Network


class Sample(NamedTuple):
    """One picture: its seed, a PIL image, x0 float32 [C, H, W] in about [-1, 1], and its sidecar's content."""

    seed: int
    image: Image.Image
    tensor: Tensor
    metadata: dict[str, Any]


def _layers(config: Config | Mapping[str, Any] | str | Path | None) -> list[Layer]:
    if config is None:
        return []
    if isinstance(config, (str, Path)):
        return [read_file(Path(config))]
    if isinstance(config, Config):
        # Unset keys stay unset, so that the model's own scheduler config still fills them.
        config = config.model_dump(exclude_unset=True, exclude_none=True)
    if not isinstance(config, Mapping):
        raise UsageError(f"sample: config is a {type(config).__name__}; it must be a mapping, a path or a Config")
    return [table_layer(config, "config")]


def _resolve(layers: list[Layer], model: Model | str | Path | None) -> Run:
    if model is None:
        return resolve(layers)
    if isinstance(model, (str, Path)):
        return resolve([*layers, table_layer({"model": {"source": str(model)}}, "model")])
    if isinstance(model, LoadedModel):
        layer = model.description.scheduler_layer()
        return judge(merge([layer, *layers]), model.description)
    return judge(merge(layers))


def _network(model: Model) -> SamplingNetwork | Network:
    """A callable (x, t) -> tensor; the wrapper that diffusers' networks return is opened."""
    if isinstance(model, LoadedModel):
        return as_sampling_network(model)
    if not isinstance(model, nn.Module):
        return model

    def network(x: Tensor, timesteps: Tensor, *classes: Tensor) -> Tensor:
        output = model(x, timesteps, *classes)
        return output if isinstance(output, Tensor) else output[0]

    return network


def _place(runtime: RuntimeSettings, given: Model | None) -> tuple[torch.device, torch.dtype]:
    """Device and dtype of the run: as set, else those of the network that was handed over, else what auto means."""
    module = given.network if isinstance(given, LoadedModel) else given
    parameter = next(module.parameters(), None) if isinstance(module, nn.Module) else None
    if given is None:
        device = choose_device(runtime.device)
        return device, choose_dtype(runtime.dtype, device)
    # A network from outside is not moved: `auto` is where it already is.
    here = parameter if parameter is not None else torch.zeros(())
    device = here.device if runtime.device == "auto" else choose_device(runtime.device)
    return device, here.dtype if runtime.dtype == "auto" else choose_dtype(runtime.dtype, device)


def _shape(model: Model, shape: tuple[int, int, int] | None) -> tuple[int, int, int]:
    config = getattr(model, "config", None)
    if shape is None and config is not None and getattr(config, "sample_size", None):
        size = config.sample_size
        height, width = (size, size) if isinstance(size, int) else size
        shape = (config.in_channels, height, width)
    if shape is None:
        raise UsageError("sample: give shape=(C, H, W), since a callable does not tell what it takes")
    whole = isinstance(shape, (tuple, list)) and all(type(n) is int and n > 0 for n in shape)
    if not whole or len(shape) != 3 or shape[0] not in (1, 3, 4):
        raise UsageError(f"sample: shape is {shape!r}; it must be (C, H, W) with 1, 3 or 4 channels")
    return tuple(shape)


def sample(
    config: Config | Mapping[str, Any] | str | Path | None = None,
    model: Model | str | Path | None = None,
    shape: tuple[int, int, int] | None = None,
) -> Iterator[Sample]:
    """Sample as ``ddim sample`` does, yielding a `Sample` an image in the order of the seeds.

    Args:
        config: a `Config`, a nested mapping such as ``{"sampling": {"steps": 20}}``, a TOML file, or
            None for the defaults.
        model: what to sample from in place of ``config``'s [model]: a source as ``--model`` takes, a
            `LoadedModel`, a module, or any callable (x [B, C, H, W], t int64 [B]) -> prediction of
            x's shape. A module or callable is used on the device and in the dtype it is in; name
            them in [runtime] if they are not the CPU and float32.
        shape: (C, H, W) of an image, for a callable that has no diffusers config.

    Whether TF32 may be used is set for the whole process, as [runtime] says.

    Warns:
        UserWarning: where settings make garbage without being wrong.

    Raises:
        DdimError: (an ordinary exception with a sentence) for settings or a model that cannot work.
    """
    if model is not None and not isinstance(model, (str, Path)) and not callable(model):
        raise UsageError(
            f"sample: model is a {type(model).__name__}; it must be a source, a loaded model or a callable"
        )
    run = _resolve(_layers(config), model)
    for text in run.warnings:
        warnings.warn(text, stacklevel=2)
    given = None if model is None or isinstance(model, (str, Path)) else model
    device, dtype = _place(run.config.runtime, given)
    set_tf32(run.config.runtime.tf32)
    shape = (run.model.channels, *run.model.size) if run.model is not None else _shape(given, shape)
    seeds, asked = run.config.seeds(), run.config.sampling.batch_size
    batch_size = choose_batch_size(asked, len(seeds), run.model, device, dtype)
    batch_size = halve_to_fit(batch_size, run.model, device, dtype, rows_an_image(run))
    if given is None:
        network, compiled = load_run_network(run, device, dtype, batch_size, len(seeds))
    else:
        network, compiled = _network(given), False
    sampler = make_sampler(run, network, device, dtype, shape)
    record = make_record(run, runtime_record(run.config.runtime, device, dtype, batch_size, compiled))
    return _samples(run_batches(sampler, seeds, batch_size), record)


def _samples(batches, record: Mapping[str, Any]) -> Iterator[Sample]:
    for pictures in batches:
        for p in pictures:
            # A clone outside inference mode is an ordinary tensor.
            metadata = copy.deepcopy(describe_picture(record, p.seed, p.pixels, p.batch_size))
            yield Sample(p.seed, to_image(p.pixels), p.x0.clone(), metadata)
