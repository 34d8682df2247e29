"""What a file says of how a picture was made: its sidecar, or the text inside the picture."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from PIL import Image

from ddim_cli.errors import UsageError
from ddim_cli.outputs.files import File, here, is_here, source_of
from ddim_cli.outputs.folder import RUN_SCHEMA
from ddim_cli.outputs.latents import ENDING, holds_latent, open_latents
from ddim_cli.outputs.picture import CHUNK, decode
from ddim_cli.outputs.sidecar import SCHEMA, STRIP_SCHEMA, first_difference, identity, is_lossy, of_the_picture
from ddim_cli.outputs.store import is_own_picture, picture_of, read_json, sidecar_of
from ddim_cli.stores.objects import StoreError


@dataclass(frozen=True)
class Provenance:
    """What is known of a picture.

    ``told_by`` is the file that says it, a sidecar, or the picture itself; ``record`` what it says, with all that a
    sidecar has where one is there; ``picture`` its file, None if that is not there; ``unchanged`` whether its pixels
    are still those that were recorded, None if that cannot be told. Of a JPEG, whose pixels never were, it is about the
    file, and of a latent, whose ``picture`` is None, about its values.
    """

    told_by: File
    record: Mapping[str, Any]
    picture: File | None
    unchanged: bool | None


def text_inside(path: File) -> Any:
    """The JSON inside a picture. Raises UsageError where there is no picture, no text in it or no JSON in that."""
    return _parse(path, _opened(path)[1])


def strip_inside(path: File) -> dict[str, Any] | None:
    """What a strip or a sheet of several pictures says of itself; None for a file that is none of ours."""
    try:
        text = text_inside(path)
    except UsageError:
        return None
    return text if isinstance(text, dict) and text.get("schema") == STRIP_SCHEMA else None


def shows_strip(path: File, facts: Mapping[str, Any], settings: Mapping[str, Any]) -> bool:
    """Whether a strip is there, is of these settings, and says these ``facts`` of what it shows."""
    text = strip_inside(path)
    return text is not None and text.get("strip") == facts and first_difference(identity(text), settings) is None


def told_of(path: File) -> Any:
    """As `text_inside`; of a picture that has no text, as after an editor, what the sidecar beside it says."""
    _, text = _opened(path)
    sidecar = _sidecar_of(path) if text is None else None
    return _parse(path, text) if sidecar is None else sidecar


def _sidecar_of(picture: File) -> dict[str, Any] | None:
    """What the sidecar beside a picture says, if it is whole and of this picture."""
    sidecar = read_json(sidecar_of(picture)) or {}
    return sidecar if _is_whole(sidecar) and sidecar["image"].get("file") == picture.name else None


def _opened(path: File, mode: str | None = None) -> tuple[Image.Image, str | None]:
    """A picture, and the text inside, None if it has none; ``mode`` as `restored` has it. Raises UsageError."""
    try:
        return decode(source_of(path), mode)
    except FileNotFoundError:
        raise UsageError(f"{path}: no such file") from None
    except StoreError:
        raise
    except Exception:
        # Pillow meets damage with errors of many kinds.
        raise UsageError(f"{path}: cannot be read as a PNG, WebP or JPEG") from None


def _parse(path: File, text: str | None) -> Any:
    if text is None:
        raise UsageError(f"{path}: has no text {CHUNK!r} inside that says how it was made")
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        raise UsageError(f"{path}: the text {CHUNK!r} inside it does not parse") from None


def trace(path: File) -> Provenance:
    """What is known of the picture that ``path``, itself or its sidecar, stands for; or of a latent.

    A picture's own text is believed before a sidecar: it cannot have been left behind by another picture. Where it has
    none, as after an editor, the sidecar beside it is read.

    Raises:
        UsageError: for a file that is not there, or that says nothing of one picture.
    """
    if path.name.endswith(ENDING) and is_here(path):
        return _trace_latent(path)
    return _trace_picture(path) if is_own_picture(path) else _trace_sidecar(path)


def _trace_latent(path: File) -> Provenance:
    record = open_latents(here(path)).record
    if record is None:
        raise UsageError(f"{path}: has no text {CHUNK!r} inside that says how it came about")
    recorded = record.get("latent")
    sha256 = recorded.get("sha256") if isinstance(recorded, dict) else None
    return Provenance(path, record, None, holds_latent(here(path), sha256) if isinstance(sha256, str) else None)


def _trace_picture(path: File) -> Provenance:
    if path.name == "grid.png":
        raise UsageError(f"{path}: is a contact sheet; name one of the pictures beside it")
    sidecar = _sidecar_of(path)
    image, text = _opened(path, None if sidecar is None else sidecar["image"].get("mode"))
    if text is None and sidecar is not None:
        return Provenance(sidecar_of(path), sidecar, path, _is_same(sidecar, path, image))
    record = _checked(_parse(path, text), path)
    if sidecar is not None and of_the_picture(sidecar) == record:
        # It says the same, and when the picture was made.
        record = sidecar
    return Provenance(path, record, path, _is_same(record, path, image))


def _trace_sidecar(path: File) -> Provenance:
    if not path.exists():
        raise UsageError(f"{path}: no such file")
    record = read_json(path)
    if record is None:
        raise UsageError(f"{path}: cannot be read as a JSON object")
    if record.get("schema") == RUN_SCHEMA:
        raise UsageError(f"{path}: is of a whole run; name the sidecar of one picture")
    record, picture = _checked(record, path), picture_of(path, record)
    try:
        image, _ = _opened(picture, record["image"].get("mode"))
        return Provenance(path, record, picture, _is_same(record, picture, image))
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


def _checked(record: Any, path: File) -> dict[str, Any]:
    if not _is_whole(record):
        raise UsageError(f"{path}: does not say how a picture of ddim was made ({SCHEMA})")
    return record


def _is_same(record: Mapping[str, Any], picture: File, image: Image.Image) -> bool | None:
    lossy = is_lossy(record)
    recorded = record["image"].get("file_sha256" if lossy else "pixels_sha256")
    if not isinstance(recorded, str):
        return None
    return recorded == hashlib.sha256(picture.read_bytes() if lossy else image.tobytes()).hexdigest()
