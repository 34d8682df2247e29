"""``ddim convert``: a checkpoint -> a diffusers directory."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ddim_cli.cli import console
from ddim_cli.cli.options import Assignments, ImageSize, Json, Verbose, argument, describe, option


@console.handles_errors
def convert(
    checkpoint: Annotated[str, argument("Checkpoint, safetensors file or any other MODEL.", "CHECKPOINT")],
    directory: Annotated[Path, argument("Directory to write.", "DIR")],
    image_size: ImageSize = None,
    assignments: Assignments = None,
    overwrite: Annotated[bool, option("Replace an existing directory.", None, "--overwrite")] = False,
    verbose: Verbose = False,
    json: Json = False,
) -> None:
    """
    Write a checkpoint of the original DDPM or DDIM code as a diffusers directory.

    diffusers.DDIMPipeline.from_pretrained(DIR) loads it and makes the same pictures.

    [bold]Examples[/bold]

    \b
    ddim convert ckpt.pth cifar10
    ddim convert ckpt.pth cifar10-raw --set model.ema=false
    ddim convert model-790000.ckpt cifar10 --image-size 32
    """
    described = describe(checkpoint, image_size, assignments)
    for note in described.notes:
        console.warn(note)
    from ddim_cli.models.convert import convert

    convert(described, directory, overwrite)
    if json:
        console.print_json({"directory": str(directory), "parameters": described.parameters})
    else:
        typer.echo(f"wrote {directory}: {described.parameters:,} parameters in float32")
