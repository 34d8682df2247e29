"""Pictures of any command made again, one by one, from what they say of themselves."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from ddim_cli.config.layers import Layer
from ddim_cli.errors import UsageError
from ddim_cli.experiments.trajectory import Selection, Strips
from ddim_cli.outputs.files import File, lies_in
from ddim_cli.outputs.sidecar import first_difference, run_identity
from ddim_cli.sampling.executor import execute
from ddim_cli.sampling.items import Choices, Item, SeedItems, seeds_of
from ddim_cli.sampling.job import make_job
from ddim_cli.sampling.product import Product, SeedPictures
from ddim_cli.sampling.replay import Group, Original, check_same_pictures, resolve_group
from ddim_cli.sampling.reporter import Reporter
from ddim_cli.sampling.row_product import RowPictures


@dataclass(frozen=True)
class Again:
    """An original, and the file in which it was made again."""

    original: Original
    picture: File


def replay(
    groups: Sequence[Group],
    overrides: Sequence[Layer] = (),
    out: Path | None = None,
    anew: bool = False,
    reporter: Reporter | None = None,
) -> Iterator[list[Again]]:
    """Make the pictures of each group again; what is yielded of one is there until the next is asked for.

    Args:
        groups: of `sampling.replay.group_originals`.
        overrides: layers above the settings that the originals were made with, such as another device.
        out: the folder for all; None: temporary folders.
        anew: make them even where ``out`` has them already.
        reporter: is told what is done.

    Raises:
        UsageError: for originals that lie in ``out``, or that no one folder can hold, and as `executor.execute` does.
        DdimError: for a model that is not there or has changed, and for a run that fails.
    """
    if out is not None:
        check_out(out, groups)
    for group in groups:
        with tempfile.TemporaryDirectory(prefix="ddim-replay-") as temporary:
            folder = Path(temporary) / "again" if out is None else out
            run = resolve_group(group, overrides, folder, grid=out is not None)
            product = product_of(group, run.timesteps)
            plan: Sequence[Item] = group.items
            if isinstance(product, SeedPictures):
                plan = SeedItems(seeds_of(plan), Choices.of(run.config), run.begins)
            with threads_of(group):
                passes = 2 if group.first.item.inversions else 1
                job = make_job(run, plan, passes=passes, pads=True)
                check_same_pictures(group, job.record)
                execute(job, product, reporter, anew=anew)
            yield [Again(o, product.files(job, o.item)[0]) for o in group.originals]


def product_of(group: Group, grid: tuple[int, ...]) -> Product:
    """What the originals of a group are: pictures of seeds, other pictures, or strips. Raises UsageError."""
    facts = group.first.strip
    if facts is None and group.of_rows:
        return RowPictures()
    if facts is None:
        return SeedPictures() if group.first.item.is_of_a_seed else Product()
    try:
        return Strips(Selection.of_facts(facts, grid))
    except (KeyError, TypeError, ValueError):
        raise UsageError(f"{group.first.file}: shows timesteps that its own settings do not visit") from None


def check_out(out: Path, groups: Sequence[Group]) -> None:
    """UsageError where originals lie in ``out``, have settings that no one folder can hold, or share a name."""
    names: dict[str, Original] = {}
    for group in groups:
        for original in group.originals:
            if lies_in(original.file, out):
                raise UsageError(f"-o {out}: the original {original.file} is in there; choose another folder")
            other = names.setdefault(original.item.name, original)
            if other.item != original.item:
                raise UsageError(
                    f"{original.file} and {other.file} are two pictures of one name; make them again one at a time, or "
                    "--check them without -o"
                )
        difference = first_difference(run_identity(groups[0].first.record), run_identity(group.first.record))
        if difference is not None:
            raise UsageError(
                f"{group.first.file} was made with another {difference[0]} than {groups[0].first.file}, and a folder "
                "holds pictures of one kind; make them again one kind at a time, or --check them without -o"
            )


@contextmanager
def threads_of(group: Group) -> Iterator[None]:
    """As many threads as the originals were made with, if this machine has so many cores."""
    before = torch.get_num_threads()
    if group.threads <= (os.cpu_count() or 1):
        torch.set_num_threads(group.threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)
