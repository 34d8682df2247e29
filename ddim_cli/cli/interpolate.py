"""``ddim interpolate``: pictures between pictures."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from ddim_cli.cli import console
from ddim_cli.cli.jobs import counts_as_json, run_job, say_conversions, say_turned_off, show_done
from ddim_cli.cli.options import OF_A_FOLDER, OF_BEGINNING, SEEDS, Gif, Layers, RunOptions, option, with_settings

if TYPE_CHECKING:
    from ddim_cli.sampling.job import Job
    from ddim_cli.sampling.plan import Shard
    from ddim_cli.sampling.product import Product
PANEL = "Interpolation"


@console.handles_errors
@with_settings(without=(*SEEDS, *OF_A_FOLDER, *OF_BEGINNING), runs=True)
def interpolate(
    layers: Layers,
    options: RunOptions,
    between: Annotated[
        str | None,
        option(
            "Two seeds, 3,8; a path, 3,8,5 or 0-4; with --square four corners; or pictures, a.png,b.png.",
            PANEL,
            metavar="SEEDS|FILES",
        ),
    ] = None,
    to_prompt: Annotated[
        list[str] | None,
        option("Go from --prompt to this one; given again, from there to the next.", PANEL, metavar="TEXT"),
    ] = None,
    seed: Annotated[
        int | None, option("Seed whose noise all frames between prompts have [0].", PANEL, metavar="S")
    ] = None,
    frames: Annotated[
        int | None,
        option(
            "Frames from one seed, picture or prompt to the next, both included [11; along a square's side 8].",
            PANEL,
            metavar="N",
        ),
    ] = None,
    square: Annotated[
        bool,
        option("Make a square of N x N frames: top left, top right, bottom left, bottom right.", PANEL, "--square"),
    ] = False,
    gif: Gif = False,
) -> None:
    """
    Make pictures between the pictures of seeds, by spherical interpolation between their initial noises; or between
    those of prompts, by linear interpolation between their embeddings. Pictures of your own are inverted first, as ddim
    invert does it, and the frames lie between their latents.

    Each frame is a PNG with a sidecar; strip.png shows all of them. At the seeds, or the prompts, the frames are the
    pictures that ddim sample makes; at a picture, what comes back of it. Between seeds and pictures it needs eta 0.

    The same command goes on where it was stopped, and does nothing where all is done.

    [bold]Examples[/bold]

    \b
    ddim interpolate --between 3,8
    ddim interpolate --between 3,8,5,3 --frames 20 --gif
    ddim interpolate --between 1,2,3,4 --square -o square
    ddim interpolate --between a.png,b.png --refine 3
    ddim interpolate -m MODEL --prompt "a thin one" --to-prompt "a bold seven" --seed 3
    """
    from ddim_cli.experiments.between_pictures import BetweenPictures
    from ddim_cli.experiments.ways import resolve_plan

    run, plan, turned_off = resolve_plan(layers, between, to_prompt or (), seed, frames, square)
    if not options.quiet and isinstance(plan, BetweenPictures):
        say_turned_off(turned_off)
        say_conversions(plan.pictures)

    def prepare(shard: Shard, speaks: bool) -> tuple[Job, Product]:
        from ddim_cli.experiments import interpolate as experiment

        return experiment.prepare(run, plan, gif, shard)

    outcome = run_job(run, prepare, options, f"frames, {plan.caption()}" if to_prompt else f"frames between {between}")
    if outcome is None:
        return
    job, _, summary = outcome
    strip = summary.sheet
    animation = strip.with_suffix(".gif") if strip is not None and gif else None
    if options.json:
        console.print_json(
            {
                **plan.facts(),
                **counts_as_json(summary),
                "strip": str(strip) if strip is not None else None,
                "animation": str(animation) if animation is not None else None,
                "files": [str(job.folder.picture(item.name)) for item in job.items],
            }
        )
    elif not options.quiet:
        show_done(summary, "frame", folder=summary.folder, strip=strip, animation=animation)
