"""Pictures from elsewhere as a network takes them: found, read, and brought to its size and channels."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from ddim_cli.errors import UsageError
from ddim_cli.outputs.picture import ENDINGS, is_picture_file, restored

_CHANNELS = {1: "grey", 3: "RGB", 4: "RGBA"}


@dataclass(frozen=True)
class Input:
    """A picture that was read.

    ``pixels_sha256`` is of its pixels as they are in the file; ``conversion`` what was done to them, in the order in
    which it was done; ``size`` its height and width before, turned as its EXIF orientation says.
    """

    path: Path
    pixels_sha256: str
    conversion: tuple[str, ...]
    size: tuple[int, int] = (0, 0)

    @property
    def name(self) -> str:
        """What its outputs are named after."""
        return self.path.stem

    def facts(self) -> dict[str, Any]:
        """What the sidecar of a picture that is made of it says of it."""
        return {"file": self.path.name, "pixels_sha256": self.pixels_sha256, "conversion": list(self.conversion)}


def find_pictures(paths: Sequence[Path]) -> list[Path]:
    """The files themselves, and in place of a folder the pictures in it, by name.

    In a folder sheets and strips of this tool are left out, and reconstructions and edits.

    Raises:
        UsageError: for a path that is not there, a folder without pictures, two pictures of one name, or a name that
            cannot be written down.
    """
    found: list[Path] = []
    for path in paths:
        if path.is_dir():
            inside = sorted(
                p for p in path.iterdir() if is_picture_file(p) and not p.stem.endswith((".recon", ".edit"))
            )
            if not inside:
                raise UsageError(f"{path}: there are no pictures in this folder ({' '.join(sorted(ENDINGS))})")
            found += inside
        elif not path.exists():
            raise UsageError(f"{path}: no such file")
        else:
            found.append(path)
    # The same file, named twice, is one picture.
    found = list({path.resolve(): path for path in reversed(found)}.values())[::-1]
    names: dict[str, Path] = {}
    for path in found:
        shown = str(path).encode("utf-8", "replace").decode()
        if shown != str(path):
            raise UsageError(f"{shown}: its name is no UTF-8 text; rename it")
        # Some file systems take a.png and A.png for one.
        other = names.setdefault(path.stem.casefold(), path)
        if other is not path:
            raise UsageError(
                f"{other} and {path} would both become {path.stem}.recon.png; rename one, or invert them into two "
                "folders"
            )
    return found


def read_input(path: Path, shape: tuple[int, int, int]) -> tuple[Input, np.ndarray]:
    """Read a picture for a network of ``shape`` (C, H, W).

    It is turned as its EXIF orientation says, brought to grey, RGB or RGBA (an alpha that the network has no channel
    for is composited on white), cropped in the middle to the network's aspect, and resized by Lanczos.

    Returns:
        what was read, and x0, float32 [C, H, W] in [-1, 1].

    Raises:
        UsageError: for a file that is no picture, or one whose values have no known range.
    """
    steps: list[str] = []
    image, pixels_sha256 = _opened(path, steps)
    channels, height, width = shape
    values = _with_channels(image, channels, steps, path)
    size = (values.shape[0], values.shape[1])
    values = _resized(_cropped(values, height / width, steps), (height, width), steps)
    x0 = np.ascontiguousarray(values.transpose(2, 0, 1)) * np.float32(2) - np.float32(1)
    return Input(path, pixels_sha256, tuple(steps), size), x0


def read_mask(path: Path, of: Input, shape: tuple[int, int, int], keeps: bool = False) -> tuple[Input, np.ndarray]:
    """Read the mask of a picture that was read for a network of ``shape`` (C, H, W): white is made anew, grey blends.

    With ``keeps`` it is the other way round: white stays as it is. One of another size than the picture is resized to
    it; then it goes the way of the picture. Where it is resized, its values are averaged over squares, so that what is
    black all around stays black.

    Returns:
        what was read, and the mask, float32 [1, H, W] from 0 to 1.

    Raises:
        UsageError: for a file that is no picture, and for a mask without a spot that is not black.
    """
    steps: list[str] = []
    image, pixels_sha256 = _opened(path, steps)
    # What is painted on nothing is what a mask means; nothing itself is black.
    values = _with_channels(image, 1, steps, path, ground="black")
    size = (values.shape[0], values.shape[1])
    if keeps:
        values = 1 - values
    if not values.any():
        told = "white everywhere, so all would be kept" if keeps else "black everywhere, so nothing would be made anew"
        raise UsageError(f"{path}: the mask is {told}")
    _, height, width = shape
    values = _resized(values, of.size, steps, Image.Resampling.BOX)
    values = _resized(_cropped(values, height / width, steps), (height, width), steps, Image.Resampling.BOX)
    if not values.any():
        raise UsageError(f"{path}: what the mask lets change is cropped away with the picture's edges")
    return Input(path, pixels_sha256, tuple(steps), size), np.ascontiguousarray(values.transpose(2, 0, 1))


def pixels_hash(path: Path) -> str:
    """The ``pixels_sha256`` that `Input` has of a picture. Raises UsageError for a file that is none."""
    return _opened(path, [])[1]


def _opened(path: Path, steps: list[str]) -> tuple[Image.Image, str]:
    """A picture, turned as its EXIF orientation says, and the hash of its pixels. Raises UsageError."""
    try:
        with warnings.catch_warnings():
            # Pillow warns of pictures that are large, and refuses those of twice that size.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            opened = Image.open(path)
        with opened as image:
            if getattr(image, "n_frames", 1) > 1:
                steps.append(f"the first of {image.n_frames} frames")
            deep = ";16" in str(image.tile)
            image.load()
            shown = restored(image)
            pixels_sha256 = _hash(shown)
            if deep and not image.mode.startswith("I"):
                steps.append("16 bits a channel read as 8")
            turned = ImageOps.exif_transpose(shown)
            orientation = image.getexif().get(0x0112, 1)
            if orientation != 1:
                steps.append(f"turned as its EXIF orientation {orientation} says")
            return turned, pixels_sha256
    except FileNotFoundError:
        raise UsageError(f"{path}: no such file") from None
    except Image.DecompressionBombError:
        raise UsageError(
            f"{path}: has more than {2 * (Image.MAX_IMAGE_PIXELS or 0):,} pixels, which may be a trap; make it smaller "
            "first"
        ) from None
    except Exception:
        # Pillow meets damage, and what is no picture, with errors of many kinds.
        raise UsageError(f"{path}: cannot be read as a picture: it is none, or is damaged or cut off") from None


def _hash(image: Image.Image) -> str:
    """Of the pixels; of a palette's pictures, of the colours that they stand for."""
    shown = image.convert("RGBA" if "transparency" in image.info else "RGB") if image.mode == "P" else image
    return hashlib.sha256(shown.tobytes()).hexdigest()


