"""Many pictures as one array, as guided-diffusion lays it out: ``arr_0`` uint8 [N, H, W, C], ``arr_1`` the classes."""

from __future__ import annotations

import contextlib
import math
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO

import numpy as np
from numpy.lib import format as npy

from ddim_cli.errors import RunError, UsageError
from ddim_cli.outputs.files import File
from ddim_cli.outputs.named import Kind, NamedFile
from ddim_cli.outputs.picture import read_own, to_pixels

# Marks that tell our arrays from those of others, which are laid out alike.
_PICTURES, _STATISTICS = b"ddim sample --npz", b"ddim evaluate --keep-reference"
PICTURES = Kind.of_archive("array of ddim sample", _PICTURES)
STATISTICS = Kind.of_archive("statistics of ddim evaluate", _STATISTICS)


def _member(archive: zipfile.ZipFile, name: str) -> IO[bytes]:
    # Always the same time, so that the same pictures give the same bytes.
    return archive.open(zipfile.ZipInfo(f"{name}.npy", (1980, 1, 1, 0, 0, 0)), "w", force_zip64=True)


def _write_header(stream: IO[bytes], shape: tuple[int, ...], dtype: np.dtype) -> None:
    npy.write_array_header_1_0(stream, {"descr": npy.dtype_to_descr(dtype), "fortran_order": False, "shape": shape})


def write_npz(
    to: NamedFile, pictures: Iterable[File], count: int, labels: Sequence[int] | None = None, fsync: bool = False
) -> None:
    """Write ``count`` picture files as one uncompressed .npz, one picture in memory at a time; whole or not at all.

    Args:
        to: the file to write, of the kind `PICTURES`.
        pictures: the files, in the order of the array; all of one size and mode.
        count: how many there are.
        labels: int64 [count], the classes, where there are any.
        fsync: as of `atomic_file`.

    Raises:
        UsageError: for a file that has come there since ``to`` was checked, and is not ours.
        RunError: for a file that cannot be written, and a picture that cannot be read or has another size than the
            first.
    """
    with to.open(fsync) as stream, zipfile.ZipFile(stream, "w", zipfile.ZIP_STORED) as archive:
        archive.comment = _PICTURES
        with _member(archive, "arr_0") as member:
            shape = None
            for picture in pictures:
                pixels = to_pixels(read_own(picture))
                if shape is None:
                    shape = pixels.shape
                    _write_header(member, (count, *shape), pixels.dtype)
                elif pixels.shape != shape:
                    raise RunError(
                        f"{picture}: is {_size(pixels.shape)}, and the pictures before it are {_size(shape)}"
                    )
                member.write(pixels.tobytes())
        if labels is not None:
            with _member(archive, "arr_1") as member:
                _write_header(member, (count,), np.dtype(np.int64))
                member.write(np.asarray(labels, np.int64).tobytes())


def write_statistics(to: NamedFile, arrays: Mapping[str, np.ndarray]) -> None:
    """Write arrays that `numpy.load` reads, of the kind `STATISTICS`; whole or not at all. Raises as `write_npz`."""
    with to.open() as stream, zipfile.ZipFile(stream, "w", zipfile.ZIP_STORED) as archive:
        archive.comment = _STATISTICS
        for name, array in arrays.items():
            with _member(archive, name) as member:
                npy.write_array(member, array, allow_pickle=False)


def _size(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape))


@contextlib.contextmanager
def read_rows(path: Path, name: str) -> Iterator[tuple[tuple[int, ...], np.dtype, Callable[[int], np.ndarray]]]:
    """An array of an .npz, without reading it whole: its shape, its dtype, and what reads its next N rows.

    Raises:
        UsageError: for a file that is no .npz, is damaged, or has no such array.
    """
    try:
        with zipfile.ZipFile(path) as archive, archive.open(f"{name}.npy") as stream:
            version = npy.read_magic(stream)
            read_header = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
            shape, by_columns, dtype = read_header(stream)
            if dtype.hasobject or (by_columns and len(shape) > 1) or not shape:
                raise UsageError(f"{path}: {name} is not laid out row by row; save it again with np.ascontiguousarray")

            def rows(count: int) -> np.ndarray:
                size = count * math.prod(shape[1:]) * dtype.itemsize
                data = stream.read(size)
                if len(data) < size:
                    raise ValueError("it ends too soon")
                return np.frombuffer(data, dtype).reshape(count, *shape[1:])

            yield shape, dtype, rows
    except KeyError:
        raise UsageError(f"{path}: holds no array {name}") from None
    except (OSError, ValueError, EOFError, zlib.error, zipfile.BadZipFile) as error:
        raise UsageError(f"{path}: not a whole .npz: {error}") from None
