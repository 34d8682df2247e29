"""The parts of a model: the config of each, and the files of its weights, on disk or on the Hub."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from functools import cache, cached_property
from pathlib import Path
from typing import Any, Protocol

from ddim_cli.errors import ModelError
from ddim_cli.models.directory import CONFIG, find_weights
from ddim_cli.models.hashing import file_sha256, joint_sha256

# What the files that make a tokenizer are called, of which those that are there are read.
VOCABULARY, MERGES, TOKENIZER = "vocab.json", "merges.txt", "tokenizer.json"
TOKENIZER_SETTINGS = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")


class Files(Protocol):
    """A tree of files, by their paths in it: a directory, or a repository on the Hub at one commit."""

    @property
    def files(self) -> Collection[str]: ...

    def fetch(self, file: str) -> Path:
        """Where the file is on this disk, downloaded if it must be. Raises ModelError."""

    def announced(self, file: str) -> tuple[str, int] | None:
        """sha256 and number of elements of a weights file that is not here yet, if they can be told without it."""


@dataclass(frozen=True)
class LocalFiles:
    """A directory on this disk, two levels deep."""

    directory: Path

    @cached_property
    def files(self) -> frozenset[str]:
        found = (path for pattern in ("*", "*/*") for path in self.directory.glob(pattern))
        return frozenset(path.relative_to(self.directory).as_posix() for path in found if path.is_file())

    def fetch(self, file: str) -> Path:
        return self.directory / file

    def announced(self, file: str) -> tuple[str, int] | None:
        return None


class Stored:
    """Weights in files, which may not be here yet. A base of frozen dataclasses that have these two fields.

    ``fetch_weights`` gives the files, downloaded if they must be; ``announce_weights`` sha256 and number of elements of
    weights that are not here yet, or None.
    """

    fetch_weights: Callable[[], tuple[Path, ...]]
    announce_weights: Callable[[], tuple[str, int] | None]

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
    def weights_sha256(self) -> str:
        """Of the weights file; of several, of their hashes in the order of their names.

        Of safetensors on the Hub that are not in the cache yet, what it announces; its .bin files are fetched for it.
        """
        return self._announced[0] if self._announced is not None else joint_sha256(list(map(file_sha256, self.weights)))

    @cached_property
    def parameters(self) -> int:
        """Number of elements of all tensors, of headers where files have them; from the Hub as `weights_sha256`."""
        if self._announced is not None:
            return self._announced[1]
        from ddim_cli.models.weights import count_elements, safetensors_header

        if all(path.suffix == ".safetensors" for path in self.weights):
            return sum(count_elements(safetensors_header(path), path) for path in self.weights)
        return self._count()

    def _count(self) -> int:
        """Number of elements, by reading all of them."""
        from ddim_cli.models.weights import read_tensors

        return sum(tensor.numel() for path in self.weights for _, tensor in read_tensors(path))


@dataclass(frozen=True)
class Part(Stored):
    """An autoencoder or a text encoder: its ``config`` and weights. ``where`` is its place, for messages."""

    where: str
    config: Mapping[str, Any]
    fetch_weights: Callable[[], tuple[Path, ...]] = field(repr=False, compare=False)
    announce_weights: Callable[[], tuple[str, int] | None] = field(default=lambda: None, repr=False, compare=False)

    @property
    def class_name(self) -> str:
        return str(self.config.get("_class_name") or (self.config.get("architectures") or [""])[0])


@dataclass(frozen=True)
class Tokenizer:
    """The files that make a tokenizer. ``where`` is their folder's place, for messages."""

    where: str
    fetch_files: Callable[[], tuple[Path, ...]] = field(repr=False, compare=False)

    @cached_property
    def files(self) -> tuple[Path, ...]:
        return self.fetch_files()

    @cached_property
    def sha256(self) -> str:
        return joint_sha256([file_sha256(path) for path in self.files])


