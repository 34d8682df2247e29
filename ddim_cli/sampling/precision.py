"""TF32 and batch size, and what of the machine bears on the pictures."""

from __future__ import annotations

import contextlib
import os
import platform
from collections.abc import Iterator

import torch

from ddim_cli.config.schema import RuntimeSettings
from ddim_cli.models.describe import ModelDescription
from ddim_cli.models.inspect import activation_bytes
from ddim_cli.sampling.host import free_memory
from ddim_cli.sampling.plan import even_batch_size
from ddim_cli.sampling.resolve import Run

# A CPU gains little from larger batches, and a killed run loses the one that is being made: as many pixels as this,
# and images as this. The GPU's bound is not measured yet.
PIXELS_ON_CPU, MOST_ON_CPU, MOST_ON_GPU = 64 * 32 * 32, 64, 512
# Of a latent model, whose pixels cost more, so many fewer as its network is larger than this.
PARAMETERS_ON_CPU = 50_000_000
# A step of a network of so many parameters takes seconds, where a gigabyte is read again in one.
LARGE_ON_CPU = 200_000_000
SHARE_OF_MEMORY = 0.5


@contextlib.contextmanager
def tf32(allowed: bool) -> Iterator[None]:
    """Allow or forbid TF32 in matrix products and convolutions within the block; torch's default allows it in cuDNN."""
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    value: bool | str = allowed
    try:
        before = [(each, "allow_tf32", each.allow_tf32) for each in (matmul, cudnn)]
    except RuntimeError:
        # A program has used torch's newer switches, after which it no longer reads these.
        before = [(each, "fp32_precision", each.fp32_precision) for each in (matmul, cudnn.conv, cudnn.rnn)]  # type: ignore[attr-defined]  # set when torch is imported
        value = "tf32" if allowed else "ieee"
    for switch, name, _ in before:
        setattr(switch, name, value)
    try:
        yield
    finally:
        for switch, name, was in before:
            setattr(switch, name, was)


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type == "cpu":
        try:
            with open("/proc/cpuinfo") as stream:
                names = [line.partition(":")[2].strip() for line in stream if line.startswith("model name")]
            if names:
                return names[0]
        except OSError:
            pass
    return platform.processor() or platform.machine()


def total_memory(device: torch.device) -> int:
    """Bytes of the device's memory, or of the host's for a CPU.

    All of it, not what is free: the same command is to choose the same batch size again.
    """
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    if device.type == "mps":
        return torch.mps.recommended_max_memory()
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def choose_batch_size(
    asked: int | str, count: int, model: ModelDescription | None, device: torch.device, dtype: torch.dtype
) -> int:
    """The batch size for ``count`` images, of which a batch has no more; ``auto``: what memory allows, in batches of
    equal size.

    Of a network from outside (``model`` None) nothing is known, and 64 is the most.
    """
    if asked != "auto":
        return max(1, min(int(asked), count))
    most = MOST_ON_CPU if device.type == "cpu" or model is None else MOST_ON_GPU
    if model is not None and device.type == "cpu":
        _, height, width = model.state_shape
        pixels = int(PIXELS_ON_CPU * min(1.0, PARAMETERS_ON_CPU / model.parameters)) if model.latents else PIXELS_ON_CPU
        most = max(1, min(most, pixels // (height * width)))
    if model is not None:
        by_memory = int(total_memory(device) * SHARE_OF_MEMORY / activation_bytes(model, dtype.itemsize))
        most = max(1, min(most, by_memory))
    return even_batch_size(max(1, count), most)


def halve_to_fit(
    batch_size: int, model: ModelDescription | None, device: torch.device, dtype: torch.dtype, rows: int = 1
) -> int:
    """The batch size, halved until the host's memory suffices for its batches, of ``rows`` rows an image.

    Of a CPU alone: a GPU says when it has no more, and a host promises what it does not have, then ends the process.
    """
    if model is None or device.type != "cpu":
        return batch_size
    free = free_memory()
    if free is None:
        return batch_size
    share = (free - model.parameters * dtype.itemsize) * SHARE_OF_MEMORY
    while batch_size > 1 and batch_size * rows * activation_bytes(model, dtype.itemsize) > share:
        batch_size //= 2
    return batch_size


def offloads(run: Run, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether text encoder and autoencoder are to leave the memory while the network runs.

    With ``runtime.offload = "auto"`` where all parts together would take more than half of the memory that there is;
    on a CPU also where the network is so large that reading them again takes no time beside its steps.
    """
    setting, model = run.config.runtime.offload, run.model
    if setting != "auto" or model.latents is None:
        return setting is True
    if device.type == "cpu" and model.parameters > LARGE_ON_CPU:
        return True
    there = free_memory() if device.type == "cpu" else total_memory(device)
    wanted = model.parameters * dtype.itemsize + model.latents.parameters * torch.float32.itemsize
    return there is not None and wanted > SHARE_OF_MEMORY * there


def runtime_record(
    settings: RuntimeSettings, device: torch.device, dtype: torch.dtype, batch_size: int, compiled: bool = False
) -> dict:
    """What of the machine and its settings bears on the pictures, for the sidecar."""
    from importlib import metadata

    from ddim_cli import __version__

    return {
        "device": str(device),
        "device_name": device_name(device),
        "dtype": str(dtype).removeprefix("torch."),
        "tf32": settings.tf32,
        "compile": compiled,
        "batch_size": batch_size,
        "threads": torch.get_num_threads(),
        "versions": {
            "ddim_cli": __version__,
            "torch": str(torch.__version__),
            "diffusers": metadata.version("diffusers"),
            "python": platform.python_version(),
        },
    }
