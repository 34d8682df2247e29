"""``ddim inspect``: what a model is."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from ddim_cli.cli import console
from ddim_cli.cli.options import Json, Verbose

if TYPE_CHECKING:
    from collections.abc import Mapping


@console.handles_errors
def inspect(
    model: Annotated[
        str | None, typer.Argument(help="As --model of sample takes it.", metavar="MODEL", show_default=False)
    ] = None,
    list_: Annotated[bool, typer.Option("--list", help="List the models that ship in the package.")] = False,
    image_size: Annotated[
        int | None, typer.Option(help="Size of an image, where the model does not tell.", show_default=False)
    ] = None,
    assignments: Annotated[
        list[str] | None, typer.Option("--set", help="A key of [model].", metavar="KEY=VALUE", show_default=False)
    ] = None,
    verbose: Verbose = False,
    json: Json = False,
) -> None:
    """
    [bold]Examples[/bold]

    \b
    ddim inspect mnist
    ddim inspect path/to/model-790000.ckpt --json
    ddim inspect --list

    Tell what a model is: its shape, weights, scheduler, and what running it costs.
    """
    from ddim_cli.cli.options import build_layers
    from ddim_cli.config.layers import merge
    from ddim_cli.errors import UsageError
    from ddim_cli.models.describe import bundled_names, describe_model

    if list_:
        if json:
            console.print_json({"bundled": bundled_names()})
        else:
            typer.echo("\n".join(bundled_names()))
        return
    if model is None:
        raise UsageError("say which model: ddim inspect MODEL, or --list for the bundled ones")
    flags = {"model": model, "image_size": image_size}
    described = describe_model(merge(build_layers([], assignments, flags)).config.model)
    from ddim_cli.models.inspect import facts

    found = facts(described)
    if json:
        console.print_json(found)
    else:
        console.show_table(rows(found), found["source"], "cyan")


def rows(found: Mapping[str, Any]) -> dict[str, Any]:
    """Facts as a person reads them."""
    weights, memory = found["weights"], found["memory"]
    table = {
        "kind": found["kind"] + (f", revision {found['revision']}" if found["revision"] else ""),
        "network": f"{found['class']}, {found['parameters']:,} parameters",
        "image": f"{found['channels']} x {found['height']} x {found['width']}",
        "classes": f"0-{found['classes'] - 1}" if found["classes"] else None,
        "blocks": "\n".join(f"{'└' if line is found['blocks'][-1] else '├'} {line}" for line in found["blocks"]),
        "weights": f"{weights['bytes']:,} bytes, " + ", ".join(f"{n:,} in {d}" for d, n in weights["dtypes"].items()),
        "files": "\n".join(weights["files"]),
        "sha256": weights["sha256"],
        "scheduler": "\n".join(f"{k} = {_short(v)}" for k, v in (found["scheduler"] or {}).items())
        or "none of its own",
        "cost": f"{found['flops_per_image_and_step'] / 1e9:.3g} GFLOP an image and step",
        "memory": f"about {memory['float32_bytes'] / 2**20:,.0f} MiB in float32, "
        f"{memory['bfloat16_bytes'] / 2**20:,.0f} in bfloat16, for a batch of {memory['batch']}",
        "notes": "\n".join(found["notes"]) or None,
    }
    return {name: value for name, value in table.items() if value is not None}


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
