"""What a model is, from its JSON files alone: no weights, and no torch but for a checkpoint that has no config."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from ddim_cli.config.layers import Layer, nearest
from ddim_cli.config.schema import ModelSettings, SchedulerSettings
from ddim_cli.errors import ModelError
from ddim_cli.models.directory import SCHEDULER, config_candidates, find_layout
from ddim_cli.models.hashing import joint_sha256
from ddim_cli.models.hub import is_hub_id, open_repository
from ddim_cli.models.latent import Latents, checked_latent_network, find_latents, pipeline_scheduler
from ddim_cli.models.networks import NETWORK_CLASS, TEXT_NETWORK_CLASS, checked_network, is_for_inpainting
from ddim_cli.models.objects import StoredFiles, ask_for, list_model, open_model
from ddim_cli.models.parts import Files, LocalFiles, Stored, read_json, stored_weights
from ddim_cli.stores.objects import is_url

BUNDLED = Path(__file__).parent / "bundled"
CHECKPOINT_ENDINGS = (".ckpt", ".pth", ".pt", ".bin")
# What StableDiffusionPipeline guides with by default.
TEXT_GUIDANCE = 7.5


@dataclass(frozen=True)
class ModelDescription(Stored):
    """What is known of a model without reading its weights.

    ``kind`` is bundled, directory, hub, checkpoint (of the original code) or file (one safetensors
    file), also where ``source`` is a URL; ``network`` the UNet's config; ``latents`` what makes pictures of a
    latent model's states, and texts its conditions, None of a model in pixel space; ``scheduler`` the DDIM keys
    of the scheduler that came with it, or None; ``unused_scheduler_keys`` those of its keys that DDIM has no use
    for; ``where`` its place, for messages; ``notes`` what a user should be told; ``announce_weights`` gives sha256
    and number of elements of weights that are not here yet, or None. ``weights`` and ``parameters`` are the
    network's alone.
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
    latents: Latents | None = None

    @cached_property
    def sha256(self) -> str:
        """Of all that decides a picture: of the network's weights; of those of several parts, of their hashes."""
        return joint_sha256([self.weights_sha256, *(self.latents.sha256s() if self.latents is not None else ())])

    @property
    def config_sha256(self) -> str:
        """Of all parts' configs: the same weights compute something else under others."""
        facts: Any = {k: v for k, v in self.network.items() if not k.startswith("_")}
        if self.latents is not None:
            facts = {"unet": facts, **self.latents.configs()}
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()

    @property
    def all_parameters(self) -> int:
        """Of the network and all other parts."""
        return self.parameters + (self.latents.parameters if self.latents is not None else 0)

    def _count(self) -> int:
        from ddim_cli.models.stored import read_weights

        return sum(tensor.numel() for _, tensor in read_weights(self))

    @property
    def network_class(self) -> str:
        return TEXT_NETWORK_CLASS if self.takes_text else NETWORK_CLASS

    @property
    def channels(self) -> int:
        """Of a state."""
        taken = self.network["in_channels"]
        return taken // 2 if self.inpaints else taken

    @property
    def inpaints(self) -> bool:
        """Whether the network takes a mask and what is known of a picture as channels behind the state."""
        return self.takes_text and is_for_inpainting(self.network)

    @property
    def input_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of what the network is given."""
        return (self.network["in_channels"], *self.state_shape[1:])

    @property
    def state_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of what is denoised."""
        size = self.network["sample_size"]
        return (self.channels, *((size, size) if isinstance(size, int) else (size[0], size[1])))

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of an image."""
        _, height, width = self.state_shape
        factor = self.latents.factor if self.latents is not None else 1
        return (height * factor, width * factor)

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W) of an image."""
        return (self.latents.picture_channels if self.latents is not None else self.channels, *self.size)

    @property
    def takes_text(self) -> bool:
        """Whether the network is conditioned on a prompt."""
        return self.latents is not None and self.latents.text is not None

    @property
    def learned_variance(self) -> bool:
        """Whether the network gives a variance behind its prediction, in as many channels again."""
        return self.network["out_channels"] == 2 * self.channels

    @property
    def classes(self) -> int | None:
        """The number of classes the network is conditioned on; None if it is not."""
        return self.network.get("num_class_embeds")

    def settings_layer(self) -> Layer:
        """The model's own settings, as the layer below every file: its scheduler's, and what its kind has else."""
        values = {f"scheduler.{k}": v for k, v in (self.scheduler or {}).items()}
        where = f"{self.name}'s {self.scheduler_name}" if self.scheduler_name else self.name
        origins = dict.fromkeys(values, where)
        if self.takes_text:
            values["sampling.guidance_scale"] = TEXT_GUIDANCE
            origins["sampling.guidance_scale"] = "default of text-to-image models"
        return Layer(values, origins)


def bundled_names() -> list[str]:
    return sorted(p.parent.name for p in BUNDLED.glob("*/model_index.json"))


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


