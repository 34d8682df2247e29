"""PNG files that know how they were made: an iTXt chunk named ``ddim`` holds the sidecar's text."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
from PIL import Image, PngImagePlugin

from ddim_cli.errors import RunError
from ddim_cli.outputs.parameters import CHUNK as PARAMETERS

CHUNK = "ddim"
# Files with these endings are pictures, but not those of this tool that show several at once.
ENDINGS = frozenset((".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"))
_SHEETS, _STRIPS = frozenset(("grid", "strip", "inverted", "edited", "sweep")), (".x0", ".xt")


def is_picture_file(path: Path) -> bool:
    """Whether a file of a folder is a picture by its name; sheets, strips and animations of this tool are none."""
    ending = path.suffix.lower()
    sheet = ending in (".png", ".gif") and (path.stem in _SHEETS or path.stem.endswith(_STRIPS))
    return ending in ENDINGS and not path.name.startswith(".") and not sheet and path.is_file()


def to_image(pixels: np.ndarray) -> Image.Image:
    """uint8 [H, W, C] with C = 1, 3 or 4 -> a PIL image of mode L, RGB or RGBA."""
    return Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels)


def to_pixels(image: Image.Image) -> np.ndarray:
    """`to_image` undone: uint8 [H, W, C] of a PIL image of mode L, RGB or RGBA."""
    pixels = np.asarray(image)
    return pixels[:, :, None] if pixels.ndim == 2 else pixels


def read_pixels(path: Path | str) -> np.ndarray:
    """A picture's pixels, uint8 [H, W, C]. Raises OSError, SyntaxError or ValueError for one that cannot be read."""
    with Image.open(path) as image:
        return to_pixels(image)


def encode_png(
    image: Image.Image, text: str | None = None, software: str | None = None, parameters: str | None = None
) -> bytes:
    """The bytes of a PNG; the same image and texts give the same bytes.

    ``software`` is a field of PNG for its maker, ``parameters`` the text of `parameters.parameters_text`.
    """
    info = PngImagePlugin.PngInfo()
    if text is not None:
        info.add_itxt(CHUNK, text, zip=True)
    if software is not None:
        info.add_text("Software", software)
    if parameters is not None:
        # Latin-1 as tEXt, anything else as iTXt, which is UTF-8: as the tools do that read it.
        info.add_text(PARAMETERS, parameters)
    buffer = io.BytesIO()
    image.save(buffer, "PNG", pnginfo=info)
    return buffer.getvalue()


def read_own(path: Path) -> Image.Image:
    """A picture that this tool has written, for a sheet of them. Raises RunError with the remedy if it is damaged."""
    try:
        with Image.open(path) as image:
            return image.copy()
    except (OSError, SyntaxError, ValueError):
        raise RunError(f"{path}: cannot be read as a picture; delete it, and the same command makes it again") from None