@dataclass(frozen=True)
class TextParts:
    """What turns a prompt into what a network is conditioned on."""

    encoder: Part
    tokenizer: Tokenizer

    @cached_property
    def limit(self) -> int:
        """How many tokens a prompt may have, the marks of begin and end included. Raises ModelError."""
        settings = next((path for path in self.tokenizer.files if path.name == TOKENIZER_SETTINGS[0]), None)
        said = read_json(settings, "the tokenizer's config").get("model_max_length") if settings is not None else None
        # As transformers has it, one that says nothing has no limit of its own.
        limits = [self.encoder.config.get("max_position_embeddings", 77), said]
        return min(int(limit) for limit in limits if isinstance(limit, (int, float)) and limit >= 1)

    @property
    def width(self) -> int:
        """The channels of an embedding."""
        return self.encoder.config.get("hidden_size", 512)


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


def stored_weights(
    tree: Files, folder: str, variant: str | None, where: str, stems: tuple[str, ...] = ()
) -> tuple[Callable[[], tuple[Path, ...]], Callable[[], tuple[str, int] | None]]:
    """`Stored.fetch_weights` and `Stored.announce_weights` of a folder of weights.

    They look for the files when they are called; ``stems`` are what these may be called but diffusers' own.
    """

    @cache
    def names() -> list[str]:
        def read(file: str) -> dict[str, Any]:
            return read_json(tree.fetch(file), "the index of shards")

        return find_weights(tree.files, folder, variant, read, where, *stems)

    def announce() -> tuple[str, int] | None:
        found = [tree.announced(file) for file in names()]
        if not any(found):
            return None
        # A part of the shards may be in the cache.
        facts = [f or _facts(tree.fetch(file)) for file, f in zip(names(), found, strict=True)]
        return joint_sha256([sha256 for sha256, _ in facts]), sum(elements for _, elements in facts)

    return lambda: tuple(tree.fetch(file) for file in names()), announce


def _facts(path: Path) -> tuple[str, int]:
    """The sha256 of a safetensors file and the number of its elements. Raises ModelError."""
    from ddim_cli.models.weights import count_elements, safetensors_header

    return file_sha256(path), count_elements(safetensors_header(path), path)


def find_part(tree: Files, folder: str, variant: str | None, where: str, stems: tuple[str, ...] = ()) -> Part:
    """The part in ``folder``. Raises ModelError where its config or its weights are missing."""
    config = f"{folder}/{CONFIG}"
    if config not in tree.files:
        raise ModelError(f"{where}: a part of the pipeline is missing: there is no {config}")
    # Whether weights are there is known from their names, and said before anything runs. A variant need not be of all.
    prefix = f"{folder}/"
    has_variant = variant is not None and any(f.startswith(prefix) and f".{variant}." in f for f in tree.files)
    fetch, announce = stored_weights(tree, folder, variant if has_variant else None, where, stems)
    if not any(f.startswith(prefix) and f.endswith((".safetensors", ".bin")) for f in tree.files):
        raise ModelError(f"{where}: a part of the pipeline is missing: there are no weights in {folder}")
    what = "the autoencoder's config" if not stems else "the text encoder's config"
    return Part(f"{where}: {folder}", read_json(tree.fetch(config), what), fetch, announce)


def find_tokenizer(tree: Files, folder: str, where: str) -> Tokenizer:
    """The tokenizer in ``folder``. Raises ModelError where it is missing."""
    there = {name for name in (VOCABULARY, MERGES, TOKENIZER) if f"{folder}/{name}" in tree.files}
    if {VOCABULARY, MERGES} <= there:
        needed = [VOCABULARY, MERGES]
    elif TOKENIZER in there:
        needed = [TOKENIZER]
    else:
        raise ModelError(
            f"{where}: the tokenizer is missing: there is neither {folder}/{VOCABULARY} with {folder}/{MERGES} nor "
            f"{folder}/{TOKENIZER}"
        )
    needed += [name for name in TOKENIZER_SETTINGS if f"{folder}/{name}" in tree.files]
    return Tokenizer(f"{where}: {folder}", lambda: tuple(tree.fetch(f"{folder}/{name}") for name in needed))