def _from_tree(
    tree: Files, settings: ModelSettings, kind: str, name: str, where: str, place: Callable[[str], str]
) -> ModelDescription:
    """A model of a directory or a repository. ``place`` says of a file in it where it is, for messages."""
    layout = find_layout(tree.files, settings.subfolder, where)
    config = read_json(tree.fetch(layout.config), "the network's config")
    scheduler = _scheduler(tree.fetch(layout.scheduler) if layout.scheduler else None)
    root, _, folder = layout.folder.rpartition("/")
    found, notes = None, tuple[str, ...]()
    if folder:
        found = find_latents(tree, root, config, settings, where)
    if found is None:
        network, latents = checked_network(config, settings.image_size, place(layout.config)), None
    else:
        latents, notes = found
        network = checked_latent_network(config, latents, settings.image_size, place(layout.config))
        scheduler, more = pipeline_scheduler(scheduler, latents, where)
        notes = (*notes, *more)
    fetch, announce = stored_weights(tree, layout.folder, settings.variant, where)
    return ModelDescription(
        source=settings.source,
        name=name,
        kind=kind,
        where=where,
        network=network,
        fetch_weights=fetch,
        announce_weights=announce,
        latents=latents,
        notes=tuple(notes),
        **scheduler,
    )


def _from_directory(directory: Path, settings: ModelSettings, kind: str) -> ModelDescription:
    name = settings.source if kind == "bundled" else directory.resolve().name
    found = _from_tree(LocalFiles(directory), settings, kind, name, str(directory), lambda file: str(directory / file))
    # Whether its weights are there is known at once.
    _ = found.weights
    return found


def _from_hub(settings: ModelSettings, cached_only: bool) -> ModelDescription:
    where, known = settings.source, config_candidates(settings.subfolder)
    repository = open_repository(settings.source, settings.revision, known, cached_only)
    name = where.rpartition("/")[2]
    found = _from_tree(repository, settings, "hub", name, where, lambda file: f"{where}: {file}")
    return replace(found, revision=repository.commit)


def _from_store(settings: ModelSettings, cached_only: bool) -> ModelDescription:
    """A model in an object store: a weights file with what lies beside it, or a directory."""
    url = open_model(settings.source)
    where = str(url)
    if url.suffix in (".safetensors", *CHECKPOINT_ENDINGS):
        folder = url.parent
        root, prefix = (folder.parent, f"{folder.name}/") if folder.key else (folder, "")
        beside = [prefix + name for name in _names_beside(url.suffix)]
        tree = ask_for(root, [prefix + url.name, *beside, f"scheduler/{SCHEDULER}"], cached_only)
        if prefix + url.name in tree.files:
            return _noted(_from_stored_file(tree, prefix + url.name, settings), tree, cached_only)
    tree = list_model(url, cached_only)
    if not tree.files:
        raise ModelError(f"{where}: there is no such object, and nothing below it")
    found = _from_tree(tree, settings, "directory", url.name or url.bucket, where, lambda file: f"{where}/{file}")
    return _noted(found, tree, cached_only)


def _names_beside(suffix: str) -> tuple[str, ...]:
    """What a weights file of this ending is read with, where it is there."""
    diffusers, original = ("config.json", SCHEDULER), ("config.yml", "config.yaml")
    return diffusers if suffix == ".safetensors" else (*diffusers, *original) if suffix == ".bin" else original


def _from_stored_file(tree: StoredFiles, file: str, settings: ModelSettings) -> ModelDescription:
    """Of a single file all that is known lies in it or beside it."""
    for name in tree.files:
        tree.fetch(name)
    place, where = tree.folder / file, f"{tree.root}/{file}"
    try:
        return replace(_from_file(place, settings), where=where)
    except ModelError as error:
        # Where it is kept is no place that anybody named.
        raise ModelError(str(error).replace(str(tree.folder), str(tree.root))) from None


def _noted(model: ModelDescription, tree: StoredFiles, cached_only: bool) -> ModelDescription:
    if not tree.offline or cached_only:
        return model
    note = f"{model.where}: the store cannot be reached; the model is taken as it was when it last could"
    return replace(model, notes=(*model.notes, note))


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
        network=checked_network(network, settings.image_size, origin),
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
        network=checked_network(network, settings.image_size, str(beside or path)),
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
    if is_url(source):
        return _from_store(settings, cached_only)
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
        f"({', '.join(bundled_names())}), nor a Hub id (OWNER/NAME), nor a URL (s3://BUCKET/NAME)"
        f"{nearest(source, bundled_names())}"
    )


def describe_model(settings: ModelSettings, cached_only: bool = False) -> ModelDescription:
    """Find the model that ``settings.source`` names, and read its JSON files.

    Args:
        settings: the section [model].
        cached_only: of a model on the Hub or in an object store, take what the cache has, and ask nobody.

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
