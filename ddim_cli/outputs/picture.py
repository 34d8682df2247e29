"""Picture files that know how they were made: each holds the sidecar's text.

A PNG has it in an iTXt chunk named ``ddim``, a WebP and a JPEG in XMP; see `embedded`.
"""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
from PIL import Image, PngImagePlugin

from ddim_cli.errors import ConfigError, RunError
from ddim_cli.outputs import embedded
from ddim_cli.outputs.files import File, source_of
from ddim_cli.outputs.parameters import CHUNK as PARAMETERS
from ddim_cli.stores.objects import StoreError

if TYPE_CHECKING:
    from ddim_cli.config.schema import OutputSettings

CHUNK = "ddim"
# The formats that pictures are written in, with the ending of their files, and the name that Pillow has for them.
FORMATS = {"png": (".png", "PNG"), "webp": (".webp", "WEBP"), "jpg": (".jpg", "JPEG")}
OWN_ENDINGS = tuple(ending for ending, _ in FORMATS.values())
# The longest side that a format has room for, where pictures could be larger.
_LONGEST = {"webp": 16383, "jpg": 65500}
# Of lossless WebP: more effort takes many times as long, and saves a percent or two.
_EFFORT: dict[str, Any] = {"lossless": True, "exact": True, "method": 1, "quality": 0}
# Files with these endings are pictures, but not those of this tool that show several at once.
ENDINGS = frozenset((".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"))
_SHEETS, _STRIPS = frozenset(("grid", "strip", "inverted", "edited", "sweep")), (".x0", ".xt")


def is_picture_file(path: Path) -> bool:
    """Whether a file of a folder is a picture by its name; sheets, strips and animations of this tool are none."""
    return is_picture_name(path) and path.is_file()


def is_picture_name(path: PurePath) -> bool:
    """As `is_picture_file`, whatever is there."""
    ending = path.suffix.lower()
    sheet = ending in (".png", ".gif") and (path.stem in _SHEETS or path.stem.endswith(_STRIPS))
    return ending in ENDINGS and not path.name.startswith(".") and not sheet


def to_image(pixels: np.ndarray) -> Image.Image:
    """uint8 [H, W, C] with C = 1, 3 or 4 -> a PIL image of mode L, RGB or RGBA."""
    return Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels)


def to_pixels(image: Image.Image) -> np.ndarray:
    """`to_image` undone: uint8 [H, W, C] of a PIL image of mode L, RGB or RGBA."""
    pixels = np.asarray(image)
    return pixels[:, :, None] if pixels.ndim == 2 else pixels


def read_pixels(path: File) -> np.ndarray:
    """A picture's pixels, uint8 [H, W, C]. Raises OSError, SyntaxError or ValueError for one that cannot be read."""
    with Image.open(source_of(path)) as image:
        return to_pixels(restored(image))


