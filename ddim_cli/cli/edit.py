"""``ddim edit``: pictures edited by inversion."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from ddim_cli.cli import console, panels
from ddim_cli.cli.jobs import (
    MOST_LINES,
    counts_as_json,
    run_job,
    say_conversions,
    say_turned_off,
    show_done,
)
from ddim_cli.cli.options import OF_A_FOLDER, SEEDS, Layers, RunOptions, argument, option, with_settings

if TYPE_CHECKING:
    from ddim_cli.experiments.edit import Edited, EditedPictures
    from ddim_cli.sampling.executor import Summary
    from ddim_cli.sampling.job import Job
    from ddim_cli.sampling.plan import Shard

PANEL = "Editing"
# What an edit says otherwise, has no use for, or has to leave off.
_WITHOUT = ("prompt", "classes", "guidance_scale", "init", "resample", "variation_seed", "variation_strength")


@console.handles_errors
@with_settings(without=(*SEEDS, *OF_A_FOLDER, *_WITHOUT, "clip_sample", "thresholding"), runs=True)
def edit(
    layers: Layers,
    options: RunOptions,
    pictures: Annotated[list[Path], argument("Pictures, or folders of them.", "IMAGE...")],
    source: Annotated[
        str | None, option("What the pictures show: a prompt, or a class.", PANEL, "--from", metavar="TEXT")
    ] = None,
    to: Annotated[
        list[str] | None,
        option("What they are to show; given again, one more edit of each.", PANEL, metavar="TEXT"),
    ] = None,
    guidance_scale: Annotated[
        list[float] | None,
        option(
            "Scale of guidance towards what they are to show; given again, one more edit of each [the model's].",
            PANEL,
            metavar="W",
        ),
    ] = None,
    keep_mask: Annotated[
        Path | None, option("Keep what is white in this picture; grey blends.", PANEL, metavar="FILE")
    ] = None,
) -> None:
    """
    Edit pictures by DDIM inversion: go up the grid with what a picture shows, and down it with what it is to show.

    Each picture NAME becomes NAME.recon.png, which shows what inversion keeps of it, and a PNG for each edit;
    edited.png shows all of them beside the originals. The way up is not guided. A smaller --strength inverts only part
    of the way, and changes less; --refine has inversion return; --mask or --keep-mask says what part of a picture is
    edited. It needs eta 0; clipping and thresholding are off.

    The same command goes on where it was stopped, and does nothing where all is done.

    [bold]Examples[/bold]

    \b
    ddim edit seven.png -m mnist-text --from "a thin seven" --to "a bold seven"
    ddim edit photos -m MODEL --from "a cat" --to "a dog" --to "a fox" --refine 3
    ddim edit photo.png -m MODEL --from "a cat" --to "a dog" --guidance-scale 2 --guidance-scale 7.5
    ddim edit photo.png -m MODEL --from "a cat" --to "a dog" --strength 0.7 --keep-mask background.png
    """
    from ddim_cli.experiments.edits import resolve_edits

    kept = None if keep_mask is None else str(keep_mask)
    run, edits, turned_off = resolve_edits(layers, pictures, source, to or (), guidance_scale or (), kept)
    if not options.quiet:
        say_turned_off(turned_off)
        say_conversions([*edits.pictures, *edits.masks])

    def prepare(shard: Shard, speaks: bool) -> tuple[Job, EditedPictures]:
        from ddim_cli.experiments import edit as experiment

        return experiment.prepare(run, edits, shard)

    names = panels.first_and_last([str(picture.path) for picture in edits.pictures])
    outcome = run_job(run, prepare, options, f"reconstructions and edits of {names}")
    if outcome is None:
        return
    from ddim_cli.experiments.edit import Edited

    result = Edited.of(*outcome)
    if options.json:
        console.print_json(as_json(result, outcome[2], edits.source.to, list(turned_off)))
    elif not options.quiet:
        show_edited(outcome[2], result)


def as_json(result: Edited, summary: Summary, source: str, turned_off: list[str]) -> dict[str, Any]:
    return {
        "images": result.made + result.present,
        **counts_as_json(summary),
        "from": source,
        "turned_off": turned_off,
        "sheet": str(result.sheet) if result.sheet is not None else None,
        "pictures": [
            {
                "file": str(each.picture),
                "reconstruction": str(each.reconstruction),
                "error": each.error if each.error == each.error else None,
                "edits": [str(path) for path in each.edits],
            }
            for each in result.pictures
        ],
    }


def show_edited(summary: Summary, result: Edited) -> None:
    """Print the closing panel."""
    shown = result.pictures[:MOST_LINES]
    width = max(len(each.picture.name) for each in shown)
    lines = [f"{each.picture.name:<{width}}  {each.error:.6f}" for each in shown if each.error == each.error]
    if len(result.pictures) > len(shown):
        lines.append(f"... and {len(result.pictures) - len(shown):,} more, each in its sidecar")
    show_done(
        summary,
        "picture",
        # As of ddim invert: of the reconstruction, which says how much inversion keeps.
        squared_difference="\n".join(lines) or None,
        folder=result.folder,
        side_by_side=result.sheet,
    )
