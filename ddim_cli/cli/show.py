"""``--show``: show a contact sheet in the terminal."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from importlib.util import find_spec
from typing import TYPE_CHECKING

from ddim_cli.cli import console
from ddim_cli.errors import UsageError, missing_extra

if TYPE_CHECKING:
    from PIL import Image
    from rich.segment import Segments

    from ddim_cli.outputs.files import File

# A character shows two pixels: more or smaller pictures than these could not be recognised.
MOST_IN_BLOCKS, FEWEST_ACROSS, SMALLEST, LARGEST = 16, 4, 16, 48


def check_show(as_json: bool) -> None:
    """Raise UsageError if nothing could be shown in the end, before minutes of sampling."""
    if as_json:
        raise UsageError("--show and --json both want stdout; give one")
    if find_spec("textual_image") is None:
        raise missing_extra("--show", "textual-image", "show")


def show_pictures(paths: Sequence[File]) -> None:
    """Print the first pictures as one sheet: in pixels where the terminal takes them, else in half blocks.

    Raises:
        RunError: for a picture that cannot be read.
    """
    screen = console.stdout()
    if not screen.is_terminal:
        console.warn("--show: stdout is not a terminal, so nothing is shown")
        return
    from ddim_cli.outputs.contact_sheet import MOST_IMAGES, contact_sheet
    from ddim_cli.outputs.picture import read_own

    in_pixels = pixel_image()
    shown = [read_own(path) for path in paths[: MOST_IMAGES if in_pixels else MOST_IN_BLOCKS]]
    if in_pixels:
        try:
            screen.print(in_pixels(contact_sheet(shown), width="auto", height="auto"))
        except Exception:
            # Some terminals take pixels, and report a size that does not fit them.
            in_pixels, shown = None, shown[:MOST_IN_BLOCKS]
    if not in_pixels:
        screen.print(half_blocks(block_sheet(shown, screen.width)), end="")
    if len(paths) > len(shown):
        screen.print(f"the first {len(shown)} of {len(paths):,} images", style="dim")


def pixel_image() -> type | None:
    """The class of textual-image that shows pixels in this terminal; None where it takes none, or does not answer."""
    # It logs a traceback where a terminal does not tell its size, and goes on with one that it assumes.
    logging.getLogger("textual_image").setLevel(logging.ERROR)
    try:
        # The terminal is asked while this is imported; where it cannot be, the errors are of many kinds.
        from textual_image import renderable
    except Exception:
        return None
    return renderable.Image if renderable.Image in (renderable.SixelImage, renderable.TGPImage) else None


def half_blocks(sheet: Image.Image) -> Segments:
    """An RGB picture of an even number of rows, two pixels a character: its colour above, its background below.

    textual-image has this too, but asks the terminal for the size of a character, and some do not answer.
    """
    from rich.color import Color
    from rich.segment import Segment, Segments
    from rich.style import Style

    values = sheet.tobytes()

    def pixel(x: int, y: int) -> Color:
        start = 3 * (y * sheet.width + x)
        return Color.from_rgb(*values[start : start + 3])

    rows = []
    for y in range(0, sheet.height, 2):
        rows += [Segment("▀", Style(color=pixel(x, y), bgcolor=pixel(x, y + 1))) for x in range(sheet.width)]
        rows.append(Segment.line())
    return Segments(rows)


def block_sheet(images: Sequence[Image.Image], columns: int) -> Image.Image:
    """A sheet of images of one size, RGB, at most ``columns`` pixels wide and of an even number of rows."""
    from PIL import Image

    from ddim_cli.outputs.contact_sheet import BACKGROUND
    from ddim_cli.outputs.strip import enlarged

    room = max(SMALLEST, columns // FEWEST_ACROSS - 1)
    side = min(max(images[0].size), room, LARGEST, columns)
    tiles = [enlarged(image, 1) for image in images]
    for tile in tiles:
        tile.thumbnail((side, side), Image.Resampling.LANCZOS)
    width, height = tiles[0].width + 1, tiles[0].height + 1
    across = min(len(tiles), max(1, (columns + 1) // width))
    down = -(-len(tiles) // across)
    sheet = Image.new("RGB", (across * width - 1, down * height + down * height % 2), BACKGROUND)
    for i, tile in enumerate(tiles):
        sheet.paste(tile, (i % across * width, i // across * height))
    return sheet
