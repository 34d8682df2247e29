"""``ddim compare``: a folder against golden pictures."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ddim_cli.cli import console
from ddim_cli.cli.options import Json, Verbose

if TYPE_CHECKING:
    from ddim_cli.evaluation.compare import Comparison, Match

# Of pictures that pass, so many are shown.
MOST_ROWS = 32


@console.handles_errors
def compare(
    golden: Annotated[Path, typer.Argument(help="The folder that is right.", metavar="GOLDEN")],
    folder: Annotated[Path, typer.Argument(help="The folder to judge.", metavar="DIR")],
    max_diff: Annotated[
        int, typer.Option(help="Largest difference of a pixel's value that passes.", min=0, max=255, metavar="N")
    ] = 1,
    min_psnr: Annotated[float, typer.Option(help="Lowest PSNR that passes, in dB.", min=0, metavar="DB")] = 40.0,
    diff_dir: Annotated[
        Path | None,
        typer.Option(
            help="Write a picture here for every pair that differs: golden, found, difference.",
            metavar="DIR",
            show_default=False,
        ),
    ] = None,
    verbose: Verbose = False,
    json: Json = False,
) -> None:
    """
    [bold]Examples[/bold]

    \b
    ddim compare tests/golden outputs/smoke
    ddim compare tests/golden outputs/smoke --max-diff 0
    ddim compare float32 bfloat16 --max-diff 255 --min-psnr 35 --diff-dir diffs

    Compare the pictures of two folders, matched by seed. Sidecars are not needed.

    Exit 3 if a picture is beyond either limit, missing, or extra.
    """
    from ddim_cli.errors import DifferenceError, UsageError
    from ddim_cli.evaluation import compare as comparison

    if not math.isfinite(min_psnr):
        raise UsageError(f"--min-psnr {min_psnr}: give a number; for equal pictures, use --max-diff 0")
    with console.spinner(f"comparing {folder}") as update:
        found = comparison.compare(golden, folder, comparison.Limits(max_diff, min_psnr), diff_dir, update)
    if json:
        limits = {"max_diff": max_diff, "min_psnr_db": min_psnr}
        console.print_json({"golden": str(golden), "folder": str(folder), "limits": limits, **as_json(found)})
    else:
        show(found)
    if not found.ok:
        raise typer.Exit(DifferenceError.exit_code)


def as_json(found: Comparison) -> dict[str, Any]:
    from ddim_cli.evaluation.compare import finite

    return {
        "ok": found.ok,
        "compared": len(found.matches),
        "failed": len(found.failed),
        "missing": list(found.missing),
        "extra": list(found.extra),
        "other_setting": found.note,
        "images": [
            {
                "seed": m.seed,
                "ok": m.problem is None,
                "max_diff": m.max_diff,
                "psnr_db": finite(m.psnr),
                "problem": m.problem,
            }
            for m in found.matches
        ],
    }


def show(found: Comparison) -> None:
    """A table, those that fail first and the worst of each kind before the others, and a closing line."""
    from rich.table import Table
    from rich.text import Text

    from ddim_cli.config.seeds import format_seeds

    passed = sorted((m for m in found.matches if m.problem is None), key=_badness)
    rows = [*sorted(found.failed, key=_badness), *passed[:MOST_ROWS]]
    if rows:
        table = Table(show_edge=False)
        for column in ("seed", "largest difference", "PSNR (dB)"):
            table.add_column(column, justify="right", no_wrap=True)
        table.add_column("", overflow="fold")
        for m in rows:
            numbers = (
                ("-", "-") if m.psnr is None else (str(m.max_diff), "equal" if not m.max_diff else f"{m.psnr:.2f}")
            )
            table.add_row(f"{m.seed:06d}", *numbers, Text(m.problem, "red") if m.problem else "ok")
        console.stdout().print(table)
    if len(passed) > MOST_ROWS:
        typer.echo(f"... and {len(passed) - MOST_ROWS:,} more that pass")
    for what, seeds in (("missing", found.missing), ("extra", found.extra)):
        if seeds:
            typer.echo(f"{what}: {console.counted(len(seeds), 'picture')} (seeds {format_seeds(seeds)})")
    if found.note is not None and not found.ok:
        typer.echo(f"note: {found.note}")
    verdict = f", {len(found.failed):,} beyond the limits" if found.failed else ", all within the limits"
    typer.echo(f"{console.counted(len(found.matches), 'picture')} compared{verdict if found.matches else ''}")


def _badness(match: Match) -> tuple[float, float]:
    return (-match.max_diff, match.psnr) if match.max_diff is not None else (-256, 0)
