"""What a benchmark reads off a machine: repeats and their spread, peak memory, the matrix peak, the network's time."""

from __future__ import annotations

import contextlib
import re
import resource
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ddim_cli.sampling.host import return_memory
from ddim_cli.sampling.items import Item
from ddim_cli.sampling.loop import Sampler, captured
from ddim_cli.sampling.noise import BatchNoise

# Side of the square matrices whose product is timed: large enough for full speed, small enough to be quick.
MATRIX_SIDE = {"cuda": 8192, "cpu": 2048, "mps": 4096}


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def spread(values: Sequence[float]) -> dict[str, Any]:
    """Median, quartiles and extremes of one value or more; ``all`` in the order in which they were measured."""
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else [values[0]] * 3
    return {
        "median": middle,
        "quartiles": [low, high],
        "min": min(values),
        "max": max(values),
        "all": list(values),
    }


class PeakMemory:
    """The most memory in use since this was made, in bytes; ``meaning`` says of what.

    On a CPU it is the process's resident memory, with the interpreter and its libraries in it.
    """

    def __init__(self, device: torch.device):
        self._device = device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            self.meaning = "torch's allocations on the device"
            return
        return_memory()
        # VmHWM is reset by a write of 5; not every container allows it.
        reset = False
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")
            reset = True
        self.meaning = "the process's resident memory" + ("" if reset else ", since the process began")

    def now(self) -> int:
        """What is in use at the moment; 0 where that cannot be told."""
        if self._device.type == "cuda":
            return torch.cuda.memory_allocated(self._device)
        with contextlib.suppress(OSError):
            found = re.search(r"VmRSS:\s+(\d+) kB", Path("/proc/self/status").read_text())
            if found:
                return int(found[1]) * 1024
        return 0

    def read(self) -> int:
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._device)
        with contextlib.suppress(OSError):
            found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
            if found:
                return int(found[1]) * 1024
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024


def is_emulated(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the device computes ``dtype`` in float32, value by value: a CPU without instructions for it."""
    if device.type != "cpu" or dtype not in (torch.float16, torch.bfloat16):
        return False
    name = "_is_mkldnn_fp16_supported" if dtype == torch.float16 else "_is_mkldnn_bf16_supported"
    supported = getattr(torch.ops.mkldnn, name, None)
    return supported is None or not supported()


def matrix_peak(device: torch.device, dtype: torch.dtype, seconds: float = 0.5) -> float:
    """Floating-point operations a second of the device's fastest product of two square matrices in ``dtype``.

    Of an `is_emulated` dtype it is float32's, in which the device computes: torch's products of such matrices are
    made by a plain loop, which is slower by far than a network of that dtype, and takes minutes.
    """
    dtype = torch.float32 if is_emulated(device, dtype) else dtype
    side = MATRIX_SIDE[device.type]
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    a @ b
    best, began = float("inf"), time.perf_counter()
    while best == float("inf") or time.perf_counter() - began < seconds:
        synchronize(device)
        started = time.perf_counter()
        a @ b
        synchronize(device)
        best = min(best, time.perf_counter() - started)
    return 2 * side**3 / best


class NetworkClock:
    """A network that adds up the seconds spent in its calls. For a CPU, whose calls return when they are done."""

    def __init__(self, network: Callable[..., Tensor]):
        self._network = network
        self.seconds = 0.0

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        started = time.perf_counter()
        try:
            return self._network(*args, **kwargs)
        finally:
            self.seconds += time.perf_counter() - started


def seconds_on_cuda(call: Callable[[], Any], times: int, device: torch.device) -> float:
    """The current device's own time of ``times`` calls, between two events; replayed from a graph, if it can be."""
    try:
        replay = captured(call, device)
    except RuntimeError:
        torch.cuda.synchronize(device)
        replay = call
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    replay()
    start.record()
    for _ in range(times):
        replay()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1000


@torch.inference_mode()
def network_alone(sampler: Sampler, items: Sequence[Item], rows: int) -> float:
    """Seconds that the network calls of a batch take with nothing between them, on that batch's first input.

    On CUDA they are replayed from a graph, where the network can be captured, and timed by events:
    only the device's own work counts, not the launching of it.
    """
    device, steps = sampler.device, len(sampler.down.table)
    x = BatchNoise(items, rows, sampler.shape, device).draw().to(sampler.dtype)
    condition, first = sampler.conditions(items, rows), torch.zeros(1, dtype=torch.int64, device=device)

    def call() -> Tensor:
        return sampler.down.network(x, first, *condition)

    if device.type == "cuda":
        with torch.cuda.device(device):
            return seconds_on_cuda(call, steps, device)
    call()
    synchronize(device)
    started = time.perf_counter()
    for _ in range(steps):
        call()
    synchronize(device)
    return time.perf_counter() - started
