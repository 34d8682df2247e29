"""What a page shows of an output folder: its pictures in sets, what is known of each, and what is wrong."""

from __future__ import annotations

import base64
import math
import os
import re
from collections.abc import Callable, Iterator, Mapping, Set
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote

from ddim_cli.config.seeds import Seeds
from ddim_cli.errors import UsageError
from ddim_cli.outputs.figures import quoted, speed_text
from ddim_cli.outputs.files import File, Place, name_below, size_of
from ddim_cli.outputs.folder import RUN_SCHEMA, OutputFolder
from ddim_cli.outputs.picture import Encoding
from ddim_cli.outputs.provenance import text_inside
from ddim_cli.outputs.report.records import Records
from ddim_cli.outputs.row_plan import RowPlan, is_of_rows
from ddim_cli.outputs.sidecar import SCHEMA, STRIP_SCHEMA
from ddim_cli.outputs.store import names_in, picture_of, read_json, sidecar_of
from ddim_cli.outputs.tar_folder import TarFolder

_FRAME = re.compile(r"frame_(\d{3,})\.png", re.ASCII)
# What browsers call files with these endings.
_KINDS = {".webp": "webp", ".jpg": "jpeg"}
_STRIPS = {"x0": "predicted x0", "xt": "state x_t"}
SETTINGS = ("sampling", "scheduler", "model", "runtime")

# Pictures that go inside a page: more would make it one that no browser opens.
MOST_INSIDE = 20_000

# Told how many pictures were read, and of how many.
OnImage = Callable[[int, int], None]


@dataclass(frozen=True)
class Source:
    """One picture to show: the number it goes by, its file, and its sidecar; None for a kind that has none."""

    number: int
    picture: File
    sidecar: File | None
    label: str | None = None


@dataclass
class Links:
    """How the page names a picture: by its way from ``base``, the page's folder, or by the bytes themselves.

    A picture that is no file of this machine, or that lies in a shard, is always in the page.
    """

    base: Path
    embed: bool = False
    _folders: dict[Path, str] = field(default_factory=dict)

    def __call__(self, path: File) -> str:
        if self.embed or not isinstance(path, Path):
            kind = _KINDS.get(path.suffix, "png")
            return f"data:image/{kind};base64,{base64.b64encode(path.read_bytes()).decode()}"
        if path.parent not in self._folders:
            self._folders[path.parent] = _quoted(Path(os.path.relpath(path.parent, self.base), "x"))[:-1]
        return self._folders[path.parent] + _quoted(Path(path.name))


def _quoted(path: Path) -> str:
    """Quoted, so that = , and blanks do no harm; bytes that are no UTF-8 stay what they are."""
    return quote(os.fsencode(path.as_posix()))


@dataclass
class PictureSet:
    """Pictures that are looked at together: those of a run, of a cell of a sweep, the frames of an interpolation.

    ``noun`` is what their numbers are: seed or frame. ``planned`` is how many there are to be, where that is known.
    """

    name: str
    noun: str
    records: Records = field(default_factory=Records)
    pictures: list[tuple[int, str, tuple[int, int] | None, str | None]] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    planned: int | None = None
    first: Mapping[str, Any] | None = None

    def as_json(self) -> dict[str, Any]:
        """The set as the page reads it. A picture is [number, source, group, row, label]; group -1 is unknown."""
        groups, rows = self.records.as_json()
        return {
            "name": self.name,
            "noun": self.noun,
            "planned": self.planned,
            "size": _size(self.first),
            "about": about(self.first),
            "groups": groups,
            "pictures": [
                [str(number), source, *((place[0], rows[place[0]][place[1]]) if place else (-1, [])), label]
                for number, source, place, label in self.pictures
            ],
        }


def section(record: Mapping[str, Any] | None, name: str) -> Mapping[str, Any]:
    """A section of a sidecar or a run.json; empty where there is none."""
    found = (record or {}).get(name)
    return found if isinstance(found, dict) else {}


