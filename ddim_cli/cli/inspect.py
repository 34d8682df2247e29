"""``ddim inspect``: what a model is, and how a picture was made."""

from __future__ import annotations

from pathlib import Path, PurePosixPath
from shlex import quote
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ddim_cli.cli import console, panels
from ddim_cli.cli.options import ImageSize, Json, Verbose, argument, describe, option
from ddim_cli.outputs.figures import shortened
from ddim_cli.outputs.sidecar import is_lossy

if TYPE_CHECKING:
    from collections.abc import Mapping

    from ddim_cli.outputs.provenance import Provenance

_OTHER_PIXELS = "its pixels are not the ones that were recorded"


@console.handles_errors
def inspect(
    model: Annotated[
        str | None,
        argument("Model, as sample --model takes it; or a picture made by ddim, or its sidecar.", "MODEL|PICTURE"),
    ] = None,
    list_: Annotated[bool, option("List the bundled models.", None, "--list")] = False,
    image_size: ImageSize = None,
    assignments: Annotated[
        list[str] | None, option("Set a key of [model].", None, "--set", metavar="KEY=VALUE")
    ] = None,
    verbose: Verbose = False,
    json: Json = False,
) -> None:
    """
    Show a model's shape, weights, scheduler and cost, or how a picture was made.

    Name a picture by its file, its sidecar, or a latent of ddim invert. Its model is not loaded.

    [bold]Examples[/bold]

    \b
    ddim inspect mnist
    ddim inspect path/to/model-790000.ckpt --json
    ddim inspect --list
    ddim inspect outputs/smoke/000003.png
    """
    from ddim_cli.errors import UsageError
    from ddim_cli.models.describe import bundled_names

    if list_:
        if json:
            console.print_json({"bundled": bundled_names()})
        else:
            typer.echo("\n".join(bundled_names()))
        return
    if model is None:
        raise UsageError("say which model: ddim inspect MODEL, or --list for the bundled ones; or name a picture")
    if is_shard(model):
        if image_size is not None or assignments:
            raise UsageError(f"{model}: is a shard of pictures; --image-size and --set are for models")
        inspect_shard(model, json)
        return
    if is_picture(model):
        if image_size is not None or assignments:
            raise UsageError(f"{model}: is a picture; --image-size and --set are for models")
        inspect_picture(model, json)
        return
    described = describe(model, image_size, assignments)
    from ddim_cli.models.inspect import facts

    model_facts = facts(described)
    if json:
        console.print_json(model_facts)
    else:
        panels.show_table(rows(model_facts), model_facts["source"], "cyan")


def is_picture(source: str) -> bool:
    """Tell whether this names a picture, a sidecar or a latent: no model has such a name, unless it is a directory."""
    path = Path(source)
    endings = (".png", ".webp", ".jpg", ".jpeg", ".json")
    named = path.suffix.lower() in endings or path.name.endswith(".latent.safetensors")
    return named and not path.is_dir()


def is_shard(source: str) -> bool:
    """Tell whether this names the tar of a shard."""
    from ddim_cli.outputs.shards import shard_number

    return shard_number(PurePosixPath(source).name) is not None


def inspect_shard(source: str, json: bool) -> None:
    """Show what a shard holds, and how its pictures were made. Raises UsageError."""
    from ddim_cli.errors import UsageError
    from ddim_cli.outputs.files import files_of, place_of, size_of
    from ddim_cli.outputs.provenance import trace

    if not place_of(source).is_file():
        raise UsageError(f"{source}: no such file")
    sidecars = files_of(source)
    if not sidecars:
        raise UsageError(f"{source}: holds no pictures")
    facts = {
        "shard": source,
        "images": len(sidecars),
        "first": sidecars[0].stem,
        "last": sidecars[-1].stem,
        "bytes": size_of(place_of(source)),
    }
    if json:
        console.print_json(facts)
        return
    shown = {"shard": f"{panels.counted(len(sidecars), 'image')}, {facts['first']} to {facts['last']}"}
    shown["size"] = f"{facts['bytes']:,} bytes"
    panels.show_table({**shown, **picture_rows(trace(sidecars[0]))}, source, "cyan")


def inspect_picture(source: str, json: bool) -> None:
    """Show how a picture was made. Raises UsageError."""
    from ddim_cli.outputs.files import file_of
    from ddim_cli.outputs.provenance import trace

    path = file_of(source)
    provenance = trace(path)
    if json:
        facts = {
            "told_by": str(provenance.told_by),
            "picture": str(provenance.picture) if provenance.picture is not None else None,
            "pixels_unchanged": provenance.unchanged,
        }
        console.print_json({**facts, **provenance.record})
        return
    panels.show_table(picture_rows(provenance), str(path), "cyan")
    if provenance.unchanged is False:
        recorded = "it is not the file that was written" if is_lossy(provenance.record) else _OTHER_PIXELS
        console.warn(f"{provenance.picture}: {recorded}; it was changed since")


