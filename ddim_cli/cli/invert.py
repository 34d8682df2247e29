"""``ddim invert``: from pictures to latents, and back."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ddim_cli.cli import console
from ddim_cli.cli.options import PICTURE, Json, Layers, LogFile, Overwrite, Quiet, Verbose, plan_layer, with_settings

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ddim_cli.config.layers import Layer
    from ddim_cli.experiments.invert import Inverted
    from ddim_cli.sampling.pictures import Input
    from ddim_cli.sampling.resolve import Run

WHY_ETA_0 = (
    "inversion needs eta 0. Only then does one latent lead to one picture, and a picture back to its latent; fresh "
    "noise in each step cannot be undone"
)
# Each would make a step one that has no inverse.
NEVER = ("scheduler.clip_sample", "scheduler.thresholding", "sampling.use_clipped_model_output")
MOST_LINES = 12


@console.handles_errors
@with_settings(*(name for name in PICTURE if name not in ("clip_sample", "thresholding")))
def invert(
    layers: Layers,
    pictures: Annotated[
        list[Path], typer.Argument(help="Pictures, or folders of them.", metavar="IMAGE...", show_default=False)
    ],
    overwrite: Overwrite = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
    log_file: LogFile = None,
    json: Json = False,
) -> None:
    """
    [bold]Examples[/bold]

    \b
    ddim invert picture.png
    ddim invert outputs/smoke --steps 100 -o inverted
    ddim sample --latents inverted -o again

    Find the latents of pictures by DDIM inversion, and what sampling makes of these.

    Each picture NAME goes up the grid to NAME.latent.safetensors, and down the same grid to NAME.recon.png, in as many
    steps. How far that is from the picture is told as the squared difference a dimension, pictures scaled to [0, 1].
    It needs eta 0; clipping and thresholding are off in both directions. A picture of another size is cropped and
    resized, which is said.

    The same command goes on where it was stopped, and does nothing where all is done.
    """
    from ddim_cli.experiments.rules import check_deterministic, one_class
    from ddim_cli.sampling.pictures import find_pictures

    files = find_pictures(pictures)
    run, turned_off = resolve_inversion([*layers, plan_layer(len(files), "IMAGE")])
    check_deterministic(run, WHY_ETA_0)
    one_class(run)
    for warning in run.warnings:
        console.warn(warning)
    if turned_off and not quiet:
        say_turned_off(turned_off)
    with console.progress(quiet, verbose) as progress:
        from ddim_cli.experiments.invert import execute
        from ddim_cli.sampling.pictures import read_input
        from ddim_cli.sampling.run import make_job

        job = make_job(run, ending="-invert")
        shape = (run.model.channels, *run.model.size)
        inputs = [read_input(path, shape)[0] for path in files]
        if not quiet:
            say_conversions(inputs)
        found = execute(job, inputs, progress, overwrite)
    if json:
        console.print_json(as_json(found, run, turned_off))
    elif not quiet:
        show_inverted(found)


def resolve_inversion(layers: Sequence[Layer]) -> tuple[Run, dict[str, str]]:
    """The run, without what has no inverse; and what had to be turned off for that, with where it was set."""
    from ddim_cli.config.layers import Layer
    from ddim_cli.sampling.resolve import resolve

    run = resolve(layers)
    settings = run.config.model_dump()
    on = {key: run.resolved.origin(key) for key in NEVER if settings[key.split(".")[0]][key.split(".")[1]]}
    if not on:
        return run, {}
    return resolve([*layers, Layer(dict.fromkeys(on, False), dict.fromkeys(on, "invert"))]), on


def say_turned_off(turned_off: dict[str, str]) -> None:
    named = ", ".join(f"{key} (on by {origin})" for key, origin in turned_off.items())
    console.say(f"turned off, as a step with it has no inverse: {named}")


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


def as_json(found: Inverted, run: Run, turned_off: dict[str, str]) -> dict[str, Any]:
    return {
        "images": len(found.reconstructions),
        "made": found.made,
        "present": found.present,
        "seconds": round(found.seconds, 3),
        "folder": str(found.folder),
        "steps": len(run.timesteps),
        "turned_off": list(turned_off),
        "mean_error": found.mean_error,
        "sheet": str(found.sheet),
        "pictures": [
            {
                **r.input.facts(),
                "file": str(r.input.path),
                "latent": str(r.latent),
                "reconstruction": str(r.picture),
                "error": r.error,
            }
            for r in found.reconstructions
        ],
    }


def show_inverted(found: Inverted) -> None:
    """The closing panel."""
    if found.made:
        images = f"{found.made:,} inverted" + (f", {found.present:,} there already" if found.present else "")
        rows: dict[str, Any] = {"pictures": images, "time": f"{found.seconds:.1f} s"}
    else:
        rows = {"pictures": f"nothing to do: all {found.present:,} are there already"}
    shown = found.reconstructions[:MOST_LINES]
    width = max(len(r.input.path.name) for r in shown)
    lines = [f"{r.input.path.name:<{width}}  {r.error:.6f}" for r in shown]
    if len(found.reconstructions) > len(shown):
        lines.append(f"... and {len(found.reconstructions) - len(shown):,} more, each in its sidecar")
    # Not "error", the paper's word: on a line of its own it would read as a failure.
    rows["squared difference"] = "\n".join(lines)
    if len(found.reconstructions) > 1:
        rows["mean of all"] = f"{found.mean_error:.6f}"
    rows |= {"folder": found.folder, "side by side": found.sheet}
    for name, value in rows.items():
        console.log(f"{name}: {value}")
    console.show_table(rows, "done")
