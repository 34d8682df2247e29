"""The denoising loop: from noise to x0, a batch at a time, on the device."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ddim_cli.diffusion.coefficients import StepTable
from ddim_cli.diffusion.step import X0Treatment, ddim_step
from ddim_cli.errors import RunError, UsageError
from ddim_cli.sampling.network import StepNetwork
from ddim_cli.sampling.noise import ImageNoise
from ddim_cli.sampling.plan import padded

# Called after each step with the number of steps done.
OnStep = Callable[[int], None]
# Called with the new batch size when memory did not suffice for the old one.
OnHalved = Callable[[int], None]
# Steps that a GPU may be behind the host: enough to keep it busy, few enough for a progress bar to be true.
STEPS_AHEAD = 8


@dataclass(frozen=True)
class Sampler:
    """All that a batch needs besides its seeds.

    ``shape`` is (C, H, W); ``dtype`` the network's; ``draws_noise`` whether each step draws noise;
    ``classes`` what a conditional network is given: classes[seed mod their number]; ``keeps_x0``
    whether pictures carry x0 beside their pixels.
    """

    network: StepNetwork
    table: StepTable
    treatment: X0Treatment
    shape: tuple[int, int, int]
    device: torch.device
    dtype: torch.dtype
    draws_noise: bool
    classes: tuple[int, ...] = ()
    keeps_x0: bool = True

    def condition(self, seeds: Sequence[int]) -> tuple[Tensor, ...]:
        """What the network takes after x and the step: the classes of the seeds, int64 [B], or nothing."""
        if not self.classes:
            return ()
        return (torch.tensor([self.classes[seed % len(self.classes)] for seed in seeds], device=self.device),)


class Picture(NamedTuple):
    """One sampled image, with its share of its batch's seconds.

    ``pixels`` uint8 [H, W, C]; ``x0`` float32 [C, H, W] where the sampler keeps it; ``batch_size`` the rows that
    the network saw.
    """

    seed: int
    pixels: np.ndarray
    x0: Tensor | None
    seconds: float
    batch_size: int


def advance(
    sampler: Sampler, x: Tensor, i: int | Tensor, condition: tuple[Tensor, ...], noise: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Step ``i`` of the table, an int or int64 [1] on the device: x_t -> (x_prev, x0), float32 [B, C, H, W]."""
    output = sampler.network(x.to(sampler.dtype), i, *condition)
    if output.shape != x.shape:
        raise UsageError(f"the network gives {list(output.shape)} for an input of {list(x.shape)}")
    return ddim_step(x, output, sampler.table.row(i), sampler.treatment, noise)


