"""``ddim evaluate``: score pictures against a reference."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ddim_cli.cli import console, panels
from ddim_cli.cli.options import (
    Extractor,
    ExtractorInput,
    Inception,
    Json,
    LogFile,
    OnlyNumbers,
    OverwriteFile,
    Verbose,
    option,
    place_argument,
    setting,
)
from ddim_cli.cli.progress import PictureProgress, showing_progress
from ddim_cli.outputs.figures import distance_text

if TYPE_CHECKING:
    from ddim_cli.evaluation.cells import CellPictures, SweepPictures
    from ddim_cli.evaluation.score import OnImage, Score
    from ddim_cli.outputs.files import Place

Scored = Sequence[tuple["CellPictures", "Score | None"]]


@console.handles_errors
def evaluate(
    pictures: Annotated[str, place_argument("Folder of pictures, .npz of pictures, or folder of a sweep.", "DIR|NPZ")],
    reference: Annotated[
        str,
        option(
            "What to compare with: pictures, an .npz of pictures or statistics, or the MNIST test digits.",
            metavar="DIR|NPZ|mnist",
        ),
    ],
    extractor: Extractor = None,
    extractor_input: ExtractorInput = None,
    inception: Inception = None,
    num_images: Annotated[
        int | None, option("Score the first N pictures [all].", None, "--num-images", "-n", min=2, metavar="N")
    ] = None,
    keep_reference: Annotated[
        Path | None,
        option("Save the reference's statistics to this .npz, for --reference next time.", metavar="FILE"),
    ] = None,
    overwrite: OverwriteFile = False,
    seed: Annotated[int, option("Seed of the kernel distance's subsets [0].", min=0, metavar="S")] = 0,
    batch_size: Annotated[
        int, option("Pictures in a batch [64].", "Runtime", "--batch-size", "-b", min=1, metavar="N")
    ] = 64,
    device: Annotated[str | None, setting("device")] = None,
    quiet: OnlyNumbers = False,
    verbose: Verbose = False,
    log_file: LogFile = None,
    json: Json = False,
) -> None:
    """
    Score pictures by their Frechet distance and kernel distance from a reference.

    With Inception's features these are FID and KID, which need pip install
    'ddim-cli\\[eval]'. With the features of another network they have other
    names, and only scores with the same features can be compared.

    [bold]Examples[/bold]

    \b
    ddim evaluate outputs/mnist-50steps-1a2b3c4d --reference mnist
    ddim evaluate samples.npz --reference path/to/pictures
    ddim evaluate samples --reference pictures --extractor network.pt
    ddim evaluate outputs/mnist-sweep-1a2b3c4d --reference mnist
    """
    from ddim_cli.outputs.files import place_of
    from ddim_cli.outputs.sweep_manifest import is_sweep

    place, cells = place_of(pictures), None
    if isinstance(place, Path) and is_sweep(place):
        from ddim_cli.evaluation.cells import read_cells

        cells = read_cells(place, num_images)
    check_keep(keep_reference, overwrite)
    with showing_progress(quiet, PictureProgress(verbose)) as progress:
        from ddim_cli.evaluation.cells import score_cells
        from ddim_cli.evaluation.pictures import open_pictures
        from ddim_cli.evaluation.score import Judge

        looking_at: Callable[[str], OnImage] = progress.looking_at if progress is not None else _silent
        opened = open_pictures(place, num_images) if cells is None else ()
        judge = Judge.open(
            reference,
            extractor,
            device or "auto",
            batch_size,
            inception=inception,
            values=extractor_input or "unit",
            seed=seed,
            on_image=looking_at(f"reference {reference}"),
        )
        if keep_reference is not None:
            judge.keep_reference(keep_reference, overwrite)
        if cells is None:
            scores = [judge.score(opened, looking_at(str(pictures)))]
        else:
            scored: Scored = list(score_cells(judge, cells, looking_at))
            scores = [score for _, score in scored if score is not None]
    for warning in dict.fromkeys(score.warning for score in scores if score.warning is not None):
        console.warn(warning)
    if cells is None and json:
        console.print_json({"pictures": str(pictures), **scores[0].as_json()})
    elif cells is None:
        show_score(place, scores[0], quiet)
    elif json:
        console.print_json(cells_as_json(place, cells, scored))
    else:
        show_cells(place, cells, scored, quiet)


def _silent(what: str) -> OnImage:
    return lambda done, total: None


def check_keep(path: Path | None, overwrite: bool) -> None:
    """Raise UsageError, before any work, for a file that could not be written, or not be read again as statistics."""
    from ddim_cli.errors import UsageError
    from ddim_cli.outputs.named import name_file
    from ddim_cli.outputs.npz import STATISTICS

    if path is None:
        return
    to = name_file(path, STATISTICS, "--keep-reference", overwrite)
    if to.is_regular and path.suffix != ".npz":
        raise UsageError(f"--keep-reference {path}: the name must end in .npz")


def kernel_text(score: Score) -> str:
    kid = score.kid
    if kid is None:
        return ""
    return f"{distance_text(kid.mean)} +- {distance_text(kid.std)} ({kid.subsets} subsets of {kid.subset_size:,})"


def _common(score: Score) -> dict[str, Any]:
    """Return the rows that all scores of a judge share: the reference and the features."""
    known = "" if score.reference_images is None else f" ({panels.counted(score.reference_images, 'picture')})"
    digest = f", sha256 {score.extractor.sha256[:12]}..." if score.extractor.sha256 is not None else ""
    return {
        "reference": f"{score.reference}{known}",
        "features": f"{score.extractor.name}, {score.features:,} of them{digest}",
    }


def show_score(pictures: Place, score: Score, quiet: bool) -> None:
    """Print the closing panel; with ``quiet`` the value alone."""
    if quiet:
        typer.echo(repr(score.value))
        return
    rows: dict[str, Any] = {score.label: distance_text(score.value)}
    if score.kid is not None:
        rows[score.kid_label] = kernel_text(score)
    rows |= {"pictures": f"{pictures} ({panels.counted(score.images, 'picture')})", **_common(score)}
    panels.close(rows, "lower is better")


def cells_as_json(folder: Place, cells: SweepPictures, scored: Scored) -> dict[str, Any]:
    return {
        "sweep": str(folder),
        "axes": [{"name": name, "values": list(labels)} for name, labels in cells.axes],
        "cells": [
            {
                "at": list(cell.at),
                "folder": cell.name,
                "finished": bool(cell.files),
                "score": score.as_json() if score is not None else None,
            }
            for cell, score in scored
        ],
    }


def show_cells(folder: Place, cells: SweepPictures, scored: Scored, quiet: bool) -> None:
    """Show a row for each cell, for two axes the scores as a table too, and the closing panel."""
    first = next(score for _, score in scored if score is not None)
    rows = [
        {
            **cells.place(cell),
            "images": f"{score.images:,}" if score is not None else "",
            "distance": distance_text(score.value) if score is not None else "not finished",
            "kernel distance": kernel_text(score) if score is not None else "",
        }
        for cell, score in scored
    ]
    panels.show_columns(rows, words=len(cells.axes))
    if len(cells.axes) == 2:
        texts = {cell.at: distance_text(score.value) for cell, score in scored if score is not None}
        panels.show_columns(panels.crossed(*cells.axes, texts), f"{first.label}, lower is better")
    if quiet:
        return
    done = sum(score is not None for _, score in scored)
    unfinished = len(scored) - done
    summary = {
        "sweep": folder,
        "cells": panels.counted(done, "cell") + (f", {unfinished:,} not finished" if unfinished else ""),
        "distance": f"{first.label}; kernel distance: {first.kid_label}",
        **_common(first),
    }
    panels.close(summary)
