"""``--show``: a contact sheet in the terminal."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from ddim_cli.cli import console
from ddim_cli.errors import UsageError, missing_extra

if TYPE_CHECKING:
    from PIL import Image

# Of a sheet of half blocks, two pixels a character: so few pictures that each can be recognised.
MOST_IN_BLOCKS, FEWEST_ACROSS, SMALLEST, LARGEST = 16, 4, 16, 48


def check_show(as_json: bool) -> None:
    """UsageError if nothing could be shown in the end: better now than after minutes."""
    if as_json:
        raise UsageError("--show and --json both want stdout; give one")
    if find_spec("textual_image") is None:
        raise missing_extra("--show", "textual-image", "show")


def show_pictures(paths: Sequence[Path]) -> None:
    """The first pictures as one sheet on stdout: in pixels where the terminal takes them, else in half blocks.

    Raises:
        RunError: for a picture that cannot be read.
    """
    screen = console.stdout()
    if not screen.is_terminal:
        console.warn("--show: stdout is no terminal, so nothing is shown")
        return
    from textual_image.renderable import HalfcellImage
    from textual_image.renderable import Image as TerminalImage

    from ddim_cli.outputs.contact_sheet import MOST_IMAGES, contact_sheet
    from ddim_cli.outputs.picture import read_own

    blocks = TerminalImage is HalfcellImage
    shown = [read_own(path) for path in paths[: MOST_IN_BLOCKS if blocks else MOST_IMAGES]]
    if blocks:
        sheet = block_sheet(shown, screen.width)
        screen.print(HalfcellImage(sheet, width=sheet.width, height=-(-sheet.height // 2)))
    else:
        screen.print(TerminalImage(contact_sheet(shown), width="auto", height="auto"))
    if len(paths) > len(shown):
        screen.print(f"the first {len(shown)} of {len(paths):,} images", style="dim")


def block_sheet(images: Sequence[Image.Image], columns: int) -> Image.Image:
    """Images of one size in reading order, RGB, at most ``columns`` pixels wide and of an even number of rows."""
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
