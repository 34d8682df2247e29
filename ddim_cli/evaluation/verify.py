"""Check an output folder against its own records: nothing missing, nothing extra, nothing changed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from ddim_cli.config.seeds import parse_seeds
from ddim_cli.errors import UsageError
from ddim_cli.outputs.figures import shortened
from ddim_cli.outputs.folder import RUN_SCHEMA, OutputFolder
from ddim_cli.outputs.latents import holds_latent
from ddim_cli.outputs.picture import CHUNK
from ddim_cli.outputs.row_plan import RowPlan, is_of_rows
from ddim_cli.outputs.sidecar import (
    SCHEMA,
    STRIP_SCHEMA,
    first_difference,
    identity,
    is_row,
    of_the_picture,
    row_settings,
)
from ddim_cli.outputs.store import read_json
from ddim_cli.outputs.sweep_manifest import is_sweep

_NOT_NAMED = "items.jsonl does not name it"


class Problem(NamedTuple):
    """What is wrong with a file, named as it lies in the folder; ``seed`` is None for files of the whole run."""

    file: str
    seed: int | None
    text: str


class Verified(NamedTuple):
    """How many ``images`` were checked, those of run.json, those of no seed and strips; and what is wrong."""

    images: int
    problems: tuple[Problem, ...]


def verify(path: Path, on_image: Callable[[int, int], None] = lambda done, total: None) -> Verified:
    """Check every pair of the folder ``path``.

    The pictures of a job file's rows are those that items.jsonl names, each with the settings that it has there.
    Pictures of no seed, which are frames, reconstructions and pictures from latents, are checked against their own
    sidecars, and the strips of a trajectory against the text inside them; no run.json says which of them belong there.

    ``on_image`` is called with the number of images checked and their total.

    Raises:
        UsageError: for a path that is not an output folder.
    """
    folder = OutputFolder(path)
    if not path.is_dir():
        raise UsageError(f"{path}: there is no such folder" if not path.exists() else f"{path}: is not a folder")
    if is_sweep(path):
        raise UsageError(f"{path}: is the folder of a sweep; name the folder of one of its cells")
    sidecars, pictures = folder.numbered("json"), folder.numbered("png")
    rows = RowPlan(folder) if is_of_rows(folder.read_manifest()) else None
    planned = frozenset(line["name"] for line in rows or ())
    unnumbered, strips = [p for p in folder.unnumbered_pairs() if p.stem not in planned], folder.strips()
    others = len(unnumbered) + len(strips)
    if not folder.manifest.exists() and not sidecars and not pictures and not others:
        raise UsageError(f"{path}: holds neither run.json nor numbered pictures; it is not an output folder of ddim")
    problems: list[Problem] = []
    only_others = others and not (folder.manifest.exists() or sidecars or pictures)
    seeds: tuple[int, ...] = ()
    settings: dict[str, Any] | None = None
    if rows is not None:
        settings = _settings_of_rows(rows, len(planned), problems)
    elif not only_others:
        seeds, settings = _plan(folder, problems)
    total = len(seeds) + len(planned) + others

    def checked() -> Iterator[tuple[Path, int | None, str | None]]:
        yield from _checked_rows(folder, rows or (), settings or {})
        for seed in seeds:
            text = check_pair(seed, sidecars.get(seed, []), pictures.get(seed, []), settings)
            yield folder.picture(seed) if text is not None else path, seed, text
        yield from ((sidecar.with_suffix(".png"), None, _check_unnumbered(sidecar)) for sidecar in unnumbered)
        yield from (
            (strip, seed, _check_strip(seed, strip, settings if rows is None else None)) for seed, _, strip in strips
        )

    for done, (file, number, text) in enumerate(checked(), start=1):
        if text is not None:
            problems.append(Problem(file.relative_to(path).as_posix(), number, text))
        on_image(done, total)
    if rows is not None:
        numbers = frozenset(int(name) for name in planned if name.isdecimal())
        problems += _extra(folder, numbers, _NOT_NAMED, sidecars, pictures)
        extra = (path.with_suffix(".png").name for path in unnumbered if is_row(read_json(path) or {}))
        problems += [Problem(name, None, f"is extra: {_NOT_NAMED}") for name in extra]
    elif settings is not None:
        problems += _extra(folder, frozenset(seeds), "run.json does not name its seed", sidecars, pictures)
    if folder.grid.exists() and _decoded(str(folder.grid)) is None:
        problems.append(Problem("grid.png", None, "does not decode"))
    return Verified(total, tuple(problems))


def _plan(folder: OutputFolder, problems: list[Problem]) -> tuple[tuple[int, ...], dict[str, Any] | None]:
    """The seeds that belong here and the settings of all of them; without a run.json, what is there and None."""
    manifest = folder.read_manifest()
    try:
        if manifest is None or manifest.get("schema") != RUN_SCHEMA:
            raise ValueError("is missing, or is not one of ddim")
        return tuple(sorted(parse_seeds(manifest["seeds"]))), identity(manifest)
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        reason = str(error) if isinstance(error, ValueError) else "names no seeds"
        problems.append(Problem("run.json", None, f"{reason}; nobody can tell which images belong here"))
        return tuple(sorted({*folder.numbered("json"), *folder.numbered("png")})), None


def _settings_of_rows(rows: RowPlan, planned: int, problems: list[Problem]) -> dict[str, Any]:
    """The settings that all rows share."""
    manifest = rows.folder.read_manifest() or {}
    if manifest["items"] != planned:
        text = (
            f"names {planned:,} rows, and run.json says {manifest['items']}; nobody can tell which images belong here"
        )
        problems.append(Problem(rows.folder.items.name, None, text))
    return identity(manifest)


def _checked_rows(
    folder: OutputFolder, rows: Iterable[Mapping[str, Any]], settings: Mapping[str, Any]
) -> Iterator[tuple[Path, int | None, str | None]]:
    """The file, the seed and what is wrong, of each planned row."""
    sidecars, pictures = folder.named("json"), folder.named("png")
    for line in rows:
        name, seed = line["name"], line.get("seed")
        own = {**settings, **row_settings(line)}
        text = check_pair(seed, sidecars.get(name, []), pictures.get(name, []), own)
        yield folder.picture(name) if text is not None else folder.path, seed, text


def _extra(
    folder: OutputFolder, planned: frozenset[int], why: str, *kinds: Mapping[int, list[str]]
) -> Iterator[Problem]:
    for files in kinds:
        for seed, paths in files.items():
            if seed not in planned:
                for file in paths:
                    name = Path(file).relative_to(folder.path).as_posix()
                    yield Problem(name, seed, f"is extra: {why}")


def check_pair(
    seed: int | None, sidecars: list[str], pictures: list[str], settings: Mapping[str, Any] | None
) -> str | None:
    """What is wrong with the pair of ``seed``, whose files are these; None for nothing."""
    if not sidecars and not pictures:
        return "is missing"
    if not sidecars:
        return "has no sidecar"
    if len(sidecars) > 1 or len(pictures) > 1:
        return "is there twice, in the folder and in a folder of 1,000 seeds"
    picture = f"{sidecars[0].removesuffix('.json')}.png"
    if pictures != [picture]:
        return "is missing, its sidecar is there"
    sidecar = read_json(sidecars[0])
    if sidecar is None or sidecar.get("schema") != SCHEMA:
        return "has a sidecar that is not one of ddim, or does not parse"
    try:
        return _check_sidecar(seed, sidecar, settings) or _check_picture(picture, sidecar)
    except (KeyError, TypeError, AttributeError):
        return "has a sidecar in which something is missing"


def _check_unnumbered(path: Path) -> str | None:
    """What is wrong with the pair of a sidecar that is of no seed, and with the latent that lies beside it."""
    picture = path.with_suffix(".png")
    if not picture.exists():
        return "is missing, its sidecar is there"
    sidecar = read_json(path) or {}
    try:
        latent = sidecar["inversion"]["latent"] if "inversion" in sidecar else None
        if latent is not None and not holds_latent(path.parent / latent["file"], latent["sha256"]):
            return f"its latent {latent['file']} is missing, or is not what its sidecar says"
        return _check_picture(str(picture), sidecar)
    except (KeyError, TypeError, AttributeError):
        return "has a sidecar in which something is missing"


def _check_strip(seed: int, path: Path, settings: Mapping[str, Any] | None) -> str | None:
    """What is wrong with a strip, which has no sidecar: by its own text and pixels."""
    decoded = _decoded(str(path))
    if decoded is None:
        return "does not decode"
    mode, size, pixels, text, _ = decoded
    inside = _parsed(text)
    if not isinstance(inside, dict) or inside.get("schema") != STRIP_SCHEMA:
        return f"has no text {CHUNK!r} inside of a strip of ddim trajectory"
    try:
        wrong = _check_pixels(mode, size, pixels, inside["image"], "text")
        return wrong or _check_sidecar(seed, inside, settings, "text")
    except (KeyError, TypeError, AttributeError):
        return "has a text in which something is missing"


def _check_sidecar(
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


def _check_picture(path: str, sidecar: Mapping[str, Any]) -> str | None:
    facts = sidecar["image"]
    decoded = _decoded(path)
    if decoded is None:
        return "does not decode"
    mode, size, pixels, text, length = decoded
    wrong = _check_pixels(mode, size, pixels, facts, "sidecar")
    if wrong is not None:
        return wrong
    inside = _parsed(text)
    if inside is None:
        return f"has no text {CHUNK!r} inside that parses"
    if inside != of_the_picture(sidecar):
        return "says something else inside than its sidecar"
    if length != facts["bytes"]:
        return f"has {length:,} bytes, its sidecar says {facts['bytes']:,}"
    return None


def _check_pixels(mode: str, size: tuple[int, int], pixels: bytes, facts: Mapping[str, Any], called: str) -> str | None:
    """What of the raw pixels is not as ``facts`` say, which are of the ``called``, a sidecar or a text inside."""
    width, height = size
    if (mode, width, height) != (facts["mode"], facts["width"], facts["height"]):
        said = f"{facts['width']} x {facts['height']} {facts['mode']}"
        return f"is {width} x {height} {mode}, its {called} says {said}"
    if hashlib.sha256(pixels).hexdigest() != facts["pixels_sha256"]:
        return f"has other pixels than its {called} says"
    return None


def _parsed(text: str | None) -> Any:
    """The JSON in a PNG's text; None where there is none."""
    try:
        return json.loads(text) if text is not None else None
    except (ValueError, RecursionError):
        return None


def _decoded(path: str) -> tuple[str, tuple[int, int], bytes, str | None, int] | None:
    """(mode, (width, height), raw pixels, the text inside, bytes of the file) of a PNG; None if it does not decode."""
    try:
        with open(path, "rb") as stream, Image.open(stream, formats=("PNG",)) as image:
            image.load()
            return image.mode, image.size, image.tobytes(), image.text.get(CHUNK), stream.seek(0, 2)
    except Exception:
        # Pillow meets damage with errors of many kinds.
        return None
