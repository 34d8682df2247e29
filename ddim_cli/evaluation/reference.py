"""Statistics of the features of a set of pictures, kept in an .npz: a reference that need not be computed again.

`mu` [D] and `sigma` [D, D] are as other tools name them. Ours have besides `images`, how many pictures they are of,
`extractor`, the sha256 of what computed the features, and `features` [K, D] of some of the pictures, for the kernel
distance.
"""

from __future__ import annotations

import zipfile
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ddim_cli.errors import UsageError
from ddim_cli.evaluation.frechet import Gaussian
from ddim_cli.outputs import npz
from ddim_cli.outputs.named import name_file


class Statistics(NamedTuple):
    """A Gaussian, features [K, D] of some pictures (None where there are none), and the extractor's sha256 if known."""

    gaussian: Gaussian
    features: np.ndarray | None
    extractor: str | None


def spread_out(count: int, most: int) -> np.ndarray:
    """At most ``most`` of the positions 0 ... ``count`` - 1, evenly spread, so that no part of the set is favoured."""
    return np.arange(count) if count <= most else np.arange(most) * count // most


def write_statistics(
    path: Path, gaussian: Gaussian, features: np.ndarray | None, extractor: str | None, overwrite: bool = False
) -> None:
    """Write an .npz that `read_statistics` reads; the file appears whole.

    Raises:
        UsageError: for a file that is there and was not written by this tool, unless ``overwrite``.
        RunError: for a file that cannot be written.
    """
    known = {"images": gaussian.count, "extractor": extractor, "features": features}
    arrays = {name: np.asarray(value) for name, value in known.items() if value is not None}
    to = name_file(path, npz.STATISTICS, overwrite=overwrite)
    npz.write_statistics(to, {"mu": gaussian.mean, "sigma": gaussian.covariance, **arrays})


def holds(path: Path, name: str) -> bool:
    """Whether the .npz has an array of this name. Raises UsageError if it is no .npz."""
    try:
        with zipfile.ZipFile(path) as archive:
            return f"{name}.npy" in archive.namelist()
    except (OSError, zipfile.BadZipFile):
        raise UsageError(f"{path}: not a whole .npz") from None


def read_statistics(path: Path) -> Statistics:
    """Read `mu` and `sigma`, and what of ours is there.

    Raises:
        UsageError: for a damaged file, and for arrays that are no mean and covariance.
    """
    try:
        with np.load(path, allow_pickle=False) as archive:
            mean, covariance = (archive[name].astype(np.float64) for name in ("mu", "sigma"))
            features = archive["features"].astype(np.float32) if "features" in archive else None
            count = int(archive["images"]) if "images" in archive else None
            extractor = str(archive["extractor"]) if "extractor" in archive else None
    except (OSError, ValueError, TypeError, KeyError, EOFError, zlib.error, zipfile.BadZipFile) as error:
        raise UsageError(f"{path}: not a whole .npz of statistics: {error}") from None
    if mean.ndim != 1 or covariance.shape != (len(mean), len(mean)):
        shapes = f"{list(mean.shape)} and {list(covariance.shape)}"
        raise UsageError(f"{path}: mu and sigma are {shapes}; expected [D] and [D, D]")
    if not (np.isfinite(mean).all() and np.isfinite(covariance).all()):
        raise UsageError(f"{path}: mu or sigma holds values that are not finite")
    if features is not None and features.shape[1:] != mean.shape:
        raise UsageError(f"{path}: features are {list(features.shape)}; expected [K, {len(mean)}]")
    return Statistics(Gaussian(mean, covariance, count), features, extractor)
