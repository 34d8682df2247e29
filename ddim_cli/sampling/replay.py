"""Pictures made again from what they say of themselves: sidecars, or the text inside a picture."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ddim_cli.config.layers import Layer, table_layer
from ddim_cli.config.seeds import MAX_SEED
from ddim_cli.errors import ModelError, UsageError
from ddim_cli.models.conditions import Blend, Conditioning
from ddim_cli.outputs.files import File, Member
from ddim_cli.outputs.folder import RUN_SCHEMA, OutputFolder
from ddim_cli.outputs.latents import latent_sha256, open_latents, read_latent
from ddim_cli.outputs.provenance import told_of
from ddim_cli.outputs.sidecar import (
    EDIT,
    OF_AN_INIT,
    ROW,
    SCHEMA,
    STRIP_SCHEMA,
    first_difference,
    is_lossy,
    is_of,
    is_row,
    run_identity,
)
from ddim_cli.outputs.store import is_own_picture, picture_of, read_json
from ddim_cli.sampling.items import (
    Begins,
    Between,
    Canvas,
    Inversion,
    Item,
    Latent,
    Noise,
    Slerp,
    blend_item,
    edit_item,
    frame_item,
    latent_item,
    picture_frame_item,
    reconstruction_item,
    row_item,
    seed_item,
)
from ddim_cli.sampling.pictures import pixels_hash
from ddim_cli.sampling.resolve import Run, resolve, writes_png
from ddim_cli.stores.objects import is_url

# Which command draws a strip that says this of itself.
_MAKERS = {"inverted": "invert", "edited": "edit"}


@dataclass(frozen=True)
class Original:
    """A picture that is to be made again.

    ``file`` is what was named, a sidecar or a picture; ``record`` what it says; ``picture`` the picture's file, None if
    that is not there. ``item`` is what makes it again.
    """

    file: File
    record: Mapping[str, Any]
    picture: File | None
    item: Item

    @property
    def pixels_sha256(self) -> str:
        return self.record["image"]["pixels_sha256"]

    @property
    def is_lossy(self) -> bool:
        """Whether the hash is of pixels that the picture's file has no longer: it is a JPEG."""
        return is_lossy(self.record)

    @property
    def runtime(self) -> Mapping[str, Any]:
        return self.record["runtime"]

    @property
    def strip(self) -> Mapping[str, Any] | None:
        """What a trajectory's strip shows; None of a single picture."""
        return self.record.get("strip")


@dataclass(frozen=True)
class Group:
    """Originals of equal settings, which are made again in batches of one size. No two have one name."""

    originals: tuple[Original, ...]

    @property
    def first(self) -> Original:
        return self.originals[0]

    @property
    def items(self) -> list[Item]:
        """What makes them again, each once, in the order of their names."""
        by_name = {original.item.name: original.item for original in self.originals}
        return [by_name[name] for name in sorted(by_name, key=lambda name: (len(name), name))]

    @property
    def of_rows(self) -> bool:
        """Whether they are rows of a job file, each with a name, a seed and a condition of its own."""
        return is_row(self.first.record)

    @property
    def of_edits(self) -> bool:
        """Whether they are pictures that were inverted and edited, each with a condition of its own."""
        return is_of(self.first.record, EDIT)

    @property
    def threads(self) -> int:
        return self.first.runtime["threads"]


def _check_record(record: Any, path: File) -> None:
    """UsageError unless all that replay needs is there."""
    if isinstance(record, dict) and record.get("schema") == STRIP_SCHEMA and "show" not in (record.get("strip") or {}):
        maker = next((m for key, m in _MAKERS.items() if key in (record.get("strip") or {})), "interpolate")
        raise UsageError(
            f"{path}: is drawn of several pictures; the same ddim {maker} draws it again, and replay takes the "
            "pictures themselves"
        )
    if not isinstance(record, dict) or record.get("schema") not in (SCHEMA, STRIP_SCHEMA):
        raise UsageError(f"{path}: is no sidecar of ddim ({SCHEMA})")
    wanted = {
        "seed": lambda r: r["seed"] is None or (type(r["seed"]) is int and 0 <= r["seed"] <= MAX_SEED),
        "image.pixels_sha256": lambda r: isinstance(r["image"]["pixels_sha256"], str),
        "runtime.batch_size": lambda r: type(r["runtime"]["batch_size"]) is int and r["runtime"]["batch_size"] > 0,
        "runtime.threads": lambda r: type(r["runtime"]["threads"]) is int and r["runtime"]["threads"] > 0,
        "runtime.dtype": lambda r: isinstance(r["runtime"]["dtype"], str),
        "sampling": lambda r: isinstance(r["sampling"], dict),
        "scheduler": lambda r: isinstance(r["scheduler"], dict),
        "model": lambda r: isinstance(r["model"], dict) and isinstance(r["model"]["kind"], str),
        "config": lambda r: isinstance(r["config"], dict) and isinstance(r["config"].get("model", {}), dict),
    }
    for name, is_right in wanted.items():
        try:
            right = is_right(record)
        except (KeyError, TypeError, AttributeError):
            right = False
        if not right:
            raise UsageError(f"{path}: its {name} is missing or not what a sidecar has")
    if record["model"]["kind"] == "callable":
        raise UsageError(f"{path}: was made from Python with a network of its own, which only that program has")


