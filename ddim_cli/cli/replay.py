"""``ddim replay``: pictures made again from what they say of themselves."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ddim_cli.cli import console, panels
from ddim_cli.cli.options import Assignments, Json, LogFile, Quiet, Verbose, option, place_argument, setting
from ddim_cli.cli.progress import RunProgress, showing_progress

if TYPE_CHECKING:
    from ddim_cli.evaluation.replayed import Agreement
    from ddim_cli.experiments.replay import Again


@console.handles_errors
def replay(
    files: Annotated[list[str], place_argument("Sidecars, pictures or shards of ddim; s3://... too.", "FILE...")],
    out: Annotated[Path | None, option("Keep what is made here.", None, "--out", "-o", metavar="DIR")] = None,
    check: Annotated[bool, option("Compare what is made with the originals.", None, "--check")] = False,
    model: Annotated[
        str | None, setting("model", "Where the model is now, if it was moved; its weights must be the same.")
    ] = None,
    # As of sample; what is not given is as the picture was made.
    device: Annotated[
        str | None, setting("device", "Device to run on: auto, cpu, cuda, cuda:N or mps [as it was].")
    ] = None,
    dtype: Annotated[
        str | None, setting("dtype", "Precision of the network: auto, float32, bfloat16, float16 [as it was].")
    ] = None,
    compile_: Annotated[
        bool | None, setting("compile", "Run the network as compiled code that is kept [as it was].")
    ] = None,
    latents: Annotated[
        list[Path] | None,
        option("Look here for latents that do not lie beside their pictures: files, or folders.", metavar="PATH"),
    ] = None,
    init: Annotated[
        list[Path] | None,
        option("Look here for pictures that these began from, if they were moved: files, or folders.", metavar="PATH"),
    ] = None,
    assignments: Assignments = None,
    quiet: Quiet = False,
    verbose: Verbose = False,
    log_file: LogFile = None,
    json: Json = False,
) -> None:
    """
    Make pictures again from their sidecars, or from the text inside; each in batches of the size it was made in.

    Pictures of ddim sample, frames of ddim interpolate, strips of ddim trajectory, reconstructions of ddim invert and
    edits of ddim edit are made again one by one. What started from a latent needs it, beside the picture or where
    --latents says; what began from a picture needs that, where it was or where --init says.

    With --check, exit 3 if one differs. Hashes must be equal where device, dtype, batch size, threads, compile setting
    and versions are what they were. Elsewhere, float32 must be within 1/255, and a lower precision reach a median PSNR
    of 40 dB.

    What is made is a PNG. Of a JPEG the hash is of the pixels before it was encoded, so equal hashes say as much; where
    they differ, it counts only what JPEG cannot have lost.

    [bold]Examples[/bold]

    \b
    ddim replay outputs/smoke/000003.json -o again
    ddim replay outputs/smoke/0*.json --check
    ddim replay frames/frame_003.json --check
    ddim replay picture.png --check -m path/to/the/model
    ddim replay out/000000.tar/000003.json --check
    """
    from ddim_cli.cli.options import build_layers
    from ddim_cli.errors import DifferenceError, UsageError
    from ddim_cli.outputs.files import files_of
    from ddim_cli.sampling.replay import group_originals, read_original

    if out is None and not check:
        raise UsageError("say where to keep what is made with -o DIR, or compare it with --check")
    flags = {"model": model, "device": device, "dtype": dtype, "compile": compile_}
    overrides = build_layers([], assignments, flags)
    if any("output.image_format" in layer.values for layer in overrides):
        console.warn("output.image_format has no effect on replay, which writes PNGs")
    named = [each for file in files for each in files_of(file)]
    originals = [original for file in named if (original := read_original(file, latents or (), init or ())) is not None]
    if not originals:
        raise UsageError("none of these files is a picture's: name sidecars such as 000000.json, or their pictures")
    groups = group_originals(originals)
    made: list[Again] = []
    agreements: list[Agreement] = []
    with showing_progress(quiet, RunProgress(verbose)) as progress:
        from ddim_cli.evaluation.replayed import check_group
        from ddim_cli.experiments import replay as experiment

        # A picture that is there already would tell nothing of how it is made now: a check makes it anew.
        for group in experiment.replay(groups, overrides, out, check, progress):
            made += group
            if check:
                agreements += check_group([(again.original, again.picture) for again in group])
    bad = [a for a in agreements if a.problem is not None]
    if json:
        console.print_json(as_json(made, agreements, out, check))
    elif check:
        show(agreements, out, quiet)
    elif not quiet:
        images = panels.counted(len({again.picture for again in made}), "image")
        panels.show_table({"images": f"{images} made again", "folder": out}, "done")
    if bad:
        raise typer.Exit(DifferenceError.exit_code)


def as_json(made: Sequence[Again], agreements: Sequence[Agreement], out: Path | None, check: bool) -> dict[str, Any]:
    from ddim_cli.evaluation.compare import finite

    pictures = [
        {
            "file": str(again.original.file),
            "seed": again.original.record["seed"],
            "made": str(again.picture) if out is not None else None,
        }
        for again in made
    ]
    result: dict[str, Any] = {"images": len(made), "folder": str(out) if out is not None else None}
    if not check:
        return {**result, "pictures": pictures}
    return {
        **result,
        "ok": all(a.problem is None for a in agreements),
        "pictures": [
            {
                **picture,
                "equal_hash": a.equal,
                "equal_hash_promised": a.other is None,
                "max_diff": a.max_diff,
                "psnr_db": finite(a.psnr),
                **({} if a.lossy is None else {"beyond_jpeg": round(a.lossy, 3)}),
                "problem": a.problem,
            }
            for picture, a in zip(pictures, agreements, strict=True)
        ],
    }


def show(agreements: Sequence[Agreement], out: Path | None, quiet: bool = False) -> None:
    """Print the problems one by one, then, unless ``quiet``, how many are equal or close."""
    from ddim_cli.evaluation.replayed import worst

    bad = [a for a in agreements if a.problem is not None]
    close = [a for a in agreements if a.problem is None and not a.equal]
    equal = len(agreements) - len(bad) - len(close)
    for a in bad:
        typer.echo(f"{a.original.file}: {a.problem}")
    if quiet:
        return
    counts = [f"{equal:,} with equal hashes"] if equal else []
    within = [a for a in close if a.lossy is None]
    if within:
        lowest = worst(within)
        text = f"; the worst {lowest.psnr:.1f} dB, {lowest.original.file}" if lowest is not None else ""
        counts.append(f"{len(within):,} within the tolerance ({within[0].other}{text})")
    hidden = [a for a in close if a.lossy is not None]
    if hidden:
        counts.append(f"{len(hidden):,} not told from their JPEGs, which hide small differences ({hidden[0].other})")
    if bad:
        counts.append(panels.counted(len(bad), "difference"))
    typer.echo(f"{panels.counted(len(agreements), 'picture')} made again: {', '.join(counts)}")
    if out is not None:
        typer.echo(f"folder: {out}")
