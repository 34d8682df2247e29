"""What a model is, from its JSON files alone: no weights, and no torch but for a checkpoint that has no config."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cache, cached_property
from pathlib import Path
from typing import Any

from ddim_cli.config.layers import Layer, nearest
from ddim_cli.config.schema import ModelSettings, SchedulerSettings
from ddim_cli.errors import ModelError
from ddim_cli.models.directory import SCHEDULER, config_candidates, find_layout, find_weights
from ddim_cli.models.hashing import file_sha256, files_sha256, joint_sha256
from ddim_cli.models.hub import is_hub_id, open_repository

BUNDLED = Path(__file__).parent / "bundled"
NETWORK_CLASS = "UNet2DModel"
# What UNet2DModel takes where a config leaves these out.
_NETWORK_DEFAULTS = {
    "in_channels": 3,
    "out_channels": 3,
    "time_embedding_type": "positional",
    "block_out_channels": [224, 448, 672, 896],
    "layers_per_block": 2,
}
MOST_PIXELS = 16384
CHECKPOINT_ENDINGS = (".ckpt", ".pth", ".pt", ".bin")


@dataclass(frozen=True)
class ModelDescription:
    """What is known of a model without reading its weights.

    ``kind`` is bundled, directory, hub, checkpoint (of the original code) or file (one safetensors
    file); ``network`` the UNet's config; ``scheduler`` the DDIM keys of the scheduler that came with
    it, or None; ``unused_scheduler_keys`` those of its keys that DDIM has no use for; ``where`` its
    place, for messages; ``notes`` what a user should be told; ``announce_weights`` gives sha256 and number of
    elements of weights that are not here yet, or None.
    """

    source: str
    name: str
    kind: str
    where: str
    network: Mapping[str, Any]
    fetch_weights: Callable[[], tuple[Path, ...]] = field(repr=False, compare=False)
    scheduler: Mapping[str, Any] | None = None
    scheduler_name: str | None = None
    unused_scheduler_keys: tuple[str, ...] = ()
    revision: str | None = None
    ema: bool = True
    notes: tuple[str, ...] = ()
    announce_weights: Callable[[], tuple[str, int] | None] = field(default=lambda: None, repr=False, compare=False)

    @cached_property
    def _announced(self) -> tuple[str, int] | None:
        return self.announce_weights()

    @cached_property
    def weights(self) -> tuple[Path, ...]:
        """The files that hold the parameters; from the Hub, they are downloaded now, and held to what it announced.

        Raises:
            ModelError: if they cannot be had, or are not what was announced.
        """
        return self.fetch_weights()

    @cached_property
    def sha256(self) -> str:
        """Of the weights file; of several, of their hashes in the order of their names.

        Of safetensors on the Hub that are not in the cache yet, what it announces; its .bin files are fetched for it.
        """
        if self._announced is not None:
            return self._announced[0]
        return files_sha256(self.weights)

    @property
    def config_sha256(self) -> str:
        """Of the network's config: the same weights compute something else under another."""
        facts = {k: v for k, v in self.network.items() if not k.startswith("_")}
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()

    @cached_property
    def parameters(self) -> int:
        """Number of elements of all tensors, of headers where files have them; from the Hub as `sha256`."""
        if self._announced is not None:
            return self._announced[1]
        from ddim_cli.models.weights import count_elements, safetensors_header

        if all(path.suffix == ".safetensors" for path in self.weights):
            return sum(count_elements(safetensors_header(path), path) for path in self.weights)
        from ddim_cli.models.stored import read_weights

        return sum(tensor.numel() for _, tensor in read_weights(self))

    @property
    def channels(self) -> int:
        return self.network["in_channels"]

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of an image."""
        size = self.network["sample_size"]
        return (size, size) if isinstance(size, int) else (size[0], size[1])

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W) of an image."""
        return (self.channels, *self.size)

    @property
    def learned_variance(self) -> bool:
        """Whether the network gives a variance behind its prediction, in as many channels again."""
        return self.network["out_channels"] == 2 * self.channels

    @property
    def classes(self) -> int | None:
        """The number of classes the network is conditioned on; None if it is not."""
        return self.network.get("num_class_embeds")

    def scheduler_layer(self) -> Layer:
        """The model's own scheduler settings, as the layer below every file."""
        values = {f"scheduler.{k}": v for k, v in (self.scheduler or {}).items()}
        where = f"{self.name}'s {self.scheduler_name}" if self.scheduler_name else self.name
        return Layer(values, dict.fromkeys(values, where))


