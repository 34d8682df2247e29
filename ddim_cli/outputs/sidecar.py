"""How a picture was made, as JSON: the sidecar beside the picture and the same text inside it.

A record is what all pictures of a run share: the sections sampling, scheduler, model, runtime and
config. Its identity is the part of it that decides the pictures.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from datetime import datetime, timezone
from typing import TYPE_CHECKING, Any

from ddim_cli.config.schema import SECTIONS
from ddim_cli.outputs.jsontext import dump_record

if TYPE_CHECKING:
    import numpy as np

SCHEMA = "ddim-cli/sidecar/1"
# A strip shows several frames, so no single seed makes it again.
STRIP_SCHEMA = "ddim-cli/strip/1"
MODES = {1: "L", 3: "RGB", 4: "RGBA"}

# The settings that cannot change a picture, or that another entry of the record stands for. All others are part of a
# picture's identity, and so is every new one until it is named here.
CANNOT_CHANGE_A_PICTURE = {
    # Which pictures there are, and how many at a time. The grid that ran is recorded, not the steps asked for. A
    # prompt's tokens follow from it.
    "sampling": frozenset({"num_images", "seed", "seeds", "batch_size", "steps", "tokens"}),
    "scheduler": frozenset[str](),
    # The hashes of weights and config stand for where they came from; the null class is recorded with guidance.
    "model": frozenset({"source", "revision", "variant", "subfolder", "ema", "image_size", "null_class"}),
    # Up to rounding; the dtype that ran and TF32 are recorded.
    "runtime": frozenset({"device", "dtype", "tf32", "compile", "offload"}),
}
# What an item says of itself, and what its plan says of all items in its place: then the item's follows from its seed.
_OF_AN_ITEM = {"class": "classes", "prompt": "prompts"}
# What of the section ``sampling`` is an item's own, and no setting of its run; and what besides is that of a job file's
# row, which has a class and prompts of its own.
OF_AN_ITEM = ("between", "between_prompts", "latent", "inverted")
ROW, EDIT = "row", "edit"
# What it says of the picture that sampling began from, which may be the run's or a row's.
OF_AN_INIT = ("init", "mask", "strength", "start_timestep")
_OF_A_ROW = ("class", "prompt", "negative_prompt", *OF_AN_INIT)
# Likewise of an edit.
_OF_AN_EDIT = ("class", "prompt", "negative_prompt", "guidance_scale")
_OF_A_KIND = {ROW: _OF_A_ROW, EDIT: _OF_AN_EDIT}
# What says of a picture where it was, which decides nothing; its name there is part of it.
PLACE, NAME = "path", "file"
# What a sidecar says of the file that its picture is in.
_OF_A_FILE = ("file", "bytes", "file_sha256")
# What identities had in the first version, whatever its value. A setting that came later is in them where it is not its
# default: so folders of before stay what they were.
_FROM_THE_START = {
    "sampling": frozenset({"eta", "timesteps", "variance", "use_clipped_model_output", "guidance_rescale"}),
    "scheduler": frozenset(
        {
            *("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas", "prediction_type"),
            *("clip_sample", "clip_sample_range", "thresholding", "dynamic_thresholding_ratio", "sample_max_value"),
            *("timestep_spacing", "steps_offset", "set_alpha_to_one", "rescale_betas_zero_snr", "previous_timestep"),
        }
    ),
}
_FACTS = {"model": ("sha256", "config_sha256"), "runtime": ("dtype", "tf32")}


def identity(record: Mapping[str, Any]) -> dict[str, Any]:
    """What decides a picture, flat: "sampling.eta" -> 0.0."""
    flat: dict[str, Any] = {}
    for section in ("sampling", "scheduler"):
        flat |= _deciding(section, _table(record, section))
    for own, of_all in _OF_AN_ITEM.items():
        if f"sampling.{of_all}" in flat:
            flat.pop(f"sampling.{own}", None)
    for section, facts in _FACTS.items():
        flat |= {f"{section}.{fact}": _table(record, section).get(fact) for fact in facts}
        flat |= _deciding(section, _table(_table(record, "config"), section))
    if flat.get("scheduler.previous_timestep") == "diffusers":
        # Its stride is T // N for the N asked for, whatever the grid's length.
        flat["sampling.steps"] = record["sampling"].get("steps")
    return flat


def run_identity(record: Mapping[str, Any]) -> dict[str, Any]:
    """The identity of the run that a picture is of: without what is the item's own."""
    kinds = [kind for kind in _OF_A_KIND if is_of(record, kind)]
    keys = (*OF_AN_ITEM, *(key for kind in kinds for key in _OF_A_KIND[kind]))
    own = {f"sampling.{key}" for key in keys}
    found = {key: value for key, value in identity(record).items() if key not in own}
    # Of a row it stays that it is one.
    return {**found, **{f"sampling.{kind}": {} for kind in kinds}}


def is_of(record: Mapping[str, Any], kind: str) -> bool:
    """Whether a record is that of a picture of this kind, ROW or EDIT, or of a run of such."""
    return kind in _table(record, "sampling")


def is_row(record: Mapping[str, Any]) -> bool:
    """Whether a record is that of a job file's row, or of a run of such."""
    return is_of(record, ROW)