def trajectory(sampler: Sampler, seeds: Sequence[int], x: Tensor | None = None) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield (x after the step, predicted x0) for every step of a batch; float32 [B, C, H, W] on the device.

    ``x`` replaces the seeds' initial noise, float32 [B, C, H, W]; noise that steps add, and classes, are still theirs.
    """
    noise = ImageNoise(seeds, sampler.shape, sampler.device)
    drawn = noise.draw()
    x = drawn if x is None else x.to(sampler.device)
    condition = sampler.condition(seeds)
    for i in range(len(sampler.table)):
        x, x0 = advance(sampler, x, i, condition, noise.draw() if sampler.draws_noise else None)
        yield x, x0


def ascent(sampler: Sampler, seeds: Sequence[int], x: Tensor) -> Iterator[Tensor]:
    """Yield x after every step of a batch on its way up the grid; float32 [B, C, H, W] on the device.

    ``sampler`` is one of the way up (see `make_sampler`), whose table has the last step of the way first; ``x`` the
    pictures, float32 [B, C, H, W] in about [-1, 1]; ``seeds`` tell the classes.
    """
    x, condition = x.to(sampler.device), sampler.condition(seeds)
    for i in reversed(range(len(sampler.table))):
        x, _ = advance(sampler, x, i, condition, None)
        yield x


class StepInPlace:
    """The same step over buffers that stay where they are, its number counted on the device.

    So one CUDA graph of it serves every step of every batch: its kernels are launched at once, and nothing
    between two steps waits for the host.
    """

    def __init__(self, sampler: Sampler, batch_size: int):
        device = sampler.device
        self._sampler = sampler
        self._x = torch.zeros(batch_size, *sampler.shape, device=device)
        self._i = torch.zeros(1, dtype=torch.int64, device=device)
        self._noise = torch.zeros_like(self._x) if sampler.draws_noise else None
        self._condition = sampler.condition([0] * batch_size)
        self._run = self._step

    def _step(self) -> None:
        x, _ = advance(self._sampler, self._x, self._i, self._condition, self._noise)
        self._x.copy_(x)
        self._i.add_(1)

    def capture(self) -> StepInPlace:
        """Record the step as a CUDA graph, after a warm-up that lets libraries choose and allocate."""
        device = self._sampler.device
        side, here = torch.cuda.Stream(device), torch.cuda.current_stream(device)
        side.wait_stream(here)
        with torch.cuda.stream(side):
            for _ in range(2):
                self._i.zero_()
                self._step()
        here.wait_stream(side)
        self._i.zero_()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self._step()
        self._run = graph.replay
        return self

    def denoise(self, seeds: Sequence[int], on_step: OnStep) -> Tensor:
        """The final state of a batch, float32 [B, C, H, W]: a buffer that the next batch overwrites."""
        sampler = self._sampler
        noise = ImageNoise(seeds, sampler.shape, sampler.device)
        self._x.copy_(noise.draw())
        self._i.zero_()
        for buffer, classes in zip(self._condition, sampler.condition(seeds), strict=True):
            buffer.copy_(classes)
        for i in range(len(sampler.table)):
            if self._noise is not None:
                self._noise.copy_(noise.draw())
            self._run()
            on_step(i + 1)
        return self._x


class Pace:
    """Passes steps on as the GPU does them, and keeps the host at most `STEPS_AHEAD` of them before it."""

    def __init__(self, device: torch.device, on_step: OnStep):
        self._stream, self._on_step = torch.cuda.current_stream(device), on_step
        self._events: list[torch.cuda.Event] = []

    def __call__(self, done: int) -> None:
        event = torch.cuda.Event()
        event.record(self._stream)
        self._events.append(event)
        if len(self._events) > STEPS_AHEAD:
            # An event of a few steps ago: the GPU has work left while the host waits.
            self._events.pop(0).synchronize()
            self._on_step(done - STEPS_AHEAD)


def to_uint8(x: Tensor) -> Tensor:
    """[-1, 1] float32 [B, C, H, W] -> 0..255 uint8 [B, H, W, C], rounded half to even as diffusers' pipelines do."""
    return (x / 2 + 0.5).clamp(0, 1).mul(255).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous()


def to_host(x: Tensor) -> Tensor:
    """A copy on the host; from a GPU into pinned memory, without waiting for it."""
    if x.device.type != "cuda":
        return x.cpu()
    return torch.empty(x.shape, dtype=x.dtype, pin_memory=True).copy_(x, non_blocking=True)


def is_out_of_memory(error: RuntimeError) -> bool:
    # On a CPU, torch says so in a plain RuntimeError.
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def explain_not_finite(sampler: Sampler, seed: int, batch_size: int) -> RunError:
    """Run one seed again, looking at every step, to name the first whose result is NaN or infinite."""
    timesteps = sampler.table.timesteps.tolist()
    for i, (x, _) in enumerate(trajectory(sampler, padded([seed], batch_size))):
        if not bool(x[0].isfinite().all()):
            kind = "NaN" if bool(x[0].isnan().any()) else "an infinity"
            return RunError(
                f"seed {seed}: {kind} at step {i + 1} of {len(timesteps)} (timestep {timesteps[i]}); "
                f"{'try --dtype float32' if sampler.dtype != torch.float32 else 'are the weights those of this model?'}"
            )
    return RunError(f"seed {seed}: the result was not finite, but was when the seed was run once more alone")


