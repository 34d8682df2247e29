"""Models in object stores: what is needed of them, kept in the user's cache folder under what the store says of it.

A listing tells which objects there are, and of which size and version (an ETag, which changes with the content). A
file that is in the cache in that version is not fetched again.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import re
import secrets
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ddim_cli.errors import ModelError, UsageError
from ddim_cli.models.hashing import cache_folder, hexdigest
from ddim_cli.stores.objects import Entry, ObjectPath, StoreError, open_url

# Of the larger ones it is shown how they come along.
SHOWN_FROM = 64 << 20
NOT_CACHED = "not in the cache, and the store was not asked"


@dataclass(frozen=True)
class StoredFiles:
    """What lies below ``root``, as one listing has it. ``offline``, the listing is that of an earlier run.

    A file is kept once for each version of it, and the files of one listing are links to these, side by side.
    """

    root: ObjectPath
    entries: Mapping[str, Entry]
    offline: bool = False
    _announced: dict[str, tuple[str, int]] = field(default_factory=dict, init=False, repr=False, compare=False)

    @property
    def files(self) -> Collection[str]:
        return self.entries.keys()

    @property
    def folder(self) -> Path:
        """Where its files are in the cache."""
        facts = sorted((name, entry.size, entry.version) for name, entry in self.entries.items())
        return _kept(self.root) / "listings" / _digest(json.dumps(facts))

    def fetch(self, file: str) -> Path:
        """Where the file is in the cache, fetched if it is not there in this version.

        Raises:
            ModelError: if it cannot be had, is another one by now, or is not what was `announced`.
        """
        place = self.folder / file
        if not place.is_file():
            with _errors(self.root / file):
                kept = self._kept_file(file)
                if not kept.is_file():
                    self._download(file, kept)
                place.parent.mkdir(parents=True, exist_ok=True)
                _link(place, kept)
        return place

    def announced(self, file: str) -> tuple[str, int] | None:
        """As `Files.announced`, where the store keeps a sha256 of a safetensors file that is not in the cache."""
        if file not in self._announced:
            if self.offline or not file.endswith(".safetensors") or self._kept_file(file).is_file():
                return None
            # Whatever is wrong is said when the file itself is fetched.
            from ddim_cli.models.weights import count_elements

            with contextlib.suppress(OSError, ValueError, RecursionError, ModelError):
                stored, size = self.root / file, self.entries[file].size
                sha256 = stored.sha256()
                if sha256 is not None:
                    self._announced[file] = sha256, count_elements(_header(stored, size), Path(file))
        return self._announced.get(file)

    def _kept_file(self, file: str) -> Path:
        entry = self.entries[file]
        key = _digest(json.dumps([file, entry.size, entry.version]))
        return _kept(self.root) / "files" / key / Path(file).name

    def _download(self, file: str, kept: Path) -> None:
        from filelock import FileLock

        entry, stored = self.entries[file], self.root / file
        if self.offline:
            raise ModelError(f"{stored}: {NOT_CACHED}")
        kept.parent.mkdir(parents=True, exist_ok=True)
        # The processes of one run fetch it once; what one left that was killed is written over.
        with FileLock(kept.parent / ".lock"):
            if kept.is_file():
                return
            part = kept.with_name(f".{kept.name}.part")
            try:
                with part.open("w+b") as stream, _shown(stream, file, entry.size) as watched:
                    came = stored.download(watched)
                if came.size != entry.size or (came.version and entry.version and came.version != entry.version):
                    raise ModelError(f"{stored}: another object took its place since it was listed; run again")
                if file in self._announced and hexdigest(part, hashlib.sha256()) != self._announced[file][0]:
                    raise ModelError(f"{stored}: what came has another sha256 than the store says; run again")
                os.replace(part, kept)
            finally:
                part.unlink(missing_ok=True)


def list_model(root: ObjectPath, cached_only: bool = False) -> StoredFiles:
    """What lies below ``root``: one listing. Where the store cannot be reached, that of an earlier run.

    Raises:
        ModelError: where there is nothing, the store refuses, or it is neither cached nor reachable.
    """
    if cached_only:
        return _remembered(root)
    try:
        with _errors(root):
            # Names that are no paths are nothing of a model.
            entries = {n: e for n, e in root.entries().items() if not {"", ".", ".."} & set(re.split(r"[/\\]", n))}
    except UnreachableStoreError:
        with contextlib.suppress(ModelError):
            return _remembered(root)
        raise
    return _remember(root, entries)


def ask_for(root: ObjectPath, names: Collection[str], cached_only: bool = False) -> StoredFiles:
    """As `list_model`, of those of ``names`` that are there: each is asked for, as there may be much beside them."""
    first = next(iter(names))
    if cached_only:
        return _remembered(root, first)
    entries = {}
    try:
        for name in names:
            with _errors(root / name), contextlib.suppress(FileNotFoundError):
                entries[name] = (root / name).entry()
    except UnreachableStoreError:
        with contextlib.suppress(ModelError):
            return _remembered(root, first)
        raise
    return _remember(root, entries, first)


class UnreachableStoreError(ModelError):
    """The store does not answer, or not with anything of use."""


@contextlib.contextmanager
def _errors(what: ObjectPath) -> Iterator[None]:
    try:
        yield
    except StoreError as error:
        kind = UnreachableStoreError if error.is_transient else ModelError
        raise kind(f"{error.filename}: {error.strerror}") from None
    except FileNotFoundError as error:
        raise ModelError(f"{what}: {error.strerror}") from None
    except OSError as error:
        # A full disk, a folder that may not be written.
        raise ModelError(f"{what}: cannot be kept in {error.filename or cache_folder()}: {error.strerror}") from None


def open_model(url: str) -> ObjectPath:
    """As `open_url`. Raises ModelError."""
    try:
        return open_url(url)
    except UsageError as error:
        raise ModelError(f"model.source: {error}") from None


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def _kept(root: ObjectPath) -> Path:
    """All that is kept of what lies below ``root``."""
    return cache_folder() / "objects" / _digest(str(root))


def _listing(root: ObjectPath, first: str) -> Path:
    """The last listing; that of single files goes by the ``first`` of them."""
    return _kept(root) / f"last{_digest(first)[:8] if first else ''}.json"


def _remember(root: ObjectPath, entries: Mapping[str, Entry], first: str = "") -> StoredFiles:
    place = _listing(root, first)
    # One that cannot be written is missed only where the store cannot be reached.
    with contextlib.suppress(OSError):
        if entries:
            place.parent.mkdir(parents=True, exist_ok=True)
            text = json.dumps({"of": str(root), "objects": {n: [e.size, e.version] for n, e in entries.items()}})
            temporary = place.with_name(f".{place.name}.{secrets.token_hex(6)}.tmp")
            temporary.write_text(text)
            os.replace(temporary, place)
        else:
            place.unlink(missing_ok=True)
    return StoredFiles(root, dict(entries))


def _remembered(root: ObjectPath, first: str = "") -> StoredFiles:
    try:
        known = json.loads(_listing(root, first).read_bytes())["objects"]
        return StoredFiles(root, {n: Entry(int(size), str(version)) for n, (size, version) in known.items()}, True)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise ModelError(f"{root}: {NOT_CACHED}") from None


def _link(place: Path, kept: Path) -> None:
    """Have ``place`` be the kept file; another process may have done it meanwhile."""
    target = os.path.relpath(kept, place.parent)
    temporary = place.with_name(f".{place.name}.{secrets.token_hex(6)}.tmp")
    try:
        os.symlink(target, temporary)
    except (OSError, NotImplementedError):
        # Windows lets not everyone make one.
        os.link(kept, temporary)
    os.replace(temporary, place)


def _header(stored: ObjectPath, size: int) -> dict[str, Any]:
    """Of a safetensors object. Raises ValueError."""
    from ddim_cli.models.weights import header_of

    start = stored.read_range(0, min(8, size))
    length = int.from_bytes(start, "little") if len(start) == 8 else 0
    rest = stored.read_range(8, 8 + length) if 2 <= length <= size - 8 else b""
    return header_of(io.BytesIO(start + rest), size)


@contextlib.contextmanager
def _shown(stream: io.BufferedRandom, name: str, size: int) -> Iterator[io.BufferedRandom]:
    """The stream, with a bar on stderr for what is large, where someone is looking: that of downloads from the Hub."""
    if size < SHOWN_FROM:
        yield stream
        return
    from huggingface_hub.utils import tqdm

    with tqdm(total=size, desc=name, unit="B", unit_scale=True, unit_divisor=1024, disable=None) as bar:
        yield _Counted(stream, bar)  # type: ignore[misc]  # as much of a stream as a download needs


class _Counted:
    def __init__(self, stream: io.BufferedRandom, bar: Any):
        self._bar = bar
        self.tell, self.seek, self.truncate, self._write = stream.tell, stream.seek, stream.truncate, stream.write

    def write(self, data: bytes) -> int:
        self._bar.update(len(data))
        return self._write(data)