def _item_of(record: Mapping[str, Any], path: File, latents: Sequence[Path], inits: Sequence[Path]) -> Item:
    """The item that makes a picture again; latents are looked for beside it, and in the folders ``latents``.

    Pictures that it began from are looked for where they were, beside it, and in ``inits``.

    Raises:
        UsageError: for a picture of no seed that does not say what else it is of, and for a latent that is not there.
    """
    sampling, name = record["sampling"], path.stem
    try:
        condition = conditioning_of(sampling)
        if EDIT in sampling:
            return _edit_of(sampling, path, condition, inits)
        if ROW in sampling:
            return _row_of(sampling, path, condition, latents, inits)
        if isinstance(condition.prompt, Blend) and record["seed"] is not None:
            return blend_item(name, record["seed"], condition.prompt, condition.negative_prompt)
        if record["seed"] is not None:
            return seed_item(record["seed"], condition, _begins_of(sampling, path, inits))
        if "between" in sampling:
            facts = sampling["between"]
            weight = facts["weight"]
            if "pictures" in facts:
                a, b = (Inversion(find_picture(each, path, inits), condition) for each in facts["pictures"])
                return picture_frame_item(name, Between((a, b), weight), facts["pictures"], condition)
            weights = tuple(weight) if isinstance(weight, list) else (weight,)
            return frame_item(name, Slerp(tuple(facts["seeds"]), weights), condition)
        if "inverted" in sampling:
            # Sampling from the latent beside it is the second half of what was done, and makes the picture.
            beside = record["inversion"]["latent"]
            latent = _find_latent(beside["file"], None, beside["sha256"], path, latents)
            return reconstruction_item(name.removesuffix(".recon"), name, latent, sampling["inverted"], condition)
        if "latent" in sampling:
            facts = sampling["latent"]
            latent = _find_latent(facts["file"], facts.get("index"), facts["sha256"], path, latents)
            return latent_item(latent, condition)
    except (KeyError, TypeError, ValueError):
        raise UsageError(f"{path}: what it says of where it started is not what a sidecar has") from None
    raise UsageError(f"{path}: is of no seed, and does not say what it started from")


def _row_of(
    sampling: Mapping[str, Any], path: File, conditioning: Conditioning, folders: Sequence[Path], inits: Sequence[Path]
) -> Item:
    """The item of a job file's row. Raises as `_item_of`, and what a section of another shape raises."""
    seed, facts = sampling[ROW]["seed"], {key: sampling[key] for key in ("latent", *OF_AN_INIT) if key in sampling}
    begins = _begins_of(sampling, path, inits)
    start: Noise | Slerp | Latent
    if "latent" in facts:
        latent = facts["latent"]
        # One that a program handed over was in no file; it may be in one by now.
        file = latent.get("file", f"{path.stem}.safetensors")
        start = _find_latent(file, latent.get("index"), latent["sha256"], path, folders)
    else:
        if type(seed) is not int:
            raise TypeError
        start = begins.start(seed)
    return row_item(path.stem, path.stem, start, seed, conditioning, facts, begins)


def _edit_of(sampling: Mapping[str, Any], path: File, conditioning: Conditioning, inits: Sequence[Path]) -> Item:
    """The item of a picture that was inverted and edited. Raises as `_row_of`."""
    facts = sampling[EDIT]
    shown = Conditioning(facts["from"].get("class"), facts["from"].get("prompt"), None, 1.0)
    picture = find_picture(facts, path, inits)
    start = Inversion(picture, shown, sampling["timesteps"].index(facts["start_timestep"]))
    mask = next((key for key in ("mask", "keep_mask") if key in facts), None)
    canvas = None if mask is None else Canvas(picture, find_picture(facts[mask], path, inits), mask == "keep_mask")
    conditioning = replace(conditioning, guidance_scale=float(sampling["guidance_scale"]))
    return edit_item(path.stem, start, conditioning, {EDIT: facts}, canvas)