class Launched:
    """A batch whose steps and copies are queued on the device; `collect` waits for its pictures."""

    def __init__(self, sampler: Sampler, seeds: Sequence[int], batch_size: int, x: Tensor, started: float):
        self._sampler, self._seeds, self._batch_size, self._started = sampler, seeds, batch_size, started
        x = x[: len(seeds)]
        self._finite = to_host(x.isfinite().flatten(1).all(1))
        self._pixels = to_host(to_uint8(x))
        self._x0 = to_host(x) if sampler.keeps_x0 else None
        self._copied = None
        if x.device.type == "cuda":
            self._copied = torch.cuda.Event()
            self._copied.record(torch.cuda.current_stream(x.device))

    @torch.inference_mode()
    def collect(self) -> list[Picture]:
        """Raises RunError for a result that is not finite, naming the seed and the step."""
        if self._copied is not None:
            self._copied.synchronize()
        finite = self._finite.tolist()
        if not all(finite):
            raise explain_not_finite(self._sampler, self._seeds[finite.index(False)], self._batch_size)
        seconds = (time.perf_counter() - self._started) / len(self._seeds)
        pixels, x0 = self._pixels.numpy(), self._x0
        return [
            Picture(seed, pixels[i], x0[i] if x0 is not None else None, seconds, self._batch_size)
            for i, seed in enumerate(self._seeds)
        ]


class Denoiser:
    """Runs batches of one sampler: step by step on a CPU, by a captured step on a GPU where it can be captured."""

    def __init__(self, sampler: Sampler):
        self._sampler = sampler
        self._steps: dict[int, StepInPlace | None] = {}

    def _in_place(self, batch_size: int) -> StepInPlace | None:
        if self._sampler.device.type != "cuda":
            return None
        if batch_size not in self._steps:
            # A smaller batch follows where memory did not suffice: the larger one's is to be given back.
            self._steps.clear()
            try:
                self._steps[batch_size] = StepInPlace(self._sampler, batch_size).capture()
            except RuntimeError as error:
                if is_out_of_memory(error):
                    raise
                # A network from outside may do what no graph can hold; it runs as it is.
                torch.cuda.synchronize(self._sampler.device)
                self._steps[batch_size] = None
        return self._steps[batch_size]

    @torch.inference_mode()
    def launch(self, seeds: Sequence[int], batch_size: int, on_step: OnStep) -> Launched:
        """Sample ``seeds`` as one batch of ``batch_size`` rows."""
        started = time.perf_counter()
        sampler, rows = self._sampler, padded(seeds, batch_size)
        if sampler.device.type == "cuda":
            on_step = Pace(sampler.device, on_step)
        in_place = self._in_place(batch_size)
        if in_place is not None:
            x = in_place.denoise(rows, on_step)
        else:
            for done, (state, _) in enumerate(trajectory(sampler, rows), start=1):
                on_step(done)
                x = state
        return Launched(sampler, seeds, batch_size, x, started)


def _launches(
    sampler: Sampler, seeds: Sequence[int], batch_size: int, on_step: OnStep, on_halved: OnHalved
) -> Iterator[Launched]:
    denoiser, start = Denoiser(sampler), 0
    while start < len(seeds):
        batch = tuple(seeds[start : start + batch_size])
        launched = None
        try:
            launched = denoiser.launch(batch, batch_size, on_step)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
        if launched is not None:
            start += len(batch)
            yield launched
        elif batch_size == 1:
            raise RunError(f"out of memory on {sampler.device}, even for a single image")
        else:
            # Here, outside of the handler, the failed step's tensors are no longer referred to.
            batch_size //= 2
            denoiser = Denoiser(sampler)
            gc.collect()
            if sampler.device.type == "cuda":
                torch.cuda.empty_cache()
            on_halved(batch_size)


def run_batches(
    sampler: Sampler,
    seeds: Sequence[int],
    batch_size: int,
    on_step: OnStep = lambda done: None,
    on_halved: OnHalved = lambda batch_size: None,
) -> Iterator[list[Picture]]:
    """Sample all ``seeds``, yielding each batch's pictures in the order of the seeds.

    On a GPU a batch's pictures are fetched while the next one is denoised. Where memory does not suffice, the
    batch size is halved for the rest.

    Raises:
        RunError: for a result that is not finite, naming the seed and the step; where memory does not suffice
            for one image.
    """
    waiting = None
    for launched in _launches(sampler, seeds, batch_size, on_step, on_halved):
        if waiting is not None:
            yield waiting.collect()
        waiting = launched
        if sampler.device.type != "cuda":
            yield waiting.collect()
            waiting = None
    if waiting is not None:
        yield waiting.collect()
