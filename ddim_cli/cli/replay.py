"""``ddim replay``: pictures made again from what they say of themselves."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ddim_cli.cli import console
from ddim_cli.cli.options import FLAGS, Assignments, Json, LogFile, Quiet, Verbose

if TYPE_CHECKING:
    from ddim_cli.config.layers import Layer
    from ddim_cli.evaluation.replayed import Agreement
    from ddim_cli.sampling.replay import Group, Original

# As of sample; what is not given is as the picture was made.
Device, DType, Compile = (
    replace(flag, help=f"{flag.help.partition(' [')[0]} [as it was].").annotation()
    for flag in (FLAGS["device"], FLAGS["dtype"], FLAGS["compile"])
)


@console.handles_errors
def replay(
    files: Annotated[list[Path], typer.Argument(help="Sidecars, or PNGs of ddim.", metavar="FILE...")],
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Keep what is made here.", metavar="DIR", show_default=False)
    ] = None,
    check: Annotated[bool, typer.Option("--check", help="Compare what is made with the originals.")] = False,
    model: Annotated[
        str | None,
        typer.Option(
            "--model",
            "-m",
            help="Where the model is now, if it has moved; its weights must be the same.",
            metavar="SOURCE",
            show_default=False,
        ),
    ] = None,
    device: Device = None,
    dtype: DType = None,
    compile_: Compile = None,
    assignments: Assignments = None,
    quiet: Quiet = False,
    verbose: Verbose = False,
    log_file: LogFile = None,
    json: Json = False,
) -> None:
    """
    [bold]Examples[/bold]

    \b
    ddim replay outputs/smoke/000003.json -o again
    ddim replay outputs/smoke/0*.json --check
    ddim replay picture.png --check -m path/to/the/model

    Make pictures again from their sidecars, or from the text inside a PNG; each in batches of the size it was made in.

    With --check, exit 3 if one differs. Hashes must be equal where device, dtype, batch size, threads, compile setting
    and versions are what they were. Elsewhere, float32 must be within 1/255, and a lower precision reach a median PSNR
    of 40 dB.
    """
    from ddim_cli.cli.options import build_layers
    from ddim_cli.errors import DifferenceError, UsageError
    from ddim_cli.sampling.replay import group_originals, read_original

    if out is None and not check:
        raise UsageError("say where to keep what is made with -o DIR, or compare it with --check")
    flags = {"model": model, "device": device, "dtype": dtype, "compile": compile_}
    overrides = build_layers([], assignments, flags)
    originals = [original for file in files if (original := read_original(file)) is not None]
    if not originals:
        raise UsageError("none of these files is a picture's: name sidecars such as 000000.json, or their PNGs")
    groups = group_originals(originals)
    if out is not None:
        check_out(out, groups)
    agreements = make_again(groups, overrides, out, check, quiet, verbose)
    bad = [a for a in agreements if a.problem is not None]
    if json:
        console.print_json(as_json(originals, agreements, out, check))
    elif check:
        show(agreements, out, quiet)
    elif not quiet:
        made = sum(len(group.seeds) for group in groups)
        console.show_table({"images": f"{console.counted(made, 'image')} made again", "folder": out}, "done")
    if bad:
        raise typer.Exit(DifferenceError.exit_code)


def check_out(out: Path, groups: Sequence[Group]) -> None:
    """UsageError where the originals lie in ``out``, or have settings that no one folder can hold."""
    from ddim_cli.errors import UsageError
    from ddim_cli.outputs.sidecar import first_difference, identity

    for group in groups:
        for original in group.originals:
            if out.resolve() in original.file.resolve().parents:
                raise UsageError(f"-o {out}: the original {original.file} is in there; choose another folder")
        difference = first_difference(identity(groups[0].first.record), identity(group.first.record))
        if difference is not None:
            raise UsageError(
                f"{group.first.file} was made with another {difference[0]} than {groups[0].first.file}, and a folder "
                "holds pictures of one kind; make them again one kind at a time, or --check them without -o"
            )


def make_again(
    groups: Sequence[Group], overrides: Sequence[Layer], out: Path | None, check: bool, quiet: bool, verbose: bool
) -> list[Agreement]:
    """Make the pictures of all groups, into ``out`` or for the time of the comparison, and compare if asked to."""
    agreements = []
    with console.progress(quiet, verbose) as progress, folders_for(groups, out) as folders:
        from ddim_cli.evaluation.replayed import check_group
        from ddim_cli.sampling.replay import check_same_pictures, resolve_group
        from ddim_cli.sampling.run import execute, make_job

        for group, folder in zip(groups, folders, strict=True):
            run = resolve_group(group, overrides, folder, grid=out is not None)
            with threads_of(group):
                job = make_job(run, pads=True)
                check_same_pictures(group, job.record)
                # A picture that is there already would tell nothing of how it is made now.
                execute(job, progress, anew=check)
            if check:
                agreements += check_group(group, job.folder)
    return agreements


@contextlib.contextmanager
def folders_for(groups: Sequence[Group], out: Path | None) -> Iterator[list[Path]]:
    """A folder a group: ``out`` for all, else temporary ones."""
    if out is not None:
        yield [out] * len(groups)
        return
    with tempfile.TemporaryDirectory(prefix="ddim-replay-") as temporary:
        yield [Path(temporary) / str(i) for i in range(len(groups))]


@contextlib.contextmanager
def threads_of(group: Group) -> Iterator[None]:
    """As many threads as the originals were made with, if this machine has so many cores."""
    import os

    import torch

    before = torch.get_num_threads()
    if group.threads <= (os.cpu_count() or 1):
        torch.set_num_threads(group.threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def as_json(
    originals: Sequence[Original], agreements: Sequence[Agreement], out: Path | None, check: bool
) -> dict[str, Any]:
    from ddim_cli.evaluation.compare import finite
    from ddim_cli.outputs.folder import OutputFolder

    def made(original: Original) -> dict[str, Any]:
        place = str(OutputFolder(out).picture(original.seed)) if out is not None else None
        return {"file": str(original.file), "seed": original.seed, "made": place}

    found: dict[str, Any] = {"images": len(originals), "folder": str(out) if out is not None else None}
    if not check:
        return {**found, "pictures": [made(original) for original in originals]}
    return {
        **found,
        "ok": all(a.problem is None for a in agreements),
        "pictures": [
            {
                **made(a.original),
                "equal_hash": a.equal,
                "equal_hash_promised": a.other is None,
                "max_diff": a.max_diff,
                "psnr_db": finite(a.psnr),
                "problem": a.problem,
            }
            for a in agreements
        ],
    }


def show(agreements: Sequence[Agreement], out: Path | None, quiet: bool = False) -> None:
    """What was found, on stdout: the problems one by one, then, unless ``quiet``, how many are equal or close."""
    from ddim_cli.evaluation.replayed import worst

    bad = [a for a in agreements if a.problem is not None]
    close = [a for a in agreements if a.problem is None and not a.equal]
    equal = len(agreements) - len(bad) - len(close)
    for a in bad:
        typer.echo(f"{a.original.file}: {a.problem}")
    if quiet:
        return
    counts = [f"{equal:,} with equal hashes"] if equal else []
    if close:
        lowest = worst(close)
        counts.append(
            f"{len(close):,} within the tolerance ({close[0].other}; the worst {lowest.psnr:.1f} dB, "
            f"{lowest.original.file})"
        )
    if bad:
        counts.append(console.counted(len(bad), "difference"))
    typer.echo(f"{console.counted(len(agreements), 'picture')} made again: {', '.join(counts)}")
    if out is not None:
        typer.echo(f"folder: {out}")
