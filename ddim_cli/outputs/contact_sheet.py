"""The contact sheet: the first images of a folder on one page."""

from __future__ import annotations

import math
from collections.abc import Sequence

from PIL import Image

MOST_IMAGES = 64
SMALLEST_TILE = 96
GAP = 6
BACKGROUND = (24, 24, 27)


def contact_sheet(images: Sequence[Image.Image], columns: int | None = None) -> Image.Image:
    """Up to 64 images of one size on a dark ground, in reading order, small ones enlarged by whole pixels.

    As square as it can be, unless ``columns`` says how many stand side by side.
    """
    images = images[:MOST_IMAGES]
    width, height = images[0].size
    factor = max(1, -(-SMALLEST_TILE // max(width, height)))
    width, height = width * factor, height * factor
    columns = columns or math.ceil(math.sqrt(len(images)))
    rows = math.ceil(len(images) / columns)
    sheet = Image.new("RGB", (columns * (width + GAP) + GAP, rows * (height + GAP) + GAP), BACKGROUND)
    for i, image in enumerate(images):
        x, y = GAP + i % columns * (width + GAP), GAP + i // columns * (height + GAP)
        mode = "RGBA" if image.mode == "RGBA" else "RGB"
        tile = image.convert(mode).resize((width, height), Image.Resampling.NEAREST)
        sheet.paste(tile, (x, y), tile if mode == "RGBA" else None)
    return sheet
