"""How a picture was made, as JSON: the sidecar beside the PNG and the same text inside it.

A record is what all pictures of a run share: the sections sampling, scheduler, model, runtime and
config. Its identity is the part of it that decides the pictures.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from datetime import datetime, timezone
from typing import Any

import numpy as np

from ddim_cli.config.seeds import parse_classes
from ddim_cli.outputs.jsontext import dump_json

SCHEMA = "ddim-cli/sidecar/1"
# Of a picture of several frames, which no one seed makes again.
STRIP_SCHEMA = "ddim-cli/strip/1"
MODES = {1: "L", 3: "RGB", 4: "RGBA"}

# The steps asked for do not matter, only the grid that ran; nor does the device, up to rounding.
_IDENTITY = {
    "sampling": None,
    "scheduler": None,
    "model": ("sha256", "config_sha256"),
    "runtime": ("dtype", "tf32"),
}
_NOT_IDENTITY = {"sampling": ("steps", "class")}


def identity(record: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that decide the pictures, flat: "sampling.eta" -> 0.0."""
    flat: dict[str, Any] = {}
    for section, keys in _IDENTITY.items():
        values = record.get(section)
        values = values if isinstance(values, Mapping) else {}
        for key in values if keys is None else keys:
            if key not in _NOT_IDENTITY.get(section, ()):
                flat[f"{section}.{key}"] = values.get(key)
    if flat.get("scheduler.previous_timestep") == "diffusers":
        # Its stride is T // N for the N asked for, whatever the grid's length.
        flat["sampling.steps"] = record["sampling"].get("steps")
    return flat


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
            "pixels_sha256": hashlib.sha256(np.ascontiguousarray(pixels).tobytes()).hexdigest(),
        },
        "seed": seed,
        **record,
        "sampling": _sampling_of(record["sampling"], seed),
        **({} if batch_size is None else {"runtime": {**record["runtime"], "batch_size": batch_size}}),
    }


def describe_strip(
    record: Mapping[str, Any], seed: int | None, strip: Mapping[str, Any], pixels: np.ndarray
) -> dict[str, Any]:
    """As `describe_picture`, of several frames in one picture; ``strip`` says what they show."""
    schema, *rest = describe_picture(record, seed, pixels).items()
    return {schema[0]: STRIP_SCHEMA, "strip": dict(strip), **dict(rest)}


def _sampling_of(sampling: Mapping[str, Any], seed: int | None) -> dict[str, Any]:
    """The section ``sampling`` of one picture: its class stands beside the classes it was taken from."""
    if "classes" not in sampling or seed is None:
        return dict(sampling)
    classes = parse_classes(sampling["classes"])
    return {**sampling, "class": classes[seed % len(classes)]}


def complete(described: Mapping[str, Any], file: str, size: int, seconds: float) -> dict[str, Any]:
    """The whole sidecar of a picture that was encoded as ``file`` of ``size`` bytes in ``seconds``."""
    facts, config = dict(described), described["config"]
    image = dict(facts.pop("image"))
    pixels_sha256 = image.pop("pixels_sha256")
    del facts["schema"], facts["config"]
    return {
        "schema": described["schema"],
        "image": {"file": file, **image, "bytes": size, "pixels_sha256": pixels_sha256},
        **facts,
        "timing": {"seconds": round(seconds, 6)},
        "created": utc_now(),
        "config": config,
    }


def of_the_picture(sidecar: Mapping[str, Any]) -> dict[str, Any]:
    """What of a sidecar stands inside its PNG too: `complete` undone."""
    facts = {k: v for k, v in sidecar.items() if k not in ("timing", "created")}
    return {**facts, "image": {k: v for k, v in sidecar["image"].items() if k not in ("file", "bytes")}}


def to_text(described: Mapping[str, Any]) -> str:
    return dump_json(described) + "\n"
