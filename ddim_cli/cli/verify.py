"""``ddim verify``: check every PNG of a folder against its sidecar."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ddim_cli.cli import console, panels
from ddim_cli.cli.options import Json, Verbose, argument
from ddim_cli.cli.progress import spinner


@console.handles_errors
def verify(
    folder: Annotated[Path, argument("Output folder to check.", "DIR")],
    verbose: Verbose = False,
    json: Json = False,
) -> None:
    """
    Check an output folder: every seed of run.json, and every row of items.jsonl, is there, every PNG decodes, its
    pixels and its text match its sidecar, and no numbered picture is extra.

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

    with spinner(f"verifying {folder}") as update:
        verified = verification.verify(folder, update)
    if json:
        console.print_json(
            {
                "folder": str(folder),
                "ok": not verified.problems,
                "images": verified.images,
                "problems": [
                    {"file": p.file, "seed": p.seed, "problem": f"{p.file} {p.text}"} for p in verified.problems
                ],
            }
        )
    else:
        for problem in verified.problems:
            typer.echo(f"{folder / problem.file}: {problem.text}")
        verdict = panels.counted(len(verified.problems), "problem") if verified.problems else "all is well"
        typer.echo(f"{panels.counted(verified.images, 'image')}: {verdict}")
    if verified.problems:
        raise typer.Exit(DifferenceError.exit_code)