def _with_channels(
    image: Image.Image, channels: int, steps: list[str], path: Path, ground: str = "white"
) -> np.ndarray:
    """float32 [H, W, C] in [0, 1] with this many channels; an alpha with no channel for it comes on ``ground``."""
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        values = _deep_grey(image, steps, path)
        return np.concatenate([values] * min(channels, 3) + [np.ones_like(values)] * (channels == 4), axis=2)
    clear = image.mode in ("LA", "PA", "La", "RGBA", "RGBa") or "transparency" in image.info
    if clear and channels != 4:
        image = image.convert("RGBA")
        if image.getchannel("A").getextrema() != (255, 255):
            image = Image.alpha_composite(Image.new("RGBA", image.size, ground), image)
            steps.append(f"alpha composited on {ground}")
        image = image.convert("RGB")
    before = image.mode
    target = {1: "L", 3: "RGB", 4: "RGBA"}[channels]
    if before != target:
        grey = before in ("1", "L", "LA")
        converted = image.convert(target)
        if not (before == "1" and target == "L"):
            named = "grey" if grey else {"P": "a palette"}.get(before, before)
            steps.append(f"{named} to {_CHANNELS[channels]}")
        image = converted
    values = np.asarray(image, np.float32) / np.float32(255)
    return values[:, :, None] if values.ndim == 2 else values


def _deep_grey(image: Image.Image, steps: list[str], path: Path) -> np.ndarray:
    """float32 [H, W, 1] in [0, 1] of 16-bit integers, or of numbers that lie in [0, 1] already."""
    values = np.asarray(image, np.float64)
    low, high = float(values.min()), float(values.max())
    most = 1.0 if image.mode == "F" else 65535.0
    if not (low >= 0 and high <= most):
        raise UsageError(
            f"{path}: its values run from {low:g} to {high:g}, and nothing says which is black and which is white; "
            "save it with 8 or 16 bits a channel"
        )
    if image.mode != "F":
        steps.append("16-bit grey")
    return (values / most).astype(np.float32)[:, :, None]


def _cropped(values: np.ndarray, aspect: float, steps: list[str]) -> np.ndarray:
    """The largest part in the middle whose height / width is ``aspect``."""
    height, width = values.shape[:2]
    new_height, new_width = min(height, max(1, round(width * aspect))), min(width, max(1, round(height / aspect)))
    if (new_height, new_width) == (height, width):
        return values
    top, left = (height - new_height) // 2, (width - new_width) // 2
    steps.append(f"cropped in the middle from {width} x {height} to {new_width} x {new_height}")
    return values[top : top + new_height, left : left + new_width]


def _resized(
    values: np.ndarray,
    size: tuple[int, int],
    steps: list[str],
    filter: Image.Resampling = Image.Resampling.LANCZOS,
) -> np.ndarray:
    """By Lanczos unless said otherwise, which averages where a picture is made smaller."""
    height, width = values.shape[:2]
    if (height, width) == size:
        return values
    steps.append(f"resized from {width} x {height} to {size[1]} x {size[0]}")
    planes = [
        np.asarray(Image.fromarray(np.ascontiguousarray(plane)).resize(size[::-1], filter))
        for plane in np.moveaxis(values, 2, 0)
    ]
    # The filter overshoots at edges.
    return np.stack(planes, axis=2).clip(0, 1)
