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
from ddim_cli.models.device import choose_device, choose_dtype
from ddim_cli.models.load import LoadedModel, as_sampling_network
from ddim_cli.outputs.picture import to_image
from ddim_cli.outputs.sidecar import describe_picture
from ddim_cli.sampling.loop import run_batches
from ddim_cli.sampling.network import Network
from ddim_cli.sampling.outside import check_outside, guarded
from ddim_cli.sampling.precision import (
    choose_batch_size,
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


def _place(runtime: RuntimeSettings, given: Model | None) -> tuple[torch.device, torch.dtype]:
    """Device and dtype of the run: as set, else those of the network that was handed over, else what auto means.

    Raises:
        UsageError: for a device that is not there, and where another is set than the network is in: it is not moved.
    """
    if given is None:
        device = choose_device(runtime.device)
        return device, choose_dtype(runtime.dtype, device)
    module = given.network if isinstance(given, LoadedModel) else given
    parameters = list(module.parameters()) if isinstance(module, nn.Module) else []
    # Of a callable nothing is known: the CPU and float32, unless another is set.
    weights = [p for p in parameters if p.is_floating_point()] or [torch.zeros(())]
    device = weights[0].device if runtime.device == "auto" else choose_device(runtime.device)
    dtype = weights[0].dtype if runtime.dtype == "auto" else choose_dtype(runtime.dtype, device)
    if parameters and device not in {p.device for p in weights}:
        raise UsageError(
            f"runtime.device is {device}, but the network is on {weights[0].device}: leave runtime.device out, or hand "
            "the network over on that device"
        )
    if parameters and dtype not in {p.dtype for p in weights}:
        asked, found = (str(each).removeprefix("torch.") for each in (dtype, weights[0].dtype))
        raise UsageError(
            f"runtime.dtype is {asked}, but the network is in {found}: leave runtime.dtype out, or hand the network "
            "over in that dtype"
        )
    return device, dtype


def _shape(network: Network | nn.Module, shape: tuple[int, int, int] | None) -> tuple[int, int, int]:
    """(C, H, W) for a network from outside: as given, else what its diffusers config says. Raises UsageError."""
    config = getattr(network, "config", None)
    channels, size = getattr(config, "in_channels", None), getattr(config, "sample_size", None)
    if shape is None and channels and size:
        height, width = (size, size) if isinstance(size, int) else size
        shape = (channels, height, width)
    if shape is None:
        raise UsageError("sample: give shape=(C, H, W), since a callable does not tell what it takes")
    whole = isinstance(shape, (tuple, list)) and all(type(n) is int and n > 0 for n in shape)
    if not whole or len(shape) != 3 or shape[0] not in (1, 3, 4):
        raise UsageError(f"sample: shape is {shape!r}; it must be (C, H, W) with 1, 3 or 4 channels")
    if isinstance(network, nn.Module) and type(channels) is int and channels != shape[0]:
        raise UsageError(f"sample: shape is {shape!r}, but the network takes {channels} channels")
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
            x's shape, with ``sampling.classes`` called with the classes, int64 [B], too. It gives a
            tensor, or a tuple or an output object of diffusers, whose first entry counts; what it
            raises comes through. A module runs on the device and in the dtype it is in; where a
            callable is to run elsewhere than on the CPU in float32, say so in [runtime].
        shape: (C, H, W) of an image, for a network that does not tell.

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
    outside = None if isinstance(given, LoadedModel) else given
    if outside is not None:
        check_outside(outside, run.config)
    elif shape is not None:
        channels, (height, width) = run.model.channels, run.model.size
        raise UsageError(
            f"sample: shape is for a callable; {run.model.name} makes pictures of {channels} x {height} x {width}, "
            "and model.image_size chooses another size"
        )
    device, dtype = _place(run.config.runtime, given)
    set_tf32(run.config.runtime.tf32)
    shape = (run.model.channels, *run.model.size) if outside is None else _shape(outside, shape)
    seeds, asked = run.config.seeds(), run.config.sampling.batch_size
    batch_size = choose_batch_size(asked, len(seeds), run.model, device, dtype)
    batch_size = halve_to_fit(batch_size, run.model, device, dtype, rows_an_image(run))
    if given is None:
        network, compiled = load_run_network(run, device, dtype, batch_size, len(seeds))
    else:
        network, compiled = as_sampling_network(given) if outside is None else guarded(outside), False
    sampler = make_sampler(run, network, device, dtype, shape)
    record = make_record(run, runtime_record(run.config.runtime, device, dtype, batch_size, compiled), outside)
    return _samples(run_batches(sampler, seeds, batch_size), record)


def _samples(batches, record: Mapping[str, Any]) -> Iterator[Sample]:
    for pictures in batches:
        for p in pictures:
            # A clone outside inference mode is an ordinary tensor.
            metadata = copy.deepcopy(describe_picture(record, p.seed, p.pixels, p.batch_size))
            yield Sample(p.seed, to_image(p.pixels), p.x0.clone(), metadata)
