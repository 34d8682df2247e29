"""The layouts of a diffusers directory, on disk or on the Hub: a pipeline, a bare UNet folder, or everything flat.

A layout is found from the names of files alone, so that what is needed of a repository is known
before anything of it is fetched.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

from ddim_cli.errors import ModelError

CONFIG, PIPELINE, SCHEDULER = "config.json", "model_index.json", "scheduler_config.json"
WEIGHTS = "diffusion_pytorch_model"


@dataclass(frozen=True)
class Layout:
    """Paths inside the directory: the network's ``folder`` ("" for the root), its config, and a scheduler's or None."""

    folder: str
    config: str
    scheduler: str | None


def _join(folder: str, name: str) -> str:
    return f"{folder}/{name}" if folder else name


def config_candidates(subfolder: str | None) -> list[str]:
    """Where the network's config may be, the first that exists being it."""
    folders = [subfolder.strip("/")] if subfolder is not None else ["unet", ""]
    return [_join(folder, CONFIG) for folder in folders]


def find_layout(files: Collection[str], subfolder: str | None, where: str) -> Layout:
    """The layout of a directory that has ``files``. Raises ModelError, saying what ``where`` lacks."""
    config = next((c for c in config_candidates(subfolder) if c in files), None)
    if config is None:
        if subfolder is not None:
            raise ModelError(f"{where}: no {subfolder}/{CONFIG} (model.subfolder = {json.dumps(subfolder)})")
        raise ModelError(f"{where}: not a diffusers model: there is neither unet/{CONFIG} nor {CONFIG}")
    scheduler = next((s for s in (f"scheduler/{SCHEDULER}", SCHEDULER) if s in files), None)
    return Layout(config.removesuffix(CONFIG).rstrip("/"), config, scheduler)


def find_weights(
    files: Collection[str],
    folder: str,
    variant: str | None,
    read_json: Callable[[str], Mapping[str, Any]],
    where: str,
    *stems: str,
) -> list[str]:
    """The files that hold the weights: safetensors before .bin, a whole file before shards.

    ``read_json`` reads an index of shards by its path in the directory; ``stems`` are what safetensors and .bin files
    are called, by default as diffusers calls both.

    Raises:
        ModelError: if there are none, naming what is there instead, or a shard of the index is missing.
    """
    middle = f".{variant}" if variant else ""
    names = dict(zip(("safetensors", "bin"), stems or (WEIGHTS, WEIGHTS), strict=True))
    for ending, stem in names.items():
        whole = _join(folder, f"{stem}{middle}.{ending}")
        if whole in files:
            return [whole]
        index = _join(folder, f"{stem}.{ending}.index{middle}.json")
        if index in files:
            return _shards(files, folder, index, read_json, where)
    wanted = f"{names['safetensors']}{middle}.safetensors"
    prefixes = tuple(_join(folder, stem) for stem in names.values())
    others = sorted(f.rpartition("/")[2] for f in files if f.startswith(prefixes))
    raise ModelError(f"{where}: no {_join(folder, wanted)}" + (f"; there is {', '.join(others)}" if others else ""))


def _shards(
    files: Collection[str], folder: str, index: str, read_json: Callable[[str], Mapping[str, Any]], where: str
) -> list[str]:
    weight_map = read_json(index).get("weight_map")
    if (
        not isinstance(weight_map, Mapping)
        or not all(isinstance(v, str) for v in weight_map.values())
        or not weight_map
    ):
        raise ModelError(f"{where}: {index} has no weight_map of tensors to files")
    names = sorted(set(weight_map.values()))
    if any("/" in name or "\\" in name or name.startswith(".") for name in names):
        raise ModelError(f"{where}: {index} names files outside its folder")
    missing = [name for name in names if _join(folder, name) not in files]
    if missing:
        raise ModelError(
            f"{where}: {len(missing)} of {len(names)} shards that {index} names are missing: {', '.join(missing[:3])}"
        )
    return [_join(folder, name) for name in names]