def picture_rows(provenance: Provenance) -> dict[str, Any]:
    """Say how a picture was made, as a person reads it, without what the record lacks."""
    record = provenance.record
    image, sampling, runtime = record.get("image"), record["sampling"], record["runtime"]
    versions = runtime.get("versions")
    # A strip of a seed is more than the picture that replay would make.
    of_pictures = "edit" in sampling or "between" in sampling
    replayable = (type(record.get("seed")) is int or of_pictures) and "strip" not in record
    states: Mapping[bool | None, str]
    states = {True: "as they were made", False: "changed since", None: "not looked at: the picture cannot be read"}
    if is_lossy(record):
        # Of the file, whose pixels are not those that were made.
        states = {
            True: "as JPEG left them, in the file as it was written",
            False: "as JPEG left them, or changed: the file was changed since",
            None: "as JPEG left them at best; nothing tells whether the file was changed since",
        }
    table = {
        "strip": _strip(record.get("strip")),
        "seed": record.get("seed"),
        "between": _between(sampling.get("between")),
        "inverted": _inverted(sampling.get("inverted")),
        "edited": _edited(sampling.get("edit")),
        "error": _error(record.get("inversion") or record.get("reconstruction")),
        "latent": _latent(record, provenance.unchanged),
        **panels.beginning(sampling),
        "class": sampling.get("class"),
        "prompt": _prompt(sampling),
        "negative prompt": sampling.get("negative_prompt"),
        "tokens": _tokens(sampling),
        "model": _model(record["model"]),
        "weights": record["model"].get("sha256"),
        "steps": _steps(sampling),
        "order": sampling.get("order"),
        "iterations a step up": sampling.get("refine"),
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
        and f"{states[provenance.unchanged] if provenance.picture else 'the picture is not there'}; "
        f"sha256{' before JPEG' if is_lossy(record) else ''} {image.get('pixels_sha256')}",
        "told by": f"{provenance.told_by}"
        + (" (the text inside)" if provenance.told_by == provenance.picture or not image else ""),
        "again": f"ddim replay {quote(str(provenance.told_by))} -o again" if replayable else _from_latent(provenance),
    }
    return {name: value for name, value in table.items() if value is not None}


def _strip(strip: Any) -> str | None:
    """Say in words what the frames of a strip show."""
    if not isinstance(strip, dict):
        return None
    if "show" in strip:
        what = {"x0": "the predicted x0", "xt": "the state x_t"}.get(strip["show"], strip["show"])
        return f"{what} at timesteps {_listed(strip.get('timesteps'))}"
    if "inverted" in strip:
        files = [p.get("file") for p in strip["inverted"] if isinstance(p, dict)]
        return f"original, latent and reconstruction of {_listed(files)}"
    if "edited" in strip:
        files = [p.get("file") for p in strip["edited"] if isinstance(p, dict)]
        return f"original, reconstruction and edits of {_listed(files)}"
    if "prompts" in strip:
        prompts = _listed([f'"{prompt}"' for prompt in strip.get("prompts") or []])
        return f"{strip.get('frames')} frames between the prompts {prompts}, of seed {strip.get('seed')}"
    if "pictures" in strip:
        return f"{strip.get('frames')} frames between the pictures {_listed(strip.get('pictures'))}"
    return f"{strip.get('frames')} frames between the noises of seeds {_listed(strip.get('seeds'))}"


def _listed(values: Any) -> str:
    return ", ".join(map(str, values if isinstance(values, list) else [values]))


def _between(between: Any) -> str | None:
    """``{"seeds": [3, 8], "weight": 0.3}`` in words."""
    if not isinstance(between, dict):
        return None
    weights = between.get("weight")
    weights = [f"{w:.4g}" for w in (weights if isinstance(weights, list) else [weights]) if isinstance(w, (int, float))]
    pictures = between.get("pictures")
    if isinstance(pictures, list):
        names = _listed([panels.picture_text(each) for each in pictures if isinstance(each, dict)])
        return f"the latents of {names}, at {_listed(weights)}"
    return f"the noises of seeds {_listed(between.get('seeds'))}, at {_listed(weights)}"


def _prompt(sampling: Mapping[str, Any]) -> str | None:
    """The prompt, or what it lies between."""
    between = sampling.get("between_prompts")
    if not isinstance(between, dict):
        return sampling.get("prompt")
    weight = between.get("weight")
    named = " and ".join(f'"{prompt}"' for prompt in between.get("prompts") or [])
    return f"between {named}, at {weight:.4g}" if isinstance(weight, (int, float)) else named


def _tokens(sampling: Mapping[str, Any]) -> str | None:
    return f"{sampling['tokens']:,} of the prompt" if isinstance(sampling.get("tokens"), int) else None


def _edited(edit: Any) -> str | None:
    """Name the picture that was edited, and what it was said to show."""
    if not isinstance(edit, dict):
        return None
    shown = edit.get("from") if isinstance(edit.get("from"), dict) else {}
    said = "".join(f', as "{value}"' for value in (shown or {}).values())
    masks = {"inside": edit.get("mask"), "outside": edit.get("keep_mask")}
    parts = "".join(f", {where} {panels.picture_text(m)}" for where, m in masks.items() if isinstance(m, dict))
    return f"{panels.picture_text(edit)}{said}, from timestep {edit.get('start_timestep')}{parts}"


