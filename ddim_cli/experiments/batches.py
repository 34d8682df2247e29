"""What the experiments share: batches that are watched step by step, and how they end when something goes wrong."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ddim_cli.errors import InterruptedRunError, RunError
from ddim_cli.models.load import SamplingNetwork
from ddim_cli.outputs.atomic import remove_leftovers
from ddim_cli.sampling.host import keep_memory
from ddim_cli.sampling.loop import OnStep, Sampler, ascent, is_out_of_memory, trajectory
from ddim_cli.sampling.plan import padded
from ddim_cli.sampling.run import Job, Reporter, fit_in_memory, load_job_network


def prepare(job: Job, images: int, reporter: Reporter) -> tuple[SamplingNetwork, Job]:
    """Load the job's network to make ``images`` with, and have its folder ready; the job says whether it is compiled.

    Raises:
        ModelError: for weights that cannot be loaded.
        UsageError: for a folder that cannot be made or written to.
    """
    keep_memory()
    job.folder.check_writable()
    job = fit_in_memory(job, reporter)
    reporter.loading(job)
    network, job = load_job_network(job, images, reporter)
    job.folder.create()
    remove_leftovers(job.folder.path)
    return network, job


@contextlib.contextmanager
def ending_well(job: Job, reporter: Reporter) -> Iterator[None]:
    """Within the block, want of memory, a full disk and Ctrl-C become errors that say what to do.

    Raises:
        RunError: where memory or the disk does not suffice.
        InterruptedRunError: on Ctrl-C.
    """
    try:
        yield
    except KeyboardInterrupt:
        reporter.stopped()
        raise InterruptedRunError(
            f"interrupted: what was finished is in {job.folder.path}; the same command goes on from there"
        ) from None
    except OSError as error:
        raise RunError(
            f"{error.filename or job.folder.path}: cannot be written: {error.strerror}; what was finished before is "
            "whole, and the same command goes on from there"
        ) from None
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        raise RunError(
            f"out of memory on {job.device} with batches of {job.batch_size}; choose a smaller --batch-size"
        ) from None
    finally:
        reporter.stopped()


@torch.inference_mode()
def denoise(
    sampler: Sampler, noises: Sequence[Tensor], seed: int, batch_size: int, on_step: OnStep = lambda done: None
) -> Tensor:
    """The final states of a batch of ``batch_size`` rows that begins at ``noises``, float32 [C, H, W] each.

    ``seed`` is one whose class all of them take. Returns float32 [B, C, H, W] on the device, without the padding.
    """
    x = torch.stack(padded(noises, batch_size))
    for done, (state, _) in enumerate(trajectory(sampler, [seed] * batch_size, x), start=1):
        on_step(done)
        x = state
    return x[: len(noises)]


@torch.inference_mode()
def encode(
    sampler: Sampler, x0: Sequence[Tensor], seed: int, batch_size: int, on_step: OnStep = lambda done: None
) -> Tensor:
    """The latents of a batch of pictures, by a sampler of the way up; arguments and result as of `denoise`."""
    x = torch.stack(padded(x0, batch_size))
    for done, state in enumerate(ascent(sampler, [seed] * batch_size, x), start=1):
        on_step(done)
        x = state
    return x[: len(x0)]


def check_finite(x: Tensor, what: list[str], job: Job) -> None:
    """RunError naming the first of ``what``, one name a row of x [B, C, H, W], whose values are not finite."""
    for name, finite in zip(what, x.isfinite().flatten(1).all(1).tolist(), strict=False):
        if not finite:
            remedy = "try --dtype float32" if job.dtype != torch.float32 else "are the weights those of this model?"
            raise RunError(f"{name}: the result is not finite; {remedy}")
