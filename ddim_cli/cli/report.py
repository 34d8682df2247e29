"""``ddim report``: a folder of pictures as a page to look at."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ddim_cli.cli import console
from ddim_cli.cli.options import Json, OverwriteFile, Quiet, Verbose

# Mail and browsers take no more gladly.
MANY_BYTES = 50_000_000
MOST_SHOWN = 10


@console.handles_errors
def report_page(
    folder: Annotated[
        Path,
        typer.Argument(help="The output folder of a command that makes pictures.", metavar="DIR"),
    ],
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="The file to write [DIR/report.html].", metavar="FILE", show_default=False),
    ] = None,
    embed: Annotated[
        bool, typer.Option("--embed", help="Have the pictures inside the file, so that it can be sent alone.")
    ] = False,
    overwrite: OverwriteFile = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
    json: Json = False,
) -> None:
    """
    [bold]Examples[/bold]

    \b
    ddim report outputs/smoke
    ddim report table1 --embed -o table1.html

    Write DIR/report.html, a page to look at: the pictures, how each was made, and the cells of a sweep side by side.

    It needs no network and no server: open it in a browser. The pictures are those beside it, unless --embed puts
    them inside.
    """
    from ddim_cli.outputs.report.page import write_report

    with console.spinner(f"reading {folder}", quiet) as update:
        found = write_report(folder, out, embed, update, overwrite)
    if embed and found.bytes > MANY_BYTES:
        console.warn(f"{found.path} has {found.bytes / 1e6:,.0f} MB; browsers take a while to open that")
    if not quiet:
        for problem in found.problems[:MOST_SHOWN]:
            console.warn(problem)
        if len(found.problems) > MOST_SHOWN:
            console.warn(f"and {len(found.problems) - MOST_SHOWN:,} more of this kind; the page lists them")
    if json:
        console.print_json(
            {
                "report": str(found.path),
                "kind": found.kind,
                "images": found.images,
                "sets": found.sets,
                "problems": list(found.problems),
                "bytes": found.bytes,
                "embedded": found.embedded,
            }
        )
    elif not quiet:
        images = console.counted(found.images, "image")
        rows = {
            "page": found.path,
            "shows": f"{images} in {console.counted(found.sets, 'cell')}" if found.kind == "sweep" else images,
            "size": f"{found.bytes / 1e6:,.2f} MB, " + ("the pictures inside" if embed else "the pictures beside it"),
        }
        console.show_table(rows, "done")
