"""``ddim trajectory``: how a picture comes about, step by step."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from ddim_cli.cli import console
from ddim_cli.cli.options import PICTURE, SEEDS, Gif, Json, Layers, LogFile, Overwrite, Quiet, Verbose, with_settings

if TYPE_CHECKING:
    from ddim_cli.experiments.trajectory import Watched


@console.handles_errors
@with_settings(*PICTURE, *SEEDS)
def trajectory(
    layers: Layers,
    show: Annotated[
        Literal["x0", "xt"],
        typer.Option(help="x0: the picture that each step predicts. xt: the noisy state.", rich_help_panel="Output"),
    ] = "x0",
    every: Annotated[
        int | None,
        typer.Option(
            help="Show every K-th step \\[about ten frames].", metavar="K", show_default=False, rich_help_panel="Output"
        ),
    ] = None,
    gif: Gif = False,
    overwrite: Overwrite = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
    log_file: LogFile = None,
    json: Json = False,
) -> None:
    """
    [bold]Examples[/bold]

    \b
    ddim trajectory --seeds 0-3
    ddim trajectory --seeds 7 --show xt --gif
    ddim trajectory --seeds 0-3 --eta 1 --steps 100 --every 5 -o steps

    Show how pictures come about: for each seed a strip of frames along its steps, the timestep under each.

    The last frame is the picture that ddim sample makes of that seed. The same command goes on where it was stopped,
    and does nothing where all is done.
    """
    from ddim_cli.sampling.resolve import resolve

    run = resolve(layers)
    for warning in run.warnings:
        console.warn(warning)
    with console.progress(quiet, verbose) as progress:
        from ddim_cli.experiments.trajectory import Watch, execute
        from ddim_cli.sampling.run import make_job

        watch = Watch(show, every)
        facts = watch.facts(run.timesteps)
        found = execute(make_job(run, ending="-trajectory"), watch, gif, progress, overwrite)
    if json:
        console.print_json(as_json(found, facts))
    elif not quiet:
        show_watched(found, facts)


def as_json(found: Watched, facts: dict[str, Any]) -> dict[str, Any]:
    return {
        "strips": len(found.strips),
        "made": found.made,
        "present": found.present,
        "seconds": round(found.seconds, 3),
        "folder": str(found.folder),
        **facts,
        "files": [str(path) for path in found.strips],
        "animations": [str(path) for path in found.animations],
    }


def show_watched(found: Watched, facts: dict[str, Any]) -> None:
    """The closing panel."""
    if found.made:
        strips = console.counted(found.made, "strip")
        strips += f" made, {found.present:,} there already" if found.present else ""
        rows: dict[str, Any] = {"strips": strips, "time": f"{found.seconds:.1f} s"}
    else:
        rows = {"strips": f"nothing to do: all {found.present:,} are there already"}
    rows |= {"timesteps": " ".join(map(str, facts["timesteps"])), "folder": found.folder}
    for name, files in (("first strip", found.strips), ("first animation", found.animations)):
        if files:
            rows[name] = files[0]
    for name, value in rows.items():
        console.log(f"{name}: {value}")
    console.show_table(rows, "done")
