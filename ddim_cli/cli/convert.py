"""``ddim convert``: any model -> a diffusers directory."""

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
    dtype: Annotated[
        str, option("Write the weights in float32, float16 or bfloat16 [float32].", None, "--dtype", metavar="DTYPE")
    ] = "float32",
    overwrite: Annotated[bool, option("Replace an existing directory.", None, "--overwrite")] = False,
    verbose: Verbose = False,
    json: Json = False,
) -> None:
    """
    Write a model as a diffusers directory: a checkpoint of the original DDPM or DDIM code, or any other MODEL.

    diffusers.DDIMPipeline.from_pretrained(DIR) loads it and makes the same pictures. Latent models are written with all
    their parts, which diffusers' LDMPipeline and StableDiffusionPipeline load.

    [bold]Examples[/bold]

    \b
    ddim convert ckpt.pth cifar10
    ddim convert ckpt.pth cifar10-raw --set model.ema=false
    ddim convert model-790000.ckpt cifar10 --image-size 32
    ddim convert OWNER/NAME half --dtype float16
    """
    from ddim_cli.config.layers import nearest
    from ddim_cli.errors import UsageError

    known = ("float32", "float16", "bfloat16")
    if dtype not in known:
        raise UsageError(f"--dtype {dtype}: it takes {', '.join(known)}{nearest(dtype, known)}")
    described = describe(checkpoint, image_size, assignments)
    for note in described.notes:
        console.warn(note)
    import torch

    from ddim_cli.models.convert import convert

    convert(described, directory, overwrite, getattr(torch, dtype))
    parameters = described.all_parameters
    if json:
        console.print_json({"directory": str(directory), "parameters": parameters, "dtype": dtype})
    else:
        typer.echo(f"wrote {directory}: {parameters:,} parameters in {dtype}")
