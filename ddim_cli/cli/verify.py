"""``ddim verify``: every PNG of a folder against its sidecar."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ddim_cli.cli import console
from ddim_cli.cli.options import Json, Verbose


@console.handles_errors
def verify(
    folder: Annotated[Path, typer.Argument(help="An output folder of ddim sample.", metavar="DIR")],
    verbose: Verbose = False,
    json: Json = False,
) -> None:
    """
    [bold]Examples[/bold]

    \b
    ddim verify outputs/smoke
    ddim verify /data/fid --json

    Check that an output folder is what it says: every seed of run.json is there, every PNG decodes, its pixels and its
    text are what its sidecar says, and no numbered picture is extra.

    Frames, reconstructions and pictures from latents are held against their sidecars, the strips of a trajectory
    against their own text. Exit 3, and a list, if something is wrong.
    """
    from ddim_cli.errors import DifferenceError
    from ddim_cli.evaluation import verify as verification

    with console.spinner(f"verifying {folder}") as update:
        found = verification.verify(folder, update)
    if json:
        console.print_json(
            {
                "folder": str(folder),
                "ok": not found.problems,
                "images": found.images,
                "problems": [{"file": p.file, "seed": p.seed, "problem": f"{p.file} {p.text}"} for p in found.problems],
            }
        )
    else:
        for problem in found.problems:
            typer.echo(f"{folder / problem.file}: {problem.text}")
        verdict = console.counted(len(found.problems), "problem") if found.problems else "all is well"
        typer.echo(f"{console.counted(found.images, 'image')}: {verdict}")
    if found.problems:
        raise typer.Exit(DifferenceError.exit_code)
