"""What a file says of how a picture was made: its sidecar, or the text inside the PNG."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from ddim_cli.errors import UsageError
from ddim_cli.outputs.folder import RUN_SCHEMA
from ddim_cli.outputs.latents import ENDING, holds_latent, open_latents
from ddim_cli.outputs.picture import CHUNK
from ddim_cli.outputs.sidecar import SCHEMA, STRIP_SCHEMA, first_difference, identity, of_the_picture
from ddim_cli.outputs.store import read_json


@dataclass(frozen=True)
class Provenance:
    """What is known of a picture.

    ``told_by`` is the file that says it, a sidecar, or the PNG itself; ``record`` what it says, with all that a
    sidecar has where one is there; ``picture`` the PNG, None if that is not there; ``unchanged`` whether its pixels
    are still those that were recorded, None if that cannot be told. Of a latent, ``picture`` is None, and
    ``unchanged`` is about its values.
    """

    told_by: Path
    record: Mapping[str, Any]
    picture: Path | None
    unchanged: bool | None


def text_inside(path: Path) -> Any:
    """The JSON in the PNG's chunk. Raises UsageError where there is no PNG, no such chunk or no JSON in it."""
    return _parse(path, _open_png(path)[0])


def strip_inside(path: Path) -> dict[str, Any] | None:
    """What a strip or a sheet of several pictures says of itself; None for a file that is none of ours."""
    try:
        text = text_inside(path)
    except UsageError:
        return None
    return text if isinstance(text, dict) and text.get("schema") == STRIP_SCHEMA else None


def shows_strip(path: Path, facts: Mapping[str, Any], settings: Mapping[str, Any]) -> bool:
    """Whether a strip is there, is of these settings, and says these ``facts`` of what it shows."""
    text = strip_inside(path)
    return text is not None and text.get("strip") == facts and first_difference(identity(text), settings) is None


def told_of(path: Path) -> Any:
    """As `text_inside`; of a PNG that has no text, as after an editor, what the sidecar beside it says."""
    text, _ = _open_png(path)
    sidecar = _sidecar_of(path) if text is None else None
    return _parse(path, text) if sidecar is None else sidecar


def _sidecar_of(picture: Path) -> dict[str, Any] | None:
    """What the sidecar beside a picture says, if it is whole and of this picture."""
    sidecar = read_json(picture.with_suffix(".json")) or {}
    return sidecar if _is_whole(sidecar) and sidecar["image"].get("file") == picture.name else None


def _open_png(path: Path) -> tuple[str | None, str]:
    """The text inside a PNG, None if it has none, and the sha256 of its pixels. Raises UsageError."""
    try:
        with Image.open(path, formats=("PNG",)) as image:
            image.load()
            return image.text.get(CHUNK), hashlib.sha256(image.tobytes()).hexdigest()
    except FileNotFoundError:
        raise UsageError(f"{path}: no such file") from None
    except Exception:
        # Pillow meets damage with errors of many kinds.
        raise UsageError(f"{path}: cannot be read as a PNG") from None


def _parse(path: Path, text: str | None) -> Any:
    if text is None:
        raise UsageError(f"{path}: has no text {CHUNK!r} inside that says how it was made")
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        raise UsageError(f"{path}: the text {CHUNK!r} inside it does not parse") from None


def trace(path: Path) -> Provenance:
    """What is known of the picture that ``path``, a PNG or a sidecar, stands for; or of a latent.

    A PNG's own text is believed before a sidecar: it cannot have been left behind by another picture. Where it has
    none, as after an editor, the sidecar beside it is read.

    Raises:
        UsageError: for a file that is not there, or that says nothing of one picture.
    """
    if path.name.endswith(ENDING):
        return _trace_latent(path)
    return _trace_picture(path) if path.suffix.lower() == ".png" else _trace_sidecar(path)


def _trace_latent(path: Path) -> Provenance:
    record = open_latents(path).record
    if record is None:
        raise UsageError(f"{path}: has no text {CHUNK!r} inside that says how it came about")
    recorded = record.get("latent")
    sha256 = recorded.get("sha256") if isinstance(recorded, dict) else None
    return Provenance(path, record, None, holds_latent(path, sha256) if isinstance(sha256, str) else None)


def _trace_picture(path: Path) -> Provenance:
    if path.name == "grid.png":
        raise UsageError(f"{path}: is a contact sheet; name one of the pictures beside it")
    text, pixels = _open_png(path)
    sidecar = _sidecar_of(path)
    if text is None and sidecar is not None:
        return Provenance(path.with_suffix(".json"), sidecar, path, _is_same(sidecar, pixels))
    record = _checked(_parse(path, text), path)
    if sidecar is not None and of_the_picture(sidecar) == record:
        # It says the same, and when the picture was made.
        record = sidecar
    return Provenance(path, record, path, _is_same(record, pixels))


def _trace_sidecar(path: Path) -> Provenance:
    if not path.exists():
        raise UsageError(f"{path}: no such file")
    record = read_json(path)
    if record is None:
        raise UsageError(f"{path}: cannot be read as a JSON object")
    if record.get("schema") == RUN_SCHEMA:
        raise UsageError(f"{path}: is of a whole run; name the sidecar of one picture")
    record, picture = _checked(record, path), path.with_suffix(".png")
    try:
        return Provenance(path, record, picture, _is_same(record, _open_png(picture)[1]))
    except UsageError:
        # The sidecar still holds, whatever became of the picture.
        return Provenance(path, record, picture if picture.exists() else None, None)


def _is_whole(record: Any) -> bool:
    sections = ("image", "sampling", "scheduler", "model", "runtime", "config")
    return (
        isinstance(record, dict)
        and record.get("schema") in (SCHEMA, STRIP_SCHEMA)
        and all(isinstance(record.get(section), dict) for section in sections)
    )


def _checked(record: Any, path: Path) -> dict[str, Any]:
    if not _is_whole(record):
        raise UsageError(f"{path}: does not say how a picture of ddim was made ({SCHEMA})")
    return record


def _is_same(record: Mapping[str, Any], pixels_sha256: str) -> bool | None:
    recorded = record["image"].get("pixels_sha256")
    return recorded == pixels_sha256 if isinstance(recorded, str) else None
