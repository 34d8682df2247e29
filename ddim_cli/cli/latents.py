"""``ddim sample --latents``: pictures that begin at latents from files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ddim_cli.cli import console
from ddim_cli.cli.options import plan_layer
from ddim_cli.cli.show import show_pictures

if TYPE_CHECKING:
    from ddim_cli.config.layers import Layer
    from ddim_cli.experiments.start import Start
    from ddim_cli.sampling.run import Job


def sample_latents(
    layers: Sequence[Layer],
    paths: Sequence[Path],
    shard: str | None,
    overwrite: bool,
    dry_run: bool,
    npz: Path | None,
    show: bool,
    quiet: bool,
    verbose: bool,
    json: bool,
) -> None:
    """As `sample`, from latents in place of the noise of seeds.

    The settings inside the files lie below the user's layers. Raises DdimError.
    """
    from ddim_cli.errors import UsageError
    from ddim_cli.experiments import start
    from ddim_cli.experiments.rules import check_deterministic, one_class
    from ddim_cli.sampling.plan import Shard
    from ddim_cli.sampling.resolve import resolve
    from ddim_cli.sampling.torchrun import Ranks

    if Ranks.of() is not None:
        raise UsageError("--latents runs in one process; without torchrun, --shard I/N makes a part of them")
    part = Shard.parse(shard) if shard is not None else Shard()
    start.check_no_seeds(layers)
    files = start.find_latents(paths)
    starts = start.starts_of(files)
    run = resolve([start.inside_layer(files, layers), *layers, plan_layer(len(starts), "--latents")])
    check_deterministic(run, start.WHY_ETA_0)
    one_class(run)
    start.check_shapes(files, run)
    for warning in run.warnings:
        console.warn(warning)
    with console.progress(quiet, verbose) as progress:
        from ddim_cli.experiments.latents import execute, holds_others, pending, picture_path
        from ddim_cli.sampling.closing import name_npz
        from ddim_cli.sampling.run import make_job

        array = name_npz(npz, overwrite) if npz is not None else None
        job = make_job(run, part, ending="-latents")
        if run.config.output.dir is None and holds_others(job, starts):
            job = make_job(run, part, ending=start.folder_ending(files))
        for text in start.differences(files, job.record):
            console.warn(text)
        if dry_run:
            todo = pending(job, starts, overwrite)
        else:
            summary = execute(job, starts, progress, overwrite, array)
    if dry_run:
        show_plan(job, starts, todo, json)
        return
    if show:
        show_pictures([picture_path(job, starts[position]) for position in job.seeds])
    if json:
        console.print_json(summary.as_json())
    elif not quiet:
        console.show_summary(summary)


def show_plan(job: Job, starts: Sequence[Start], todo: Sequence[int], json: bool) -> None:
    """``--dry-run``: on stdout, the plan."""
    from ddim_cli.cli.sample import common_plan, show_table_of_plan
    from ddim_cli.experiments.latents import picture_path

    files = [str(picture_path(job, starts[position])) for position in todo]
    named = list(dict.fromkeys(str(starts[position].file.path) for position in job.seeds))
    plan: dict[str, Any] = {**common_plan(job, todo), "latents": named, "files": files}
    if json:
        console.print_json(plan)
    else:
        shown = named[0] if len(named) == 1 else f"{named[0]} ... {named[-1]}"
        show_table_of_plan(plan, f"{len(job.seeds):,} (latents of {shown})", files)
