"""The sheet of a sweep: a few pictures of every cell in a table, its rows and columns named."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image, ImageDraw

from ddim_cli.outputs.contact_sheet import BACKGROUND, GAP
from ddim_cli.outputs.lettering import (
    CAPTION_COLOUR,
    CAPTION_SIZE,
    LABEL_COLOUR,
    LABEL_SIZE,
    MARGIN,
    fitting,
    font,
    line_height,
    wrapped,
)
from ddim_cli.outputs.strip import enlarged

# The longer side of a picture on the sheet: one that is smaller is enlarged by whole pixels, a larger one reduced.
SMALLEST, LARGEST = 64, 192
# A cell shows so many pictures, or fewer where the sheet would get too wide to be read.
MOST_A_SIDE, MOST_IN_A_ROW = 3, 8
WIDEST = 2400
# Of a column's name.
MOST_LINES = 3


@dataclass(frozen=True)
class Block:
    """The pictures of one cell, and what is said below them."""

    images: Sequence[Image.Image]
    note: str = ""


@dataclass(frozen=True)
class Panel:
    """Blocks in rows and columns, with a label a row and a column: "" for none. ``heading`` is for one of several."""

    blocks: Sequence[Sequence[Block]]
    columns: Sequence[str]
    rows: Sequence[str]
    heading: str = ""


def _tile(image: Image.Image) -> Image.Image:
    tile = enlarged(image, SMALLEST)
    tile.thumbnail((LARGEST, LARGEST), Image.Resampling.LANCZOS)
    return tile


def pictures_in_a_cell(size: tuple[int, int], columns: int, several_columns: bool, most: int) -> tuple[int, int]:
    """How many pictures of ``size`` a cell shows, across and down: a square of them, or one row where cells are rows.

    ``most`` is how many there are.
    """
    width = _tile(Image.new("L", size)).width + GAP
    if not several_columns:
        return max(1, min(MOST_IN_A_ROW, most, WIDEST // width)), 1
    side = next((k for k in range(MOST_A_SIDE, 1, -1) if k * k <= most and k * width * columns <= WIDEST), 1)
    return side, side


def draw_sweep(panels: Sequence[Panel], caption: str, across: int) -> Image.Image:
    """The sheet, RGB: each panel a table of blocks under a caption, ``across`` pictures side by side in a block."""
    tiles = [[[[_tile(i) for i in b.images] for b in row] for row in p.blocks] for p in panels]
    every = [tile for panel in tiles for row in panel for images in row for tile in images]
    width, height = max(tile.width for tile in every), max(tile.height for tile in every)
    line = line_height(LABEL_SIZE)
    down = max(-(-len(images) // across) for panel in tiles for row in panel for images in row)
    noted = any(block.note for panel in panels for row in panel.blocks for block in row)
    block = (across * width + (across - 1) * 2, down * height + (down - 1) * 2 + (line if noted else 0))
    left = MARGIN + max(round(font(LABEL_SIZE).getlength(text)) for p in panels for text in ("", *p.rows)) + MARGIN
    columns = max(len(row) for panel in panels for row in panel.blocks)
    total = left + columns * (block[0] + GAP) + MARGIN - GAP
    names = [[wrapped(text, LABEL_SIZE, block[0] + GAP, MOST_LINES) for text in p.columns] for p in panels]
    lines = [
        max(map(len, of_panel), default=0) if any(p.columns) else 0 for p, of_panel in zip(panels, names, strict=True)
    ]
    heads = [(line if p.heading else 0) + line * count for p, count in zip(panels, lines, strict=True)]
    bodies = [len(p.blocks) * (block[1] + GAP) for p in panels]
    sheet = Image.new(
        "RGB", (total, MARGIN + line_height(CAPTION_SIZE) + 3 + sum(heads) + sum(bodies) + MARGIN - GAP), BACKGROUND
    )
    draw = ImageDraw.Draw(sheet)

    def write(place: tuple[float, float], text: str, room: int, anchor: str, colour: Any = LABEL_COLOUR) -> None:
        draw.text(place, fitting(text, LABEL_SIZE, room), fill=colour, font=font(LABEL_SIZE), anchor=anchor)

    title = fitting(caption, CAPTION_SIZE, total - 2 * MARGIN)
    draw.text((MARGIN, MARGIN - 2), title, fill=CAPTION_COLOUR, font=font(CAPTION_SIZE))
    y = MARGIN + line_height(CAPTION_SIZE) + 3
    for panel, of_panel, head, named in zip(panels, tiles, heads, names, strict=True):
        if panel.heading:
            write((left, y + line / 2), panel.heading, total - left, "lm", CAPTION_COLOUR)
        for column, texts in enumerate(named):
            x = left + column * (block[0] + GAP)
            for above, text in enumerate(reversed(texts)):
                write((x + block[0] / 2, y + head - line / 2 - above * line), text, block[0] + GAP, "mm")
        y += head
        for label, row, images in zip(panel.rows, panel.blocks, of_panel, strict=True):
            inside = block[1] - (line if noted else 0)
            write((left - MARGIN, y + inside / 2), label, left - 2 * MARGIN, "rm")
            for column, (own, of_block) in enumerate(zip(row, images, strict=True)):
                x = left + column * (block[0] + GAP)
                for i, tile in enumerate(of_block):
                    sheet.paste(tile, (x + i % across * (width + 2), y + i // across * (height + 2)))
                if own.note:
                    write((x + block[0] / 2, y + inside + line / 2), own.note, block[0] + GAP, "mm")
            y += block[1] + GAP
    return sheet
