"""``ddim sweep``: the same seeds under many settings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ddim_cli.cli import console
from ddim_cli.cli.options import (
    DryRun,
    ExtractorInput,
    Inception,
    Json,
    Layers,
    LogFile,
    Overwrite,
    Part,
    Quiet,
    Verbose,
    with_settings,
)
from ddim_cli.outputs.figures import distance_text

if TYPE_CHECKING:
    from ddim_cli.evaluation.score import Judge
    from ddim_cli.experiments.sweep import CellResult, Plan, Scorer, Swept


@console.handles_errors
@with_settings()
def sweep(
    layers: Layers,
    axis: Annotated[
        list[str] | None,
        typer.Option(
            help="An axis: any TOML key and its values, steps=10,20,50; may be given again.",
            metavar="KEY=V1,V2",
            show_default=False,
            rich_help_panel="Sweep",
        ),
    ] = None,
    reference: Annotated[
        str | None,
        typer.Option(
            help="Score every cell against this, as ddim evaluate does.",
            metavar="DIR|NPZ|mnist",
            show_default=False,
            rich_help_panel="Sweep",
        ),
    ] = None,
    extractor: Annotated[
        str | None,
        typer.Option(
            help="The network whose features are compared \\[what the reference is of].",
            metavar="FILE|NAME",
            show_default=False,
            rich_help_panel="Features",
        ),
    ] = None,
    extractor_input: ExtractorInput = None,
    inception: Inception = None,
    shard: Part = None,
    overwrite: Overwrite = False,
    dry_run: DryRun = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
    log_file: LogFile = None,
    json: Json = False,
) -> None:
    """
    [bold]Examples[/bold]

    \b
    ddim sweep --axis steps=10,20,50 --axis eta=0.0,0.5,1.0
    ddim sweep --axis scheduler.timestep_spacing=leading,quadratic --steps 10 -n 64
    ddim sweep -c configs/table1.toml --dry-run
    ddim sweep -c configs/table1.toml --reference mnist -o table1

    Sample the same seeds under many settings: every combination of the values of the axes.

    The axes come from --axis, or the \\[sweep] table of a config. Each cell is a folder as ddim sample makes them;
    sweep.png shows all of them with the axes named. The same command goes on where it was stopped, and does nothing
    where all is done.
    """
    from ddim_cli.config.sweep import parse_sweep
    from ddim_cli.errors import UsageError
    from ddim_cli.experiments.cells import resolve_cells
    from ddim_cli.sampling.plan import Shard
    from ddim_cli.sampling.torchrun import Ranks

    if Ranks.of() is not None:
        raise UsageError("sweep runs in one process; without torchrun, --shard I/N makes a part of every cell")
    part = Shard.parse(shard) if shard is not None else Shard()
    wanted = parse_sweep(layers, axis or ())
    cells, warnings = resolve_cells(layers, wanted)
    for warning in warnings:
        console.warn(warning)
    with console.progress(quiet, verbose, kind=console.SweepProgress) as progress:
        from ddim_cli.experiments.sweep import execute, look, make_plan

        plan = make_plan(wanted, cells, part)
        given = {
            "reference": reference,
            "extractor": extractor,
            "extractor_input": extractor_input,
            "inception": inception,
        }
        asked = {**wanted.scoring, **{name: value for name, value in given.items() if value is not None}}
        scorer = open_scorer(plan, asked, progress)
        if dry_run:
            todo = look(plan, overwrite)
        else:
            found = execute(plan, progress, overwrite, scorer)
    if dry_run:
        show_plan(plan, todo, json)
        return
    scores = [result.score for result in found.results if result.score is not None]
    for warning in dict.fromkeys(score["warning"] for score in scores if score.get("warning")):
        console.warn(warning)
    if json:
        console.print_json(as_json(found))
    elif not quiet:
        show_swept(found)


def open_scorer(plan: Plan, asked: Mapping[str, str], progress: console.RunProgress | None) -> Scorer | None:
    """What scores a cell's pictures, None without a reference. Before any is made: what it needs may be missing."""
    from ddim_cli.errors import UsageError

    if "reference" not in asked:
        if asked:
            raise UsageError(f"{min(asked)} without a reference scores nothing; name one with --reference")
        return None
    from ddim_cli.evaluation.score import Judge

    if progress is not None:
        progress.waiting(f"reading the reference {asked['reference']}")
    job = plan.cells[0].job
    judge = Judge.open(
        asked["reference"],
        asked.get("extractor"),
        job.device,
        inception=Path(asked["inception"]) if "inception" in asked else None,
        values=asked.get("extractor_input", "unit"),
    )
    return JudgeScorer(judge)