def _size(record: Mapping[str, Any] | None) -> list[int] | None:
    sides = (section(record, "image").get(key) for key in ("width", "height"))
    size = [side for side in sides if type(side) is int and 0 < side < 100_000]
    return size if len(size) == 2 else None


def about(record: Mapping[str, Any] | None) -> str:
    """How a picture was made, in a few words that fit in an alternative text: "50 steps, eta 0.0"."""
    sampling = section(record, "sampling")
    if not sampling:
        return ""
    timesteps = sampling.get("timesteps")
    steps = len(timesteps) if isinstance(timesteps, list) else sampling.get("steps")
    words = [f"{steps} step{'' if steps == 1 else 's'}", f"eta {sampling.get('eta')}"]
    if sampling.get("variance") == "large":
        words[1:] = ["large variance"]
    if "order" in sampling:
        words.insert(1, f"order {sampling['order']}")
    if "guidance_scale" in sampling:
        words.append(f"guidance {sampling['guidance_scale']}")
    return ", ".join(words)


def read_set(
    name: str, noun: str, sources: list[Source], links: Links, root: Place, on_image: OnImage = lambda done, total: None
) -> PictureSet:
    """Read what is known of pictures. What is wrong with one is among the problems; it is shown all the same."""
    found = PictureSet(name, noun)
    for done, source in enumerate(sources, start=1):
        file = name_below(source.picture, root)
        try:
            size = size_of(source.picture)
            shown = links(source.picture)
        except OSError:
            found.problems.append(f"{file} is not there, its sidecar is")
            continue
        record, problem = _read_record(source)
        place = None
        if record is not None:
            try:
                place = found.records.add(record)
            except (ValueError, RecursionError):
                record, problem = None, "has a sidecar with values that are no JSON"
        if record is not None:
            found.first = found.first or record
            recorded = section(record, "image").get("bytes")
            if problem is None and type(recorded) is int and recorded != size:
                problem = f"has {size:,} bytes, its sidecar says {recorded:,}"
        if problem is not None:
            found.problems.append(f"{file} {problem}")
        found.pictures.append((source.number, shown, place, source.label or _label(record)))
        on_image(done, len(sources))
    return found


def _read_record(source: Source) -> tuple[Mapping[str, Any] | None, str | None]:
    """What is known of a picture, and what is wrong with that: the text inside it stands in for a sidecar."""
    if source.sidecar is not None:
        record = read_json(source.sidecar)
        if record is not None and record.get("schema") == SCHEMA:
            return record, None
    what = (
        "has no sidecar" if source.sidecar is None or not source.sidecar.exists() else "has a sidecar that is damaged"
    )
    try:
        inside = text_inside(source.picture)
    except UsageError:
        return None, f"{what}, and no text inside that says how it was made"
    if not isinstance(inside, dict) or inside.get("schema") not in (SCHEMA, STRIP_SCHEMA):
        return None, f"{what}, and the text inside is not one of ddim"
    return inside, f"{what}; the text inside it is shown" if source.sidecar is not None else None


def _label(record: Mapping[str, Any] | None) -> str | None:
    """Of a frame between seeds or prompts, where it lies."""
    between, prompts = (section(record, "sampling").get(key) for key in ("between", "between_prompts"))
    if isinstance(prompts, dict) and isinstance(prompts.get("weight"), (int, float)):
        named = " and ".join(quoted(str(prompt)) for prompt in prompts.get("prompts") or [])
        return f"between {named}, at {prompts['weight']:.2g}"
    if not isinstance(between, dict) or not isinstance(between.get("seeds"), list):
        return None
    weights = between.get("weight")
    weights = [f"{w:.2g}" for w in (weights if isinstance(weights, list) else [weights]) if isinstance(w, (int, float))]
    *seeds, last = map(str, between["seeds"] or [None])
    return f"between seeds {', '.join(seeds)} and {last}, at {', '.join(weights)}"


