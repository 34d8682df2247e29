"""Check an output folder against its own records: nothing missing, nothing extra, nothing changed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from ddim_cli.config.seeds import parse_seeds
from ddim_cli.errors import UsageError
from ddim_cli.evaluation.pairs import check_pair, check_strip, check_unnumbered
from ddim_cli.evaluation.verified import Problem, Verified, check_grid
from ddim_cli.evaluation.verify_shards import verify_shards
from ddim_cli.outputs.files import File, Place, name_below
from ddim_cli.outputs.folder import RUN_SCHEMA, OutputFolder
from ddim_cli.outputs.picture import Encoding
from ddim_cli.outputs.row_plan import RowPlan, is_of_rows, is_open
from ddim_cli.outputs.sidecar import identity, is_row, row_settings
from ddim_cli.outputs.store import picture_of, read_json
from ddim_cli.outputs.sweep_manifest import is_sweep
from ddim_cli.outputs.tar_folder import TarFolder, open_folder

_NOT_NAMED = "items.jsonl does not name it"


def verify(path: Place, on_image: Callable[[int, int], None] = lambda done, total: None) -> Verified:
    """Check every pair of the folder ``path``.

    The pictures of a job file's rows are those that items.jsonl names, each with the settings that it has there; where
    rows still come, or came until a process was killed, those of them that are there.
    Pictures of no seed, which are frames, reconstructions and pictures from latents, are checked against their own
    sidecars, and the strips of a trajectory against the text inside them; no run.json says which of them belong there.

    ``on_image`` is called with the number of images checked and their total.

    Raises:
        UsageError: for a path that is not an output folder.
    """
    if not path.is_dir():
        raise UsageError(f"{path}: there is no such folder" if not path.exists() else f"{path}: is not a folder")
    if is_sweep(path):
        raise UsageError(f"{path}: is the folder of a sweep; name the folder of one of its cells")
    folder = open_folder(path)
    if isinstance(folder, TarFolder):
        return verify_shards(folder, on_image)
    sidecars, pictures = folder.numbered("json"), folder.pictures()
    rows = RowPlan(folder) if is_of_rows(folder.read_manifest()) else None
    planned = frozenset(line["name"] for line in rows or ())
    still_open = is_open(folder.read_manifest())
    awaited = planned.difference(folder.named("json")) if still_open else frozenset[str]()
    unnumbered, strips = [p for p in folder.unnumbered_pairs() if p.stem not in planned], folder.strips()
    others = len(unnumbered) + len(strips)
    if not folder.manifest.exists() and not sidecars and not pictures and not others:
        raise UsageError(f"{path}: holds neither run.json nor numbered pictures; it is not an output folder of ddim")
    problems: list[Problem] = []
    only_others = others and not (folder.manifest.exists() or sidecars or pictures)
    seeds: tuple[int, ...] = ()
    settings: dict[str, Any] | None = None
    if rows is not None:
        settings = _settings_of_rows(rows, len(planned), still_open, problems)
    elif not only_others:
        seeds, settings = _plan(folder, problems)
    total = len(seeds) + len(planned) - len(awaited) + others

    def checked() -> Iterator[tuple[File, int | None, str | None]]:
        there = (line for line in rows or () if line["name"] not in awaited)
        yield from _checked_rows(folder, there, settings or {})
        for seed in seeds:
            text = check_pair(seed, sidecars.get(seed, []), pictures.get(seed, []), settings)
            yield folder.picture(seed) if text is not None else path, seed, text
        yield from ((picture_of(sidecar), None, check_unnumbered(sidecar)) for sidecar in unnumbered)
        yield from (
            (strip, seed, check_strip(seed, strip, settings if rows is None else None)) for seed, _, strip in strips
        )

    for done, (file, number, text) in enumerate(checked(), start=1):
        if text is not None:
            problems.append(Problem(name_below(file, path), number, text))
        on_image(done, total)
    if rows is not None:
        numbers = frozenset(int(name) for name in planned if name.isdecimal())
        problems += _extra(folder, numbers, _NOT_NAMED, sidecars, pictures)
        extra = (picture_of(path).name for path in unnumbered if is_row(read_json(path) or {}))
        problems += [Problem(name, None, f"is extra: {_NOT_NAMED}") for name in extra]
    elif settings is not None:
        problems += _extra(folder, frozenset(seeds), "run.json does not name its seed", sidecars, pictures)
    problems += check_grid(folder)
    return Verified(total, tuple(problems), _count_lossy(folder, seeds, planned, unnumbered))


def _count_lossy(
    folder: OutputFolder, seeds: Iterable[int], planned: frozenset[str], unnumbered: Iterable[File]
) -> int:
    """How many of the pictures that are there are JPEGs."""
    others = [picture_of(path) for path in unnumbered]
    count = sum(path.suffix == Encoding("jpg").ending and path.exists() for path in others)
    if folder.coding.is_lossless:
        return count
    pictures = folder.named_pictures()
    return count + sum(f"{seed:06d}" in pictures for seed in seeds) + sum(name in pictures for name in planned)


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
        return tuple(sorted({*folder.numbered("json"), *folder.pictures()})), None


def _settings_of_rows(rows: RowPlan, planned: int, still_open: bool, problems: list[Problem]) -> dict[str, Any]:
    """The settings that all rows share."""
    manifest = rows.folder.read_manifest() or {}
    # A plan that is open has grown since run.json was written.
    if manifest["items"] != planned and not (still_open and manifest["items"] < planned):
        text = (
            f"names {planned:,} rows, and run.json says {manifest['items']}; nobody can tell which images belong here"
        )
        problems.append(Problem(rows.folder.items.name, None, text))
    return identity(manifest)


def _checked_rows(
    folder: OutputFolder, rows: Iterable[Mapping[str, Any]], settings: Mapping[str, Any]
) -> Iterator[tuple[File, int | None, str | None]]:
    """The file, the seed and what is wrong, of each planned row."""
    sidecars, pictures = folder.named("json"), folder.named_pictures()
    for line in rows:
        name, seed = line["name"], line.get("seed")
        own = {**settings, **row_settings(line)}
        text = check_pair(seed, sidecars.get(name, []), pictures.get(name, []), own)
        yield folder.picture(name) if text is not None else folder.path, seed, text


def _extra(
    folder: OutputFolder, planned: frozenset[int], why: str, *kinds: Mapping[int, list[File]]
) -> Iterator[Problem]:
    for files in kinds:
        for seed, paths in files.items():
            if seed not in planned:
                for file in paths:
                    yield Problem(name_below(file, folder.path), seed, f"is extra: {why}")
