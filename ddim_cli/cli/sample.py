"""``ddim sample``: the main job."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ddim_cli.cli import console
from ddim_cli.cli.options import DryRun, Json, Layers, LogFile, Overwrite, Part, Quiet, Verbose, with_settings
from ddim_cli.cli.show import check_show, show_pictures

if TYPE_CHECKING:
    from ddim_cli.outputs.named import NamedFile
    from ddim_cli.sampling.plan import Shard
    from ddim_cli.sampling.run import Job, Summary
    from ddim_cli.sampling.torchrun import Ranks


@console.handles_errors
@with_settings()
def sample(
    layers: Layers,
    more_latents: Annotated[list[Path] | None, typer.Argument(hidden=True)] = None,
    shard: Part = None,
    overwrite: Overwrite = False,
    dry_run: DryRun = False,
    npz: Annotated[
        Path | None,
        typer.Option(
            help="Once all images are there, write them into one array too; with --overwrite even over a file that is "
            "no such array.",
            metavar="FILE",
            show_default=False,
            rich_help_panel="Output",
        ),
    ] = None,
    show: Annotated[
        bool, typer.Option("--show", help="Show the pictures in the terminal too.", rich_help_panel="Output")
    ] = False,
    latents: Annotated[
        list[Path] | None,
        typer.Option(
            help="Begin at latents, of ddim invert or yours: safetensors files, or folders of them.",
            metavar="FILE...",
            show_default=False,
            rich_help_panel="Sampling",
        ),
    ] = None,
    quiet: Quiet = False,
    verbose: Verbose = False,
    log_file: LogFile = None,
    json: Json = False,
) -> None:
    """
    [bold]Examples[/bold]

    \b
    ddim sample --steps 50 --eta 0.0
    ddim sample -n 64 --seed 1000 --steps 20 --spacing trailing -o out
    ddim sample -m path/to/model -c run.toml --dtype bfloat16 --json
    ddim sample -c configs/smoke.toml --dry-run
    ddim sample --latents inverted/picture.latent.safetensors
    torchrun --nproc-per-node=8 -m ddim_cli sample --seeds 0-49999 --subdirs -o out

    Sample images: a PNG and a JSON sidecar each, and a contact sheet.

    The same command goes on where it was stopped, and does nothing where all is done.
    """
    from ddim_cli.errors import UsageError
    from ddim_cli.sampling.resolve import resolve
    from ddim_cli.sampling.torchrun import Ranks

    # A shell gives --latents *.safetensors as one value and arguments.
    more = more_latents or []
    if show:
        check_show(json)
    if latents:
        from ddim_cli.cli.latents import sample_latents

        sample_latents(layers, [*latents, *more], shard, overwrite, dry_run, npz, show, quiet, verbose, json)
        return
    if more:
        raise UsageError(f"{more[0]}: sample takes options alone; latents are named with --latents")
    ranks = Ranks.of()
    part = choose_part(shard, ranks)
    speaks = console.speaks()
    run = resolve(layers)
    if speaks:
        for warning in run.warnings:
            console.warn(warning)
    if verbose and speaks and run.model.unused_scheduler_keys:
        unused = ", ".join(run.model.unused_scheduler_keys)
        console.say(f"{run.model.name}'s scheduler config has keys that DDIM has no use for: {unused}")
    with console.progress(quiet, verbose, ranks) as progress:
        from ddim_cli.sampling.closing import name_npz
        from ddim_cli.sampling.run import execute, make_job, pending

        array = name_npz(npz, overwrite) if npz is not None else None
        if ranks is not None and run.config.runtime.device in ("auto", "cuda"):
            ranks.pick_gpu()
        job = make_job(run, part)
        if dry_run:
            todo = pending(job, overwrite)
        else:
            summary = (
                execute(job, progress, overwrite, array)
                if ranks is None
                else execute_ranks(job, ranks, progress, overwrite, array)
            )
    if not speaks:
        return
    if show and not dry_run:
        there = job.folder.numbered("json")
        show_pictures([job.folder.picture(seed) for seed in run.config.seeds() if seed in there])
    if dry_run:
        show_plan(job, todo, json)
    elif json:
        console.print_json(summary.as_json())
    elif not quiet:
        console.show_summary(summary)


def choose_part(shard: str | None, ranks: Ranks | None) -> Shard:
    """The part of the plan that this process makes. Raises UsageError."""
    from ddim_cli.errors import UsageError
    from ddim_cli.sampling.plan import Shard

    if ranks is None:
        return Shard.parse(shard) if shard is not None else Shard()
    if shard is not None:
        raise UsageError(
            f"--shard {shard}: under torchrun each rank is a shard already ({ranks.rank}/{ranks.size} here); leave "
            "--shard out, or start without torchrun"
        )
    return ranks.shard


def execute_ranks(
    job: Job, ranks: Ranks, progress: console.RunProgress | None, overwrite: bool, npz: NamedFile | None
) -> Summary:
    """As `execute`, of one rank of several; what it made is its own share.

    Rank 0 stays to show the others' progress, and so knows what is left of the whole plan, and writes the array.
    """
    from dataclasses import replace

    from ddim_cli.sampling.run import Reporter, conclude, execute
    from ddim_cli.sampling.torchrun import wait_for_others

    summary = execute(job, progress, overwrite)
    if ranks.rank:
        return summary
    plan = frozenset(job.run.config.seeds())
    if progress is not None:
        progress.waiting_for_others(job)

    def count() -> int:
        if progress is not None:
            progress.step(0)
        return len(plan.intersection(job.folder.numbered("json")))

    wait_for_others(count, len(plan), summary.seconds / max(1, -(-summary.made // job.batch_size)))
    if progress is not None:
        progress.stopped()
        console.say(f"all ranks: {count():,} of {len(plan):,} images are there")
    found = conclude(job, 0, summary.seconds, progress or Reporter(), npz)
    return replace(found, made=summary.made, present=summary.present)


def plan_as_json(job: Job, todo: Sequence[int]) -> dict[str, Any]:
    """What a run would do; ``files`` are those it would write."""
    from ddim_cli.config.seeds import format_seeds

    files = [str(job.folder.picture(seed)) for seed in todo]
    return {**common_plan(job, todo), "seeds": format_seeds(job.seeds), "files": files}


def common_plan(job: Job, todo: Sequence[int]) -> dict[str, Any]:
    """Of a plan, all but which images."""
    return {
        "model": job.record["model"],
        "images": len(job.seeds),
        "present": len(job.seeds) - len(todo),
        "batch_size": job.batch_size,
        "batches": -(-len(todo) // job.batch_size),
        "timesteps": list(job.run.timesteps),
        "device": job.record["runtime"]["device"],
        "dtype": job.record["runtime"]["dtype"],
        "compiled": job.record["runtime"]["compile"],
        "folder": str(job.folder.path),
    }


def show_plan(job: Job, todo: Sequence[int], as_json: bool) -> None:
    """``--dry-run``: on stdout, the plan."""
    if as_json:
        console.print_json(plan_as_json(job, todo))
        return
    # The first and the last alone: a plan may have millions.
    ends = [str(job.folder.picture(todo[i])) for i in ((0, -1) if len(todo) > 1 else range(len(todo)))]
    show_table_of_plan(common_plan(job, todo), f"{len(job.seeds):,} ({seeds_text(job)})", ends)


def seeds_text(job: Job) -> str:
    """Which seeds are the job's, in a few words."""
    from ddim_cli.config.seeds import format_seeds
    from ddim_cli.outputs.figures import shortened

    plan, shard = shortened(format_seeds(job.run.config.seeds()), 70), job.shard
    return f"seeds {plan}" if shard.count == 1 else f"shard {shard.index}/{shard.count} of the seeds {plan}"


def show_table_of_plan(plan: Mapping[str, Any], images: str, files: Sequence[str]) -> None:
    """A plan as a person reads it; ``images`` says which they are, ``files`` has at least the first and the last."""
    timesteps = plan["timesteps"]
    shown = timesteps if len(timesteps) <= 12 else [*timesteps[:6], "...", *timesteps[-5:]]
    console.show_table(
        {
            "model": f"{plan['model']['source']} ({plan['model']['parameters']:,} parameters)",
            "images": images + (f", {plan['present']:,} there already" if plan["present"] else ""),
            "batches": f"{plan['batches']:,} of {plan['batch_size']}",
            "timesteps": f"{len(timesteps)}: {' '.join(map(str, shown))}",
            "runs on": f"{plan['device']} in {plan['dtype']}{', compiled' if plan['compiled'] else ''}",
            "folder": plan["folder"],
            "files": f"{files[0]} ... {files[-1]}" if len(files) > 1 else (files[0] if files else "none"),
        },
        "dry run: nothing is written",
        "yellow",
    )
