"""Sampling from Python: pictures one at a time, without files."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor, nn

from ddim_cli.config.job_file import job_of, read_job_file
from ddim_cli.config.layers import Settings, layers_of, merge
from ddim_cli.config.schema import RuntimeSettings
from ddim_cli.errors import UsageError
from ddim_cli.models.device import choose_device, choose_dtype
from ddim_cli.models.load import LoadedModel
from ddim_cli.outputs.picture import to_image
from ddim_cli.sampling.items import Item, SeedItems
from ddim_cli.sampling.job import most_alike
from ddim_cli.sampling.network import Network
from ddim_cli.sampling.opened import OpenRun, open_run
from ddim_cli.sampling.outside import check_outside
from ddim_cli.sampling.resolve import resolve, settle, with_init, without_refinement
from ddim_cli.sampling.rows import rows_of

Model = LoadedModel | nn.Module | Network


class Sample(NamedTuple):
    """One picture: its seed, a PIL image, x0 float32 [C, H, W] in about [-1, 1], and its sidecar's content.

    ``seed`` is None of a row with a latent and no seed.
    """

    seed: int | None
    image: Image.Image
    tensor: Tensor
    metadata: dict[str, Any]


def _place(runtime: RuntimeSettings, given: Network | None) -> tuple[torch.device, torch.dtype]:
    """Device and dtype of the run: as set, else those of the network that was handed over, else what auto means.

    Raises:
        UsageError: for a device that is not there, and where another is set than the network is in: it is not moved.
    """
    if given is None:
        device = choose_device(runtime.device)
        return device, choose_dtype(runtime.dtype, device)
    parameters = list(given.parameters()) if isinstance(given, nn.Module) else []
    # Of a callable nothing is known: the CPU and float32, unless another is set.
    weights: list[Tensor] = [p for p in parameters if p.is_floating_point()] or [torch.zeros(())]
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


def _shape(network: Network, shape: tuple[int, int, int] | None) -> tuple[int, int, int]:
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
    return (shape[0], shape[1], shape[2])


def sample(
    config: Settings = None,
    model: Model | str | Path | None = None,
    shape: tuple[int, int, int] | None = None,
    items: Sequence[Mapping[str, Any]] | str | Path | None = None,
) -> Iterator[Sample]:
    """Sample as ``ddim sample`` does, yielding a `Sample` an image in the order of the seeds, or of the rows.

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
        items: rows in place of ``config``'s seeds, a picture each: a job file, or mappings with its keys ``name``,
            ``seed``, ``prompt``, ``negative_prompt``, ``class``, ``latent``, ``init``, ``mask`` and ``strength``. A
            callable takes no prompts, and is given classes where the rows have some.

    What can be refused is refused at once; a batch is sampled when its first picture is asked for. While the network is
    loaded, and while a batch is sampled, torch's switches of TF32 are as [runtime] says; between two pictures and at
    the end they are as they were.

    Warns:
        UserWarning: where settings make garbage without being wrong; and where a network cannot be captured as a CUDA
            graph, and runs slower.

    Raises:
        DdimError: (an ordinary exception with a sentence) for settings or a model that cannot work.
    """
    loaded: LoadedModel | None = None
    outside: Network | None = None
    job = None if items is None else read_job_file(Path(items)) if isinstance(items, (str, Path)) else job_of(items)
    if model is None or isinstance(model, (str, Path)):
        run = resolve(layers_of(config, model), conditions_follow=job is not None)
    elif isinstance(model, LoadedModel):
        loaded = model
        layers = [model.description.settings_layer(), *layers_of(config)]
        run = settle(merge(layers), model.description, conditions_follow=job is not None)
    elif callable(model):
        outside = model
        run = settle(merge(layers_of(config)), conditions_follow=job is not None)
    else:
        raise UsageError(
            f"sample: model is a {type(model).__name__}; it must be a source, a loaded model or a callable"
        )
    run = without_refinement(run)
    if run.init is None:
        run = with_init(run, None if outside is None else _shape(outside, shape))
    plan: Sequence[Item] = SeedItems.of(run.config, run.begins)
    asked = run.config
    if job is not None:
        run, plan = rows_of(job, run, None if outside is None else _shape(outside, shape))
        asked = plan.as_seeds(run.config)
    for text in run.warnings:
        warnings.warn(text, stacklevel=2)
    if outside is not None:
        check_outside(outside, asked)
    elif shape is not None:
        channels, height, width = run.model.shape
        raise UsageError(
            f"sample: shape is for a callable; {run.model.name} makes pictures of {channels} x {height} x {width}, "
            "and model.image_size chooses another size"
        )
    given = loaded if loaded is not None else outside
    device, dtype = _place(run.config.runtime, loaded.network if loaded is not None else outside)
    shape = None if outside is None else _shape(outside, shape)
    return _samples(open_run(run, device, dtype, most_alike(plan), len(plan), given, shape), plan)


def _samples(opened: OpenRun, plan: Sequence[Item]) -> Iterator[Sample]:
    batches = opened.batches(plan)
    while True:
        pictures = next(batches, None)
        while opened.warned:
            warnings.warn(opened.warned.pop(), stacklevel=2)
        if pictures is None:
            return
        for picture in pictures:
            assert picture.x0 is not None
            # A clone outside inference mode is an ordinary tensor.
            x0 = picture.x0.clone()
            yield Sample(picture.item.seed, to_image(picture.pixels), x0, opened.describe(picture))
