"""``ddim compare``: compare a folder with golden pictures."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ddim_cli.cli import console, panels
from ddim_cli.cli.options import Json, Verbose, option, place_argument
from ddim_cli.cli.progress import spinner

if TYPE_CHECKING:
    from ddim_cli.evaluation.compare import Comparison, Match

# What fails must not drown in a log among thousands of pictures that pass.
MOST_ROWS = 32


@console.handles_errors
def compare(
    golden: Annotated[str, place_argument("Folder of golden pictures.", "GOLDEN")],
    folder: Annotated[str, place_argument("Folder to compare with them.", "DIR")],
    max_diff: Annotated[
        int, option("Largest difference of a pixel that passes, of 255 [1].", min=0, max=255, metavar="N")
    ] = 1,
    min_psnr: Annotated[float, option("Lowest PSNR that passes, in dB [40].", min=0, metavar="DB")] = 40.0,
    diff_dir: Annotated[
        Path | None,
        option("Write a picture for each pair that differs: golden, actual, difference.", metavar="DIR"),
    ] = None,
    verbose: Verbose = False,
    json: Json = False,
) -> None:
    """
    Compare the pictures of two folders, matched by seed. Sidecars are not needed.

    Exit 3 if a picture is beyond either limit, missing, or extra.

    [bold]Examples[/bold]

    \b
    ddim compare tests/golden outputs/smoke
    ddim compare tests/golden outputs/smoke --max-diff 0
    ddim compare float32 bfloat16 --max-diff 255 --min-psnr 35 --diff-dir diffs
    """
    from ddim_cli.errors import DifferenceError, UsageError
    from ddim_cli.evaluation.compare import Limits
    from ddim_cli.evaluation.compare import compare as compare_folders
    from ddim_cli.outputs.files import place_of

    if not math.isfinite(min_psnr):
        raise UsageError(f"--min-psnr {min_psnr}: give a number; for equal pictures, use --max-diff 0")
    with spinner(f"comparing {folder}") as update:
        comparison = compare_folders(place_of(golden), place_of(folder), Limits(max_diff, min_psnr), diff_dir, update)
    if json:
        limits = {"max_diff": max_diff, "min_psnr_db": min_psnr}
        console.print_json({"golden": str(golden), "folder": str(folder), "limits": limits, **as_json(comparison)})
    else:
        show(comparison)
    if not comparison.ok:
        raise typer.Exit(DifferenceError.exit_code)


def as_json(comparison: Comparison) -> dict[str, Any]:
    from ddim_cli.evaluation.compare import finite

    return {
        "ok": comparison.ok,
        "compared": len(comparison.matches),
        "failed": len(comparison.failed),
        "missing": list(comparison.missing),
        "extra": list(comparison.extra),
        "other_setting": comparison.note,
        "images": [
            {
                "seed": m.seed,
                "ok": m.problem is None,
                "max_diff": m.max_diff,
                "psnr_db": finite(m.psnr),
                "problem": m.problem,
            }
            for m in comparison.matches
        ],
    }


def show(comparison: Comparison) -> None:
    """A table, those that fail first and the worst of each kind before the others, and a closing line."""
    from rich.table import Table
    from rich.text import Text

    from ddim_cli.config.seeds import format_seeds

    passed = sorted((m for m in comparison.matches if m.problem is None), key=_badness)
    rows = [*sorted(comparison.failed, key=_badness), *passed[:MOST_ROWS]]
    if rows:
        table = Table(show_edge=False)
        for column in ("seed", "largest difference", "PSNR (dB)"):
            table.add_column(column, justify="right", no_wrap=True)
        table.add_column("", overflow="fold")
        for m in rows:
            psnr = "-" if m.psnr is None else f"{m.psnr:.2f}" if m.max_diff else "equal"
            numbers = ("-" if m.psnr is None else str(m.max_diff), psnr)
            table.add_row(f"{m.seed:06d}", *numbers, Text(m.problem, "red") if m.problem else "ok")
        console.stdout().print(table)
    if len(passed) > MOST_ROWS:
        typer.echo(f"... and {len(passed) - MOST_ROWS:,} more that pass")
    for what, seeds in (("missing", comparison.missing), ("extra", comparison.extra)):
        if seeds:
            typer.echo(f"{what}: {panels.counted(len(seeds), 'picture')} (seeds {format_seeds(seeds)})")
    if comparison.note is not None and not comparison.ok:
        typer.echo(f"note: {comparison.note}")
    verdict = f", {len(comparison.failed):,} beyond the limits" if comparison.failed else ", all within the limits"
    typer.echo(f"{panels.counted(len(comparison.matches), 'picture')} compared{verdict if comparison.matches else ''}")


def _badness(match: Match) -> tuple[float, float]:
    return (-256, 0) if match.max_diff is None or match.psnr is None else (-match.max_diff, match.psnr)