@dataclass(frozen=True)
class Encoding:
    """How pictures become files: ``format`` is "png", "webp" (always lossless) or "jpg"; ``quality`` is of JPEG alone.

    Two encodings are equal where they give the same bytes.
    """

    format: str = "png"
    quality: int = 95

    def __post_init__(self) -> None:
        if self.is_lossless:
            # It bears on nothing.
            object.__setattr__(self, "quality", Encoding.quality)

    @classmethod
    def of(cls, settings: OutputSettings) -> Encoding:
        """The encoding that the section [output] asks for."""
        return cls(settings.image_format, settings.quality)

    @property
    def ending(self) -> str:
        """The ending of its files: ".png", ".webp" or ".jpg"."""
        return FORMATS[self.format][0]

    @property
    def is_lossless(self) -> bool:
        """Whether a file has the pixels that it was made of."""
        return self.format != "jpg"

    @property
    def about(self) -> dict[str, Any]:
        """What a sidecar's ``image`` says of it: nothing where the pixels in the file are those of the hash."""
        return {} if self.is_lossless else {"encoding": self.format, "quality": self.quality}

    @property
    def settings(self) -> dict[str, Any]:
        """What the section ``output`` of a run.json says of it; empty for PNG, as it always was."""
        if self.format == "png":
            return {}
        return {"image_format": self.format, **({} if self.is_lossless else {"quality": self.quality})}

    @property
    def suffix(self) -> str:
        """What tells a folder of such pictures by its name: nothing of PNGs, "-webp", "-jpg95"."""
        return "" if self.format == "png" else f"-{self.format}{'' if self.is_lossless else self.quality}"

    @classmethod
    def told_by(cls, record: Mapping[str, Any]) -> Encoding:
        """The encoding of the pictures that a run.json, or of the one that a sidecar is of."""
        image, output = record.get("image"), record.get("output")
        if isinstance(image, Mapping):
            ending = ending_of(image.get("file"))
            told = {"image_format": ending[1:], "quality": image.get("quality")}
        else:
            told = dict(output) if isinstance(output, Mapping) else {}
        name, quality = told.get("image_format"), told.get("quality")
        return cls(
            name if isinstance(name, str) and name in FORMATS else "png",
            quality if type(quality) is int else cls.quality,
        )

    def check(self, shape: tuple[int, int, int]) -> None:
        """ConfigError where pictures of this shape (channels, height, width) have no room in such files."""
        channels, *sides = shape
        if channels == 4 and not self.is_lossless:
            raise ConfigError(
                'output.image_format = "jpg": JPEG has no transparency, and the pictures of this model have; take png '
                "or webp"
            )
        longest = _LONGEST.get(self.format)
        if longest is not None and max(sides) > longest:
            raise ConfigError(
                f'output.image_format = "{self.format}": has room for {longest:,} pixels a side, and these pictures '
                f"have {max(sides):,}; take png"
            )

    def encode(self, image: Image.Image, text: str | None = None, parameters: str | None = None) -> bytes:
        """The bytes of a file; the same image and texts give the same bytes.

        Args:
            image: of mode L, RGB or RGBA; a JPEG takes no RGBA.
            text: the sidecar's text (JSON); see `text_inside`.
            parameters: the text of `parameters.parameters_text`, where the tools look for it that read it. A JPEG has
                no room for one of more than 32,000 characters, and goes without.
        """
        if self.format == "png":
            return encode_png(image, text, parameters=parameters)
        buffer = io.BytesIO()
        exif = b"" if parameters is None else embedded.user_comment(parameters)
        if self.format == "webp":
            image.save(buffer, "WEBP", xmp=b"" if text is None else embedded.packet(text), exif=exif, **_EFFORT)
        else:
            extra = b"" if text is None else embedded.jpeg_segments(text)
            exif = embedded.EXIF + exif if exif and len(exif) <= embedded.MOST_EXIF else b""
            # All of the colour: what is lost is then known from the tables in the file.
            image.save(buffer, "JPEG", quality=self.quality, subsampling=0, extra=extra, exif=exif)
        return buffer.getvalue()


def ending_of(file: Any) -> str:
    """The ending of a picture that a sidecar names; that of a PNG where it names none."""
    return next((ending for ending in OWN_ENDINGS if isinstance(file, str) and file.endswith(ending)), ".png")


def text_inside(image: Image.Image) -> str | None:
    """The text that says how a picture was made; None for one that has none. Loads the picture."""
    image.load()
    if image.format == "PNG":
        return image.text.get(CHUNK)  # type: ignore[attr-defined]  # of a PNG
    return embedded.text_of(image)


def parameters_inside(image: Image.Image) -> str | None:
    """The text that other image tools read; None for a picture that has none. Loads the picture."""
    image.load()
    if image.format == "PNG":
        return image.text.get(PARAMETERS)  # type: ignore[attr-defined]  # of a PNG
    return embedded.comment_of(image)


def restored(image: Image.Image, mode: str | None = None) -> Image.Image:
    """A picture in the mode it was made in: WebP has no grey, and leaves out an alpha that is opaque everywhere.

    ``mode`` is what a sidecar records, else what the text inside says. Where the pixels are not of that mode, they
    stay as they are.
    """
    if image.format != "WEBP" or image.mode != "RGB":
        return image
    mode = mode or _mode_inside(image)
    if mode == "RGBA":
        return image.convert(mode)
    if mode == "L":
        red, green, blue = (band.tobytes() for band in image.split())
        return image.getchannel(0) if red == green == blue else image
    return image


def _mode_inside(image: Image.Image) -> str | None:
    """The mode that the text inside a picture says it has."""
    with contextlib.suppress(ValueError, RecursionError, LookupError, TypeError):
        return json.loads(text_inside(image) or "")["image"]["mode"]
    return None


def decode(
    file: Path | str | BinaryIO, mode: str | None = None, formats: Collection[str] = tuple(FORMATS)
) -> tuple[Image.Image, str | None]:
    """A picture of one of ``formats``, as `restored`, and the text inside. Raises errors of many kinds for others."""
    with Image.open(file, formats=[FORMATS[name][1] for name in formats]) as image:
        text = text_inside(image)
        return restored(image, mode).copy(), text


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


def read_own(path: File) -> Image.Image:
    """A picture that this tool has written, for a sheet of them. Raises RunError with the remedy if it is damaged."""
    try:
        with Image.open(source_of(path)) as image:
            return restored(image).copy()
    except StoreError:
        raise
    except (OSError, SyntaxError, ValueError):
        raise RunError(f"{path}: cannot be read as a picture; delete it, and the same command makes it again") from None
