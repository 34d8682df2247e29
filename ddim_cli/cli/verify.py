"""``ddim verify``: check every picture of a folder against its sidecar."""

from __future__ import annotations

from typing import Annotated

import typer

from ddim_cli.cli import console, panels
from ddim_cli.cli.options import Json, Verbose, place_argument
from ddim_cli.cli.progress import spinner


@console.handles_errors
def verify(
    folder: Annotated[str, place_argument("Output folder to check, or one in an object store.", "DIR")],
    verbose: Verbose = False,
    json: Json = False,
) -> None:
    """
    Check an output folder: every seed of run.json, and every row of items.jsonl, is there, every picture decodes, its
    pixels and its text match its sidecar, and no numbered picture is extra.

    JPEG keeps no pixels exactly: of these pictures, the bytes of the file are
    checked in place of the pixels, and the summary says so.

    Frames, reconstructions and pictures from latents are checked against
    their sidecars, strips of a trajectory against their own text. List what
    is wrong, and exit 3 if anything is.

    [bold]Examples[/bold]

    \b
    ddim verify outputs/smoke
    ddim verify /data/fid --json
    """
    from ddim_cli.errors import DifferenceError
    from ddim_cli.evaluation import verify as verification
    from ddim_cli.outputs.files import place_of

    place = place_of(folder)
    with spinner(f"verifying {folder}") as update:
        verified = verification.verify(place, update)
    if json:
        console.print_json(
            {
                "folder": str(folder),
                "ok": not verified.problems,
                "images": verified.images,
                "pixels_not_checked": verified.lossy,
                "problems": [
                    {"file": p.file, "seed": p.seed, "problem": f"{p.file} {p.text}"} for p in verified.problems
                ],
            }
        )
    else:
        for problem in verified.problems:
            typer.echo(f"{place / problem.file}: {problem.text}")
        verdict = panels.counted(len(verified.problems), "problem") if verified.problems else "all is well"
        typer.echo(f"{panels.counted(verified.images, 'image')}: {verdict}")
        if verified.lossy:
            typer.echo(
                f"{panels.counted(verified.lossy, 'JPEG')}: the files were checked, and not their pixels, which JPEG "
                "does not keep"
            )
    if verified.problems:
        raise typer.Exit(DifferenceError.exit_code)
