"""The plan of a run that begins at latents from files: which ones, under which names, with whose settings.

Needs no torch.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ddim_cli.config.layers import Layer
from ddim_cli.errors import UsageError
from ddim_cli.experiments.rules import check_deterministic
from ddim_cli.outputs.figures import shortened
from ddim_cli.outputs.latents import LatentFile, open_latents
from ddim_cli.outputs.sidecar import first_difference, identity
from ddim_cli.sampling.items import Choices, Latent
from ddim_cli.sampling.replay import model_layer, settings_layer
from ddim_cli.sampling.resolve import Run, refuse_init, resolve

WHY_ETA_0 = (
    "sampling from a latent needs eta 0. The noise of each step comes from an image's seed, and a latent has none"
)
SEED_KEYS = ("sampling.seeds", "sampling.seed", "sampling.num_images")
_SAID_BY_USER = ("--set", "--seeds", "--seed", "--num-images")


def find_latents(paths: Sequence[Path]) -> list[LatentFile]:
    """The files themselves, and in place of a folder the safetensors files in it, by name.

    Raises:
        UsageError: for a path that holds no latents, or two files of one name.
    """
    files: list[Path] = []
    for path in paths:
        inside = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
        if not inside:
            raise UsageError(f"--latents {path}: there are no safetensors files in this folder")
        files += inside
    found = [open_latents(path) for path in {path.resolve(): path for path in reversed(files)}.values()][::-1]
    names: dict[str, Path] = {}
    for start in starts_of(found):
        other = names.setdefault(start.name.casefold(), start.file.path)
        if other is not start.file.path:
            raise UsageError(
                f"--latents: {other} and {start.file.path} would both become {start.name}.latent.png; rename one, or "
                "sample them into two folders"
            )
    return found


def starts_of(files: Sequence[LatentFile]) -> list[Latent]:
    return [Latent(file, index) for file in files for index in file.indices]


def folder_ending(files: Iterable[LatentFile]) -> str:
    """The ending of the default folder's name where the plain one holds pictures of other latents of these names.

    It tells which folders the latents lie in: there, names are told apart.
    """
    folders = sorted({str(file.path.resolve().parent) for file in files})
    return f"-latents-{hashlib.sha256(chr(0).join(folders).encode(errors='surrogateescape')).hexdigest()[:8]}"


def check_no_seeds(
    layers: Sequence[Layer], beside: str = "--latents", says: str = "which noise images begin with"
) -> None:
    """UsageError where seeds are asked for ``beside`` an option that ``says`` as much.

    Those of a config file stand for runs without that option.
    """
    for layer in layers:
        for key in SEED_KEYS:
            if layer.origins.get(key) in _SAID_BY_USER:
                raise UsageError(f"{layer.origins[key]} says {says}, and so does {beside}; keep one")


def inside_layer(files: Sequence[LatentFile], layers: Sequence[Layer]) -> Layer:
    """The settings inside the first of the files that has some, to lie below ``layers``, which are the user's.

    Raises:
        ConfigError: for settings that this version does not know.
        ModelError: if the model is not where it was, and the user names no other.
    """
    told = next(((file.path, file.record) for file in files if file.record is not None), None)
    if told is None:
        return Layer({}, {})
    path, record = told
    own = settings_layer(record, path)
    # Device and speed are this machine's; the dtype bears on the picture.
    values = {k: v for k, v in own.values.items() if not k.startswith("runtime.")}
    values["runtime.dtype"] = record["runtime"].get("dtype", "auto")
    if any("model.source" in layer.values for layer in layers):
        values = {k: v for k, v in values.items() if not k.startswith("model.")}
    else:
        values |= model_layer(record, path).values
    return replace(own, values=values, origins=dict.fromkeys(values, str(path)))


def check_shapes(files: Sequence[LatentFile], run: Run) -> None:
    """UsageError for latents of another shape than the network takes."""
    shape = run.model.state_shape
    for file in files:
        if file.shape[-3:] != shape:
            found, wanted = (" x ".join(map(str, s)) for s in (file.shape[-3:], shape))
            raise UsageError(f"{file.path}: its latents are {found} (C x H x W), and {run.model.name} takes {wanted}")


def differences(files: Sequence[LatentFile], record: Mapping[str, Any]) -> list[str]:
    """What is to be said of files that were made with other settings than those that run, as ``record`` has them."""
    found: dict[str, list[str]] = {}
    for file in files:
        if file.record is None:
            continue
        before = {k: v for k, v in identity(file.record).items() if k != "sampling.inverted"}
        difference = first_difference(before, identity(record))
        if difference is not None:
            key, old, new = difference
            found.setdefault(
                f"with {key} = {shortened(str(old), 40)}, and is sampled with {shortened(str(new), 40)}", []
            ).append(str(file.path))
    return [
        f"{paths[0]}{f' (and {len(paths) - 1} more)' if len(paths) > 1 else ''} was made {text}: the picture is not "
        "the one that was inverted"
        for text, paths in found.items()
    ]


def resolve_latents(files: Sequence[LatentFile], layers: Sequence[Layer]) -> Run:
    """The run of latents: the settings inside the files lie below the user's.

    Raises:
        ConfigError: for settings that cannot work together.
        ModelError: for a model that is not there or cannot be sampled from.
        UsageError: for seeds beside latents, an eta other than 0, several classes, and latents of another shape.
    """
    check_no_seeds(layers)
    run = resolve([inside_layer(files, layers), *layers])
    refuse_init(run, "--latents says so too; keep one")
    check_deterministic(run, WHY_ETA_0)
    Choices.of(run.config).of_all()
    check_shapes(files, run)
    return run
