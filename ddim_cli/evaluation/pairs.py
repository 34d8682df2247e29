"""Check a picture against what its sidecar says, and a strip against its own text."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Mapping, Sequence
from typing import Any

from PIL import Image

from ddim_cli.outputs.figures import shortened
from ddim_cli.outputs.files import File, here
from ddim_cli.outputs.latents import holds_latent
from ddim_cli.outputs.picture import CHUNK, decode
from ddim_cli.outputs.sidecar import SCHEMA, STRIP_SCHEMA, first_difference, identity, is_lossy, of_the_picture
from ddim_cli.outputs.store import picture_of, read_json, sidecar_of
from ddim_cli.stores.objects import StoreError


def check_pair(
    seed: int | None, sidecars: Sequence[File], pictures: Sequence[File], settings: Mapping[str, Any] | None
) -> str | None:
    """What is wrong with the pair of ``seed``, whose files are these; None for nothing."""
    if not sidecars and not pictures:
        return "is missing"
    if not sidecars:
        return "has no sidecar"
    if len(sidecars) > 1 or len(pictures) > 1:
        return "is there twice, in the folder and in a folder of 1,000 seeds"
    if [sidecar_of(picture) for picture in pictures] != list(sidecars):
        return "is missing, its sidecar is there"
    sidecar = read_json(sidecars[0])
    if sidecar is None or sidecar.get("schema") != SCHEMA:
        return "has a sidecar that is not one of ddim, or does not parse"
    try:
        return check_sidecar(seed, sidecar, settings) or check_picture(pictures[0], sidecar)
    except (KeyError, TypeError, AttributeError):
        return "has a sidecar in which something is missing"


def check_unnumbered(path: File) -> str | None:
    """What is wrong with the pair of a sidecar that is of no seed, and with the latent that lies beside it."""
    sidecar = read_json(path) or {}
    picture = picture_of(path, sidecar)
    if not picture.exists():
        return "is missing, its sidecar is there"
    try:
        latent = sidecar["inversion"]["latent"] if "inversion" in sidecar else None
        if latent is not None and not holds_latent(here(path.parent) / latent["file"], latent["sha256"]):
            return f"its latent {latent['file']} is missing, or is not what its sidecar says"
        return check_picture(picture, sidecar)
    except (KeyError, TypeError, AttributeError):
        return "has a sidecar in which something is missing"


def check_strip(seed: int, path: File, settings: Mapping[str, Any] | None) -> str | None:
    """What is wrong with a strip, which has no sidecar: by its own text and pixels."""
    found = decoded(path.read_bytes(), path.suffix)
    if found is None:
        return "does not decode"
    image, text = found
    inside = parsed(text)
    if not isinstance(inside, dict) or inside.get("schema") != STRIP_SCHEMA:
        return f"has no text {CHUNK!r} inside of a strip of ddim trajectory"
    try:
        wrong = _check_pixels(image, inside["image"], "text")
        return wrong or check_sidecar(seed, inside, settings, "text")
    except (KeyError, TypeError, AttributeError):
        return "has a text in which something is missing"


def check_sidecar(
    seed: int | None, sidecar: Mapping[str, Any], settings: Mapping[str, Any] | None, called: str = "sidecar"
) -> str | None:
    if sidecar["seed"] != seed:
        return f"has a {called} that says seed {sidecar['seed']}"
    difference = first_difference(identity(sidecar), settings) if settings is not None else None
    if difference is not None:
        key, *values = difference
        actual, expected = (shortened(json.dumps(value), 40) for value in values)
        return f"was made with {key} = {actual}, the run with {expected}"
    return None


def check_picture(path: File, sidecar: Mapping[str, Any]) -> str | None:
    """What is wrong with a picture, held against its sidecar. Raises as `check_bytes`."""
    try:
        data = path.read_bytes()
    except StoreError:
        raise
    except OSError:
        return "does not decode"
    return check_bytes(data, path.suffix, sidecar)


def check_bytes(data: bytes, ending: str, sidecar: Mapping[str, Any]) -> str | None:
    """As `check_picture`, of the bytes of a file with this ending.

    Raises KeyError, TypeError or AttributeError for a sidecar in which something is missing.
    """
    facts, lossy = sidecar["image"], is_lossy(sidecar)
    found = decoded(data, ending, facts["mode"])
    if found is None:
        return "does not decode"
    image, text = found
    wrong = _check_pixels(image, facts, "sidecar", lossy)
    if wrong is not None:
        return wrong
    inside = parsed(text)
    if inside is None:
        return f"has no text {CHUNK!r} inside that parses"
    if inside != of_the_picture(sidecar):
        return "says something else inside than its sidecar"
    if len(data) != facts["bytes"]:
        return f"has {len(data):,} bytes, its sidecar says {facts['bytes']:,}"
    if lossy and hashlib.sha256(data).hexdigest() != facts["file_sha256"]:
        return "is not the file that its sidecar says"
    return None


def _check_pixels(image: Image.Image, facts: Mapping[str, Any], called: str, lossy: bool = False) -> str | None:
    """What of a picture is not as ``facts`` say, which are of the ``called``, a sidecar or a text inside.

    Of one that is ``lossy``, its pixels are not looked at.
    """
    width, height = image.size
    if (image.mode, width, height) != (facts["mode"], facts["width"], facts["height"]):
        said = f"{facts['width']} x {facts['height']} {facts['mode']}"
        return f"is {width} x {height} {image.mode}, its {called} says {said}"
    if not lossy and hashlib.sha256(image.tobytes()).hexdigest() != facts["pixels_sha256"]:
        return f"has other pixels than its {called} says"
    return None


def parsed(text: str | bytes | None) -> Any:
    """The JSON in a text; None where there is none."""
    try:
        return json.loads(text) if text is not None else None
    except (ValueError, RecursionError):
        return None


def decoded(data: bytes, ending: str, mode: str | None = None) -> tuple[Image.Image, str | None] | None:
    """A picture in the ``mode`` that is recorded, and the text inside; None if it does not decode."""
    try:
        return decode(io.BytesIO(data), mode, (ending[1:],))
    except Exception:
        # Pillow meets damage with errors of many kinds.
        return None
