"""What the commands that make pictures share: the way from a run to what they print."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from ddim_cli.cli import console, panels
from ddim_cli.cli.options import RunOptions
from ddim_cli.cli.progress import RanksProgress, RunProgress, showing_progress
from ddim_cli.outputs.sidecar import OF_AN_INIT

if TYPE_CHECKING:
    from ddim_cli.sampling.executor import Summary
    from ddim_cli.sampling.items import Item
    from ddim_cli.sampling.job import Job
    from ddim_cli.sampling.pictures import Input
    from ddim_cli.sampling.plan import Shard
    from ddim_cli.sampling.product import Product
    from ddim_cli.sampling.resolve import Run


# What a plan says of what its pictures begin from.
BEGINNING = (*OF_AN_INIT, "resample", "variation_seed", "variation_strength")
GUIDANCE = "sampling.guidance_scale"
# Of what is told of many pictures one by one.
MOST_LINES = 12
P = TypeVar("P", bound="Product")
Outcome = tuple["Job", P, "Summary"]


def run_job(
    run: Run, prepare: Callable[[Shard, bool], tuple[Job, P]], options: RunOptions, items: str
) -> Outcome[P] | None:
    """Prepare and execute a job, with its progress. ``items`` says for ``--dry-run`` what the pictures are of.

    ``prepare`` is given the part of the plan that this process makes, and whether it is the one that shows results.
    Returns None if there is nothing to print: after a dry run, and on all ranks of torchrun but the first.
    """
    from ddim_cli.sampling.torchrun import Ranks, choose_shard

    ranks = Ranks.of()
    shard, speaks = choose_shard(options.shard, ranks), console.speaks()
    if speaks:
        for warning in run.warnings:
            console.warn(warning)
        if run.init is not None and not options.quiet:
            say_conversions(run.init.inputs)
    kind = RunProgress if ranks is None else RanksProgress
    with showing_progress(options.quiet or not speaks, kind(options.verbose)) as progress:
        from ddim_cli.sampling.executor import execute, pending
        from ddim_cli.sampling.torchrun import execute_ranks

        if ranks is not None and run.config.runtime.device in ("auto", "cuda"):
            ranks.pick_gpu()
        job, product = prepare(shard, speaks)
        if options.dry_run:
            todo = pending(job, product, options.overwrite)
        elif ranks is None:
            summary = execute(job, product, progress, options.overwrite)
        else:
            summary = execute_ranks(job, product, ranks, progress, options.overwrite)
    if speaks and options.dry_run:
        show_plan(job, product, todo, items, options.json)
    return (job, product, summary) if speaks and not options.dry_run else None


def say_turned_off(turned_off: Mapping[str, str]) -> None:
    """Say what was turned off so that pictures can be inverted, and where it was on."""
    never = {key: origin for key, origin in turned_off.items() if key != GUIDANCE}
    if never:
        named = ", ".join(f"{key} (on by {origin})" for key, origin in never.items())
        console.say(f"turned off, as a step with it has no inverse: {named}")
    if GUIDANCE in turned_off:
        console.say(
            f"turned off, as inversion with guidance drifts: {GUIDANCE} ({turned_off[GUIDANCE]}); to invert with it, "
            "set it"
        )


def say_conversions(inputs: Sequence[Input]) -> None:
    """What was done to the pictures so that the network can take them, those alike together."""
    groups: dict[tuple[str, ...], list[Input]] = {}
    for picture in inputs:
        if picture.conversion:
            groups.setdefault(picture.conversion, []).append(picture)
    for conversion, alike in list(groups.items())[:MOST_LINES]:
        others = f" and {len(alike) - 1:,} more" if len(alike) > 1 else ""
        console.say(f"{alike[0].path}{others}: {', '.join(conversion)}")
    if len(groups) > MOST_LINES:
        console.say(f"... and {len(groups) - MOST_LINES:,} other conversions; each picture's is in its sidecar")


def show_plan(job: Job, product: Product, todo: Sequence[Item], items: str, as_json: bool) -> None:
    """Print what a run would do, for ``--dry-run``."""
    plan = {
        "model": job.record["model"],
        "images": len(job.items),
        "present": len(job.items) - len(todo),
        "batch_size": job.batch_size,
        "batches": -(-len(todo) // job.batch_size),
        "timesteps": list(job.run.timesteps),
        "order": job.run.config.sampling.order,
        **({"refine": job.run.config.sampling.refine} if job.run.config.sampling.refine else {}),
        **({key: job.record["sampling"][key] for key in BEGINNING if key in job.record["sampling"]}),
        "device": job.record["runtime"]["device"],
        "dtype": job.record["runtime"]["dtype"],
        "compiled": job.record["runtime"]["compile"],
        "folder": str(job.folder.path),
    }
    if as_json:
        files = [str(product.files(job, item)[0]) for item in todo]
        console.print_json({**plan, **product.plan(job), "files": files})
        return
    part = f"shard {job.shard.index}/{job.shard.count} of the {items}" if job.shard.count > 1 else items
    # The first and the last alone: a plan may have millions.
    ends = [todo[0], todo[-1]][: len(todo)] if todo else []
    panels.show_table(
        {
            "model": f"{plan['model']['source']} ({plan['model']['parameters']:,} parameters)",
            "images": f"{plan['images']:,} ({part})"
            + (f", {plan['present']:,} there already" if plan["present"] else ""),
            "batches": f"{plan['batches']:,} of {plan['batch_size']}",
            "timesteps": panels.timesteps_text(job.run.timesteps),
            **({"order": plan["order"]} if plan["order"] > 1 else {}),
            **({"iterations a step up": plan["refine"]} if "refine" in plan else {}),
            **panels.beginning(job.record["sampling"]),
            "runs on": f"{plan['device']} in {plan['dtype']}{', compiled' if plan['compiled'] else ''}",
            "folder": plan["folder"],
            "files": " ... ".join(str(product.files(job, item)[0]) for item in ends) or "none",
        },
        "dry run: nothing is written",
        "yellow",
    )


def counts_as_json(summary: Summary) -> dict[str, Any]:
    """What the JSON of every command but sample says of what was done."""
    told = summary.as_json()
    return {name: told[name] for name in ("made", "present", "left", "seconds", "folder")}


def show_done(summary: Summary, noun: str, verb: str = "made", **more: Any) -> None:
    """Print the closing panel: how many of ``noun`` were made, in what time, and what else there is to say."""
    rows: dict[str, Any] = {f"{noun}s": f"nothing to do: all {summary.present:,} are there already"}
    if summary.made:
        done = panels.counted(summary.made, noun)
        if summary.present:
            done += f" {verb}, {summary.present:,} there already"
        elif verb != "made":
            done += f" {verb}"
        speed = panels.speed_text(summary.images_per_second or 0.0)
        rows = {f"{noun}s": done, "time": f"{summary.seconds:.1f} s ({speed})"}
    if summary.left:
        rows["left"] = f"{panels.counted(summary.left, noun)} of the plan, for other shards or runs"
    rows |= {name.replace("_", " "): value for name, value in more.items() if value is not None}
    panels.close(rows)
