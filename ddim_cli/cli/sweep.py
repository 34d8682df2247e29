"""``ddim sweep``: the same seeds under many settings."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

from ddim_cli.cli import console, panels
from ddim_cli.cli.options import (
    OF_INVERSION,
    Extractor,
    ExtractorInput,
    Inception,
    Layers,
    RunOptions,
    option,
    with_settings,
)
from ddim_cli.cli.progress import SweepProgress, showing_progress
from ddim_cli.outputs.figures import distance_text

if TYPE_CHECKING:
    from ddim_cli.experiments.sweep import CellResult, SweepJob, Swept


@console.handles_errors
@with_settings(without=OF_INVERSION, runs=True)
def sweep(
    layers: Layers,
    options: RunOptions,
    axis: Annotated[
        list[str] | None,
        option("Add an axis: any TOML key and its values, steps=10,20,50.", "Sweep", metavar="KEY=V1,V2"),
    ] = None,
    reference: Annotated[
        str | None,
        option("Score every cell against this, as ddim evaluate does.", "Sweep", metavar="DIR|NPZ|mnist"),
    ] = None,
    extractor: Extractor = None,
    extractor_input: ExtractorInput = None,
    inception: Inception = None,
) -> None:
    """
    Sample the same seeds under many settings: every combination of the values of the axes.

    The axes come from --axis, or the \\[sweep] table of a config. Each cell is a folder as ddim sample makes them;
    sweep.png shows all of them with the axes named.

    The same command goes on where it was stopped, and does nothing where all is done.

    [bold]Examples[/bold]

    \b
    ddim sweep --axis steps=10,20,50 --axis eta=0.0,0.5,1.0
    ddim sweep --axis scheduler.timestep_spacing=leading,quadratic --steps 10 -n 64
    ddim sweep -c configs/table1.toml --dry-run
    ddim sweep -c configs/table1.toml --reference mnist -o table1
    """
    from ddim_cli.experiments.cells import choose_part, resolve_sweep

    part = choose_part(options.shard)
    run = resolve_sweep(layers, axis or ())
    for warning in run.warnings:
        console.warn(warning)
    given = {
        "reference": reference,
        "extractor": extractor,
        "extractor_input": extractor_input,
        "inception": inception,
    }
    scoring = {**run.settings.scoring, **{name: str(value) for name, value in given.items() if value is not None}}
    with showing_progress(options.quiet, SweepProgress(options.verbose)) as progress:
        from ddim_cli.experiments.sweep import execute_sweep, pending_images, prepare

        job, scorer = prepare(run, part), None
        if scoring:
            from ddim_cli.evaluation.cells import open_judge

            if progress is not None and "reference" in scoring:
                progress.waiting(f"reading the reference {scoring['reference']}")
            # Before any picture is made: what it needs may be missing.
            scorer = open_judge(scoring, job.cells[0].job.device)
        if options.dry_run:
            counts = pending_images(job, options.overwrite)
        else:
            swept = execute_sweep(job, progress, options.overwrite, scorer)
    if options.dry_run:
        show_plan(job, counts, options.json)
        return
    scores = [result.score for result in swept.cells if result.score is not None]
    for warning in dict.fromkeys(score["warning"] for score in scores if score.get("warning")):
        console.warn(warning)
    if options.json:
        console.print_json(swept.as_json())
    elif not options.quiet:
        show_swept(swept)


def show_plan(sweep: SweepJob, counts: Sequence[int], as_json: bool) -> None:
    """Print what a sweep would do, for ``--dry-run``; ``counts`` are the images to be made of each cell."""
    cells: list[dict[str, Any]] = [
        {
            "title": cell.settings.title,
            "folder": cell.name,
            "images": len(cell.job.items),
            "present": len(cell.job.items) - count,
            "timesteps": len(cell.job.run.timesteps),
            "batch_size": cell.job.batch_size,
            "set": cell.settings.values,
        }
        for cell, count in zip(sweep.cells, counts, strict=True)
    ]
    steps = sum(count * cell["timesteps"] for cell, count in zip(cells, counts, strict=True))
    if as_json:
        facts = {"folder": str(sweep.folder), "images": len(sweep.seeds), "cells": cells, "image_steps": steps}
        console.print_json(facts)
        return
    columns = {"images": "images", "there": "present", "timesteps": "timesteps", "batch": "batch_size"}
    rows = [
        {**_place(sweep, cell.settings.at), **{name: f"{told[key]:,}" for name, key in columns.items()}}
        for cell, told in zip(sweep.cells, cells, strict=True)
    ]
    title = "dry run: nothing is written"
    panels.show_columns(rows, title, words=len(sweep.settings.axes))
    work = f"{steps:,} steps of an image"
    panels.show_table({"cells": len(cells), "work": work, "folder": sweep.folder}, title, "yellow")


def _place(sweep: SweepJob, at: tuple[int, ...]) -> dict[str, str]:
    """Return where a cell is on each axis: name -> label."""
    return {axis.name: axis.values[i].label for axis, i in zip(sweep.settings.axes, at, strict=True)}


def show_swept(swept: Swept) -> None:
    """Print the table of the cells, the scores as a table of two axes, and the closing panel."""
    axes = swept.job.settings.axes
    score = next((result.score for result in swept.cells if result.score is not None), None)
    rows = [
        {
            **_place(swept.job, result.cell.settings.at),
            "images": f"{len(result.cell.seeds):,}",
            "images/s": f"{result.images_per_second:.3g}" if result.images_per_second is not None else "",
            **({} if score is None else {"score": _score_text(result)}),
        }
        for result in swept.cells
    ]
    panels.show_columns(rows, words=len(axes))
    if score is not None and len(axes) == 2:
        across, down = ((axis.name, [value.label for value in axis.values]) for axis in axes)
        texts = {result.cell.settings.at: _score_text(result) for result in swept.cells}
        panels.show_columns(panels.crossed(across, down, texts), f"{score['label']}, lower is better")
    there = f", {swept.present:,} there already" if swept.present else ""
    summary: dict[str, Any] = {
        "images": f"{panels.counted(swept.made, 'image')} made{there}",
        "time": panels.duration(swept.seconds),
    }
    if not swept.made:
        summary = {"images": f"nothing to do: all {swept.present:,} are there already"}
    if swept.left:
        summary["left"] = f"{panels.counted(swept.left, 'image')}, for other shards or runs"
    summary["folder"] = swept.folder
    if swept.sheet is not None:
        summary["sheet"] = swept.sheet
    if score is not None:
        summary["scored by"] = f"{score['label']} to {score['reference']['source']}"
    panels.close(summary)


def _score_text(result: CellResult) -> str:
    return distance_text(result.score["value"]) if result.score is not None else ""
