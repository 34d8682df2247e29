"""A folder of pairs, each a PNG and its sidecar, by name.

A name is an item's, the stem of its files; a seed is taken for its name, its number with six digits or more.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ddim_cli.errors import UsageError
from ddim_cli.outputs.atomic import locked, remove_leftovers, write_atomically
from ddim_cli.outputs.figures import shortened
from ddim_cli.outputs.parameters import parameters_text
from ddim_cli.outputs.picture import encode_png, to_image
from ddim_cli.outputs.sidecar import ROW, SCHEMA, complete, first_difference, identity, to_text

SEEDS_A_FOLDER = 1000
_NUMBER = re.compile(r"\d{6,}", re.ASCII)
_NUMBERED = re.compile(r"(\d{6,})\.(json|png)", re.ASCII)
_STRIP = re.compile(r"(\d{6,})\.(x0|xt)\.png", re.ASCII)

_ROW = f"sampling.{ROW}"

Name = str | int


@dataclass(frozen=True)
class PairFolder:
    """``path`` may not exist yet; ``subdirs`` puts every 1,000 seeds into a folder named after the first.

    With ``fsync`` a file that is there survives a power cut. ``size`` is (height, width) of the pictures that are to
    come, where it is known, to be named where it is what differs. ``parameters`` has a PNG of a prompt carry the text
    that other image tools read.
    """

    path: Path
    subdirs: bool = False
    fsync: bool = False
    size: tuple[int, int] | None = None
    parameters: bool = True

    def _place(self, name: str, subdirs: bool) -> Path:
        if subdirs and _NUMBER.fullmatch(name):
            return self.path / f"{int(name) // SEEDS_A_FOLDER * SEEDS_A_FOLDER:06d}" / f"{name}.png"
        return self.path / f"{name}.png"

    def picture(self, name: Name) -> Path:
        """Where a PNG lies, in either layout, or belongs; its sidecar has the ending .json."""
        name = f"{name:06d}" if isinstance(name, int) else name
        path, other = self._place(name, self.subdirs), self._place(name, not self.subdirs)
        elsewhere = other != path and other.with_suffix(".json").exists() and not path.with_suffix(".json").exists()
        return other if elsewhere else path

    def sidecar(self, name: Name) -> Path:
        return self.picture(name).with_suffix(".json")

    def check_usable(self) -> None:
        """UsageError if the path is a file, or the folder cannot be made. Creates nothing.

        One that is there may be finished, and then needs not be written to: see `check_writable`.
        """
        there = self.path
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
        if self.path.exists():
            self._check_access(self.path)

    def _check_access(self, there: Path) -> None:
        if not os.access(there, os.W_OK | os.X_OK):
            raise UsageError(f"output folder {self.path}: {there} cannot be written to")

    def create(self) -> None:
        """Make the folder. Raises UsageError if that cannot be done."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UsageError(f"output folder {self.path}: cannot be made: {error.strerror}") from None

    def folders(self) -> Iterator[Path]:
        """The folder itself, then those of either thousand seeds that are there."""
        yield self.path
        try:
            with os.scandir(self.path) as entries:
                names = sorted(e.name for e in entries if _NUMBER.fullmatch(e.name) and e.is_dir())
        except OSError:
            return
        yield from (self.path / name for name in names)

    def numbered(self, kind: str) -> dict[int, list[str]]:
        """The files NUMBER.``kind`` (``"png"`` or ``"json"``) where a pair of that seed can lie, by seed.

        Two for a seed that is there in either layout. Reads directories alone; of 50,000 files, in a tenth of a second.
        """
        files: dict[int, list[str]] = {}
        for folder in self.folders():
            first = None if folder == self.path else int(folder.name)
            for name in names_in(folder):
                match = _NUMBERED.fullmatch(name)
                if match is None or match[2] != kind:
                    continue
                seed = int(match[1])
                here = first is None or seed // SEEDS_A_FOLDER * SEEDS_A_FOLDER == first
                if here and len(match[1]) == max(6, len(str(seed))):
                    files.setdefault(seed, []).append(f"{folder}/{name}")
        return dict(sorted(files.items()))

    def sidecars(self) -> dict[str, list[str]]:
        """The sidecars that are there by the names of their pictures, two for one that is there in either layout.

        Reads directories alone.
        """
        return self.named("json")

    def named(self, kind: str) -> dict[str, list[str]]:
        """The files NAME.``kind`` (``"png"`` or ``"json"``) of `numbered`, and all of other names, by name."""
        by_name = {f"{seed:06d}": paths for seed, paths in self.numbered(kind).items()}
        for file in names_in(self.path):
            if file.endswith(f".{kind}") and not _NUMBERED.fullmatch(file):
                by_name[file.removesuffix(f".{kind}")] = [f"{self.path}/{file}"]
        return by_name

    def is_done(self, name: Name, settings: Mapping[str, Any], there: Sequence[str] = ()) -> bool:
        """Whether the sidecar parses and the PNG has the size it records.

        ``there`` are its sidecars, where they have been listed. Of two, one in either layout, `picture` knows which
        counts.

        Raises:
            UsageError: if the pair was made with settings of another identity than ``settings``.
        """
        return self.is_pair(there[0] if len(there) == 1 else str(self.sidecar(name)), settings)

    def is_pair(self, path: str, settings: Mapping[str, Any]) -> bool:
        """As `is_done`, of the sidecar ``path``."""
        sidecar = read_json(path)
        if sidecar is None:
            return False
        self.check_same(sidecar, settings, path)
        try:
            return os.stat(f"{path.removesuffix('.json')}.png").st_size == sidecar["image"]["bytes"]
        except (OSError, KeyError, TypeError):
            return False

    def check_same(
        self,
        record: Mapping[str, Any],
        settings: Mapping[str, Any],
        where: Path | str,
        of: Callable[[Mapping[str, Any]], Mapping[str, Any]] = identity,
    ) -> None:
        """UsageError naming the first setting of ``record`` that would change the pictures; ``of`` is what decides."""
        difference = _rows_apart(of(record), settings) or first_difference(of(record), settings)
        if difference is not None:
            key, *values = difference
            before, now = _shown(*values), _shown(*values[::-1])
            # All that a hash says of two sizes is that they are not the same.
            sizes = self._sizes(record) if key == "model.config_sha256" else None
            text = "with images of {}, this run has {}".format(*sizes) if sizes else None
            text = text or (_in_words(*values) if key == _ROW else f"with {key} = {before}, this run has {now}")
            raise UsageError(
                f"{where} was made {text}; choose another folder with --out, or replace what is there with --overwrite"
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

    def pairs(self) -> Iterator[Path]:
        """The sidecars of the folder, in either layout, in the order of their seeds."""
        for paths in self.numbered("json").values():
            yield from map(Path, paths)

    def unnumbered_pairs(self) -> Iterator[Path]:
        """The sidecars of the folder that are of no seed: of frames, reconstructions, and pictures from latents."""
        for name in names_in(self.path):
            if name.endswith(".json") and not name.startswith(".") and not _NUMBERED.fullmatch(name):
                path = self.path / name
                if (read_json(path) or {}).get("schema") == SCHEMA:
                    yield path

    def strips(self) -> list[tuple[int, str, Path]]:
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
        if path.parent != self.path:
            path.parent.mkdir(exist_ok=True)
        parameters = parameters_text(described) if self.parameters else None
        png = encode_png(to_image(pixels), to_text(described), parameters=parameters)
        sidecar_path = path.with_suffix(".json")
        # Another process may be making the same picture, in batches of another size: a pair is of one of them.
        with locked(sidecar_path) as held:
            if self.is_pair(str(sidecar_path), settings):
                return
            write_atomically(path, png, self.fsync)
            # The sidecar last: its presence means that the pair is complete.
            sidecar = complete(described, path.name, len(png), seconds)
            held.write(to_text(sidecar).encode(), self.fsync)

    def remove(self, name: Name) -> None:
        remove_pair(self.sidecar(name))

    def remove_leftovers(self, is_item: Callable[[str], bool] = lambda name: False) -> None:
        """Remove what processes have left half written here that were killed; ``is_item`` as `atomic` has it."""
        for folder in self.folders():
            remove_leftovers(folder, is_item)


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


def names_in(folder: Path) -> list[str]:
    """The names of what is in a folder, in their order; none where it cannot be read."""
    try:
        return sorted(os.listdir(folder))
    except OSError:
        return []


def remove_pair(sidecar: Path) -> None:
    """Remove a sidecar, then its picture: no sidecar is to stand without one."""
    sidecar.unlink(missing_ok=True)
    sidecar.with_suffix(".png").unlink(missing_ok=True)


def read_json(path: Path | str) -> dict[str, Any] | None:
    """A JSON object from a file; None where there is none."""
    try:
        with open(path, "rb") as stream:
            value = json.loads(stream.read())
    except (OSError, ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None