def _begins_of(sampling: Mapping[str, Any], path: File, inits: Sequence[Path]) -> Begins:
    """How a picture began that is of a seed. Raises as `_row_of`."""
    variation = None
    if sampling.get("variation_strength"):
        variation = (sampling["variation_seed"], sampling["variation_strength"])
    if "init" not in sampling:
        return Begins(variation)
    mask = find_picture(sampling["mask"], path, inits) if "mask" in sampling else None
    canvas = Canvas(find_picture(sampling["init"], path, inits), mask)
    return Begins(variation, sampling["timesteps"].index(sampling["start_timestep"]), canvas)


def find_picture(facts: Mapping[str, Any], sidecar: File, places: Sequence[Path] = ()) -> Path:
    """Where a picture is that a sidecar names: where it was, beside the sidecar, or in ``places``, files or folders.

    Raises UsageError where it is in none of them, or has changed.
    """
    name, was = facts["file"], Path(facts["path"])
    candidates = [place if place.is_file() else place / name for place in places]
    candidates += [was, *(folder / name for folder in beside(sidecar))]
    there = [candidate for candidate in candidates if candidate.is_file()]
    for candidate in there:
        # One that is no picture any more has changed too.
        with contextlib.suppress(UsageError):
            if pixels_hash(candidate) == facts["pixels_sha256"]:
                return candidate
    looked = ", ".join(str(candidate) for candidate in candidates)
    raise UsageError(
        f"{sidecar}: the picture that it began from, {name}, "
        + (
            f"has changed since: {there[0]} has other pixels"
            if there
            else f"is not there any more (looked for {looked})"
        )
        + "; say where it is with --init"
    )


def beside(file: File) -> list[Path]:
    """The folder that a file of this machine lies in, or the shard that it is in."""
    place = file.tar if isinstance(file, Member) else file
    return [place.parent] if isinstance(place, Path) else []


def conditioning_of(sampling: Mapping[str, Any]) -> Conditioning:
    """What a picture was conditioned on, as its section ``sampling`` says: `record.condition_record` undone.

    Raises KeyError, TypeError or ValueError for one that is none.
    """
    prompt: str | Blend | None = sampling.get("prompt")
    if "between_prompts" in sampling:
        facts = sampling["between_prompts"]
        first, second = facts["prompts"]
        prompt = Blend((first, second), float(facts["weight"]))
    return Conditioning(sampling.get("class"), prompt, sampling.get("negative_prompt"))


def _find_latent(name: str, index: int | None, sha256: str, path: File, folders: Sequence[Path]) -> Latent:
    """The latent with this hash, in a file of this name beside ``path`` or in one of ``folders``. Raises UsageError."""
    places = [*beside(path), *folders]
    for place in places:
        file = place if place.is_file() else place / name
        if file.is_file():
            latent = Latent(open_latents(file), index)
            if latent_sha256(read_latent(latent.file, index)) == sha256:
                return latent
    looked = ", ".join(str(place) for place in places)
    raise UsageError(
        f"{path}: the latent it started from, {name}, is not in {looked} as it was then; say where it is with --latents"
    )


def read_original(path: File, latents: Sequence[Path] = (), inits: Sequence[Path] = ()) -> Original | None:
    """What ``path``, a sidecar or a picture, says of a picture.

    None for run.json and grid.png, which a pattern such as DIR/* catches too. ``latents`` are files, or folders of
    them, in which latents are looked for that do not lie beside it, ``inits`` such for pictures that it began from.
    Raises UsageError for anything else.
    """
    if not isinstance(path, Member) and path.is_dir():
        strips = OutputFolder(path).strips() and not OutputFolder(path).numbered("json")
        pattern = f"its strips, for example {path}/0*.png" if strips else f"its sidecars, for example {path}/0*.json"
        raise UsageError(f"{path}: is a folder; name {pattern}")
    if path.name == "grid.png":
        return None
    if is_own_picture(path):
        record, picture = told_of(path), path
    else:
        if not path.exists():
            raise UsageError(f"{path}: no such file")
        record = read_json(path)
        picture = picture_of(path, record or {})
        if record is not None and record.get("schema") == RUN_SCHEMA:
            return None
    _check_record(record, path)
    return Original(path, record, picture if picture.exists() else None, _item_of(record, path, latents, inits))


