"""A folder of pairs, each a picture and its sidecar, by name.

A name is an item's, the stem of its files; a seed is taken for its name, its number with six digits or more.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from ddim_cli.errors import UsageError
from ddim_cli.outputs.atomic import locked, remove_leftovers, write_atomically
from ddim_cli.outputs.figures import shortened
from ddim_cli.outputs.files import File, Member, Place, is_here, size_of
from ddim_cli.outputs.parameters import parameters_text
from ddim_cli.outputs.picture import OWN_ENDINGS, Encoding, ending_of, to_image
from ddim_cli.outputs.sidecar import ROW, SCHEMA, complete, first_difference, identity, to_text
from ddim_cli.stores.objects import StoreError

SEEDS_A_FOLDER = 1000
_NUMBER = re.compile(r"\d{6,}", re.ASCII)
_NUMBERED = re.compile(r"(\d{6,})\.(json|png|webp|jpg)", re.ASCII)
# Of a seed, or the index of a shard.
_OF_A_NUMBER = re.compile(r"\d{6,}(\.index)?\.json", re.ASCII)
_STRIP = re.compile(r"(\d{6,})\.(x0|xt)\.png", re.ASCII)

_ROW = f"sampling.{ROW}"

Name = str | int


@dataclass(frozen=True)
class PairFolder:
    """``path`` may not exist yet; ``subdirs`` puts every 1,000 seeds into a folder named after the first.

    With ``fsync`` a file that is there survives a power cut. ``size`` is (height, width) of the pictures that are to
    come, where it is known, to be named where it is what differs. ``parameters`` has a picture of a prompt carry the
    text that other image tools read. ``encoding`` is that of the pictures, None for whatever is there: see `coding`.
    """

    path: Place
    subdirs: bool = False
    fsync: bool = False
    size: tuple[int, int] | None = None
    parameters: bool = True
    encoding: Encoding | None = None

    @cached_property
    def coding(self) -> Encoding:
        """How the pictures here are encoded: as the folder was opened for, else as those that are there; else PNG."""
        return self.encoding or self._coding_there() or Encoding()

    def _coding_there(self) -> Encoding | None:
        """The encoding that the first sidecar tells of, else that of most of the numbered pictures; None for none."""
        endings: dict[str, int] = {}
        for folder, names in self._files():
            for name in names:
                match = _NUMBERED.fullmatch(name)
                if match is None or match[2] != "json":
                    if match is not None:
                        endings[match[2]] = endings.get(match[2], 0) + 1
                elif (sidecar := read_json(folder / name) or {}).get("schema") == SCHEMA:
                    return Encoding.told_by(sidecar)
        if endings:
            return Encoding(max(endings, key=lambda ending: (endings[ending], ending == "png")))
        first = next(self.unnumbered_pairs(), None)
        return Encoding.told_by(read_json(first) or {}) if first is not None else None

    def _place(self, name: str, subdirs: bool) -> Place:
        file = f"{name}{self.coding.ending}"
        if subdirs and _NUMBER.fullmatch(name):
            return self.path / f"{int(name) // SEEDS_A_FOLDER * SEEDS_A_FOLDER:06d}" / file
        return self.path / file

    def picture(self, name: Name) -> File:
        """Where a picture lies, in either layout, or belongs; its sidecar has the ending .json."""
        name = key_of(name)
        path, other = self._place(name, self.subdirs), self._place(name, not self.subdirs)
        if other == path:
            return path
        if not is_here(self.path):
            return other if key_of(name) in self._elsewhere else path
        elsewhere = other.with_suffix(".json").exists() and not path.with_suffix(".json").exists()
        return other if elsewhere else path

    @cached_property
    def _elsewhere(self) -> frozenset[str]:
        """Of an object store, which is not to be asked for each: the numbers that lie in the other layout."""
        places = {name: path.parent for name, [path, *_] in self.named("json").items() if _NUMBER.fullmatch(name)}
        return frozenset(name for name, folder in places.items() if folder != self._place(name, self.subdirs).parent)

    def sidecar(self, name: Name) -> File:
        return sidecar_of(self.picture(name))

    def check_usable(self) -> None:
        """UsageError if the path is a file, or the folder cannot be made. Creates nothing.

        One that is there may be finished, and then needs not be written to: see `check_writable`. Of an object store
        it is the bucket that has to be there.
        """
        there = self.path
        if not isinstance(there, Path):
            there.check()
            return
        if "\0" in str(there):
            raise UsageError(f"output folder {str(there)!r}: a path cannot hold a null character")
        try:
            while not there.exists() and there != there.parent:
                there = there.parent
        except (OSError, ValueError) as error:
            raise UsageError(
                f"output folder {str(self.path)[:80]!r}: {getattr(error, 'strerror', None) or error}"
            ) from None
        if not there.is_dir():
            raise UsageError(f"output folder {self.path}: {there} is a file")
        if there != self.path:
            self._check_access(there)

    def check_writable(self) -> None:
        """UsageError if the folder is there, and nothing can be written into it."""
        if isinstance(self.path, Path) and self.path.exists():
            self._check_access(self.path)

    def _check_access(self, there: Path) -> None:
        if not os.access(there, os.W_OK | os.X_OK):
            raise UsageError(f"output folder {self.path}: {there} cannot be written to")

    def create(self) -> None:
        """Make the folder. Raises UsageError if that cannot be done."""
        if not isinstance(self.path, Path):
            # An object store has none.
            return
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UsageError(f"output folder {self.path}: cannot be made: {error.strerror}") from None

    def folders(self) -> Iterator[Path]:
        """The folder itself, then those of either thousand seeds that are there; none of an object store."""
        if not isinstance(self.path, Path):
            return
        yield self.path
        try:
            with os.scandir(self.path) as entries:
                names = sorted(e.name for e in entries if _NUMBER.fullmatch(e.name) and e.is_dir())
        except OSError:
            return
        yield from (self.path / name for name in names)

    def _files(self) -> Iterator[tuple[Place, list[str]]]:
        """The folder itself, then those of either thousand seeds, with the names of what is in each. Lists once."""
        if isinstance(self.path, Path):
            yield from ((folder, names_in(folder)) for folder in self.folders())
            return
        found: dict[str, list[str]] = {"": []}
        for name in self.path.listing():
            folder, _, file = name.rpartition("/")
            if not folder or _NUMBER.fullmatch(folder):
                found.setdefault(folder, []).append(file)
        yield from ((self.path / folder, names) for folder, names in sorted(found.items()))

    def numbered(self, kind: str) -> dict[int, list[File]]:
        """The files NUMBER.``kind`` (``"json"`` or a format) where a pair of that seed can lie, by seed.

        Two for a seed that is there in either layout. Reads directories alone; of 50,000 files, in a fifth of a second.
        """
        return _numbered(self._files(), self.path, kind)

    def sidecars(self) -> dict[str, list[File]]:
        """The sidecars that are there by the names of their pictures, two for one that is there in either layout.

        Reads directories alone.
        """
        return self.named("json")

    def named(self, kind: str) -> dict[str, list[File]]:
        """The files NAME.``kind`` (``"json"`` or a format) of `numbered`, and all of other names, by name."""
        files = list(self._files())
        by_name = {key_of(seed): paths for seed, paths in _numbered(files, self.path, kind).items()}
        for file in files[0][1]:
            if file.endswith(f".{kind}") and not _NUMBERED.fullmatch(file):
                by_name[file.removesuffix(f".{kind}")] = [self.path / file]
        return by_name

    def listed(self) -> frozenset[str]:
        """Of an object store: the names of the pictures that are there with their sidecars. Lists once.

        An object appears whole, so that no more has to be asked for.
        """
        kinds: dict[str, set[str]] = {"json": set(), self.coding.format: set()}
        for folder, names in self._files():
            for name in names:
                stem, _, kind = name.rpartition(".")
                if kind in kinds and (folder == self.path or _NUMBER.fullmatch(stem)):
                    kinds[kind].add(stem)
        return frozenset.intersection(*map(frozenset, kinds.values()))

    def pictures(self) -> dict[int, list[File]]:
        """The pictures of seeds, as `numbered`."""
        return self.numbered(self.coding.format)

    def named_pictures(self) -> dict[str, list[File]]:
        """The pictures that are there, as `named`; in a folder of PNGs a sheet is among them."""
        return self.named(self.coding.format)

    def is_done(self, name: Name, settings: Mapping[str, Any], there: Sequence[File] = ()) -> bool:
        """Whether the sidecar parses and the picture has the size it records.

        ``there`` are its sidecars, where they have been listed. Of two, one in either layout, `picture` knows which
        counts.

        Raises:
            UsageError: if the pair was made with settings of another identity than ``settings``, or encoded otherwise.
        """
        return self.is_pair(there[0] if len(there) == 1 else self.sidecar(name), settings)

    def is_pair(self, path: File, settings: Mapping[str, Any]) -> bool:
        """As `is_done`, of the sidecar ``path``."""
        sidecar = read_json(path)
        if sidecar is None:
            return False
        self.check_same(sidecar, settings, path)
        try:
            return size_of(path.with_suffix(self.coding.ending)) == sidecar["image"]["bytes"]
        except (OSError, KeyError, TypeError):
            return False

    def check_same(
        self,
        record: Mapping[str, Any],
        settings: Mapping[str, Any],
        where: File | str,
        of: Callable[[Mapping[str, Any]], Mapping[str, Any]] = identity,
    ) -> None:
        """UsageError naming the first setting of ``record`` that would change the pictures; ``of`` is what decides.

        ``record`` is a sidecar or a run.json.
        """
        made = self.apart(record, settings, of)
        if made is not None:
            raise UsageError(
                f"{where} {made}; choose another folder with --out, or replace what is there with --overwrite"
            )

    def apart(
        self,
        record: Mapping[str, Any],
        settings: Mapping[str, Any],
        of: Callable[[Mapping[str, Any]], Mapping[str, Any]] = identity,
    ) -> str | None:
        """`difference` in words, as `check_same` says it: how what is there was made; None where it is no other."""
        difference = self.difference(record, settings, of)
        if difference is None:
            return None
        key, *values = difference
        before, now = _shown(*values), _shown(*values[::-1])
        # All that a hash says of two sizes is that they are not the same.
        sizes = self._sizes(record) if key == "model.config_sha256" else None
        text = "with images of {}, this run has {}".format(*sizes) if sizes else None
        text = text or (_in_words(*values) if key == _ROW else f"with {key} = {before}, this run has {now}")
        return f"was made {text}"

    def difference(
        self,
        record: Mapping[str, Any],
        settings: Mapping[str, Any],
        of: Callable[[Mapping[str, Any]], Mapping[str, Any]] = identity,
    ) -> tuple[str, Any, Any] | None:
        """The first setting in which a sidecar or a run.json differs from ``settings``, or from how it is encoded here.

        With both values; None where pictures of both can lie in one folder. ``of`` is as `check_same` has it.
        """
        found = of(record)
        return (
            _rows_apart(found, settings)
            or first_difference(found, settings)
            or encoded_apart(Encoding.told_by(record), self.coding)
        )

    def _sizes(self, record: Mapping[str, Any]) -> tuple[str, str] | None:
        """The size of the pictures that are there, by a sidecar or the first of run.json's, and of those to come.

        None where they are the same, or one is not known.
        """
        image = record.get("image")
        if image is None:
            image = next((sidecar.get("image") for path in self.pairs() if (sidecar := read_json(path))), None)
        if self.size is None or not isinstance(image, dict):
            return None
        height, width = self.size
        before, now = f"{image.get('width')} x {image.get('height')}", f"{width} x {height}"
        return None if before == now else (before, now)

    def pairs(self) -> Iterator[File]:
        """The sidecars of the folder, in either layout, in the order of their seeds."""
        for paths in self.numbered("json").values():
            yield from paths

    def unnumbered_pairs(self) -> Iterator[File]:
        """The sidecars of the folder that are of no seed: of frames, reconstructions, and pictures from latents."""
        for name in names_in(self.path):
            if name.endswith(".json") and not name.startswith(".") and not _OF_A_NUMBER.fullmatch(name):
                path = self.path / name
                if (read_json(path) or {}).get("schema") == SCHEMA:
                    yield path

    def strips(self) -> list[tuple[int, str, File]]:
        """(seed, "x0" or "xt", file) of the strips of ddim trajectory in the folder, in the order of their names."""
        return [(int(m[1]), m[2], self.path / name) for name in names_in(self.path) if (m := _STRIP.fullmatch(name))]

    def write(
        self, name: Name, described: Mapping[str, Any], pixels: np.ndarray, seconds: float, settings: Mapping[str, Any]
    ) -> None:
        """Write a picture, uint8 [H, W, C], then its sidecar, unless the pair is there.

        ``described`` is what `describe_picture` says of it, ``settings`` its identity. Raises OSError, and UsageError
        for a pair of other settings.
        """
        path = self.picture(name)
        assert not isinstance(path, Member)
        if isinstance(path, Path) and path.parent != self.path:
            path.parent.mkdir(exist_ok=True)
        described, data = encoded(described, pixels, self.coding, self.parameters)
        sidecar_path = path.with_suffix(".json")
        # Another process may be making the same picture, in batches of another size: a pair is of one of them.
        with locked(sidecar_path) as held:
            if is_here(sidecar_path) and self.is_pair(sidecar_path, settings):
                return
            write_atomically(path, data, self.fsync)
            # The sidecar last: its presence means that the pair is complete.
            sidecar = complete(described, path.name, data, seconds)
            held.write(to_text(sidecar).encode(), self.fsync)

    @property
    def keeps_all(self) -> bool:
        """Whether every picture that was written is there after an interruption."""
        return True

    def remove(self, name: Name, *others: Encoding) -> None:
        """Remove a pair, and what may be there of its picture in ``others``."""
        remove_pair(self.sidecar(name), self.coding, *others)

    def remove_leftovers(self, is_item: Callable[[str], bool] = lambda name: False) -> None:
        """Remove what processes have left half written here that were killed; ``is_item`` as `atomic` has it."""
        for folder in self.folders():
            remove_leftovers(folder, is_item)


def _numbered(files: Iterable[tuple[Place, list[str]]], root: Place, kind: str) -> dict[int, list[File]]:
    """As `PairFolder.numbered`, of the folders ``files`` with what is in each."""
    found: dict[int, list[File]] = {}
    for folder, names in files:
        first = None if folder == root else int(folder.name)
        for name in names:
            match = _NUMBERED.fullmatch(name)
            if match is None or match[2] != kind:
                continue
            seed = int(match[1])
            placed = first is None or seed // SEEDS_A_FOLDER * SEEDS_A_FOLDER == first
            if placed and len(match[1]) == max(6, len(str(seed))):
                found.setdefault(seed, []).append(folder / name)
    return dict(sorted(found.items()))


def encoded(
    described: Mapping[str, Any], pixels: np.ndarray, encoding: Encoding, parameters: bool
) -> tuple[Mapping[str, Any], bytes]:
    """What is said of a picture that `describe_picture` describes once it is encoded, and the bytes of its file.

    ``pixels`` is uint8 [H, W, C]; with ``parameters`` it carries the text that other tools read.
    """
    if encoding.about:
        described = {**described, "image": {**described["image"], **encoding.about}}
    other = parameters_text(described) if parameters else None
    return described, encoding.encode(to_image(pixels), to_text(described), other)


def encoded_apart(before: Encoding, now: Encoding) -> tuple[str, Any, Any] | None:
    """As `first_difference`, of two encodings."""
    if before == now:
        return None
    if before.format == now.format:
        return "output.quality", before.quality, now.quality
    return "output.image_format", before.format, now.format


def _rows_apart(before: Mapping[str, Any], now: Mapping[str, Any]) -> tuple[str, Any, Any] | None:
    """As `first_difference` where one is of a job file's rows, and the other is not: all else follows from that."""
    return (_ROW, before.get(_ROW), now.get(_ROW)) if (_ROW in before) != (_ROW in now) else None


