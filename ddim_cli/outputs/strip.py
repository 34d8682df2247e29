"""Frames beside each other with a line of text under each, and the same frames as an animation."""

from __future__ import annotations

import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw

from ddim_cli.outputs.contact_sheet import BACKGROUND, GAP, SMALLEST_TILE, reduction
from ddim_cli.outputs.lettering import (
    CAPTION_COLOUR,
    CAPTION_SIZE,
    LABEL_COLOUR,
    LABEL_SIZE,
    MARGIN,
    fitting,
    font,
    line_height,
)

SMALLEST_ANIMATED = 224
# The first and the last frame of an animation stay longer, so that one can look at them.
FRAME_MS, REST_MS = 120, 900


@dataclass(frozen=True)
class Row:
    """Frames of one size, and a label for each: "" for none. ``above`` puts the labels over their frames."""

    images: Sequence[Image.Image]
    labels: Sequence[str] = ()
    above: bool = False


def enlarged(image: Image.Image, smallest: int = SMALLEST_TILE) -> Image.Image:
    """RGB on the dark ground, enlarged by whole pixels until the longer side has ``smallest`` of them."""
    factor = max(1, -(-smallest // max(image.size)))
    size = (image.width * factor, image.height * factor)
    if image.mode != "RGBA":
        return image.convert("RGB").resize(size, Image.Resampling.NEAREST)
    tile = image.resize(size, Image.Resampling.NEAREST)
    ground = Image.new("RGB", size, BACKGROUND)
    ground.paste(tile, (0, 0), tile)
    return ground


def draw_strip(
    rows: Sequence[Row], caption: str = "", smallest: int = SMALLEST_TILE, widest: int | None = None
) -> Image.Image:
    """Rows of frames on a dark ground under a caption, RGB; small frames are enlarged by whole pixels.

    Where it would be wider than ``widest`` pixels, frames are reduced by a whole number.
    """
    columns, line = max(len(row.images) for row in rows), line_height(LABEL_SIZE)
    less = reduction(rows[0].images[0].width, columns, widest) if widest is not None else 1
    tiles = [[enlarged(image.reduce(less) if less > 1 else image, smallest) for image in row.images] for row in rows]
    width, height = tiles[0][0].size
    top = MARGIN + (line_height(CAPTION_SIZE) + 3 if caption else 0)
    spaces = [line if any(row.labels) else 0 for row in rows]
    total = top + sum(height + space + GAP for space in spaces) - GAP + MARGIN
    # A label brings its own room below.
    total -= 4 if spaces[-1] and not rows[-1].above else 0
    inner = columns * (width + GAP) - GAP
    sheet = Image.new("RGB", (inner + 2 * MARGIN, total), BACKGROUND)
    draw = ImageDraw.Draw(sheet)
    if caption:
        text = fitting(caption, CAPTION_SIZE, inner)
        draw.text((MARGIN, MARGIN - 2), text, fill=CAPTION_COLOUR, font=font(CAPTION_SIZE))
    y = top
    for row, space, images in zip(rows, spaces, tiles, strict=True):
        place = y + (space if row.above else 0)
        for i, tile in enumerate(images):
            x = MARGIN + i * (width + GAP)
            sheet.paste(tile, (x, place))
            if i < len(row.labels) and row.labels[i]:
                middle = (x + width / 2, y + line / 2 if row.above else place + height + line / 2)
                text = fitting(row.labels[i], LABEL_SIZE, width + GAP - 2)
                draw.text(middle, text, fill=LABEL_COLOUR, font=font(LABEL_SIZE), anchor="mm")
        y += height + space + GAP
    return sheet


def encode_gif(frames: Iterable[Image.Image], labels: Sequence[str] = (), rests: Iterable[int] = ()) -> bytes:
    """The bytes of an animation that begins anew at its end, each frame with its label below.

    ``rests`` are the frames that stay for longer.
    """
    frames = list(frames)
    drawn = [
        draw_strip([Row([frame], labels[i : i + 1])], smallest=SMALLEST_ANIMATED) for i, frame in enumerate(frames)
    ]
    waits = [REST_MS if i in set(rests) else FRAME_MS for i in range(len(drawn))]
    # One palette a frame: colours of a photograph differ from frame to frame.
    drawn = [image.quantize(256, Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE) for image in drawn]
    buffer = io.BytesIO()
    drawn[0].save(buffer, "GIF", save_all=True, append_images=drawn[1:], duration=waits, loop=0, optimize=False)
    return buffer.getvalue()