@dataclass(frozen=True)
class JudgeScorer:
    """A judge as the sweep knows it: its scores as JSON. A `Scorer`."""

    judge: Judge

    @property
    def facts(self) -> Mapping[str, Any]:
        return self.judge.facts

    def __call__(self, pictures: Sequence[Path]) -> Mapping[str, Any]:
        return self.judge.score(pictures).as_json()


def plan_as_json(plan: Plan, todo: list[int]) -> dict[str, Any]:
    return {
        "folder": str(plan.folder),
        "images": len(plan.seeds),
        "cells": [
            {
                "title": own.cell.title,
                "folder": own.name,
                "images": len(own.job.seeds),
                "present": len(own.job.seeds) - count,
                "timesteps": len(own.job.run.timesteps),
                "batch_size": own.job.batch_size,
                "set": own.cell.settings,
            }
            for own, count in zip(plan.cells, todo, strict=True)
        ],
        "image_steps": sum(count * len(own.job.run.timesteps) for own, count in zip(plan.cells, todo, strict=True)),
    }


def show_plan(plan: Plan, todo: list[int], as_json: bool) -> None:
    """``--dry-run``: on stdout, the cells."""
    found = plan_as_json(plan, todo)
    if as_json:
        console.print_json(found)
        return
    rows = [
        {
            **_places(plan, own.cell.at),
            "images": f"{cell['images']:,}",
            "there": f"{cell['present']:,}",
            "timesteps": f"{cell['timesteps']:,}",
            "batch": f"{cell['batch_size']:,}",
        }
        for own, cell in zip(plan.cells, found["cells"], strict=True)
    ]
    console.show_columns(rows, "dry run: nothing is written", words=len(plan.sweep.axes))
    console.show_table(
        {
            "cells": len(plan.cells),
            "work": f"{found['image_steps']:,} steps of an image",
            "folder": plan.folder,
        },
        "dry run: nothing is written",
        "yellow",
    )


def _places(plan: Plan, at: tuple[int, ...]) -> dict[str, str]:
    """The cell's place on each axis: name -> label."""
    return {axis.name: axis.values[i].label for axis, i in zip(plan.sweep.axes, at, strict=True)}


def as_json(found: Swept) -> dict[str, Any]:
    return {
        "folder": str(found.plan.folder),
        "sheet": str(found.sheet) if found.sheet is not None else None,
        "made": found.made,
        "present": found.present,
        "left": found.left,
        "finished": found.left == 0,
        "seconds": round(found.seconds, 3),
        "cells": [result.as_json() for result in found.results],
    }


def show_swept(found: Swept) -> None:
    """The table of the cells, the score as the paper has it, and the closing panel."""
    plan = found.plan
    score = next((result.score for result in found.results if result.score is not None), None)
    rows = [{**_places(plan, result.own.cell.at), **_figures(result, score)} for result in found.results]
    console.show_columns(rows, words=len(plan.sweep.axes))
    if score is not None and len(plan.sweep.axes) == 2:
        console.show_columns(_matrix(found), f"{score['label']}, lower is better")
    if found.made:
        images = console.counted(found.made, "image")
        images += f" made, {found.present:,} there already" if found.present else ""
        summary: dict[str, Any] = {"images": images, "time": console.duration(found.seconds)}
    else:
        summary = {"images": f"nothing to do: all {found.present:,} are there already"}
    if found.left:
        summary["left"] = f"{console.counted(found.left, 'image')}, for other shards or runs"
    summary["folder"] = plan.folder
    if found.sheet is not None:
        summary["sheet"] = found.sheet
    if score is not None:
        summary["scored by"] = f"{score['label']} to {score['reference']['source']}"
    for name, value in summary.items():
        console.log(f"{name}: {value}")
    console.show_table(summary, "done")


def _figures(result: CellResult, score: Any) -> dict[str, str]:
    rate = result.images_per_second
    figures = {
        "images": f"{len(result.own.job.run.config.seeds()):,}",
        "images/s": f"{rate:.3g}" if rate is not None else "",
    }
    return figures if score is None else {**figures, "score": _score(result)}


def _score(result: CellResult) -> str:
    return distance_text(result.score["value"]) if result.score is not None else ""


def _matrix(found: Swept) -> list[dict[str, str]]:
    """The scores, the first axis across and the second down."""
    across, down = ((axis.name, [value.label for value in axis.values]) for axis in found.plan.sweep.axes)
    return console.crossed(across, down, {result.own.cell.at: _score(result) for result in found.results})
