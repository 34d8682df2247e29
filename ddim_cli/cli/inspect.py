"""``ddim inspect``: what a model is, and how a picture was made."""

from __future__ import annotations

from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ddim_cli.cli import console
from ddim_cli.cli.options import ImageSize, Json, Verbose
from ddim_cli.outputs.figures import shortened

if TYPE_CHECKING:
    from collections.abc import Mapping

    from ddim_cli.outputs.provenance import Provenance


@console.handles_errors
def inspect(
    model: Annotated[
        str | None,
        typer.Argument(
            help="A model as --model of sample takes it, or a PNG of ddim or its sidecar.",
            metavar="MODEL|PICTURE",
            show_default=False,
        ),
    ] = None,
    list_: Annotated[bool, typer.Option("--list", help="List the models that ship in the package.")] = False,
    image_size: ImageSize = None,
    assignments: Annotated[
        list[str] | None, typer.Option("--set", help="A key of \\[model].", metavar="KEY=VALUE", show_default=False)
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
    ddim inspect outputs/smoke/000003.png

    Tell what a model is: its shape, weights, scheduler, and what running it costs. Of a picture, how it was made.

    A picture is a PNG, which has the text inside, or its sidecar, or a latent of ddim invert; its model is not loaded.
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
        raise UsageError("say which model: ddim inspect MODEL, or --list for the bundled ones; or name a picture")
    if is_picture(model):
        if image_size is not None or assignments:
            raise UsageError(f"{model}: is a picture; --image-size and --set are for models")
        inspect_picture(Path(model), json)
        return
    flags = {"model": model, "image_size": image_size}
    described = describe_model(merge(build_layers([], assignments, flags)).config.model)
    from ddim_cli.models.inspect import facts

    found = facts(described)
    if json:
        console.print_json(found)
    else:
        console.show_table(rows(found), found["source"], "cyan")


def is_picture(source: str) -> bool:
    """Whether the name is that of a PNG, a sidecar or a latent: no model has such a name, unless it is a directory."""
    path = Path(source)
    named = path.suffix.lower() in (".png", ".json") or path.name.endswith(".latent.safetensors")
    return named and not path.is_dir()


def inspect_picture(path: Path, json: bool) -> None:
    """Show how a picture was made. Raises UsageError."""
    from ddim_cli.outputs.provenance import trace

    found = trace(path)
    if json:
        facts = {
            "told_by": str(found.told_by),
            "picture": str(found.picture) if found.picture is not None else None,
            "pixels_unchanged": found.unchanged,
        }
        console.print_json({**facts, **found.record})
        return
    console.show_table(picture_rows(found), str(path), "cyan")
    if found.unchanged is False:
        console.warn(f"{found.picture}: its pixels are not the ones that were recorded; it was changed since")


def picture_rows(found: Provenance) -> dict[str, Any]:
    """How a picture was made, as a person reads it; what the record lacks is left out."""
    record = found.record
    image, sampling, runtime = record.get("image"), record["sampling"], record["runtime"]
    versions = runtime.get("versions")
    # A strip of a seed is more than the picture that replay would make.
    replayable = type(record.get("seed")) is int and "strip" not in record
    states = {True: "as they were made", False: "changed since", None: "not looked at: the PNG cannot be read"}
    table = {
        "strip": _strip(record.get("strip")),
        "seed": record.get("seed"),
        "between": _between(sampling.get("between")),
        "inverted": _inverted(sampling.get("inverted")),
        "error": _error(record.get("inversion")),
        "latent": _latent(record, found.unchanged),
        "class": sampling.get("class"),
        "model": _model(record["model"]),
        "weights": record["model"].get("sha256"),
        "steps": _steps(sampling),
        "eta": f"{sampling.get('eta')}" + (", the large variance" if sampling.get("variance") == "large" else ""),
        "guidance": _guidance(sampling),
        "scheduler": "\n".join(
            f"{k} = {shortened(str(v), 60)}" for k, v in record["scheduler"].items() if v is not None
        ),
        "made on": _machine(runtime),
        "versions": ", ".join(f"{k} {v}" for k, v in versions.items()) if isinstance(versions, dict) else None,
        "made at": _made_at(record),
        "image": image and f"{image.get('width')} x {image.get('height')} {image.get('mode')}",
        "pixels": image
        and f"{states[found.unchanged] if found.picture else 'the PNG is not there'}; "
        f"sha256 {image.get('pixels_sha256')}",
        "told by": f"{found.told_by}" + (" (the text inside)" if found.told_by == found.picture or not image else ""),
        "again": f"ddim replay {quote(str(found.told_by))} -o again" if replayable else _from_latent(found),
    }
    return {name: value for name, value in table.items() if value is not None}


def _strip(strip: Any) -> str | None:
    """What the frames of a strip show, in words."""
    if not isinstance(strip, dict):
        return None
    if "show" in strip:
        what = {"x0": "the predicted x0", "xt": "the state x_t"}.get(strip["show"], strip["show"])
        return f"{what} at timesteps {_listed(strip.get('timesteps'))}"
    if "inverted" in strip:
        files = [p.get("file") for p in strip["inverted"] if isinstance(p, dict)]
        return f"original, latent and reconstruction of {_listed(files)}"
    return f"{strip.get('frames')} frames between the noises of seeds {_listed(strip.get('seeds'))}"


def _listed(values: Any) -> str:
    return ", ".join(map(str, values if isinstance(values, list) else [values]))


def _between(between: Any) -> str | None:
    """``{"seeds": [3, 8], "weight": 0.3}`` in words."""
    if not isinstance(between, dict):
        return None
    weights = between.get("weight")
    weights = [f"{w:.4g}" for w in (weights if isinstance(weights, list) else [weights]) if isinstance(w, (int, float))]
    return f"the noises of seeds {_listed(between.get('seeds'))}, at {_listed(weights)}"


def _inverted(inverted: Any) -> str | None:
    """Of which picture, and what was done to it first."""
    if not isinstance(inverted, dict):
        return None
    conversion = inverted.get("conversion")
    return f"{inverted.get('file')}" + (f" ({_listed(conversion)})" if conversion else "")


def _error(inversion: Any) -> str | None:
    error = inversion.get("error") if isinstance(inversion, dict) else None
    return f"{error:.6f} (mean squared, pictures in [0, 1])" if isinstance(error, (int, float)) else None


def _latent(record: Mapping[str, Any], unchanged: bool | None) -> str | None:
    """The latent that a picture began at, or that beside a reconstruction; of a latent itself, its shape and state."""
    own, inversion = record.get("latent"), record.get("inversion")
    latent = record["sampling"].get("latent") or (inversion.get("latent") if isinstance(inversion, dict) else own)
    if not isinstance(latent, dict):
        return None
    state = {True: ", as it was made", False: ", changed since"}.get(unchanged, "") if latent is own else ""
    named = latent.get("file") or " x ".join(map(str, latent.get("shape", [])))
    row = f", number {latent['index']} in it" if "index" in latent else ""
    return f"{named}{row}{state}; sha256 {latent.get('sha256')}"


def _from_latent(found: Provenance) -> str | None:
    """The command that makes a picture from the latent that lies beside it, or from this latent."""
    inversion = found.record.get("inversion")
    if isinstance(inversion, dict) and isinstance(inversion.get("latent"), dict):
        path = found.told_by.parent / str(inversion["latent"].get("file"))
    elif "latent" in found.record:
        path = found.told_by
    else:
        return None
    return f"ddim sample --latents {quote(str(path))} -o again"


def _model(model: Mapping[str, Any]) -> str:
    source, kind, parameters = (model.get(key) for key in ("source", "kind", "parameters"))
    if kind == "callable":
        return "a network of a Python program"
    text = f"{source} ({kind}" + (f", {parameters:,} parameters)" if isinstance(parameters, int) else ")")
    revision, path = model.get("revision"), model.get("path")
    return text + (f", revision {revision}" if revision else "") + (f", then at {path}" if path else "")


def _steps(sampling: Mapping[str, Any]) -> str:
    asked, timesteps = sampling.get("steps"), sampling.get("timesteps")
    timesteps = timesteps if isinstance(timesteps, list) else []
    shown = timesteps if len(timesteps) <= 12 else [*timesteps[:6], "...", *timesteps[-5:]]
    count = f"{len(timesteps)}" + (f" ({asked} asked)" if asked != len(timesteps) else "")
    return f"{count}: {' '.join(map(str, shown))}"


def _guidance(sampling: Mapping[str, Any]) -> str | None:
    if "guidance_scale" not in sampling:
        return None
    rescale = sampling.get("guidance_rescale")
    return f"{sampling['guidance_scale']}" + (f", rescaled by {rescale}" if rescale else "")


def _machine(runtime: Mapping[str, Any]) -> str:
    return (
        f"{runtime.get('device')} ({runtime.get('device_name')}) in {runtime.get('dtype')}, "
        f"batches of {runtime.get('batch_size')}, threads: {runtime.get('threads')}"
        + (", compiled" if runtime.get("compile") else "")
        + (", TF32 allowed" if runtime.get("tf32") else "")
    )


def _made_at(record: Mapping[str, Any]) -> str | None:
    if "created" not in record:
        return None
    timing = record.get("timing")
    seconds = timing.get("seconds") if isinstance(timing, dict) else None
    return f"{record['created']}" + (f", in {seconds:.3g} s" if isinstance(seconds, (int, float)) else "")


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
        "scheduler": "\n".join(f"{k} = {shortened(str(v), 60)}" for k, v in (found["scheduler"] or {}).items())
        or "none of its own",
        "cost": f"{found['flops_per_image_and_step'] / 1e9:.3g} GFLOP an image and step",
        "memory": f"about {memory['float32_bytes'] / 2**20:,.0f} MiB in float32, "
        f"{memory['bfloat16_bytes'] / 2**20:,.0f} in bfloat16, for a batch of {memory['batch']}",
        "notes": "\n".join(found["notes"]) or None,
    }
    return {name: value for name, value in table.items() if value is not None}