def _shown(value: Any, other: Any) -> str:
    """A value that is not the ``other``, in a message; of a picture, what is not the same of it."""
    if not isinstance(value, Mapping) or value.keys() != {"pixels_sha256", "conversion"}:
        return shortened(json.dumps(value), 70)
    if isinstance(other, Mapping) and other.get("pixels_sha256") == value["pixels_sha256"]:
        return f"it {', '.join(value['conversion']) or 'as it is'}"
    return f"a picture of the pixels {value['pixels_sha256'][:8]}"


def _in_words(before: Any, now: Any) -> str:
    """How two pictures differ of which one is no row of a job file, or which are rows with other seeds."""
    if before is None or now is None:
        return "from a job file, this run is of none" if now is None else "without a job file, this run is of one"
    seeds = ["none" if row.get("seed") is None else row["seed"] for row in (before, now)]
    return f"with seed {seeds[0]}, this run has {seeds[1]}"


def key_of(name: Name) -> str:
    """The name of a picture's files; that of a seed has six digits or more."""
    return f"{name:06d}" if isinstance(name, int) else name


def names_in(folder: Place) -> list[str]:
    """The names of what is in a folder, in their order; none where it cannot be read. Raises StoreError."""
    if not isinstance(folder, Path):
        return [name for name in folder.listing() if "/" not in name]
    try:
        return sorted(os.listdir(folder))
    except OSError:
        return []


