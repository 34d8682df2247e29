"""Read pictures in batches: from a folder, from files by name, or from an array in an .npz."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePath
from typing import Any, Protocol

import numpy as np
from PIL import Image

from ddim_cli.config.seeds import format_seeds
from ddim_cli.errors import UsageError
from ddim_cli.outputs.figures import shortened
from ddim_cli.outputs.files import File, Place, source_of
from ddim_cli.outputs.folder import RUN_SCHEMA, OutputFolder
from ddim_cli.outputs.npz import read_rows
from ddim_cli.outputs.picture import ENDINGS, is_picture_file, is_picture_name, restored, to_pixels
from ddim_cli.outputs.row_plan import RowPlan, is_of_rows
from ddim_cli.outputs.tar_folder import open_folder
from ddim_cli.stores.objects import StoreError

_READERS = min(8, os.cpu_count() or 1)
# Modes of PIL that are grey with at most eight bits; one with more would lose them.
_GREY, _DEEP = ("1", "L", "LA", "La"), ("I", "F", "I;16", "I;16B", "I;16L", "I;16N")


class Pictures(Protocol):
    """Pictures that can be read in batches of one size; ``where`` names them in messages."""

    where: str

    def __len__(self) -> int: ...

    def batches(self, batch_size: int) -> Iterator[np.ndarray]:
        """Yield uint8 [N, H, W, C], C = 1 or 3, N at most ``batch_size``. Raises UsageError for a damaged picture."""


class PictureFiles:
    """Picture files, in the order given."""

    def __init__(self, paths: Sequence[File], where: str | None = None):
        self._paths, self.where = list(paths), where or (str(paths[0].parent) if paths else "")

    def __len__(self) -> int:
        return len(self._paths)

    def batches(self, batch_size: int) -> Iterator[np.ndarray]:
        with ThreadPoolExecutor(_READERS) as pool:
            parts = (self._paths[i : i + batch_size] for i in range(0, len(self), batch_size))
            read = (pool.map(read_picture, part) for part in parts)
            # The next batch is read while this one is in use.
            waiting = list(itertools.islice(read, 1))
            while waiting:
                waiting += itertools.islice(read, 1)
                for _, pictures in itertools.groupby(waiting.pop(0), key=lambda p: p.shape):
                    yield np.stack(list(pictures))


class PictureArray:
    """``arr_0`` of an .npz: uint8 [N, H, W, C], as ``ddim sample --npz`` writes it; the first ``count`` of them."""

    def __init__(self, path: Path, count: int | None = None):
        self.where, self._path = str(path), path
        with read_rows(path, "arr_0") as (shape, dtype, _):
            if dtype != np.uint8 or len(shape) != 4 or shape[3] not in (1, 3):
                raise UsageError(f"{path}: arr_0 is {dtype} {list(shape)}; expected uint8 [N, H, W, C] with C = 1 or 3")
            self._count = shape[0]
        if count is not None:
            self._count = check_count(count, self._count, self.where)

    def __len__(self) -> int:
        return self._count

    def batches(self, batch_size: int) -> Iterator[np.ndarray]:
        with read_rows(self._path, "arr_0") as (_, _, rows):
            for start in range(0, self._count, batch_size):
                yield rows(min(batch_size, self._count - start))


def read_picture(path: File) -> np.ndarray:
    """uint8 [H, W, C], C = 1 or 3: palettes are resolved, alpha and orientation left out. Raises UsageError."""
    try:
        with Image.open(source_of(path)) as image:
            if image.mode in _DEEP:
                raise UsageError(f"{path}: has more than eight bits a channel; convert it first")
            shown = restored(image)
            return to_pixels(shown.convert("L" if shown.mode in _GREY else "RGB"))
    except (UsageError, StoreError):
        raise
    except FileNotFoundError:
        raise UsageError(f"{path}: there is no such picture") from None
    except Exception:
        # Pillow meets damage with errors of many kinds.
        raise UsageError(f"{path}: cannot be read as a picture") from None


def check_count(asked: int, there: int, where: str) -> int:
    """``asked``, of the pictures that are ``there``. Raises UsageError if they are fewer."""
    if asked > there:
        raise UsageError(f"{where}: holds {there:,} pictures, and -n asks for {asked:,}")
    return asked


def open_pictures(path: Place, count: int | None = None) -> Pictures:
    """The pictures of a folder or of an .npz; of an output folder those of its plan; the first ``count`` of them.

    Raises:
        UsageError: for a path that is not there or holds no pictures, and for an output folder in which some that
            are wanted are missing.
    """
    if path.is_dir():
        return PictureFiles(_files(path, count), str(path))
    if not path.exists():
        raise UsageError(f"{path}: there is no such folder or file")
    if path.suffix != ".npz":
        raise UsageError(f"{path}: is neither a folder of pictures nor an .npz")
    if not isinstance(path, Path):
        raise UsageError(f"{path}: an .npz is read from this machine alone; fetch it first")
    return PictureArray(path, count)


def _pictures_below(path: Place) -> list[Any]:
    """The picture files in a folder and in the folders in it."""
    if isinstance(path, Path):
        return [file for file in path.rglob("*") if is_picture_file(file)]
    return [path / name for name in path.listing() if is_picture_name(PurePath(name))]


def _files(path: Place, count: int | None) -> list[File]:
    folder = open_folder(path)
    if is_of_rows(folder.read_manifest()):
        return _files_of_rows(folder, [line["name"] for line in RowPlan(folder)], count)
    if (folder.read_manifest() or {}).get("schema") == RUN_SCHEMA:
        return files_of(folder, sorted(folder.planned()), count)
    paths: list[File] = sorted(_pictures_below(path))
    if not paths and folder.strips():
        raise UsageError(
            f"{path}: is a folder of ddim trajectory, whose strips cannot be scored; name the folder that ddim sample "
            "makes with the same settings and seeds"
        )
    if not paths:
        raise UsageError(f"{path}: holds no pictures ({' '.join(sorted(ENDINGS))})")
    return paths[: check_count(count, len(paths), str(path))] if count is not None else paths


def _files_of_rows(folder: OutputFolder, names: Sequence[str], count: int | None) -> list[File]:
    """As `files_of`, of a job file's rows."""
    if count is not None:
        names = names[: check_count(count, len(names), str(folder.path))]
    there = folder.named_pictures()
    missing = [name for name in names if name not in there]
    if missing:
        raise UsageError(
            f"{folder.path}: lacks {len(missing):,} of {len(names):,} pictures (first {missing[0]}); make them with "
            "the command that began the folder, or look at the first N with -n N"
        )
    return [there[name][0] for name in names]


def files_of(folder: OutputFolder, seeds: Sequence[int], count: int | None = None) -> list[File]:
    """The pictures of ``seeds`` in an output folder; of the first ``count``. Raises UsageError if one is missing."""
    if count is not None:
        seeds = seeds[: check_count(count, len(seeds), str(folder.path))]
    there = folder.pictures()
    missing = [seed for seed in seeds if seed not in there]
    if missing:
        named = shortened(format_seeds(missing), 60)
        raise UsageError(
            f"{folder.path}: lacks {len(missing):,} of {len(seeds):,} pictures (seeds {named}); make them "
            "with the command that began the folder, or look at the first N with -n N"
        )
    return [there[seed][0] for seed in seeds]
