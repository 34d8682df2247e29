"""Pictures made again from what they say of themselves: sidecars, or the text inside a PNG."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ddim_cli.config.layers import Layer, table_layer
from ddim_cli.config.seeds import MAX_SEED, format_seeds
from ddim_cli.errors import ModelError, UsageError
from ddim_cli.outputs.folder import RUN_SCHEMA, OutputFolder, read_json
from ddim_cli.outputs.provenance import told_of
from ddim_cli.outputs.sidecar import SCHEMA, STRIP_SCHEMA, first_difference, identity
from ddim_cli.sampling.resolve import Run, resolve


@dataclass(frozen=True)
class Original:
    """A picture that is to be made again.

    ``file`` is what was named, a sidecar or a PNG; ``record`` what it says; ``picture`` its PNG, None
    if that is not there.
    """

    file: Path
    record: Mapping[str, Any]
    picture: Path | None

    @property
    def seed(self) -> int:
        return self.record["seed"]

    @property
    def pixels_sha256(self) -> str:
        return self.record["image"]["pixels_sha256"]

    @property
    def runtime(self) -> Mapping[str, Any]:
        return self.record["runtime"]


@dataclass(frozen=True)
class Group:
    """Originals of equal settings, which are made again in batches of one size."""

    originals: tuple[Original, ...]

    @property
    def first(self) -> Original:
        return self.originals[0]

    @property
    def seeds(self) -> tuple[int, ...]:
        return tuple(sorted({o.seed for o in self.originals}))

    @property
    def threads(self) -> int:
        return self.first.runtime["threads"]


_NOT_OF_A_SEED = {
    "between": "is a frame between the noises of several seeds; ddim interpolate makes it again",
    "inverted": "is the reconstruction of another picture; ddim invert makes it again from that, and ddim sample "
    "--latents from the latent beside it",
    "latent": "began at a latent and not at the noise of a seed; ddim sample --latents makes it again",
}


def _check_record(record: Any, path: Path) -> None:
    """UsageError unless all that replay needs is there."""
    if isinstance(record, dict) and record.get("schema") == STRIP_SCHEMA:
        strip = record.get("strip") or {}
        maker = "trajectory" if "show" in strip else "invert" if "inverted" in strip else "interpolate"
        raise UsageError(
            f"{path}: is drawn of several frames; the same ddim {maker} draws it again, and replay takes pictures of "
            "ddim sample"
        )
    if not isinstance(record, dict) or record.get("schema") != SCHEMA:
        raise UsageError(f"{path}: is no sidecar of ddim ({SCHEMA})")
    sampling = record.get("sampling")
    if record.get("seed") is None and isinstance(sampling, dict):
        for key, text in _NOT_OF_A_SEED.items():
            if key in sampling:
                raise UsageError(f"{path}: {text}")
    wanted = {
        "seed": lambda r: type(r["seed"]) is int and 0 <= r["seed"] <= MAX_SEED,
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


def read_original(path: Path) -> Original | None:
    """What ``path``, a sidecar or a PNG, says of a picture.

    None for run.json and grid.png, which a pattern such as DIR/* catches too. Raises UsageError for anything else.
    """
    if path.is_dir() and OutputFolder(path).strips() and not OutputFolder(path).numbered("json"):
        raise UsageError(
            f"{path}: is a folder of ddim trajectory; the same command draws its strips again, and replay takes "
            "pictures of ddim sample"
        )
    if path.is_dir():
        raise UsageError(f"{path}: is a folder; name its sidecars, for example {path}/0*.json")
    if path.name == "grid.png":
        return None
    if path.suffix.lower() == ".png":
        record, picture = told_of(path), path
    else:
        if not path.exists():
            raise UsageError(f"{path}: no such file")
        record, picture = read_json(path), path.with_suffix(".png")
        if record is not None and record.get("schema") == RUN_SCHEMA:
            return None
    _check_record(record, path)
    return Original(path, record, picture if picture.exists() else None)


def group_originals(originals: Iterable[Original]) -> list[Group]:
    """Those with equal settings together, in the order in which they come."""
    groups: dict[str, list[Original]] = {}
    for original in originals:
        runtime = {k: original.runtime.get(k) for k in ("batch_size", "threads", "compile")}
        key = json.dumps([identity(original.record), runtime, original.record["config"]], sort_keys=True)
        groups.setdefault(key, []).append(original)
    return [Group(tuple(found)) for found in groups.values()]


def model_layer(original: Original) -> Layer:
    """Where the model is now: as it was named, for what has a name everywhere; else where it lay."""
    model, settings = original.record["model"], original.record["config"].get("model", {})
    values = {}
    if model["kind"] == "hub" and model.get("revision"):
        # The branch may have moved on.
        values["model.revision"] = model["revision"]
    elif isinstance(model.get("path"), str) and os.path.exists(model["path"]):
        values["model.source"] = model["path"]
    elif model["kind"] in ("directory", "checkpoint", "file") and not os.path.exists(str(settings.get("source"))):
        raise ModelError(
            f"{original.file}: its model is no longer at {model.get('path') or settings.get('source')}; point to it "
            f"with -m (the sha256 of its weights is {model.get('sha256')})"
        )
    return Layer(values, dict.fromkeys(values, str(original.file)))


def settings_layer(original: Original) -> Layer:
    """The settings that the picture was made with. Raises ConfigError for ones this version does not know."""
    config = {k: dict(v) if isinstance(v, dict) else v for k, v in original.record["config"].items()}
    sampling = config.get("sampling", {})
    if "timesteps" in sampling:
        # Resolved settings have both; as a config, the two exclude each other.
        sampling.pop("steps", None)
    return table_layer(config, str(original.file))


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

    settings = settings_layer(original)
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
    plan = layer(sampling__seeds=format_seeds(group.seeds), output__dir=str(folder), output__grid=grid)
    model = [] if moved else [model_layer(original)]
    return resolve([settings, ran, *model, *overrides, plan])


def check_same_pictures(group: Group, record: Mapping[str, Any]) -> None:
    """UsageError if a run with this ``record`` makes other pictures than the originals. Another dtype is none."""
    before, now = identity(group.first.record), identity(record)
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