def picture_of(sidecar: File, record: Mapping[str, Any] | None = None) -> File:
    """The picture of a sidecar, which lies beside it; ``record`` is what it says, where that has been read."""
    image = ((read_json(sidecar) or {}) if record is None else record).get("image")
    return sidecar.with_suffix(ending_of(image.get("file") if isinstance(image, Mapping) else None))


def sidecar_of(picture: File) -> File:
    """Where the sidecar of a picture belongs."""
    return picture.with_suffix(".json")


def is_own_picture(path: File) -> bool:
    """Whether a file can be a picture of this tool by its name."""
    return path.suffix.lower() in (*OWN_ENDINGS, ".jpeg")


def remove_pair(sidecar: File, *encodings: Encoding) -> None:
    """Remove a sidecar, then its picture: no sidecar is to stand without one.

    Also what may be there of it in ``encodings``, without a sidecar.
    """
    record = read_json(sidecar)
    pictures = {sidecar.with_suffix(encoding.ending) for encoding in encodings}
    if record is not None and record.get("schema") == SCHEMA:
        pictures.add(picture_of(sidecar, record))
    for file in (sidecar, *pictures):
        assert not isinstance(file, Member)
        file.unlink(missing_ok=True)


def read_json(path: File | str) -> dict[str, Any] | None:
    """A JSON object from a file; None where there is none. Raises StoreError of a store that does not answer."""
    try:
        value = json.loads((Path(path) if isinstance(path, str) else path).read_bytes())
    except StoreError:
        raise
    except (OSError, ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None
