"""Latents on disk: safetensors files with the settings inside, and whatever a user has as initial noise."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from ddim_cli.errors import UsageError
from ddim_cli.outputs.picture import CHUNK
from ddim_cli.outputs.sidecar import to_text

LATENT_SCHEMA = "ddim-cli/latent/1"
ENDING = ".latent.safetensors"
# Ours is called latent, that of others often latents; where there is only one tensor, its name does not matter.
NAMES = ("latent", "latents")
_FLOATS = {"F64", "F32", "F16", "BF16"}


@dataclass(frozen=True)
class LatentFile:
    """A file that holds latents.

    ``tensor`` is the name of the one that does, ``shape`` its [C, H, W] or [N, C, H, W]; ``record`` what the file says
    of how it came about, None where it says nothing.
    """

    path: Path
    tensor: str
    shape: tuple[int, ...]
    record: Mapping[str, Any] | None

    @property
    def indices(self) -> tuple[int | None, ...]:
        """The rows of a batch; of a single latent, None."""
        return tuple(range(self.shape[0])) if len(self.shape) == 4 else (None,)

    @property
    def stem(self) -> str:
        name = self.path.name
        return next((name.removesuffix(end) for end in (ENDING, ".safetensors") if name.endswith(end)), name)


def latent_sha256(latent: np.ndarray) -> str:
    """Of the values, float32 [C, H, W], as bytes: little-endian, the last axis fastest."""
    return hashlib.sha256(np.ascontiguousarray(latent, "<f4").tobytes()).hexdigest()


def describe_latent(record: Mapping[str, Any], latent: np.ndarray) -> dict[str, Any]:
    """What a latent's file says of it: the sections of a sidecar, ``record``, and its own shape and hash."""
    facts = {"shape": list(latent.shape), "sha256": latent_sha256(latent)}
    return {"schema": LATENT_SCHEMA, "latent": facts, **record}


def encode_latent(latent: np.ndarray, described: Mapping[str, Any]) -> bytes:
    """The bytes of a safetensors file with float32 [C, H, W] as ``latent``, and how it came about as its metadata."""
    from safetensors.numpy import save

    return save({"latent": np.ascontiguousarray(latent, np.float32)}, metadata={CHUNK: to_text(described)})


def open_latents(path: Path) -> LatentFile:
    """Look at a safetensors file, without reading its values.

    The tensor is the one called ``latent`` or ``latents``, else the only one.

    Raises:
        UsageError: for a file that is not there, is none of safetensors, or holds no latents.
    """
    if path.is_dir():
        raise UsageError(f"{path}: is a folder")
    try:
        with safe_open(path, framework="np") as stream:
            names = list(stream.keys())
            name = next((n for n in NAMES if n in names), names[0] if len(names) == 1 else None)
            if name is None:
                what = (
                    f"{len(names)} tensors, none of them called" if names else "no tensors; it should have one called"
                )
                raise UsageError(f"{path}: holds {what} 'latent' or 'latents'")
            part = stream.get_slice(name)
            shape, dtype = tuple(part.get_shape()), part.get_dtype()
            metadata = stream.metadata() or {}
    except FileNotFoundError:
        raise UsageError(f"{path}: no such file") from None
    except (SafetensorError, OSError) as error:
        raise UsageError(f"{path}: cannot be read as a safetensors file: {error}") from None
    if len(shape) not in (3, 4) or 0 in shape:
        raise UsageError(f"{path}: its {name!r} is {list(shape)}; a latent is [C, H, W], several are [N, C, H, W]")
    if dtype not in _FLOATS:
        raise UsageError(f"{path}: its {name!r} is of type {dtype}; latents are floating-point numbers")
    return LatentFile(path, name, shape, _parse(metadata.get(CHUNK), path))


def read_latent(file: LatentFile, index: int | None) -> np.ndarray:
    """One latent, float32 [C, H, W]. Raises UsageError for a file that cannot be read or values that are not finite."""
    try:
        # By torch, as numpy has no bfloat16.
        with safe_open(file.path, framework="pt", device="cpu") as stream:
            part = stream.get_slice(file.tensor)
            values = (part[:] if index is None else part[index]).float().numpy()
    except (SafetensorError, OSError) as error:
        raise UsageError(f"{file.path}: cannot be read as a safetensors file: {error}") from None
    if not np.isfinite(values).all():
        raise UsageError(f"{file.path}: {'' if index is None else f'latent {index} '}has values that are not finite")
    return values


def holds_latent(path: Path, sha256: str) -> bool:
    """Whether ``path`` is a whole file of ours whose latent has this hash."""
    try:
        with safe_open(path, framework="np") as stream:
            return latent_sha256(stream.get_tensor("latent")) == sha256
    except (SafetensorError, OSError, ValueError, TypeError):
        return False


def _parse(text: str | None, path: Path) -> dict[str, Any] | None:
    """The settings inside a file of ours; of others, None. Raises UsageError where they do not parse."""
    if text is None:
        return None
    try:
        record = json.loads(text)
        sections = ("sampling", "scheduler", "model", "runtime", "config")
        whole = record["schema"] == LATENT_SCHEMA and all(isinstance(record[s], dict) for s in sections)
    except (ValueError, RecursionError, KeyError, TypeError):
        whole = False
    if not whole:
        raise UsageError(f"{path}: the text {CHUNK!r} inside it does not say how a latent came about ({LATENT_SCHEMA})")
    return record