def bundled_names() -> list[str]:
    return sorted(p.parent.name for p in BUNDLED.glob("*/model_index.json"))


def read_json(path: Path, what: str) -> dict[str, Any]:
    """A JSON object from a file. Raises ModelError, calling it ``what``."""
    try:
        value = json.loads(path.read_bytes())
    except OSError as error:
        raise ModelError(f"{path}: {what} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{path}: {what} is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise ModelError(f"{path}: {what} is not a JSON object")
    return value


def ddim_keys(scheduler: Mapping[str, Any]) -> tuple[dict[str, Any], tuple[str, ...]]:
    """The keys of a scheduler's config that DDIM has, and the names of those it has no use for."""
    known = SchedulerSettings.model_fields
    keys = {k: v for k, v in scheduler.items() if k in known and v is not None}
    return keys, tuple(sorted(k for k in scheduler if k not in known and not k.startswith("_")))


def read_scheduler_config(path: Path) -> tuple[dict[str, Any], tuple[str, ...]]:
    """As `ddim_keys`, of a scheduler_config.json. Raises ModelError for a file that is no JSON object."""
    return ddim_keys(read_json(path, "the scheduler's config"))


def _scheduler(path: Path | None) -> dict[str, Any]:
    """What a `ModelDescription` says of the scheduler in this file, if there is one. Raises ModelError."""
    if path is None:
        return {}
    keys, unused = read_scheduler_config(path)
    return {"scheduler": keys, "scheduler_name": SCHEDULER, "unused_scheduler_keys": unused}


def _positive(value: Any) -> bool:
    return type(value) is int and value > 0


def checked_network(config: Mapping[str, Any], settings: ModelSettings, where: str) -> dict[str, Any]:
    """A network's config with what sampling needs filled in. Raises ModelError for one it cannot sample from."""
    network = {**_NETWORK_DEFAULTS, **config}
    name = network.get("_class_name", NETWORK_CLASS)
    if name != NETWORK_CLASS:
        raise ModelError(f"{where}: the network is a {name}; this tool samples from a {NETWORK_CLASS}")
    if settings.image_size is not None:
        network["sample_size"] = settings.image_size
    size = network.get("sample_size")
    sides = size if isinstance(size, (list, tuple)) and len(size) == 2 else (size,)
    if not all(map(_positive, sides)) or max(sides) > MOST_PIXELS:
        raise ModelError(f"{where}: sample_size is {json.dumps(size)}; give the size of an image with --image-size")
    channels, out = network["in_channels"], network["out_channels"]
    if not _positive(channels) or out not in (channels, 2 * channels):
        raise ModelError(f"{where}: the network takes {channels} channels and gives {out}; DDIM needs as many")
    if channels not in (1, 3, 4):
        raise ModelError(f"{where}: the network makes {channels} channels; a picture has 1, 3 or 4")
    _check_shape(network, where)
    classes = network.get("num_class_embeds")
    if classes is not None and not _positive(classes):
        raise ModelError(f"{where}: num_class_embeds is {json.dumps(classes)}; it must be a positive number")
    return network


def _check_shape(network: Mapping[str, Any], where: str) -> None:
    """ModelError for levels that cannot be, or an image that cannot be halved as often as there are levels."""
    widths, layers = network["block_out_channels"], network["layers_per_block"]
    if not (isinstance(widths, (list, tuple)) and widths and all(map(_positive, widths))):
        raise ModelError(f"{where}: block_out_channels is {json.dumps(widths)}; it must be a list of channels")
    if not _positive(layers):
        raise ModelError(f"{where}: layers_per_block is {json.dumps(layers)}; it must be a positive number")
    size, factor = network["sample_size"], 2 ** (len(widths) - 1)
    if any(s % factor for s in (size if isinstance(size, (list, tuple)) else (size,))):
        raise ModelError(
            f"{where}: an image of size {json.dumps(size)} cannot be halved at the network's {len(widths)} levels; "
            f"its sides must be multiples of {factor}"
        )


def _from_directory(directory: Path, settings: ModelSettings, kind: str) -> ModelDescription:
    where = str(directory)
    files = {
        p.relative_to(directory).as_posix() for pattern in ("*", "*/*") for p in directory.glob(pattern) if p.is_file()
    }
    layout = find_layout(files, settings.subfolder, where)
    weights = find_weights(
        files, layout.folder, settings.variant, lambda f: read_json(directory / f, "the index of shards"), where
    )
    config = directory / layout.config
    return ModelDescription(
        source=settings.source,
        name=settings.source if kind == "bundled" else directory.resolve().name,
        kind=kind,
        where=where,
        network=checked_network(read_json(config, "the network's config"), settings, str(config)),
        fetch_weights=lambda: tuple(directory / file for file in weights),
        **_scheduler(directory / layout.scheduler if layout.scheduler else None),
    )


def _facts(path: Path) -> tuple[str, int]:
    """The sha256 of a safetensors file and the number of its elements. Raises ModelError."""
    from ddim_cli.models.weights import count_elements, safetensors_header

    return file_sha256(path), count_elements(safetensors_header(path), path)


def _from_hub(settings: ModelSettings, cached_only: bool) -> ModelDescription:
    known = config_candidates(settings.subfolder)
    repository = open_repository(settings.source, settings.revision, known, cached_only)
    where = settings.source
    layout = find_layout(repository.files, settings.subfolder, where)
    network = read_json(repository.fetch(layout.config), "the network's config")
    scheduler = _scheduler(repository.fetch(layout.scheduler) if layout.scheduler else None)

    def read(file: str) -> dict[str, Any]:
        return read_json(repository.fetch(file), "the index of shards")

    @cache
    def weights() -> list[str]:
        return find_weights(repository.files, layout.folder, settings.variant, read, where)

    def announce() -> tuple[str, int] | None:
        found = [repository.announced(file) for file in weights()]
        if not any(found):
            return None
        # A part of the shards may be in the cache.
        facts = [f or _facts(repository.fetch(file)) for file, f in zip(weights(), found, strict=True)]
        return joint_sha256([sha256 for sha256, _ in facts]), sum(elements for _, elements in facts)

    return ModelDescription(
        source=settings.source,
        name=settings.source.rpartition("/")[2],
        kind="hub",
        where=where,
        network=checked_network(network, settings, f"{where}: {layout.config}"),
        fetch_weights=lambda: tuple(repository.fetch(file) for file in weights()),
        announce_weights=announce,
        revision=repository.commit,
        **scheduler,
    )


def _beside(path: Path, *names: str) -> Path | None:
    return next((path.parent / name for name in names if (path.parent / name).is_file()), None)


def _from_weights_file(path: Path, settings: ModelSettings) -> ModelDescription:
    """One file of diffusers' weights, with its config beside it or in a safetensors file's metadata."""
    from ddim_cli.models.weights import safetensors_header

    metadata: Mapping[str, Any] = {}
    if path.suffix == ".safetensors":
        metadata = safetensors_header(path).get("__metadata__") or {}
    beside, scheduler_file = _beside(path, "config.json"), _beside(path, SCHEDULER, f"../scheduler/{SCHEDULER}")
    if beside is not None:
        network, origin = read_json(beside, "the network's config"), str(beside)
    elif "config" in metadata:
        network, origin = _metadata_json(path, metadata, "config"), f"{path}'s metadata"
    else:
        raise ModelError(f"{path}: there is neither a config.json beside it nor a config in its metadata")
    scheduler = _scheduler(scheduler_file)
    if scheduler_file is None and "scheduler_config" in metadata:
        keys, unused = ddim_keys(_metadata_json(path, metadata, "scheduler_config"))
        scheduler = {"scheduler": keys, "scheduler_name": "metadata", "unused_scheduler_keys": unused}
    return ModelDescription(
        source=settings.source,
        name=path.stem,
        kind="file",
        where=str(path),
        network=checked_network(network, settings, origin),
        fetch_weights=lambda: (path,),
        **scheduler,
    )


def _metadata_json(path: Path, metadata: Mapping[str, Any], key: str) -> dict[str, Any]:
    try:
        value = json.loads(metadata[key])
    except (ValueError, TypeError, RecursionError) as error:
        raise ModelError(f"{path}: the {key} in its metadata is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise ModelError(f"{path}: the {key} in its metadata is not a JSON object")
    return value


def _from_checkpoint(path: Path, settings: ModelSettings) -> ModelDescription:
    """A checkpoint of the original code, with config.yml beside it, or inferred from its tensors."""
    from ddim_cli.models import original

    beside = _beside(path, "config.yml", "config.yaml")
    notes: tuple[str, ...] = ()
    if beside is not None:
        config = original.read_config(beside)
        network, scheduler = (
            original.network_from_config(config, beside),
            original.scheduler_from_config(config, beside),
        )
    else:
        shapes = {k: tuple(v.shape) for k, v in original.read_checkpoint(path, settings.ema).items()}
        size = settings.image_size
        network = original.network_from_shapes(shapes, size if isinstance(size, int) or size is None else size[0], path)
        scheduler = None
        notes = (f"{path.name} has no config.yml beside it: its network is inferred from its tensors, and the linear "
                 "schedule of 1000 steps is assumed",)  # fmt: skip
    return ModelDescription(
        source=settings.source,
        name=path.stem,
        kind="checkpoint",
        where=str(path),
        network=checked_network(network, settings, str(beside or path)),
        fetch_weights=lambda: (path,),
        scheduler=scheduler,
        scheduler_name=beside.name if beside else None,
        ema=settings.ema,
        notes=notes,
    )


def _from_file(path: Path, settings: ModelSettings) -> ModelDescription:
    if path.suffix == ".safetensors" or (path.suffix == ".bin" and _beside(path, "config.json")):
        return _from_weights_file(path, settings)
    if path.suffix in CHECKPOINT_ENDINGS:
        return _from_checkpoint(path, settings)
    endings = ", ".join((".safetensors", *CHECKPOINT_ENDINGS))
    raise ModelError(f"{path}: a weights file ends in one of {endings}")


def _find(settings: ModelSettings, cached_only: bool) -> ModelDescription:
    source = settings.source
    if source in bundled_names():
        return _from_directory(BUNDLED / source, settings, "bundled")
    try:
        path = Path(source).expanduser()
        if path.is_dir():
            return _from_directory(path, settings, "directory")
        if path.exists():
            return _from_file(path, settings)
    except (OSError, RuntimeError, ValueError) as error:
        # A name too long, a folder that may not be entered, ~nobody.
        raise ModelError(f"model {source[:80]!r}: {getattr(error, 'strerror', None) or error}") from None
    if is_hub_id(source) and path.suffix not in (".safetensors", *CHECKPOINT_ENDINGS):
        return _from_hub(settings, cached_only)
    raise ModelError(
        f"model {source!r} not found: it is neither a directory or file, nor a bundled model "
        f"({', '.join(bundled_names())}), nor a Hub id (OWNER/NAME){nearest(source, bundled_names())}"
    )


def describe_model(settings: ModelSettings, cached_only: bool = False) -> ModelDescription:
    """Find the model that ``settings.source`` names, and read its JSON files.

    Args:
        settings: the section [model].
        cached_only: of a model on the Hub, take what the cache has, and ask nobody.

    Raises:
        ModelError: where there is none, or it is not a model this tool can sample from.
    """
    model = _find(settings, cached_only)
    if settings.revision is not None and model.kind != "hub":
        raise ModelError(f"model.revision = {settings.revision!r} is for models on the Hub; {model.where} is not on it")
    if not model.learned_variance:
        return model
    note = f"{model.name} gives a learned variance behind its prediction, which DDIM does not use"
    return replace(model, notes=(*model.notes, note))
