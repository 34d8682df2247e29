"""``ddim invert``: from pictures to latents, and back."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from ddim_cli.cli import console, panels
from ddim_cli.cli.jobs import MOST_LINES, counts_as_json, run_job, say_conversions, say_turned_off, show_done
from ddim_cli.cli.options import OF_A_FOLDER, OF_BEGINNING, SEEDS, Layers, RunOptions, argument, with_settings

if TYPE_CHECKING:
    from ddim_cli.experiments.invert import Inverted, Reconstructions
    from ddim_cli.sampling.executor import Summary
    from ddim_cli.sampling.job import Job
    from ddim_cli.sampling.plan import Shard


@console.handles_errors
@with_settings(without=(*SEEDS, *OF_A_FOLDER, *OF_BEGINNING, "clip_sample", "thresholding"), runs=True)
def invert(
    layers: Layers,
    options: RunOptions,
    pictures: Annotated[list[Path], argument("Pictures, or folders of them.", "IMAGE...")],
) -> None:
    """
    Find the latents of pictures by DDIM inversion, and what sampling makes of these.

    Each picture NAME goes up the grid to NAME.latent.safetensors, and down the same grid to NAME.recon.png, in as many
    steps. The error is the mean squared difference a dimension, pictures scaled to [0, 1]. It needs eta 0; clipping
    and thresholding are off in both directions, and so is the guidance that text-to-image models have by default. A
    picture of another size is cropped and resized, which is said.

    The same command goes on where it was stopped, and does nothing where all is done.

    [bold]Examples[/bold]

    \b
    ddim invert picture.png
    ddim invert outputs/smoke --steps 100 -o inverted
    ddim invert picture.png --refine 3           so that what comes back is the picture
    ddim invert picture.png --order 2
    ddim sample --latents inverted -o resampled
    ddim invert picture.png -m MODEL --prompt "what it shows"
    """
    from ddim_cli.experiments.inversion import resolve_inversion
    from ddim_cli.sampling.pictures import find_pictures

    files = find_pictures(pictures)
    run, turned_off = resolve_inversion(layers)
    if not options.quiet:
        say_turned_off(turned_off)

    def prepare(shard: Shard, speaks: bool) -> tuple[Job, Reconstructions]:
        from ddim_cli.experiments import invert as experiment

        job, product = experiment.prepare(run, files, shard)
        if speaks and not options.quiet:
            say_conversions(product.inputs)
        return job, product

    outcome = run_job(run, prepare, options, f"inversions of {panels.first_and_last([str(file) for file in files])}")
    if outcome is None:
        return
    from ddim_cli.experiments.invert import Inverted

    result = Inverted.of(*outcome)
    if options.json:
        console.print_json(as_json(result, outcome[2], len(run.timesteps), turned_off))
    elif not options.quiet:
        show_inverted(outcome[2], result)


def _residual(result: Inverted) -> str | None:
    """The largest residual, and whose it is where there are several."""
    known = [(r.residual, r.input.path.name) for r in result.reconstructions if r.residual is not None]
    if not known:
        return None
    residual, name = max(known)
    return f"{residual:.2g}" + (f" ({name})" if len(known) > 1 else "")


def as_json(result: Inverted, summary: Summary, steps: int, turned_off: dict[str, str]) -> dict[str, Any]:
    return {
        "images": len(result.reconstructions),
        **counts_as_json(summary),
        "steps": steps,
        "turned_off": list(turned_off),
        "mean_error": result.mean_error,
        "sheet": str(result.sheet) if result.sheet is not None else None,
        "pictures": [
            {
                **r.input.facts(),
                "file": str(r.input.path),
                "latent": str(r.latent),
                "reconstruction": str(r.picture),
                "error": r.error,
                **({} if r.residual is None else {"residual": r.residual}),
            }
            for r in result.reconstructions
        ],
    }


def show_inverted(summary: Summary, result: Inverted) -> None:
    """Print the closing panel."""
    shown = result.reconstructions[:MOST_LINES]
    width = max((len(r.input.path.name) for r in shown), default=0)
    lines = [f"{r.input.path.name:<{width}}  {r.error:.6f}" for r in shown]
    if len(result.reconstructions) > len(shown):
        lines.append(f"... and {len(result.reconstructions) - len(shown):,} more, each in its sidecar")
    show_done(
        summary,
        "picture",
        "inverted",
        # Not "error", the paper's word: on a line of its own it would read as a failure.
        squared_difference="\n".join(lines) or None,
        largest_residual=_residual(result),
        mean_of_all=f"{result.mean_error:.6f}" if len(result.reconstructions) > 1 else None,
        folder=result.folder,
        side_by_side=result.sheet,
    )
