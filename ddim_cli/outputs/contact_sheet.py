"""The contact sheet: the first images of a folder on one page."""

from __future__ import annotations

import math
from collections.abc import Sequence

from PIL import Image

MOST_IMAGES = 64
SMALLEST_TILE = 96
GAP = 6
BACKGROUND = (24, 24, 27)
# Of a sheet, in pixels: eight pictures of 256 side by side fit. Larger ones are reduced until theirs do.
WIDEST = 2200


def reduction(width: int, columns: int, widest: int) -> int:
    """By which whole number ``columns`` pictures of this width are reduced to stand side by side in ``widest``."""
    room = max(1, (widest - GAP) // columns - GAP)
    return max(1, -(-width // room))


def contact_sheet(
    images: Sequence[Image.Image], columns: int | None = None, widest: int | None = WIDEST
) -> Image.Image:
    """Up to 64 images of one size on a dark ground, in reading order, small ones enlarged by whole pixels.

    As square as it can be, unless ``columns`` says how many stand side by side. Where it would be wider than
    ``widest`` pixels, the images are reduced by a whole number.
    """
    images = images[:MOST_IMAGES]
    columns = columns or math.ceil(math.sqrt(len(images)))
    less = reduction(images[0].width, columns, widest) if widest is not None else 1
    if less > 1:
        images = [image.reduce(less) for image in images]
    width, height = images[0].size
    factor = max(1, -(-SMALLEST_TILE // max(width, height)))
    width, height = width * factor, height * factor
    rows = math.ceil(len(images) / columns)
    sheet = Image.new("RGB", (columns * (width + GAP) + GAP, rows * (height + GAP) + GAP), BACKGROUND)
    for i, image in enumerate(images):
        x, y = GAP + i % columns * (width + GAP), GAP + i // columns * (height + GAP)
        mode = "RGBA" if image.mode == "RGBA" else "RGB"
        tile = image.convert(mode).resize((width, height), Image.Resampling.NEAREST)
        sheet.paste(tile, (x, y), tile if mode == "RGBA" else None)
    return sheet