def row_settings(line: Mapping[str, Any]) -> dict[str, Any]:
    """What a row of items.jsonl adds to the identity of its run."""
    own = {key: value for key, value in line.items() if key not in ("name", "seed")}
    return {f"sampling.{key}": _unplaced(value) for key, value in {**own, ROW: {"seed": line.get("seed")}}.items()}


def _unplaced(value: Any) -> Any:
    """A value without where the pictures that it is about lie."""
    if isinstance(value, Mapping):
        placed = (PLACE, NAME) if PLACE in value else ()
        return {k: _unplaced(v) for k, v in value.items() if k not in placed}
    if isinstance(value, list) and value and isinstance(value[0], Mapping):
        return [_unplaced(each) for each in value]
    return value


def _table(record: Mapping[str, Any], section: str) -> Mapping[str, Any]:
    values = record.get(section)
    return values if isinstance(values, Mapping) else {}


def _deciding(section: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """Those of a section's values that can change a picture."""
    fields, kept = SECTIONS[section].model_fields, _FROM_THE_START.get(section, ())
    return {
        f"{section}.{key}": _unplaced(value)
        for key, value in values.items()
        if key not in CANNOT_CHANGE_A_PICTURE[section]
        and (key in kept or key not in fields or value != fields[key].default)
    }


def identity_hash(record: Mapping[str, Any]) -> str:
    """Eight hex digits over the identity."""
    text = json.dumps(identity(record), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def first_difference(before: Mapping[str, Any], now: Mapping[str, Any]) -> tuple[str, Any, Any] | None:
    """The first key of two identities that differs, with both values; None if none does."""
    if before == now:
        return None
    for key in [*now, *(k for k in before if k not in now)]:
        if before.get(key) != now.get(key):
            return key, before.get(key), now.get(key)
    return None


def utc_now() -> str:
    """The time in UTC, ISO 8601, to the second."""
    return datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")


def describe_picture(
    record: Mapping[str, Any], seed: int | None, pixels: np.ndarray, batch_size: int | None = None
) -> dict[str, Any]:
    """What can be said of a picture before it has a file. ``pixels`` is uint8 [H, W, C].

    ``batch_size`` is that of its batch, where it is not the record's: once memory did not suffice for that. ``seed``
    is None for a picture that no single seed makes; what its noise is made of is in the record's sampling.
    """
    height, width, channels = pixels.shape
    return {
        "schema": SCHEMA,
        "image": {
            "width": width,
            "height": height,
            "mode": MODES[channels],
            "pixels_sha256": hashlib.sha256(pixels.tobytes()).hexdigest(),
        },
        "seed": seed,
        **record,
        **_in_batches_of(batch_size, record),
    }


def _in_batches_of(batch_size: int | None, record: Mapping[str, Any]) -> dict[str, Any]:
    same = batch_size is None or record["runtime"].get("batch_size") == batch_size
    # The same section is one that is written once for all pictures.
    return {} if same else {"runtime": {**record["runtime"], "batch_size": batch_size}}


def describe_strip(
    record: Mapping[str, Any], seed: int | None, strip: Mapping[str, Any], pixels: np.ndarray
) -> dict[str, Any]:
    """As `describe_picture`, of several frames in one picture; ``strip`` says what they show."""
    schema, *rest = describe_picture(record, seed, pixels).items()
    return {schema[0]: STRIP_SCHEMA, "strip": dict(strip), **dict(rest)}


def complete(described: Mapping[str, Any], file: str, data: bytes, seconds: float | None = None) -> dict[str, Any]:
    """The whole sidecar of a picture that was made in ``seconds``, and is encoded as ``data`` in ``file``.

    Without ``seconds`` it has no times, so that the same picture has the same sidecar.

    Of one that lost pixels in that (`is_lossy`) it has the hash of the file too, which still tells a change.
    """
    facts, config = dict(described), described["config"]
    image = dict(facts.pop("image"))
    pixels_sha256 = image.pop("pixels_sha256")
    of_the_file = {"file_sha256": hashlib.sha256(data).hexdigest()} if is_lossy(described) else {}
    del facts["schema"], facts["config"]
    return {
        "schema": described["schema"],
        "image": {"file": file, **image, "bytes": len(data), "pixels_sha256": pixels_sha256, **of_the_file},
        **facts,
        **({} if seconds is None else {"timing": {"seconds": round(seconds, 6)}, "created": utc_now()}),
        "config": config,
    }


def of_the_picture(sidecar: Mapping[str, Any]) -> dict[str, Any]:
    """What of a sidecar stands inside its picture too: `complete` undone."""
    facts = {k: v for k, v in sidecar.items() if k not in ("timing", "created")}
    return {**facts, "image": {k: v for k, v in sidecar["image"].items() if k not in _OF_A_FILE}}


def is_lossy(record: Mapping[str, Any]) -> bool:
    """Whether a sidecar, or a text inside, is of a JPEG: the hash is then of the pixels before it was encoded."""
    image = record.get("image")
    return isinstance(image, Mapping) and "encoding" in image


def to_text(described: Mapping[str, Any]) -> str:
    return dump_record(described) + "\n"
