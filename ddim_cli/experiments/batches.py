"""What the experiments share: batches that are watched step by step, and how they end when something goes wrong."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor

from ddim_cli.errors import InterruptedRunError, RunError
from ddim_cli.sampling.loop import is_out_of_memory
from ddim_cli.sampling.run import Job, Reporter


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


def check_finite(x: Tensor, what: list[str], job: Job) -> None:
    """RunError naming the first of ``what``, one name a row of x [B, C, H, W], whose values are not finite."""
    for name, finite in zip(what, x.isfinite().flatten(1).all(1).tolist(), strict=False):
        if not finite:
            remedy = "try --dtype float32" if job.dtype != torch.float32 else "are the weights those of this model?"
            raise RunError(f"{name}: the result is not finite; {remedy}")
