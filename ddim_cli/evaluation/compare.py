"""Compare pictures with golden ones, matched by seed: for renders in CI."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from ddim_cli.errors import UsageError
from ddim_cli.evaluation.pixels import largest_difference, psnr_db, size_text
from ddim_cli.outputs.contact_sheet import contact_sheet
from ddim_cli.outputs.files import File, Place
from ddim_cli.outputs.named import Kind, name_file
from ddim_cli.outputs.picture import Encoding, encode_png, read_pixels, to_image
from ddim_cli.outputs.sidecar import first_difference, identity
from ddim_cli.outputs.store import encoded_apart, read_json, sidecar_of
from ddim_cli.outputs.tar_folder import open_folder

SOFTWARE = "ddim compare --diff-dir"
DIFFERENCE = Kind.of_png("difference picture of ddim compare", SOFTWARE)
_NUMBERED = re.compile(r"\d{6,}\.png")


class Limits(NamedTuple):
    """What passes: the largest difference of a value, 0..255, and the lowest PSNR in dB."""

    max_diff: int
    min_psnr: float


class Match(NamedTuple):
    """One seed that both folders have. ``problem`` says why it fails; None if it passes.

    Where the pictures cannot be compared, ``max_diff`` and ``psnr`` are None.
    """

    seed: int
    max_diff: int | None
    psnr: float | None
    problem: str | None


class Comparison(NamedTuple):
    """The result: ``missing`` seeds are in GOLDEN alone, ``extra`` in DIR alone; ``note`` is a setting that differs."""

    matches: tuple[Match, ...]
    missing: tuple[int, ...]
    extra: tuple[int, ...]
    note: str | None

    @property
    def failed(self) -> tuple[Match, ...]:
        return tuple(m for m in self.matches if m.problem is not None)

    @property
    def ok(self) -> bool:
        return not (self.failed or self.missing or self.extra)


def compare(
    golden: Place,
    folder: Place,
    limits: Limits,
    difference_folder: Path | None = None,
    on_image: Callable[[int, int], None] = lambda done, total: None,
) -> Comparison:
    """Compare the numbered pictures of two folders; sidecars are not needed.

    Args:
        golden: the folder of golden pictures.
        folder: the one to compare with it.
        limits: what passes.
        difference_folder: where a picture is written for every pair that differs at all: golden, actual, and
            their difference, made as bright as possible. Those of an earlier comparison there are removed.
        on_image: called with the number of pairs looked at and their total.

    Raises:
        UsageError: for folders that are not there, no picture in ``golden``, and numbered pictures in
            ``difference_folder`` that are something else.
        RunError: if a difference picture cannot be written.
    """
    expected, actual = _pictures(golden), _pictures(folder)
    if not expected:
        raise UsageError(f"{golden}: holds no numbered pictures such as 000000.png")
    both = [seed for seed in expected if seed in actual]
    if difference_folder is not None:
        _clear(difference_folder)
    matches = []
    for done, seed in enumerate(both, start=1):
        matches.append(_match(seed, expected[seed], actual[seed], limits, difference_folder))
        on_image(done, len(both))
    return Comparison(
        tuple(matches),
        tuple(seed for seed in expected if seed not in actual),
        tuple(seed for seed in actual if seed not in expected),
        _other_setting(expected, actual, both),
    )


def _clear(folder: Path) -> None:
    """Make the folder of difference pictures, or take those of before out of it. Raises UsageError for others there."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        numbered = [Path(entry.path) for entry in os.scandir(folder) if _NUMBERED.fullmatch(entry.name)]
    except (FileExistsError, NotADirectoryError):
        raise UsageError(f"--diff-dir {folder}: is not a folder, or cannot be made; name another") from None
    for path in numbered:
        if not DIFFERENCE.is_ours(path):
            raise UsageError(f"--diff-dir {folder}: {path.name} in there is no {DIFFERENCE.name}; name another folder")
    for path in numbered:
        path.unlink(missing_ok=True)


def _pictures(folder: Place) -> dict[int, File]:
    if not folder.is_dir():
        raise UsageError(f"{folder}: {'is not a folder' if folder.exists() else 'there is no such folder'}")
    return {seed: paths[0] for seed, paths in open_folder(folder).pictures().items()}


def _match(seed: int, golden: File, other: File, limits: Limits, difference_folder: Path | None) -> Match:
    try:
        a, b = _read(golden), _read(other)
    except UsageError as error:
        return Match(seed, None, None, str(error))
    if a.shape != b.shape:
        return Match(seed, None, None, f"is {size_text(b.shape)}, the golden one {size_text(a.shape)}")
    largest, psnr = largest_difference(a, b), psnr_db(a, b)
    if largest and difference_folder is not None:
        drawn = encode_png(difference_picture(a, b), software=SOFTWARE)
        name_file(difference_folder / f"{seed:06d}.png", DIFFERENCE).write(drawn)
    problems = []
    if largest > limits.max_diff:
        problems.append(f"differs by {largest}")
    if psnr < limits.min_psnr:
        problems.append(f"PSNR {psnr:.1f} dB")
    return Match(seed, largest, psnr, ", ".join(problems) or None)


def _read(path: File) -> np.ndarray:
    try:
        return read_pixels(path)
    except Exception:
        # Pillow meets damage with errors of many kinds.
        raise UsageError(f"{path} cannot be read as a picture") from None


def difference_picture(golden: np.ndarray, other: np.ndarray) -> Image.Image:
    """Side by side: golden, other, and their absolute difference with its largest value made white."""
    difference = np.abs(golden.astype(np.int16) - other.astype(np.int16))
    bright = (difference * (255 / max(1, int(difference.max())))).astype(np.uint8)
    # The difference of two opaque pictures would be transparent.
    panels = [to_image(p[:, :, :3] if p.shape[2] == 4 else p) for p in (golden, other, bright)]
    # In full: a difference may be of one pixel.
    return contact_sheet(panels, columns=3, widest=None)


def _other_setting(expected: dict[int, File], actual: dict[int, File], both: list[int]) -> str | None:
    """The first setting in which the sidecars of the first pair differ, if both are there: it may explain the rest."""
    if not both:
        return None
    one, other = (read_json(sidecar_of(files[both[0]])) for files in (expected, actual))
    if one is None or other is None:
        return None
    difference = first_difference(identity(one), identity(other))
    difference = difference or encoded_apart(Encoding.told_by(one), Encoding.told_by(other))
    if difference is None:
        return None
    key, before, now = difference
    return f"{key} is {now!r}, in the golden pictures {before!r}"


def finite(value: float | None) -> float | None:
    """For JSON, which has no infinity: the PSNR of equal pictures is null."""
    return None if value is None or math.isinf(value) else round(value, 3)
