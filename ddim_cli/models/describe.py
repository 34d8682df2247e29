"""What a model is, from its JSON files alone: no torch, no weights."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from ddim_cli.config.layers import Layer, nearest
from ddim_cli.config.schema import ModelSettings, SchedulerSettings
from ddim_cli.errors import ModelError

BUNDLED = Path(__file__).parent / "bundled"
NETWORK_CLASS = "UNet2DModel"
_WEIGHTS = "diffusion_pytorch_model"


@dataclass(frozen=True)
class ModelDescription:
    """A model that was found: where its files are and what its JSON says.

    ``network`` is the UNet's config; ``weights`` the files that hold its parameters; ``scheduler`` the
    DDIM keys of the scheduler that came with it, or None; ``unused_scheduler_keys`` those of its keys
    that DDIM has no use for.
    """

    source: str
    name: str
    kind: str
    directory: Path
    network: Mapping[str, Any]
    weights: tuple[Path, ...]
    scheduler: Mapping[str, Any] | None = None
    scheduler_file: Path | None = None
    unused_scheduler_keys: tuple[str, ...] = ()

    @cached_property
    def sha256(self) -> str:
        """Of the weights file; of several, of their hashes in the order of their names."""
        digests = [_file_sha256(path) for path in self.weights]
        if len(digests) == 1:
            return digests[0]
        return hashlib.sha256("".join(digests).encode()).hexdigest()

    @cached_property
    def parameters(self) -> int:
        """Number of parameters, from the headers of the weights files."""
        return sum(_count_elements(path) for path in self.weights)

    @property
    def channels(self) -> int:
        return self.network["in_channels"]

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of an image."""
        size = self.network["sample_size"]
        return (size, size) if isinstance(size, int) else (size[0], size[1])

    def scheduler_layer(self) -> Layer:
        """The model's own scheduler settings, as the layer below every file; keys that DDIM lacks are left out."""
        values = {f"scheduler.{k}": v for k, v in (self.scheduler or {}).items()}
        where = f"{self.name}'s {self.scheduler_file.name}" if self.scheduler_file else self.name
        return Layer(values, dict.fromkeys(values, where))


def _file_sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest() if hasattr(hashlib, "file_digest") else _digest(stream)


def _digest(stream) -> str:
    # hashlib.file_digest came with Python 3.11.
    digest = hashlib.sha256()
    while block := stream.read(1 << 20):
        digest.update(block)
    return digest.hexdigest()


def _count_elements(path: Path) -> int:
    """Elements of all tensors of a safetensors file: its JSON header follows an 8-byte length."""
    try:
        with path.open("rb") as stream:
            header = json.loads(stream.read(int.from_bytes(stream.read(8), "little")))
        return sum(math.prod(entry["shape"]) for name, entry in header.items() if name != "__metadata__")
    except (OSError, ValueError, KeyError, TypeError, OverflowError, MemoryError, AttributeError) as error:
        raise ModelError(f"{path}: not a whole safetensors file: {error}") from None


def bundled_names() -> list[str]:
    """The names of the models that ship in the package."""
    return sorted(p.parent.name for p in BUNDLED.glob("*/model_index.json"))


def _read_json(path: Path, what: str) -> dict[str, Any]:
    try:
        found = json.loads(path.read_bytes())
    except OSError as error:
        raise ModelError(f"{path}: {what} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{path}: {what} is not JSON: {error}") from None
    if not isinstance(found, dict):
        raise ModelError(f"{path}: {what} is not a JSON object")
    return found


def _find_network(directory: Path, subfolder: str | None) -> Path:
    """The folder with the network's config.json: ``subfolder``, unet/, or the directory itself."""
    if subfolder is not None:
        if not (directory / subfolder / "config.json").is_file():
            raise ModelError(f"{directory}: no {subfolder}/config.json (model.subfolder = {json.dumps(subfolder)})")
        return directory / subfolder
    for folder in (directory / "unet", directory):
        if (folder / "config.json").is_file():
            return folder
    raise ModelError(f"{directory}: not a diffusers model: there is neither unet/config.json nor config.json")


def _check_network(config: Mapping[str, Any], path: Path) -> None:
    found = config.get("_class_name", NETWORK_CLASS)
    if found != NETWORK_CLASS:
        raise ModelError(f"{path}: the network is a {found}; this tool samples from a {NETWORK_CLASS}")
    size = config.get("sample_size")
    pair = isinstance(size, list) and len(size) == 2 and all(type(s) is int and s > 0 for s in size)
    if not pair and not (type(size) is int and size > 0):
        raise ModelError(f"{path}: sample_size is {json.dumps(size)}; sampling needs the height and width of an image")
    channels, out = config.get("in_channels", 3), config.get("out_channels", 3)
    if channels != out:
        raise ModelError(f"{path}: the network takes {channels} channels and gives {out}; DDIM needs as many")
    if channels not in (1, 3, 4):
        raise ModelError(f"{path}: the network makes {channels} channels; a picture has 1, 3 or 4")
    if config.get("num_class_embeds") or config.get("class_embed_type"):
        raise ModelError(f"{path}: the network is class-conditional, which this version cannot sample from")


def _find_weights(folder: Path, variant: str | None) -> tuple[Path, ...]:
    name = f"{_WEIGHTS}.{variant}.safetensors" if variant else f"{_WEIGHTS}.safetensors"
    if (folder / name).is_file():
        return (folder / name,)
    others = sorted(p.name for p in folder.glob(f"{_WEIGHTS}*"))
    raise ModelError(f"{folder}: no {name}" + (f"; there is {', '.join(others)}" if others else ""))


def read_scheduler_config(path: Path) -> tuple[dict[str, Any], list[str]]:
    """The keys of a scheduler_config.json that DDIM has, and the names of those it has no use for.

    Raises:
        ModelError: for a file that cannot be read or is no JSON object.
    """
    found = _read_json(path, "the scheduler's config")
    known = SchedulerSettings.model_fields
    keys = {k: v for k, v in found.items() if k in known and v is not None}
    return keys, sorted(k for k in found if k not in known and not k.startswith("_"))


def _find_scheduler(directory: Path) -> Path | None:
    candidates = (directory / "scheduler" / "scheduler_config.json", directory / "scheduler_config.json")
    return next((path for path in candidates if path.is_file()), None)


def describe_model(settings: ModelSettings) -> ModelDescription:
    """Find the model that ``settings.source`` names, and read its JSON files.

    Raises:
        ModelError: where there is none, or it is not a model this tool can sample from.
    """
    source = settings.source
    bundled = source in bundled_names()
    directory = BUNDLED / source if bundled else Path(source).expanduser()
    if not directory.exists():
        raise ModelError(
            f"model {source!r} not found: it is neither a directory nor a bundled model "
            f"({', '.join(bundled_names())}){nearest(source, bundled_names())}"
        )
    if not directory.is_dir():
        raise ModelError(f"model {source!r} is a file; this version loads diffusers directories and bundled models")
    folder = _find_network(directory, settings.subfolder)
    network = {"in_channels": 3, "out_channels": 3} | _read_json(folder / "config.json", "the network's config")
    _check_network(network, folder / "config.json")
    scheduler_file = _find_scheduler(directory)
    scheduler, unused = read_scheduler_config(scheduler_file) if scheduler_file else (None, [])
    return ModelDescription(
        source=source,
        name=source if bundled else directory.resolve().name,
        kind="bundled" if bundled else "directory",
        directory=directory,
        network=network,
        weights=_find_weights(folder, settings.variant),
        scheduler=scheduler,
        scheduler_file=scheduler_file,
        unused_scheduler_keys=tuple(unused),
    )