def seed_sources(folder: OutputFolder) -> list[Source]:
    """The numbered pictures of a folder, in the order of their seeds; of two for a seed, the one that counts."""
    sidecars, pictures = folder.numbered("json"), folder.pictures()
    sources = []
    for seed in sorted({*sidecars, *pictures}):
        there = [*sidecars.get(seed, []), *pictures.get(seed, [])]
        single = len({(path.parent, path.stem) for path in there}) == 1
        path = there[0].with_suffix(folder.coding.ending) if single else folder.picture(seed)
        sources.append(Source(seed, path, sidecar_of(path)))
    return sources


def _row_sources(folder: OutputFolder, rows: RowPlan) -> Iterator[Source]:
    """The pictures that are there of a job file's rows, numbered and labelled as in the plan."""
    there = folder.named_pictures()
    for number, line in enumerate(rows):
        for path in there.get(line["name"], [])[:1]:
            yield Source(number, path, sidecar_of(path), line["name"])


def _other_sources(folder: OutputFolder, rows: Set[str] = frozenset()) -> Iterator[tuple[str, str, list[Source]]]:
    """Frames, strips of either kind, reconstructions and pictures from latents: the name of the set, what its numbers
    are, and its pictures; those of the names ``rows`` are none of them."""
    files = (file for file in names_in(folder.path) if file.removesuffix(".png") not in rows)
    frames = {int(m[1]): folder.path / file for file in files if (m := _FRAME.fullmatch(file))}
    files_of_frames = {path.name for path in frames.values()}
    yield "frames", "frame", [Source(n, frames[n], frames[n].with_suffix(".json")) for n in sorted(frames)]
    for kind, name in _STRIPS.items():
        strips = {seed: path for seed, shown, path in folder.strips() if shown == kind}
        yield f"trajectories, {name}", "seed", [Source(n, strips[n], None, name) for n in sorted(strips)]
    unnumbered = (path for path in folder.unnumbered_pairs() if path.stem not in rows)
    named = [(picture, path) for path in unnumbered if (picture := picture_of(path)).name not in files_of_frames]
    yield (
        "pictures from latents",
        "picture",
        [Source(n, picture, path, path.stem) for n, (picture, path) in enumerate(named, start=1)],
    )


def check_room(folder: OutputFolder) -> None:
    """UsageError for a folder of more pictures than go inside a page, where nothing else can be shown."""
    count = folder.count() if isinstance(folder, TarFolder) else 0
    if count > MOST_INSIDE:
        raise UsageError(
            f"{folder.path}: has {count:,} pictures in shards, which go inside the page, and {MOST_INSIDE:,} have room "
            "there; copy some of the shards, with their indexes, into a folder of their own"
        )


def read_folder(folder: OutputFolder, links: Links, on_image: OnImage) -> list[PictureSet]:
    """The sets of pictures in an output folder that is no sweep; none where there is nothing of ours."""
    check_room(folder)
    sources, manifest = seed_sources(folder), _manifest(folder)
    sets, rows = [], RowPlan(folder) if is_of_rows(manifest) else None
    if rows is not None:
        pictures = read_set("pictures", "row", list(_row_sources(folder, rows)), links, folder.path, on_image)
        pictures.planned, pictures.first = len(rows), pictures.first or manifest
        sets.append(pictures)
    elif sources or manifest is not None:
        pictures = read_set("pictures", "seed", sources, links, folder.path, on_image)
        add_planned(pictures, folder.planned(), sources)
        pictures.first = pictures.first or manifest
        sets.append(pictures)
    named = {line["name"] for line in rows or ()}
    for name, noun, others in _other_sources(folder, named):
        if others:
            sets.append(read_set(name, noun, others, links, folder.path, on_image))
    return sets


def add_planned(pictures: PictureSet, planned: Seeds, sources: list[Source]) -> None:
    """State how many of the plan are there; and what is there that the plan does not name."""
    files = {source.number: source.picture.name for source in sources}
    extra = sorted(set(files).difference(planned))
    pictures.planned = len(planned)
    for seed in extra:
        pictures.problems.append(f"{files[seed]} is extra: run.json does not name its seed")


