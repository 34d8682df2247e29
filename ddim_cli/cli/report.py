"""``ddim report``: show the pictures of a folder as a page."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from ddim_cli.cli import console, panels
from ddim_cli.cli.options import Json, OverwriteFile, Quiet, Verbose, option, place_argument
from ddim_cli.cli.progress import spinner

# Beyond this, mail servers refuse a file and browsers are slow to open it.
MANY_BYTES = 50_000_000
MOST_SHOWN = 10


@console.handles_errors
def report_page(
    folder: Annotated[str, place_argument("Output folder of any command that makes pictures.", "DIR")],
    out: Annotated[Path | None, option("File to write [DIR/report.html].", None, "--out", "-o", metavar="FILE")] = None,
    embed: Annotated[
        bool, option("Embed the pictures, so that the file can be sent on its own.", None, "--embed")
    ] = False,
    overwrite: OverwriteFile = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
    json: Json = False,
) -> None:
    """
    Write a page that shows the pictures, how each was made, and the cells of a sweep side by side.

    Open it in a browser; it needs no network and no server. It shows the
    pictures that lie beside it, unless --embed puts them inside; those of
    shards and of object stores are always inside.

    [bold]Examples[/bold]

    \b
    ddim report outputs/smoke
    ddim report table1 --embed -o table1.html
    """
    from ddim_cli.outputs.files import place_of
    from ddim_cli.outputs.report.page import write_report

    with spinner(f"reading {folder}", quiet) as update:
        page = write_report(place_of(folder), out, embed, update, overwrite)
    if page.embedded and page.bytes > MANY_BYTES:
        console.warn(f"{page.path} has {page.bytes / 1e6:,.0f} MB; browsers take a while to open that")
    if not quiet:
        for problem in page.problems[:MOST_SHOWN]:
            console.warn(problem)
        if len(page.problems) > MOST_SHOWN:
            console.warn(f"and {len(page.problems) - MOST_SHOWN:,} more of this kind; the page lists them")
    if json:
        facts = vars(page).items()
        console.print_json({"report": str(page.path), **{name: value for name, value in facts if name != "path"}})
    elif not quiet:
        images = panels.counted(page.images, "image")
        rows = {
            "page": page.path,
            "shows": f"{images} in {panels.counted(page.sets, 'cell')}" if page.kind == "sweep" else images,
            "size": f"{page.bytes / 1e6:,.2f} MB, the pictures {'inside' if page.embedded else 'beside it'}",
        }
        panels.close(rows)
