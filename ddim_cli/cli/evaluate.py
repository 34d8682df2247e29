"""``ddim evaluate``: how far pictures are from a reference."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ddim_cli.cli import console
from ddim_cli.cli.options import FLAGS, ExtractorInput, Inception, Json, LogFile, OverwriteFile, Verbose
from ddim_cli.outputs.figures import distance_text

if TYPE_CHECKING:
    from ddim_cli.evaluation.cells import Cell, Cells
    from ddim_cli.evaluation.score import OnImage, Score

Device = FLAGS["device"].annotation()
Scored = Sequence[tuple["Cell", "Score | None"]]


@console.handles_errors
def evaluate(
    pictures: Annotated[
        Path, typer.Argument(help="A folder of pictures, an .npz of them, or the folder of a sweep.", metavar="DIR|NPZ")
    ],
    reference: Annotated[
        str,
        typer.Option(
            help="What they should look like: pictures, an .npz of pictures or statistics, or the MNIST test digits.",
            metavar="DIR|NPZ|mnist",
            show_default=False,
        ),
    ],
    extractor: Annotated[
        str | None,
        typer.Option(
            help="Whose features are compared: a network in TorchScript or of torch.export, or mnist, the bundled "
            "digit classifier \\[Inception; of --reference mnist the digit classifier].",
            metavar="FILE|mnist",
            show_default=False,
            rich_help_panel="Features",
        ),
    ] = None,
    extractor_input: ExtractorInput = None,
    inception: Inception = None,
    num_images: Annotated[
        int | None,
        typer.Option(
            "--num-images", "-n", help="Only the first N pictures \\[all].", min=2, metavar="N", show_default=False
        ),
    ] = None,
    keep_reference: Annotated[
        Path | None,
        typer.Option(
            help="Write the reference's statistics here, an .npz that --reference takes the next time.",
            metavar="FILE",
            show_default=False,
        ),
    ] = None,
    overwrite: OverwriteFile = False,
    seed: Annotated[int, typer.Option(help="Of the kernel distance's subsets.", min=0, metavar="S")] = 0,
    batch_size: Annotated[
        int,
        typer.Option("--batch-size", "-b", help="Pictures at a time.", min=1, metavar="N", rich_help_panel="Runtime"),
    ] = 64,
    device: Device = None,
    quiet: Annotated[
        bool,
        typer.Option("--quiet", "-q", help="No progress, and of the result the numbers.", rich_help_panel="Console"),
    ] = False,
    verbose: Verbose = False,
    log_file: LogFile = None,
    json: Json = False,
) -> None:
    """
    [bold]Examples[/bold]

    \b
    ddim evaluate outputs/mnist-50steps-1a2b3c4d --reference mnist
    ddim evaluate samples.npz --reference path/to/pictures
    ddim evaluate samples --reference pictures --extractor network.pt
    ddim evaluate outputs/mnist-sweep-1a2b3c4d --reference mnist

    Score pictures by their Frechet distance from a reference, and by the kernel distance.

    In the features of Inception these are FID and KID, which need pip install 'ddim-cli\\[eval]'; in those of another
    network they go by other names, and their values compare with their like alone.
    """
    cells = read_cells_if_sweep(pictures, num_images)
    check_keep(keep_reference, overwrite)
    with console.progress(quiet, verbose, kind=console.PictureProgress) as progress:
        from ddim_cli.evaluation.pictures import open_pictures
        from ddim_cli.evaluation.score import Judge

        looking_at: Callable[[str], OnImage] = progress.looking_at if progress is not None else _silent
        found = open_pictures(pictures, num_images) if cells is None else None
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
            scored: Scored = []
            score = judge.score(found, looking_at(str(pictures)))
        else:
            from ddim_cli.evaluation.cells import score_cells

            scored = list(score_cells(judge, cells, looking_at))
    scores = [score] if cells is None else [each for _, each in scored if each is not None]
    for warning in dict.fromkeys(each.warning for each in scores if each.warning is not None):
        console.warn(warning)
    if json and cells is None:
        console.print_json({"pictures": str(pictures), **score.as_json()})
    elif json:
        console.print_json(cells_as_json(pictures, cells, scored))
    elif cells is None:
        show_score(pictures, score, quiet)
    else:
        show_cells(pictures, cells, scored, quiet)


def _silent(what: str) -> OnImage:
    return lambda done, total: None


def read_cells_if_sweep(folder: Path, count: int | None) -> Cells | None:
    """The cells of a sweep's folder; None for any other path."""
    from ddim_cli.outputs.sweep_manifest import is_sweep

    if not is_sweep(folder):
        return None
    from ddim_cli.evaluation.cells import read_cells

    return read_cells(folder, count)


def check_keep(path: Path | None, overwrite: bool) -> None:
    """UsageError, before any work, for a file that could not be written, or not be found again as statistics."""
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
    """What holds for every score of a judge: the reference and the features."""
    known = "" if score.reference_images is None else f" ({console.counted(score.reference_images, 'picture')})"
    digest = f", sha256 {score.extractor.sha256[:12]}..." if score.extractor.sha256 is not None else ""
    return {
        "reference": f"{score.reference}{known}",
        "features": f"{score.extractor.name}, {score.features:,} of them{digest}",
    }


def show_score(pictures: Path, score: Score, quiet: bool) -> None:
    """The closing panel; with ``quiet`` the value alone."""
    if quiet:
        typer.echo(repr(score.value))
        return
    rows: dict[str, Any] = {score.label: distance_text(score.value)}
    if score.kid is not None:
        rows[score.kid_label] = kernel_text(score)
    rows |= {"pictures": f"{pictures} ({console.counted(score.images, 'picture')})", **_common(score)}
    for name, value in rows.items():
        console.log(f"{name}: {value}")
    console.show_table(rows, "lower is better")


def cells_as_json(folder: Path, cells: Cells, scored: Scored) -> dict[str, Any]:
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


def show_cells(folder: Path, cells: Cells, scored: Scored, quiet: bool) -> None:
    """A row a cell; of two axes the scores as a table too; the closing panel."""
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
    console.show_columns(rows, words=len(cells.axes))
    if len(cells.axes) == 2:
        texts = {cell.at: distance_text(score.value) for cell, score in scored if score is not None}
        console.show_columns(console.crossed(*cells.axes, texts), f"{first.label}, lower is better")
    if quiet:
        return
    done = sum(score is not None for _, score in scored)
    unfinished = len(scored) - done
    summary = {
        "sweep": folder,
        "cells": console.counted(done, "cell") + (f", {unfinished:,} not finished" if unfinished else ""),
        "distance": f"{first.label}; kernel distance: {first.kid_label}",
        **_common(first),
    }
    for name, value in summary.items():
        console.log(f"{name}: {value}")
    console.show_table(summary, "done")
