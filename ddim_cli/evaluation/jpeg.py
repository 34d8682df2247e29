"""What a JPEG can have lost: so much is no difference between it and the pixels that it was made of."""

from __future__ import annotations

import math

import numpy as np
from PIL import Image, JpegImagePlugin

from ddim_cli.outputs.files import File, source_of
from ddim_cli.outputs.picture import to_image

_BLOCK = 8
# Of a value, by rounding: into luma and chroma, in the transform, and back.
_ROUNDING = 1.5
# The largest root mean square of luma or chroma where that of RGB is 1.
_OF_RGB = 1.16


def least_difference(path: File, pixels: np.ndarray) -> float:
    """How far ``pixels`` are at least from those that a JPEG was made of: a root mean square in steps of 1/255.

    ``pixels`` is uint8 [H, W, C] of the JPEG's size and channels. 0 where all that is between them can be what JPEG
    loses: each coefficient of a block of 8 x 8 is off by half a step of its table at most, and the transform keeps
    sums of squares. Raises OSError or SyntaxError for a file that cannot be read.
    """
    with Image.open(source_of(path), formats=["JPEG"]) as image:
        tables = list(getattr(image, "quantization", {}).values())
        if image.mode == "RGB" and JpegImagePlugin.get_sampling(image) != 0:
            # Of colours at half the size the tables tell nothing.
            return 0.0
        if image.mode == "RGB":
            image.draft("YCbCr", image.size)
        there = np.asarray(image, np.float64)
    shown = to_image(pixels)
    made = np.asarray(shown.convert("YCbCr") if shown.mode == "RGB" else shown, np.float64)
    grey = made.ndim == 2
    found = []
    for plane in range(1 if grey else 3):
        apart = (there - made) if grey else (there - made)[:, :, plane]
        table = tables[min(plane, len(tables) - 1)]
        found.append(math.sqrt(float(np.square(apart).mean())) - _most_lost(table, apart.shape))
    return max(0.0, *found) / (1.0 if grey else _OF_RGB)


def _most_lost(table: list[int], shape: tuple[int, ...]) -> float:
    """The largest root mean square that quantization by ``table`` can cost a plane of this shape."""
    height, width = shape[:2]
    # What is beyond the edges is coded too, and its error may lie within them.
    coded = math.prod(-(-side // _BLOCK) * _BLOCK for side in (height, width)) / (height * width)
    steps = np.asarray(table, np.float64) / 2
    return math.sqrt(float(np.square(steps).mean()) * coded) + _ROUNDING