def _inverted(inverted: Any) -> str | None:
    """Name the picture that was inverted, and what was done to it first."""
    return panels.picture_text(inverted) if isinstance(inverted, dict) else None


def _error(inversion: Any) -> str | None:
    error, residual = (inversion.get(key) if isinstance(inversion, dict) else None for key in ("error", "residual"))
    if not isinstance(error, (int, float)):
        return None
    moved = f"; the last iterations moved a state by {residual:.2g} at most" if isinstance(residual, float) else ""
    return f"{error:.6f} (mean squared, pictures in [0, 1]){moved}"


def _latent(record: Mapping[str, Any], unchanged: bool | None) -> str | None:
    """Name the latent a picture started from, or that beside it; of a latent itself, say its shape and state."""
    own, inversion = record.get("latent"), record.get("inversion")
    latent = record["sampling"].get("latent") or (inversion.get("latent") if isinstance(inversion, dict) else own)
    if not isinstance(latent, dict):
        return None
    state = {True: ", as it was made", False: ", changed since", None: ""}[unchanged] if latent is own else ""
    named = latent.get("file") or " x ".join(map(str, latent.get("shape", [])))
    row = f", number {latent['index']} in it" if "index" in latent else ""
    return f"{named}{row}{state}; sha256 {latent.get('sha256')}"


def _from_latent(provenance: Provenance) -> str | None:
    """Return the command that samples from the latent beside a picture, or from this latent."""
    inversion = provenance.record.get("inversion")
    if isinstance(inversion, dict) and isinstance(inversion.get("latent"), dict):
        path: object = provenance.told_by.parent / str(inversion["latent"].get("file"))
    elif "latent" in provenance.record:
        path = provenance.told_by
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
    text = panels.timesteps_text(timesteps)
    return text if asked == len(timesteps) else text.replace(":", f" ({asked} asked):", 1)


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


def rows(facts: Mapping[str, Any]) -> dict[str, Any]:
    """Say what `models.inspect.facts` knows of a model, as a person reads it."""
    weights, memory, parts = facts["weights"], facts["memory"], facts["parts"] or []
    table = {
        "kind": facts["kind"] + (f", revision {facts['revision']}" if facts["revision"] else ""),
        "network": facts["class"] + ("" if parts else f", {facts['parameters']:,} parameters"),
        "image": f"{facts['channels']} x {facts['height']} x {facts['width']}",
        "state": f"{' x '.join(map(str, facts['state']))}, latents times {facts['latent_scale']:g}" if parts else None,
        "prompt": _prompt_limit(facts),
        "inpainting": "fills in parts of pictures: sample with --init and --mask" if facts.get("inpaints") else None,
        "classes": f"0-{facts['classes'] - 1}" if facts["classes"] else None,
        "blocks": "\n".join(f"{'└' if line is facts['blocks'][-1] else '├'} {line}" for line in facts["blocks"]),
        **{part["name"]: _part(part) for part in parts},
        "weights": (f"{facts['parameters']:,} parameters in all, " if parts else "") + _stored(weights),
        "files": "\n".join(weights["files"]),
        "sha256": weights["sha256"] + (", of all parts" if parts else ""),
        "scheduler": "\n".join(f"{k} = {shortened(str(v), 60)}" for k, v in (facts["scheduler"] or {}).items())
        or "none of its own",
        "cost": f"{facts['flops_per_image_and_step'] / 1e9:.3g} GFLOP an image and step"
        + (", twice that with guidance" if facts["prompt_tokens"] else ""),
        "memory": f"about {memory['float32_bytes'] / 2**20:,.0f} MiB in float32, "
        f"{memory['bfloat16_bytes'] / 2**20:,.0f} in bfloat16, for a batch of {memory['batch']}"
        + (", the other parts in float32" if parts else ""),
        "notes": "\n".join(facts["notes"]) or None,
    }
    return {name: value for name, value in table.items() if value is not None}


def _prompt_limit(facts: Mapping[str, Any]) -> str | None:
    if facts["prompt_tokens"] is None:
        return None
    # Begin and end take one each.
    return f"at most {facts['prompt_tokens'] - 2} tokens; guided by {facts['guidance_scale']:g} unless told otherwise"


def _part(part: Mapping[str, Any]) -> str:
    """Say what is in a part; of one without weights, its files."""
    size = f"{part['parameters']:,} parameters, " if part["parameters"] else ""
    return f"{part['class']}, {size}{_stored(part)}\nsha256 {part['sha256']}"


def _stored(facts: Mapping[str, Any]) -> str:
    """Say how many bytes, and what of."""
    return ", ".join([f"{facts['bytes']:,} bytes", *(f"{n:,} in {d}" for d, n in facts["dtypes"].items())])
