"""``ddim sample``: the main job."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ddim_cli.cli import console, panels
from ddim_cli.cli.jobs import Outcome, run_job, say_conversions, show_done
from ddim_cli.cli.options import OF_INVERSION, Layers, RunOptions, option, with_settings
from ddim_cli.cli.show import check_show, show_pictures
from ddim_cli.cli.stream import check_stream, sample_stream

if TYPE_CHECKING:
    from ddim_cli.sampling.job import Job
    from ddim_cli.sampling.plan import Shard
    from ddim_cli.sampling.product import Product


@console.handles_errors
@with_settings(without=OF_INVERSION, runs=True)
def sample(
    layers: Layers,
    options: RunOptions,
    more_latents: Annotated[list[Path] | None, typer.Argument(hidden=True)] = None,
    npz: Annotated[
        Path | None,
        option(
            "Write all images into one array too, once they are there (--overwrite replaces it).",
            "Output",
            metavar="FILE",
        ),
    ] = None,
    show: Annotated[bool, option("Show the pictures in the terminal too.", "Output", "--show")] = False,
    latents: Annotated[
        list[Path] | None,
        option("Start from saved latents: safetensors files, or folders of them.", "Sampling", metavar="FILE..."),
    ] = None,
    items: Annotated[
        Path | None,
        option(
            "Sample the rows of a job file: JSONL, CSV with a header, or a prompt a line; -: stdin.",
            "Sampling",
            metavar="FILE",
        ),
    ] = None,
    jsonl: Annotated[
        bool,
        option(
            "Sample the rows of --items as they come, and answer each with a line of JSON on stdout.",
            "Sampling",
            "--jsonl",
        ),
    ] = False,
    max_wait: Annotated[
        float | None,
        option(
            "Seconds that a row may wait until its batch is whole, with --jsonl; 0: none [0.1].",
            "Sampling",
            metavar="SECONDS",
        ),
    ] = None,
) -> None:
    """
    Sample images: a picture and a JSON sidecar each, and a contact sheet.

    The same command goes on where it was stopped, and does nothing where all is done.

    [bold]Examples[/bold]

    \b
    ddim sample --steps 50 --eta 0.0
    ddim sample -n 64 --seed 1000 --steps 20 --spacing trailing -o out
    ddim sample -m path/to/model -c run.toml --dtype bfloat16 --json
    ddim sample -c configs/smoke.toml --dry-run
    ddim sample --items - --jsonl -o out
    ddim sample --latents inverted/picture.latent.safetensors
    ddim sample --init photo.png --strength 0.6
    ddim sample --items jobs.jsonl -o out
    ddim sample -n 1000 --image-format webp -o out
    torchrun --nproc-per-node=8 -m ddim_cli sample --seeds 0-49999 --subdirs -o out
    """
    from ddim_cli.errors import UsageError

    # A shell gives --latents *.safetensors as one value and arguments.
    more = more_latents or []
    if jsonl or max_wait is not None:
        check_stream(jsonl, max_wait, items, options, {"--show": show, "--npz": npz is not None})
    if show:
        check_show(options.json)
    if more and not latents:
        raise UsageError(f"{more[0]}: sample takes options alone; latents are named with --latents")
    if items is not None and latents:
        raise UsageError(
            "--items says which images there are, and so does --latents; a row can have a latent of its own"
        )
    if items is not None and jsonl:
        sample_stream(layers, items, options, max_wait)
        return
    if items is not None:
        outcome = sample_rows(layers, items, options, npz)
    elif latents:
        outcome = sample_latents(layers, [*latents, *more], options, npz)
    else:
        outcome = sample_seeds(layers, options, npz)
    if outcome is None:
        return
    job, _, summary = outcome
    if show:
        there = job.folder.sidecars()
        show_pictures([job.folder.picture(item.name) for item in job.plan if item.name in there])
    if options.json:
        console.print_json(summary.as_json())
    elif not options.quiet:
        show_done(summary, "image", folder=summary.folder, contact_sheet=summary.sheet, array=summary.npz)


def sample_seeds(layers: Layers, options: RunOptions, npz: Path | None) -> Outcome | None:
    """Sample from the noise of seeds."""
    from ddim_cli.config.seeds import format_seeds
    from ddim_cli.outputs.figures import shortened
    from ddim_cli.sampling.resolve import resolve

    run = resolve(layers)
    if options.verbose and console.speaks() and run.model.unused_scheduler_keys:
        unused = ", ".join(run.model.unused_scheduler_keys)
        console.say(f"{run.model.name}'s scheduler config has keys that DDIM has no use for: {unused}")

    def prepare(shard: Shard, speaks: bool) -> tuple[Job, Product]:
        from ddim_cli.sampling.job import make_job
        from ddim_cli.sampling.product import SeedPictures, name_npz

        array = name_npz(npz, options.overwrite) if npz is not None and speaks else None
        return make_job(run, shard=shard), SeedPictures(array)

    return run_job(run, prepare, options, f"seeds {shortened(format_seeds(run.config.seeds()), 70)}")


def sample_latents(layers: Layers, paths: Sequence[Path], options: RunOptions, npz: Path | None) -> Outcome | None:
    """Sample from latents of files in place of the noise of seeds."""
    from ddim_cli.experiments import start

    files = start.find_latents(paths)
    run = start.resolve_latents(files, layers)

    def prepare(shard: Shard, speaks: bool) -> tuple[Job, Product]:
        from ddim_cli.experiments import latents
        from ddim_cli.sampling.product import name_npz

        array = name_npz(npz, options.overwrite) if npz is not None and speaks else None
        job, product = latents.prepare(run, start.starts_of(files), shard, array)
        for text in start.differences(files, job.record):
            console.warn(text)
        return job, product

    names = [str(file.path) for file in files]
    return run_job(run, prepare, options, f"latents of {panels.first_and_last(names)}")


def sample_rows(layers: Layers, path: Path, options: RunOptions, npz: Path | None) -> Outcome | None:
    """Sample the rows of a job file."""
    from ddim_cli.config.job_file import STDIN, read_job_file
    from ddim_cli.errors import UsageError
    from ddim_cli.experiments.start import check_no_seeds
    from ddim_cli.sampling.rows import resolve_rows
    from ddim_cli.sampling.torchrun import Ranks

    check_no_seeds(layers, "--items", "which images there are")
    if str(path) == STDIN and Ranks.of() is not None:
        raise UsageError("--items -: the ranks of torchrun would each read a part of stdin; name a file")
    file = read_job_file(path)
    run, items = resolve_rows(file, layers)

    def prepare(shard: Shard, speaks: bool) -> tuple[Job, Product]:
        from ddim_cli.sampling.job import make_job
        from ddim_cli.sampling.product import name_npz
        from ddim_cli.sampling.row_product import RowPictures

        if speaks and not options.quiet and items.inits is not None:
            say_conversions(items.inits.inputs)
        array = name_npz(npz, options.overwrite) if npz is not None and speaks else None
        return make_job(run, items, shard, f"-{file.stem}"), RowPictures(array)

    return run_job(run, prepare, options, f"rows of {file.label}")
