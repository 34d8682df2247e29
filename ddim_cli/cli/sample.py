"""``ddim sample``: the main job."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from ddim_cli.cli import console
from ddim_cli.cli.options import Json, Layers, Quiet, Verbose, with_settings

if TYPE_CHECKING:
    from ddim_cli.sampling.run import Job


@console.handles_errors
@with_settings()
def sample(
    layers: Layers,
    shard: Annotated[
        str | None,
        typer.Option(
            help="Make only part I of N of the plan, for job arrays: 0/8.",
            metavar="I/N",
            show_default=False,
            rich_help_panel="Output",
        ),
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace what is in the output folder.", rich_help_panel="Output")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the plan and write nothing.", rich_help_panel="Output")
    ] = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
    json: Json = False,
) -> None:
    """
    [bold]Examples[/bold]

    \b
    ddim sample --steps 50 --eta 0.0
    ddim sample -n 64 --seed 1000 --steps 20 --spacing trailing -o out
    ddim sample -m path/to/model -c run.toml --dtype bfloat16 --json
    ddim sample -c configs/smoke.toml --dry-run

    Sample images: a PNG and a JSON sidecar each, and a contact sheet.

    The same command goes on where it was stopped, and does nothing where all is done.
    """
    from ddim_cli.sampling.plan import Shard
    from ddim_cli.sampling.resolve import resolve

    part = Shard.parse(shard) if shard is not None else Shard()
    run = resolve(layers)
    for warning in run.warnings:
        console.warn(warning)
    if verbose and run.model.unused_scheduler_keys:
        unused = ", ".join(run.model.unused_scheduler_keys)
        console.say(f"{run.model.name}'s scheduler config has keys that DDIM has no use for: {unused}")
    with console.progress(quiet, verbose) as progress:
        from ddim_cli.sampling.run import execute, make_job, pending

        job = make_job(run, part)
        if dry_run:
            todo = pending(job, overwrite)
        else:
            summary = execute(job, progress, overwrite)
    if dry_run:
        show_plan(job, todo, json)
        return
    if json:
        console.print_json(summary.as_json())
    elif not quiet:
        console.show_summary(summary)


def plan_as_json(job: Job, todo: list[int]) -> dict[str, Any]:
    """What a run would do; ``files`` are those it would write."""
    from ddim_cli.config.seeds import format_seeds

    return {
        "model": job.record["model"],
        "images": len(job.seeds),
        "present": len(job.seeds) - len(todo),
        "seeds": format_seeds(job.seeds),
        "batch_size": job.batch_size,
        "batches": -(-len(todo) // job.batch_size),
        "timesteps": list(job.run.timesteps),
        "device": job.record["runtime"]["device"],
        "dtype": job.record["runtime"]["dtype"],
        "compiled": job.record["runtime"]["compile"],
        "folder": str(job.folder.path),
        "files": [str(job.folder.picture(seed)) for seed in todo],
    }


def show_plan(job: Job, todo: list[int], as_json: bool) -> None:
    """``--dry-run``: on stdout, the plan."""
    plan = plan_as_json(job, todo)
    if as_json:
        console.print_json(plan)
        return
    timesteps = plan["timesteps"]
    shown = timesteps if len(timesteps) <= 12 else [*timesteps[:6], "...", *timesteps[-5:]]
    files = plan["files"]
    console.show_table(
        {
            "model": f"{plan['model']['source']} ({plan['model']['parameters']:,} parameters)",
            "images": f"{len(job.seeds):,} (seeds {plan['seeds']})"
            + (f", {plan['present']:,} there already" if plan["present"] else ""),
            "batches": f"{plan['batches']:,} of {plan['batch_size']}",
            "timesteps": f"{len(timesteps)}: {' '.join(map(str, shown))}",
            "runs on": f"{plan['device']} in {plan['dtype']}{', compiled' if plan['compiled'] else ''}",
            "folder": plan["folder"],
            "files": f"{files[0]} ... {files[-1]}" if len(files) > 1 else (files[0] if files else "none"),
        },
        "dry run: nothing is written",
        "yellow",
    )