def _manifest(folder: OutputFolder) -> dict[str, Any] | None:
    manifest = folder.read_manifest()
    return manifest if manifest is not None and manifest.get("schema") == RUN_SCHEMA else None


def facts(folder: OutputFolder, pictures: PictureSet) -> list[tuple[str, str]]:
    """What a person wants to know first of a set of ``folder``, as names and values."""
    manifest = _manifest(folder) if pictures.planned is not None else None
    record = manifest or pictures.first or {}
    model, sampling, runtime = (section(record, name) for name in ("model", "sampling", "runtime"))
    totals, parameters = section(manifest, "totals"), model.get("parameters")
    size, timesteps = _size(pictures.first), sampling.get("timesteps")
    asked, ran = sampling.get("steps"), len(timesteps) if isinstance(timesteps, list) else None
    rows = {
        "images": _images(pictures),
        "model": _text(model.get("source") or model.get("kind")),
        "parameters": f"{parameters:,}" if type(parameters) is int else None,
        "steps": f"{ran} ({asked} asked)" if None not in (asked, ran) and asked != ran else _text(asked),
        "order": _text(sampling.get("order")),
        "iterations a step up": _text(sampling.get("refine")),
        "begins from": _text(section(sampling, "init").get("file")),
        "mask": _text(section(sampling, "mask").get("file")),
        "strength": _text(sampling.get("strength")),
        "spacing": _text(section(record, "scheduler").get("timestep_spacing")),
        "eta": "large variance" if sampling.get("variance") == "large" else _text(sampling.get("eta")),
        "guidance": _text(sampling.get("guidance_scale")),
        "prompt": _prompts(sampling),
        "negative prompt": _text(sampling.get("negative_prompt")),
        "size": f"{size[0]} x {size[1]}" if size else None,
        "format": _format(record),
        "speed": rate_text(totals.get("images_per_second")),
        "device": " in ".join(filter(None, (_text(runtime.get("device")), _text(runtime.get("dtype"))))) or None,
        "date": (_text(record.get("created")) or "")[:10] or None,
    }
    return [(name, value) for name, value in rows.items() if value is not None]


def _format(record: Mapping[str, Any]) -> str | None:
    """How the pictures of a run.json are encoded; None of PNGs."""
    encoding = Encoding.told_by(record)
    told = {"webp": "WebP", "jpg": f"JPEG, quality {encoding.quality}"}
    return told.get(encoding.format)


def _prompts(sampling: Mapping[str, Any]) -> str | None:
    """The prompt of all pictures, or how many there are."""
    several = sampling.get("prompts")
    return f"{len(several)} prompts" if isinstance(several, list) else _text(sampling.get("prompt"))


def _images(pictures: PictureSet) -> str:
    there, planned = len(pictures.pictures), pictures.planned or 0
    return f"{there:,} of {planned:,}" if planned > there else f"{there:,}"


def settings(record: Mapping[str, Any] | None) -> list[tuple[str, list[tuple[str, str]]]]:
    """The sections of a record that all pictures share, each value as its JSON text."""
    records = Records()
    try:
        records.add({name: found for name in SETTINGS if (found := dict(section(record, name)))})
    except (ValueError, RecursionError):
        return []
    [group], _ = records.as_json()
    sections: dict[str, list[tuple[str, str]]] = {}
    for (name, *keys), text in zip(group["paths"], group["texts"], strict=True):
        sections.setdefault(name, []).append((" ".join(keys), text))
    return list(sections.items())


def rate_text(rate: Any) -> str | None:
    """Images a second as a person reads them; None for what is no number."""
    if not isinstance(rate, (int, float)) or not math.isfinite(rate):
        return None
    return speed_text(rate)


def _text(value: Any) -> str | None:
    return None if value is None or isinstance(value, (dict, list)) else str(value)
