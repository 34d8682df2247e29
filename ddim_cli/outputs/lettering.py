"""Text on pictures: its font, its colours, and what of it fits."""

from __future__ import annotations

from functools import cache

from PIL import ImageFont, features

MARGIN = 10
LABEL_SIZE, CAPTION_SIZE = 13, 15
LABEL_COLOUR, CAPTION_COLOUR = (212, 212, 216), (244, 244, 245)


@cache
def font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size) if features.check("freetype2") else ImageFont.load_default()


def fitting(text: str, size: int, width: int) -> str:
    """``text``, or as much of it as is ``width`` pixels wide, its middle left out."""
    shown, keep = text, len(text)
    while font(size).getlength(shown) > width and keep > 1:
        keep -= 1
        shown = f"{text[: (keep + 1) // 2]}..{text[len(text) - keep // 2 :]}"
    return shown


def wrapped(text: str, size: int, width: int, most: int) -> list[str]:
    """``text`` in as few lines as have room for it in ``width`` pixels, at most so many; what is beyond is left out."""
    lines = [""]
    for word in text.split(" "):
        longer = f"{lines[-1]} {word}" if lines[-1] else word
        if lines[-1] and len(lines) < most and font(size).getlength(longer) > width:
            lines.append(word)
        else:
            lines[-1] = longer
    return [fitting(line, size, width) for line in lines]


def line_height(size: int) -> int:
    return size + 7
