"""The end of a run: whoever finds the whole plan finished writes totals, contact sheet and, if asked for, the .npz."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ddim_cli.config.seeds import parse_classes
from ddim_cli.outputs.named import NamedFile, name_file
from ddim_cli.outputs.npz import PICTURES, write_npz

if TYPE_CHECKING:
    from ddim_cli.sampling.run import Job


def name_npz(path: Path, overwrite: bool) -> NamedFile:
    """The file of ``--npz``. UsageError for one that is not to be written, so that it is said before hours of sampling.

    ``overwrite`` is the one of the run, which makes the pictures anew too: so it is not the first thing to be advised.
    """
    remedy = "delete it (--overwrite replaces it, and makes the pictures anew)"
    return name_file(path, PICTURES, "--npz", overwrite, remedy)


def close_folder(job: Job, made: int, seconds: float) -> list[int]:
    """Write totals and contact sheet if the folder's plan is finished; else the seeds of it that are left.

    The job's own are done by now, and are not looked at again.
    """
    own, planned = set(job.seeds), job.folder.planned()
    left = job.folder.missing([seed for seed in planned if seed not in own], job.identity)
    if not left:
        job.folder.finish(made, seconds, job.run.config.output.grid, planned)
    return left


def collect_npz(job: Job, left: Sequence[int], to: NamedFile) -> bool:
    """Write the pictures of this command's plan, in ascending order of their seeds, into one array.

    Nothing is written, and False returned, while one of them is missing.
    """
    seeds = sorted(job.run.config.seeds())
    if not set(seeds).isdisjoint(left):
        return False
    classes = job.run.config.sampling.classes
    labels = None
    if classes is not None:
        numbers = parse_classes(classes)
        labels = [numbers[seed % len(numbers)] for seed in seeds]
    pictures = (job.folder.picture(seed) for seed in seeds)
    write_npz(to, pictures, len(seeds), labels, job.folder.fsync)
    return True
