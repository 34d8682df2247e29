"""``ddim interpolate``: pictures between pictures."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from ddim_cli.cli import console
from ddim_cli.cli.options import (
    PICTURE,
    Gif,
    Json,
    Layers,
    LogFile,
    Overwrite,
    Quiet,
    Verbose,
    plan_layer,
    with_settings,
)

if TYPE_CHECKING:
    from ddim_cli.experiments.between import Between
    from ddim_cli.experiments.interpolate import Interpolated


@console.handles_errors
@with_settings(*PICTURE)
def interpolate(
    layers: Layers,
    between: Annotated[
        str,
        typer.Option(
            help="Two seeds, 3,8; a path, 3,8,5 or 0-4; with --square four corners.",
            metavar="SEEDS",
            show_default=False,
            rich_help_panel="Interpolation",
        ),
    ],
    frames: Annotated[
        int | None,
        typer.Option(
            help="Frames from one seed to the next, both included [11; along a square's side 8].",
            metavar="N",
            show_default=False,
            rich_help_panel="Interpolation",
        ),
    ] = None,
    square: Annotated[
        bool,
        typer.Option(
            "--square",
            help="A square of N x N frames: top left, top right, bottom left, bottom right.",
            rich_help_panel="Interpolation",
        ),
    ] = False,
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
    ddim interpolate --between 3,8
    ddim interpolate --between 3,8,5,3 --frames 20 --gif
    ddim interpolate --between 1,2,3,4 --square -o square

    Make pictures between the pictures of seeds, by spherical interpolation between their initial noises.

    Each frame is a PNG with a sidecar; strip.png shows all of them. At the seeds the frames are the pictures that
    ddim sample makes. It needs eta 0.

    The same command goes on where it was stopped, and does nothing where all is done.
    """
    from ddim_cli.experiments.between import WHY_ETA_0, Between, class_of
    from ddim_cli.experiments.rules import check_deterministic
    from ddim_cli.sampling.resolve import resolve

    plan = Between.parse(between, frames, square)
    run = resolve([*layers, plan_layer(len(plan), "--frames")])
    check_deterministic(run, WHY_ETA_0)
    class_of(run, plan.seeds)
    for warning in run.warnings:
        console.warn(warning)
    with console.progress(quiet, verbose) as progress:
        from ddim_cli.experiments.interpolate import execute
        from ddim_cli.sampling.run import make_job

        found = execute(make_job(run, ending=plan.ending()), plan, gif, progress, overwrite)
    if json:
        console.print_json(as_json(found, plan))
    elif not quiet:
        show_interpolated(found)


def as_json(found: Interpolated, plan: Between) -> dict[str, Any]:
    return {
        **plan.facts(),
        "made": found.made,
        "present": found.present,
        "seconds": round(found.seconds, 3),
        "folder": str(found.folder),
        "strip": str(found.strip),
        "animation": str(found.animation) if found.animation is not None else None,
        "files": [str(path) for path in found.frames],
    }


def show_interpolated(found: Interpolated) -> None:
    """The closing panel."""
    if found.made:
        frames = console.counted(found.made, "frame")
        frames += f" made, {found.present:,} there already" if found.present else ""
        rows: dict[str, Any] = {"frames": frames, "time": f"{found.seconds:.1f} s"}
    else:
        rows = {"frames": f"nothing to do: all {found.present:,} are there already"}
    rows |= {"folder": found.folder, "strip": found.strip}
    if found.animation is not None:
        rows["animation"] = found.animation
    for name, value in rows.items():
        console.log(f"{name}: {value}")
    console.show_table(rows, "done")
