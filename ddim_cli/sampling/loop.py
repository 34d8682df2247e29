"""The denoising loop: from noise to x0, a batch at a time, on the device."""

from __future__ import annotations

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
from ddim_cli.sampling.noise import ImageNoise
from ddim_cli.sampling.plan import batches, padded

# (x [B, C, H, W], timesteps int64 [B]) -> the network's output [B, C, H, W]; a conditional one takes classes int64 [B]
Network = Callable[..., Tensor]
# Called after each step with the number of steps done.
OnStep = Callable[[int], None]


@dataclass(frozen=True)
class Sampler:
    """All that a batch needs besides its seeds.

    ``shape`` is (C, H, W); ``dtype`` the network's; ``draws_noise`` whether each step draws noise;
    ``classes`` what a conditional network is given: classes[seed mod their number].
    """

    network: Network
    table: StepTable
    treatment: X0Treatment
    shape: tuple[int, int, int]
    device: torch.device
    dtype: torch.dtype
    draws_noise: bool
    classes: tuple[int, ...] = ()

    def condition(self, seeds: Sequence[int]) -> tuple[Tensor, ...]:
        """What the network takes after x and t: the classes of the seeds, int64 [B], or nothing."""
        if not self.classes:
            return ()
        return (torch.tensor([self.classes[seed % len(self.classes)] for seed in seeds], device=self.device),)


class Picture(NamedTuple):
    """One sampled image: ``pixels`` uint8 [H, W, C], ``x0`` float32 [C, H, W], and its share of its batch's seconds."""

    seed: int
    pixels: np.ndarray
    x0: Tensor
    seconds: float


def trajectory(sampler: Sampler, seeds: Sequence[int]) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield (x after the step, predicted x0) for every step of a batch; float32 [B, C, H, W] on the device."""
    noise = ImageNoise(seeds, sampler.shape, sampler.device)
    x = noise.draw()
    condition = sampler.condition(seeds)
    for i in range(len(sampler.table)):
        timesteps = sampler.table.timesteps[i].expand(len(seeds))
        output = sampler.network(x.to(sampler.dtype), timesteps, *condition)
        if output.shape != x.shape:
            raise UsageError(f"the network gives {list(output.shape)} for an input of {list(x.shape)}")
        step_noise = noise.draw() if sampler.draws_noise else None
        x, x0 = ddim_step(x, output, sampler.table.row(i), sampler.treatment, step_noise)
        yield x, x0


def denoise(sampler: Sampler, seeds: Sequence[int], on_step: OnStep) -> Tensor:
    """The final state of a batch, float32 [B, C, H, W] on the device."""
    for done, (state, _) in enumerate(trajectory(sampler, seeds), start=1):
        on_step(done)
        x = state
    return x


def to_uint8(x: Tensor) -> Tensor:
    """[-1, 1] float32 [B, C, H, W] -> 0..255 uint8 [B, H, W, C], rounded half to even as diffusers' pipelines do."""
    return (x / 2 + 0.5).clamp(0, 1).mul(255).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous()


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


@torch.inference_mode()
def run_batch(sampler: Sampler, seeds: Sequence[int], batch_size: int, on_step: OnStep) -> list[Picture]:
    """Sample ``seeds`` as one batch of ``batch_size`` rows.

    Raises:
        RunError: for a result that is not finite, naming the seed and the step.
    """
    started = time.perf_counter()
    x = denoise(sampler, padded(seeds, batch_size), on_step)[: len(seeds)]
    # One transfer each, at the end of the batch: the only points at which the host waits.
    finite = x.isfinite().flatten(1).all(1).tolist()
    pixels, x0 = to_uint8(x).cpu().numpy(), x.cpu()
    if not all(finite):
        raise explain_not_finite(sampler, seeds[finite.index(False)], batch_size)
    seconds = (time.perf_counter() - started) / len(seeds)
    return [Picture(seed, pixels[i], x0[i], seconds) for i, seed in enumerate(seeds)]


def run_batches(
    sampler: Sampler, seeds: Sequence[int], batch_size: int, on_step: OnStep = lambda done: None
) -> Iterator[list[Picture]]:
    """Sample all ``seeds``, yielding each batch's pictures in the order of the seeds."""
    for batch in batches(seeds, batch_size):
        yield run_batch(sampler, batch, batch_size, on_step)
