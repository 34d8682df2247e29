"""``ddim convert``: a checkpoint -> a diffusers directory."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ddim_cli.cli import console
from ddim_cli.cli.options import Assignments, ImageSize, Json, Verbose


@console.handles_errors
def convert(
    checkpoint: Annotated[
        str, typer.Argument(help="A checkpoint or safetensors file; any MODEL is taken.", metavar="CHECKPOINT")
    ],
    directory: Annotated[Path, typer.Argument(help="The directory to write.", metavar="DIR")],
    image_size: ImageSize = None,
    assignments: Assignments = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the directory if there is one.")] = False,
    verbose: Verbose = False,
    json: Json = False,
) -> None:
    """
    [bold]Examples[/bold]

    \b
    ddim convert ckpt.pth cifar10
    ddim convert ckpt.pth cifar10-raw --set model.ema=false
    ddim convert model-790000.ckpt cifar10 --image-size 32

    Write a checkpoint of the original DDPM or DDIM code as a diffusers directory.

    diffusers.DDIMPipeline.from_pretrained(DIR) loads it, and it gives the same pictures.
    """
    from ddim_cli.cli.options import build_layers
    from ddim_cli.config.layers import merge
    from ddim_cli.models.describe import describe_model

    flags = {"model": checkpoint, "image_size": image_size}
    described = describe_model(merge(build_layers([], assignments, flags)).config.model)
    for note in described.notes:
        console.warn(note)
    from ddim_cli.models.convert import convert

    convert(described, directory, overwrite)
    if json:
        console.print_json({"directory": str(directory), "parameters": described.parameters})
    else:
        typer.echo(f"wrote {directory}: {described.parameters:,} parameters in float32")
