"""``ddim trajectory``: how a picture comes about, step by step."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

from ddim_cli.cli import console
from ddim_cli.cli.jobs import counts_as_json, run_job, show_done
from ddim_cli.cli.options import OF_A_FOLDER, OF_A_PICTURE, OF_INVERSION, Gif, Layers, RunOptions, option, with_settings

if TYPE_CHECKING:
    from ddim_cli.experiments.trajectory import Strips
    from ddim_cli.sampling.job import Job
    from ddim_cli.sampling.plan import Shard


@console.handles_errors
@with_settings(without=(*OF_A_FOLDER, *OF_A_PICTURE, *OF_INVERSION), runs=True)
def trajectory(
    layers: Layers,
    options: RunOptions,
    show: Annotated[
        Literal["x0", "xt"], option("x0: the picture that each step predicts. xt: the noisy state [x0].", "Output")
    ] = "x0",
    every: Annotated[int | None, option("Show every K-th step [about ten frames].", "Output", metavar="K")] = None,
    gif: Gif = False,
) -> None:
    """
    Show how pictures come about: for each seed a strip of frames along its steps, the timestep under each.

    The last frame is the picture that ddim sample makes of that seed. The same command goes on where it was stopped,
    and does nothing where all is done.

    [bold]Examples[/bold]

    \b
    ddim trajectory --seeds 0-3
    ddim trajectory --seeds 7 --show xt --gif
    ddim trajectory --seeds 0-3 --eta 1 --steps 100 --every 5 -o steps
    """
    from ddim_cli.config.seeds import format_seeds
    from ddim_cli.outputs.figures import shortened
    from ddim_cli.sampling.resolve import resolve, writes_png

    run = writes_png(resolve(layers))

    def prepare(shard: Shard, speaks: bool) -> tuple[Job, Strips]:
        from ddim_cli.experiments import trajectory as experiment

        return experiment.prepare(run, experiment.select(run, show, every), gif, shard)

    outcome = run_job(run, prepare, options, f"trajectories of seeds {shortened(format_seeds(run.config.seeds()), 70)}")
    if outcome is None:
        return
    job, product, summary = outcome
    facts, files = product.selection.facts(), [product.files(job, item) for item in job.items]
    strips, animations = [str(own[0]) for own in files], [str(own[1]) for own in files if gif]
    if options.json:
        counts = {"strips": len(strips), **counts_as_json(summary)}
        console.print_json({**counts, **facts, "files": strips, "animations": animations})
    elif not options.quiet:
        show_done(
            summary,
            "strip",
            timesteps=" ".join(map(str, facts["timesteps"])),
            folder=summary.folder,
            first_strip=strips[0] if strips else None,
            first_animation=animations[0] if animations else None,
        )