def group_originals(originals: Iterable[Original]) -> list[Group]:
    """Those with equal settings together, in the order in which they come."""
    groups: dict[str, list[Original]] = {}
    for original in originals:
        runtime = {k: original.runtime.get(k) for k in ("batch_size", "threads", "compile")}
        settings = [run_identity(original.record), runtime, original.record["config"], original.strip]
        key = json.dumps([settings, original.item.is_of_a_seed], sort_keys=True)
        # Different pictures may have one name, in folders of their own.
        while any(o.item.name == original.item.name and o.item != original.item for o in groups.get(key, ())):
            key += "+"
        groups.setdefault(key, []).append(original)
    return [Group(tuple(members)) for members in groups.values()]


def model_layer(record: Mapping[str, Any], file: File) -> Layer:
    """Where the model is that ``file`` names: as it was named, for what has a name everywhere; else where it lay.

    Raises ModelError where it is no longer there.
    """
    model, settings = record["model"], record["config"].get("model", {})
    values = {}
    if model["kind"] == "hub" and model.get("revision"):
        # The branch may have moved on.
        values["model.revision"] = model["revision"]
    elif isinstance(model.get("path"), str) and os.path.exists(model["path"]):
        values["model.source"] = model["path"]
    elif (
        model["kind"] in ("directory", "checkpoint", "file")
        and not is_url(str(settings.get("source")))
        and not os.path.exists(str(settings.get("source")))
    ):
        raise ModelError(
            f"{file}: its model is no longer at {model.get('path') or settings.get('source')}; point to it "
            f"with -m (the sha256 of its weights is {model.get('sha256')})"
        )
    return Layer(values, dict.fromkeys(values, str(file)))


def settings_layer(record: Mapping[str, Any], file: File) -> Layer:
    """The settings that ``file`` says it was made with. Raises ConfigError for ones this version does not know."""
    config = {k: dict(v) if isinstance(v, dict) else v for k, v in record["config"].items()}
    sampling = config.get("sampling", {})
    if "timesteps" in sampling:
        # Resolved settings have both; as a config, the two exclude each other.
        sampling.pop("steps", None)
    return table_layer(config, str(file))


def resolve_group(group: Group, overrides: Sequence[Layer], folder: Path, grid: bool) -> Run:
    """The run that makes the pictures of a group again, into ``folder``; ``overrides`` are what the user says.

    Raises:
        ConfigError: for settings that this version does not know, or that cannot work.
        ModelError: if the model is not where it was.
    """
    original = group.first
    origin = str(original.file)

    def layer(**values: Any) -> Layer:
        named = {key.replace("__", "."): value for key, value in values.items()}
        return Layer(named, dict.fromkeys(named, origin))

    settings = settings_layer(original.record, original.file)
    moved = any("model.source" in o.values for o in overrides)
    if moved:
        # The commit of where it was says nothing of where it is now.
        settings = replace(settings, values={k: v for k, v in settings.values.items() if k != "model.revision"})
    ran = layer(
        # `auto` as it was resolved then.
        runtime__dtype=original.runtime["dtype"],
        sampling__batch_size=original.runtime["batch_size"],
        # Compiled code is used if it is kept here too; to build it for a few pictures would not pay.
        runtime__compile="auto" if original.runtime.get("compile") else False,
    )
    plan = layer(output__dir=str(folder), output__grid=grid)
    follow = group.of_rows or group.of_edits
    canvas = None if follow else original.item.canvas
    if canvas is not None:
        # They may have moved since.
        found = _found(canvas)
        plan = Layer({**plan.values, **found}, {**plan.origins, **dict.fromkeys(found, origin)})
    model = [] if moved else [model_layer(original.record, original.file)]
    run = writes_png(resolve([settings, ran, *model, *overrides, plan], conditions_follow=follow))
    classes = follow and original.item.class_number is not None
    return replace(run, of_rows=group.of_rows, of_edits=group.of_edits, classes_follow=classes)


def _found(canvas: Canvas) -> dict[str, str]:
    """The settings that name a canvas."""
    mask = {} if canvas.mask is None else {"sampling.mask": str(canvas.mask)}
    return {"sampling.init": str(canvas.picture), **mask}


def check_same_pictures(group: Group, record: Mapping[str, Any]) -> None:
    """UsageError if a run with this ``record`` makes other pictures than the originals. Another dtype is none."""
    before, now = run_identity(group.first.record), run_identity(record)
    for key in ("runtime.dtype", "runtime.tf32"):
        before.pop(key, None)
        now.pop(key, None)
    difference = first_difference(before, now)
    if difference is None:
        return
    key, old, new = difference
    if key == "model.sha256":
        raise ModelError(
            f"{group.first.file}: was made with other weights: their sha256 is {old}, that of "
            f"{record['model']['source']} is {new}"
        )
    raise UsageError(f"{group.first.file}: was made with {key} = {old!r}, and would be made again with {new!r}")
